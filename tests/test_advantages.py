"""Advantages and returns against loops over Python numbers, on random masked batches."""

import math

import jax
import numpy as np
import pytest

from rlver_jax.rl import advantages as lib
from rlver_jax.rl.advantages import Groups

# Groups of the rows below: 4, 3, 2 (one of them absent: `ABSENT`), 1, 2 (both absent); the sixth
# has no row at all.
SIZES, GROUPS = (4, 3, 2, 1, 2), 6
ABSENT = (7, 10, 11)
TOKENS = 19


def random_batch(seed):
  """Rewards, values and mask [12, T], groups and baselines [12], the rows in shuffled order.

  The policy's tokens lie scattered, one row has all of its tokens and one a single one, and a row
  earns rewards in its middle. Off the mask stands what must not count.
  """
  random = np.random.default_rng(seed)
  rows = sum(SIZES)
  mask = random.random((rows, TOKENS)) < 0.5
  mask[:, 9] = True
  mask[0], mask[1] = True, np.arange(TOKENS) == 12
  mask[list(ABSENT)] = False
  rewards = random.normal(size=mask.shape) * (random.random(mask.shape) < 0.4)
  values = random.normal(size=mask.shape)
  rewards, values = (np.where(mask, x, 77.0) for x in (rewards, values))
  baselines = random.normal(size=rows)
  baselines[[2, 5, 7]] = math.nan
  groups = np.repeat(np.arange(len(SIZES)), SIZES)
  order = random.permutation(rows)
  arrays = (x[order].astype(np.float32) for x in (rewards, values, baselines))
  return (*arrays, mask[order], groups[order].astype(np.int32))


def own_tokens(row):
  return [t for t in range(len(row)) if row[t]]


def gae_by_hand(rewards, values, mask, gamma, lam):
  """A_t as the sum over the later tokens of the policy of (gamma lam)^l delta_(t+l)."""
  advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
  for b in range(len(mask)):
    tokens = own_tokens(mask[b])
    r, v = ([float(x[b, t]) for t in tokens] for x in (rewards, values))
    v.append(0.0)
    deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(tokens))]
    for i, t in enumerate(tokens):
      later = range(len(tokens) - i)
      advantages[b, t] = sum((gamma * lam) ** n * deltas[i + n] for n in later)
      returns[b, t] = advantages[b, t] + v[i]
  return advantages, returns


def to_come_by_hand(rewards, mask, gamma):
  """The discounted rewards from each token on."""
  total = np.zeros(mask.shape)
  for b in range(len(mask)):
    tokens = own_tokens(mask[b])
    for i, t in enumerate(tokens):
      total[b, t] = sum(gamma**n * float(rewards[b, u]) for n, u in enumerate(tokens[i:]))
  return total


def whitened_by_hand(x, mask):
  numbers = [float(x[b, t]) for b, t in np.argwhere(mask)]
  mean = sum(numbers) / len(numbers)
  deviation = math.sqrt(sum((n - mean) ** 2 for n in numbers) / len(numbers))
  return np.where(mask, (x.astype(np.float64) - mean) / (deviation + 1e-6), 0.0)


def totals_of(rewards, mask):
  """The sum of each row's rewards, None for absent rows."""
  return [
    sum(float(rewards[b, t]) for t in own_tokens(mask[b])) if mask[b].any() else None
    for b in range(len(mask))
  ]


def group_by_hand(kind, totals, groups, baselines):
  """One row after the other: its reward against those of its group, or its baseline."""
  advantages = []
  for b, total in enumerate(totals):
    group = [t for t, g in zip(totals, groups, strict=True) if g == groups[b] and t is not None]
    if total is None:
      advantages.append(0.0)
    elif kind == "remax":
      advantages.append(0.0 if math.isnan(baselines[b]) else total - float(baselines[b]))
    elif kind == "rloo":
      others = len(group) - 1
      advantages.append(total - (sum(group) - total) / others if others else 0.0)
    else:
      mean = sum(group) / len(group)
      deviation = math.sqrt(sum((t - mean) ** 2 for t in group) / len(group))
      advantages.append((total - mean) / (deviation + 1e-6) if kind == "grpo" else total - mean)
  return np.array(advantages)


def estimate(estimator, batch, gamma=1.0, lam=1.0):
  rewards, values, baselines, mask, groups = batch
  values = values if estimator == "gae" else None
  results = jax.jit(
    lambda *arrays: lib.estimate(
      estimator, *arrays[:2], Groups(arrays[2], GROUPS), baselines_B=baselines, values_BT=values,
      gamma=gamma, lam=lam,
    )
  )(rewards, mask, groups)  # fmt: skip
  assert [(x.dtype, x.shape) for x in results] == [(np.float32, mask.shape)] * 2
  return results


