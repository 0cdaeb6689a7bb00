"""The sampler's draws against NumPy: frequencies, filters, log-probabilities, independence."""

import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlver_jax.sampling.sampler import Sampling, draw, row_key

V = 1003  # neither a square nor a multiple of the block that a draw first looks up


draw_jit = jax.jit(draw, static_argnums=2)


@jax.jit
def keys_of(numbers_B5):
  return jax.vmap(row_key)(numbers_B5)


def keys(n, seed=0):
  """Keys as the engine makes them: from consecutive small numbers."""
  index = np.arange(n)
  numbers = np.stack([np.full(n, seed), index // 1000, index % 1000, index % 7, index % 4], 1)
  return keys_of(numbers.astype(np.uint32))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _count(logits_V, all_keys, sampling, rows):
  def batch(batch_keys):
    tokens, _ = draw(jnp.broadcast_to(logits_V, (rows, logits_V.size)), batch_keys, sampling)
    return jnp.zeros(logits_V.size, jnp.int32).at[tokens].add(1)

  return jax.lax.map(batch, all_keys.reshape(-1, rows)).sum(0)


def count(logits_V, sampling, n, rows=1000):
  """How often each token is drawn in `n` draws, `rows` at a time."""
  return np.asarray(_count(np.asarray(logits_V, np.float32), keys(n), sampling, rows))


def assert_frequencies(counts, probabilities):
  """Pearson's test at one in a thousand; tokens expected fewer than 10 times share a bin."""
  expected = probabilities / probabilities.sum() * counts.sum()
  large = expected >= 10
  observed, wanted = counts[large], expected[large]
  if expected[~large].sum() >= 10:
    observed = np.append(observed, counts[~large].sum())
    wanted = np.append(wanted, expected[~large].sum())
  wanted *= observed.sum() / wanted.sum()
  assert len(wanted) > 1
  assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3
  assert counts[~large].sum() <= 30 + 2 * expected[~large].sum()


def logits(seed=1, size=V, scale=2.0):
  return scale * np.random.default_rng(seed).normal(size=size).astype(np.float32)


def probabilities(logits_V, temperature=1.0):
  return np.exp(builders.log_softmax(np.asarray(logits_V, np.float64) / temperature))


def nucleus(p, top_p):
  """The fewest most probable tokens that together reach `top_p` (a plain loop)."""
  kept, total = np.zeros(len(p), bool), 0.0
  for token in np.argsort(-p):
    kept[token] = True
    total += p[token]
    if total >= top_p:
      return kept
  return kept


@pytest.mark.parametrize("temperature", (0.7, 1.0))
def test_frequencies_are_those_of_the_softmax(temperature):
  counts = count(logits(), Sampling(temperature=temperature), 50_000)
  assert_frequencies(counts, probabilities(logits(), temperature))


def test_frequencies_over_a_wide_vocabulary_with_a_rare_token():
  size = 151_936
  logits_V = logits(size=size, scale=1.0)
  # Tokens at the ends, neighbours in one block, and one alone, from common to rare.
  special = [0, 1, 389, 390, 391, 70_000, 70_001, 120_000, size - 2, size - 1]
  background = np.exp(np.delete(logits_V, special).astype(np.float64)).sum()
  wanted = np.array([0.1, 0.02, 0.1, 0.05, 0.01, 0.004, 0.2, 0.02, 0.03, 0.1])
  logits_V[special] = np.log(wanted / (1 - wanted.sum()) * background)
  counts = count(logits_V, Sampling(), 6144, rows=64)
  p = probabilities(logits_V)
  np.testing.assert_allclose(p[special], wanted, rtol=1e-4)
  # One bin a special token, and the background in 20 ranges of ids.
  bins = np.arange(size) * 20 // size
  bins[special] = 20 + np.arange(len(special))
  assert_frequencies(np.bincount(bins, counts), np.bincount(bins, p))


def test_top_k_draws_from_the_k_best_in_proportion():
  k = 37
  best = np.argsort(-logits())[:k]
  kept = np.isin(np.arange(V), best)
  counts = count(logits(), Sampling(temperature=1.5, top_k=k), 50_000)
  assert not counts[~kept].any()
  assert (counts[kept] > 0).all()
  assert_frequencies(counts, np.where(kept, probabilities(logits(), 1.5), 0))


@pytest.mark.parametrize("top_p", (0.3, 0.9))
def test_top_p_draws_from_the_nucleus_in_proportion(top_p):
  p = probabilities(logits())
  kept = nucleus(p, top_p)
  counts = count(logits(), Sampling(top_p=top_p), 50_000)
  assert not counts[~kept].any()
  assert (counts[kept & (p > 1e-3)] > 0).all()
  assert_frequencies(counts, np.where(kept, p, 0))


@pytest.mark.parametrize("top_p", (0.05, 0.5, 0.75, 0.95))
@pytest.mark.parametrize("shift", (-60.0, 0.0, 60.0))
def test_the_nucleus_ends_where_a_plain_loop_ends_it(top_p, shift):
  for seed in range(4):
    few = logits(seed, size=12, scale=1.0)
    kept = nucleus(probabilities(few), top_p)
    drawn = count(few + np.float32(shift), Sampling(top_p=top_p), 4000) > 0
    np.testing.assert_array_equal(drawn, kept)


def test_tokens_as_probable_as_the_last_of_the_nucleus_are_in_it():
  counts = count(np.log([0.4, 0.2, 0.2, 0.19, 0.01]), Sampling(top_p=0.5), 4000)
  assert_frequencies(counts, np.array([0.4, 0.2, 0.2, 0, 0]))
  assert (count(np.zeros(5), Sampling(top_p=0.01), 4000) > 0).all()


def test_top_p_takes_the_nucleus_of_what_top_k_left():
  p = probabilities(logits())
  p[np.argsort(-p)[30:]] = 0
  kept = nucleus(p / p.sum(), 0.8)
  counts = count(logits(), Sampling(top_k=30, top_p=0.8), 50_000)
  assert kept.sum() < 30
  assert not counts[~kept].any()
  assert_frequencies(counts, np.where(kept, p, 0))


def test_a_top_k_beyond_the_vocabulary_changes_no_draw():
  rows = np.stack([logits(seed) for seed in range(64)])
  plain, _ = draw_jit(rows, keys(64), Sampling())
  filtered, _ = draw_jit(rows, keys(64), Sampling(top_k=V + 5))
  np.testing.assert_array_equal(filtered, plain)


@pytest.mark.parametrize(
  "sampling", (Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-6)), ids=str
)
def test_greedy_takes_the_best_token_whatever_the_key(sampling):
  rows = np.stack([logits(seed) for seed in range(64)])
  tokens, _ = draw_jit(rows, keys(64, seed=9), sampling)
  np.testing.assert_array_equal(tokens, rows.argmax(1))
  assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(
  "sampling",
  (Sampling(), Sampling(temperature=0.3), Sampling(temperature=2.5, top_k=5, top_p=0.8)),
  ids=str,
)
def test_greedy_rows_take_the_best_token_and_leave_the_others_bit_identical(sampling):
  rows = np.stack([logits(seed) for seed in range(64)])
  plain = [np.asarray(x) for x in draw_jit(rows, keys(64), sampling)]
  best = rows.argmax(1)
  greedy = np.random.default_rng(2).random(64) < 0.5
  assert (plain[0][greedy] != best[greedy]).sum() > 3  # so that there is something to change
  tokens, logprobs = (np.asarray(x) for x in draw_jit(rows, keys(64), sampling, greedy))
  np.testing.assert_array_equal(tokens[greedy], best[greedy])
  np.testing.assert_array_equal(tokens[~greedy], plain[0][~greedy])
  np.testing.assert_array_equal(logprobs[~greedy], plain[1][~greedy])
  wanted = builders.log_softmax(rows.astype(np.float64) / sampling.temperature).max(1)
  np.testing.assert_allclose(logprobs[greedy], wanted[greedy], atol=3e-5)
  assert (tokens.dtype, logprobs.dtype) == (np.int32, np.float32)
  nobody = draw_jit(rows, keys(64), sampling, np.zeros(64, bool))
  for result, reference in zip(nobody, plain, strict=True):
    np.testing.assert_array_equal(result, reference)


def test_a_greedy_row_does_not_depend_on_its_key():
  rows = np.stack([logits(seed) for seed in range(16)])
  everyone = np.ones(16, bool)
  first, second = (draw_jit(rows, keys(16, seed), Sampling(), everyone)[0] for seed in (0, 9))
  np.testing.assert_array_equal(first, rows.argmax(1))
  np.testing.assert_array_equal(second, rows.argmax(1))


@pytest.mark.parametrize(
  "sampling",
  (
    Sampling(temperature=0.3, top_p=0.3),
    Sampling(temperature=2.5, top_k=5),
    Sampling(temperature=0, top_k=3),
  ),
  ids=str,
)
def test_logprobs_are_those_of_the_whole_distribution(sampling):
  rows = np.stack([logits(seed, scale=4.0) for seed in range(50)])
  rows[1] += 64.0
  rows[2, 100:] = -np.inf
  rows[3] -= 64.0
  tokens, logprobs = draw_jit(rows, keys(50), sampling)
  wanted = builders.log_softmax(rows.astype(np.float64) / (sampling.temperature or 1.0))
  np.testing.assert_allclose(logprobs, wanted[np.arange(50), tokens], atol=3e-5)
  assert logprobs.dtype == jnp.float32


def test_a_draw_does_not_depend_on_its_neighbours():
  sampling = Sampling()
  rows = np.stack([logits(seed) for seed in range(40)])
  own = keys(40)
  tokens, logprobs = draw_jit(rows, own, sampling)
  assert len(set(np.asarray(tokens).tolist())) > 5
  for chosen in (np.arange(1), np.arange(40)[::-1], np.array([5, 5, 39, 0, 5])):
    again, again_logprobs = draw_jit(rows[chosen], own[chosen], sampling)
    np.testing.assert_array_equal(again, tokens[chosen])
    np.testing.assert_allclose(again_logprobs, logprobs[chosen], atol=1e-6)
  replaced = rows.copy()
  replaced[1:] = -5.0
  assert draw_jit(replaced, own, sampling)[0][0] == tokens[0]


def alive(*tokens, size=V):
  mask = np.zeros(size, bool)
  mask[list(tokens)] = True
  return mask


@pytest.mark.parametrize(
  "mask",
  (
    alive(0),
    alive(V - 1),
    alive(0, V - 1),
    alive(1, 31, 32, 33, V - 2),
    np.arange(V) % 2 == 1,
    np.arange(V) % 32 == 31,
    np.arange(V) < 500,
    np.arange(V) >= 500,
    alive(0, size=1),
    alive(1, 4, size=5),
  ),
  ids=lambda mask: f"{mask.sum()}of{mask.size}",
)
def test_no_token_of_zero_mass_is_ever_drawn(mask):
  nothing = np.where(np.arange(mask.size) % 2, -np.inf, -1e30)
  logits_V = np.where(mask, logits(3, mask.size, 1.0), nothing)
  counts = count(logits_V, Sampling(), 50_000)
  assert not counts[~mask].any()
  if mask.sum() > 1:
    assert_frequencies(counts, probabilities(logits_V))


def test_a_row_with_masses_of_many_orders_of_magnitude_draws_the_large_ones():
  logits_V = np.full(V, -60.0)
  logits_V[[3, 500, V - 1]] = [0.0, -1.0, -2.0]
  counts = count(logits_V, Sampling(), 50_000)
  assert counts.sum() == counts[[3, 500, V - 1]].sum()
  assert_frequencies(counts, probabilities(logits_V))


def test_a_rows_key_is_its_numbers_folded_in_order():
  numbers = np.array([3, 1, 4, 1, 5], np.uint32)
  wanted = jax.random.key(3)
  for number in (1, 4, 1, 5):
    wanted = jax.random.fold_in(wanted, number)
  assert row_key(numbers) == wanted
  others = np.stack([numbers, *(numbers + np.eye(5, dtype=np.uint32)), numbers[[0, 2, 1, 3, 4]]])
  data = jax.random.key_data(keys_of(others.astype(np.uint32)))
  assert len({tuple(row) for row in np.asarray(data).tolist()}) == 7
