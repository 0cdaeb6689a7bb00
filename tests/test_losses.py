"""Losses against loops over NumPy scalars and closed forms, on random masked batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.rl import losses


def ragged_mask(seed, shape=(6, 13)):
  """A random mask with an empty row, a full row and a row of one token."""
  mask = np.random.default_rng(seed).random(shape) < 0.4
  mask[0], mask[1], mask[2] = False, True, False
  mask[2, 5] = True
  return mask


def weights_by_hand(mask, aggregation, constant):
  rows = [row.sum() for row in mask]
  used = sum(n > 0 for n in rows)
  weights = np.zeros(mask.shape)
  for b, t in np.argwhere(mask):
    weights[b, t] = {
      "token_mean": 1 / sum(rows),
      "sequence_mean": 1 / (rows[b] * used),
      "constant": 1 / (constant * used),
    }[aggregation]
  return weights


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_token_weights_equal_a_loop_over_tokens(aggregation, seed):
  mask = ragged_mask(seed)
  weights = losses.token_weights(mask, aggregation, 40.0)
  assert weights.dtype == np.float32
  np.testing.assert_allclose(weights, weights_by_hand(mask, aggregation, 40.0), atol=1e-7)
  assert not weights[~mask].any()


def test_token_weights_average_a_constant_loss_to_itself():
  mask = ragged_mask(3)
  for aggregation in ("token_mean", "sequence_mean"):
    np.testing.assert_allclose(losses.token_weights(mask, aggregation).sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_token_weights_of_a_batch_without_tokens_are_zero(aggregation):
  assert not losses.token_weights(np.zeros((2, 3), bool), aggregation, 7.0).any()


def test_token_weights_name_an_unknown_aggregation():
  with pytest.raises(ValueError, match="median"):
    losses.token_weights(np.ones((1, 1), bool), "median")


def random_batch(seed, shape=(5, 11)):
  rng = np.random.default_rng(seed)
  old = -rng.exponential(2.0, shape).astype(np.float32)
  new = old + rng.normal(0, 0.4, shape).astype(np.float32)
  return new, old, rng.normal(0, 1, shape).astype(np.float32)


def clipped_by_hand(new, old, advantage, low, high):
  """One token: the pessimistic one of the free and the clipped surrogate."""
  ratio = math.exp(new - old)
  kept = min(max(ratio, 1 - low), 1 + high)
  if kept * advantage < ratio * advantage:
    return -kept * advantage, ratio, 1.0
  return -ratio * advantage, ratio, 0.0


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.5)])
def test_clipped_ratio_equals_a_loop_over_tokens(low, high):
  batch = random_batch(int(100 * high))
  results = losses.clipped_ratio(*batch, low, high)
  tokens = zip(*(x.ravel().tolist() for x in batch), strict=True)
  expected = np.array([clipped_by_hand(*token, low, high) for token in tokens]).T
  for result, column in zip(results, expected, strict=True):
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, column.reshape(batch[0].shape), atol=1e-5, rtol=1e-5)
  assert 0 < results[2].mean() < 1  # the batch holds both kinds of tokens


def test_clipped_ratio_stops_the_gradient_only_where_a_step_would_go_too_far():
  ratio = np.array([1.5, 1.5, 0.5, 0.5, 1.1, 0.9], np.float32)
  advantage = np.array([1.0, -1.0, 1.0, -1.0, 2.0, -2.0], np.float32)

  def total(new):
    return losses.clipped_ratio(new, jnp.zeros(6), advantage, 0.2, 0.2)[0].sum()

  # d(-ratio A)/d(log pi) = -ratio A, and zero where the bound decides: a good token already
  # above 1.2, a bad one already below 0.8.
  expected = np.array([0.0, 1.5, -0.5, 0.0, -2.2, 1.8])
  np.testing.assert_allclose(jax.grad(total)(np.log(ratio)), expected, atol=1e-5)


def test_kl_k3_equals_a_loop_and_is_never_negative():
  new, reference, _ = random_batch(9)
  kl = losses.kl_k3(new, reference)
  expected = [math.exp(r - n) - 1 - (r - n) for n, r in zip(new.flat, reference.flat, strict=True)]
  np.testing.assert_allclose(kl.ravel(), expected, atol=1e-5)
  assert float(kl.min()) >= 0
  assert float(jnp.abs(losses.kl_k3(new, new)).max()) == 0


def test_kl_k3_averages_to_the_exact_divergence_of_two_distributions():
  rng = np.random.default_rng(4)
  policy, reference = rng.dirichlet(np.ones(12)), rng.dirichlet(3 * np.ones(12))
  exact = float(np.sum(policy * np.log(policy / reference)))
  drawn = rng.choice(12, 200_000, p=policy)
  estimates = np.asarray(losses.kl_k3(np.log(policy)[drawn], np.log(reference)[drawn]))
  error = estimates.std() / math.sqrt(len(drawn))
  assert abs(estimates.mean() - exact) < 5 * error
  assert error < 0.01 * exact  # so that the comparison means something