def assert_equal(results, expected, mask):
  for result, reference in zip(results, expected, strict=True):
    np.testing.assert_allclose(result, reference, atol=1e-5)
    assert not np.asarray(result)[~mask].any()


@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (0.9, 1), (1, 0.8), (0.95, 0.7), (0.5, 1e-9)])
@pytest.mark.parametrize("seed", range(2))
def test_gae_steps_over_all_but_the_policys_own_tokens(gamma, lam, seed):
  batch = random_batch(seed)
  rewards, values, _, mask, _ = batch
  expected = gae_by_hand(rewards, values, mask, gamma, lam)
  assert_equal(estimate("gae", batch, gamma, lam), expected, mask)


def test_gae_of_an_example_worked_out_by_hand():
  """Two tokens, three of the user, and a last one; a reward in the middle and one at the end."""
  mask = np.array([[1, 1, 0, 0, 0, 1]], bool)
  rewards = np.float32([[0, 4, 9, 9, 9, 8]])
  values = np.float32([[1, 2, 9, 9, 9, 3]])
  advantages, returns = lib.gae(rewards, values, mask, gamma=0.5, lam=0.5)
  # Deltas: 0 + 1 - 1, 4 + 1.5 - 2, 8 - 3; each advantage adds a quarter of the next one.
  np.testing.assert_allclose(advantages, [[1.1875, 4.75, 0, 0, 0, 5]], atol=1e-6)
  np.testing.assert_allclose(returns, [[2.1875, 6.75, 0, 0, 0, 8]], atol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "remax"])
@pytest.mark.parametrize("seed", range(3))
def test_estimators_of_a_number_a_dialogue_equal_a_loop_over_rows(estimator, seed):
  batch = random_batch(seed)
  rewards, _, baselines, mask, groups = batch
  advantages = group_by_hand(estimator, totals_of(rewards, mask), groups, baselines)
  assert np.count_nonzero(advantages) >= 5
  expected = np.where(mask, advantages[:, None], 0.0), to_come_by_hand(rewards, mask, 0.9)
  assert_equal(estimate(estimator, batch, gamma=0.9, lam=0.3), expected, mask)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("seed", range(2))
def test_reinforce_pp_whitens_the_rewards_to_come(gamma, seed):
  batch = random_batch(seed)
  rewards, _, _, mask, _ = batch
  to_come = to_come_by_hand(rewards, mask, gamma)
  expected = whitened_by_hand(to_come, mask), to_come
  assert_equal(estimate("reinforce_pp", batch, gamma, lam=0.3), expected, mask)


def process_by_hand(rewards, mask, groups, gamma):
  """One reply after the other: its reward against those of all replies of the group."""
  replies = []  # row, tokens, reward
  for b in range(len(mask)):
    for t in own_tokens(mask[b]):
      if t == 0 or not mask[b, t - 1]:
        replies.append([b, [], 0.0])
      replies[-1][1].append(t)
      replies[-1][2] += float(rewards[b, t])
  advantages = np.zeros(mask.shape)
  for i, (b, tokens, _) in enumerate(replies):
    group = [reward for row, _, reward in replies if groups[row] == groups[b]]
    mean = sum(group) / len(group)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / len(group)) + 1e-6
    later = [reward for row, _, reward in replies[i:] if row == b]
    advantages[b, tokens] = sum(gamma**n * (r - mean) / deviation for n, r in enumerate(later))
  return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_grpo_process_compares_each_reply_with_those_of_its_group(gamma, seed):
  batch = random_batch(seed)
  rewards, _, _, mask, groups = batch
  expected = process_by_hand(rewards, mask, groups, gamma), to_come_by_hand(rewards, mask, gamma)
  assert_equal(estimate("grpo_process", batch, gamma, lam=0.3), expected, mask)


def test_grpo_process_of_an_example_worked_out_by_hand():
  """Two dialogues of two replies; the four rewards are 1, 5, 3 and 3."""
  mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1]], bool)
  rewards = np.float32([[0, 1, 9, 5], [9, 3, 9, 3]])
  groups = Groups(np.zeros(2, np.int32), 1)
  advantages = lib.process_relative(rewards, mask, groups, gamma=0.5)
  root = 2**0.5
  np.testing.assert_allclose(advantages, [[-root / 2, -root / 2, 0, root], [0, 0, 0, 0]], atol=1e-5)


def test_an_unknown_estimator_is_named():
  with pytest.raises(ValueError, match="unknown advantage estimator 'vtrace'"):
    estimate("vtrace", random_batch(0))


@pytest.mark.parametrize("seed", range(3))
def test_whitening_equals_a_loop_over_tokens(seed):
  random = np.random.default_rng(seed)
  x = random.normal(3.0, 5.0, (6, 11)).astype(np.float32)
  mask = random.random(x.shape) < 0.4
  mask[2] = False
  whitened = np.asarray(lib.whiten(np.where(mask, x, np.float32(1e6)), mask))
  np.testing.assert_allclose(whitened, whitened_by_hand(x, mask), atol=1e-5)
  assert not whitened[~mask].any()
  np.testing.assert_allclose(whitened[mask].mean(), 0, atol=1e-6)
  np.testing.assert_allclose(whitened[mask].var(), 1, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, -1e4])
def test_whitening_numbers_that_are_all_equal_gives_exact_zeros(level):
  x = np.full((3, 7), level, np.float32)
  for mask in (np.ones(x.shape, bool), np.arange(7) % 3 > 0, np.zeros(x.shape, bool)):
    np.testing.assert_array_equal(lib.whiten(x, np.broadcast_to(mask, x.shape)), 0.0)


@pytest.fixture(scope="module")
def levels():
  """A group of every size in 2..16 at every level k / 100, the rows in shuffled order."""
  groups = [(size, k) for size in range(2, 17) for k in range(101)]
  index = np.repeat(np.arange(len(groups), dtype=np.int32), [size for size, _ in groups])
  order = np.random.default_rng(0).permutation(len(index))
  rewards = np.float32([k / 100 for _, k in groups])[index][order]
  return rewards, Groups(index[order], len(groups))


@pytest.mark.parametrize("function", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_give_exact_zeros_at_every_level_and_group_size(levels, function):
  rewards, groups = levels
  mask = np.tile([True, False, True], (len(rewards), 1))
  placed = np.stack([0 * rewards, rewards, rewards], 1)
  advantages, _ = lib.estimate(
    function, placed, mask, groups, baselines_B=0 * rewards, values_BT=None, gamma=1.0, lam=1.0
  )
  np.testing.assert_array_equal(advantages, 0.0)


def test_replies_that_earn_the_same_give_exact_zeros(levels):
  rewards, groups = levels
  mask = np.tile([True, False, True], (len(rewards), 1))
  placed = np.stack([rewards, 0 * rewards, rewards], 1)
  advantages = lib.process_relative(placed, mask, groups, gamma=0.7)
  np.testing.assert_array_equal(advantages, 0.0)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_rewards_that_are_equal_as_sums_of_different_changes_give_exact_zeros(estimator):
  """Each row earns 8 changes k / 100, in all the same as the other of its group."""
  random = np.random.default_rng(0)
  points = random.integers(-10, 11, (2000, 8))
  points[1::2, -1] += points[::2].sum(1) - points[1::2].sum(1)
  rewards, groups = np.float32(points / 100), Groups(np.arange(2000, dtype=np.int32) // 2, 1000)
  differ = rewards.sum(1)[::2] != rewards.sum(1)[1::2]
  assert differ.mean() > 0.3  # rounding makes them differ
  mask, none = np.ones(rewards.shape, bool), np.zeros(2000, np.float32)
  advantages, _ = lib.estimate(
    estimator, rewards, mask, groups, baselines_B=none, values_BT=None, gamma=1.0, lam=1.0
  )
  np.testing.assert_array_equal(advantages, 0.0)


@pytest.mark.parametrize("function", [lib.leave_one_out, lib.group_relative])
def test_absent_rows_do_not_count_whatever_their_rewards(function):
  options = {} if function is lib.leave_one_out else {"scale": False}
  present = np.array([1, 0, 1, 0, 1, 0], bool)
  totals = np.float32([0.5, -9.0, 0.25, math.nan, 0.75, 9.0])
  groups = Groups(np.int32([0, 0, 1, 1, 1, 2]), 3)
  half = 0.5 if function is lib.leave_one_out else 0.25
  advantages = function(totals, present, groups, **options)
  np.testing.assert_allclose(advantages, [0, 0, -half, 0, half, 0], atol=1e-6)


def test_rewards_that_differ_by_one_point_of_emotion_keep_their_signal():
  rewards = np.float32([0.98, 0.98, 0.98, 0.99])
  groups = Groups(np.zeros(4, np.int32), 1)
  advantages = lib.group_relative(rewards, np.ones(4, bool), groups, scale=True)
  np.testing.assert_allclose(advantages, [-(3**-0.5)] * 3 + [3**0.5], atol=1e-3)


def test_a_dialogue_that_equals_its_baseline_gets_exactly_zero():
  levels = np.arange(101, dtype=np.float32) / 100
  present = np.ones(101, bool)
  np.testing.assert_array_equal(lib.against_greedy(levels, present, levels.copy()), 0.0)
