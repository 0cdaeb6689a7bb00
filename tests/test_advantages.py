"""Advantages against loops over NumPy scalars."""

import numpy as np
import pytest

from rlver_jax.rl.advantages import group_relative


def by_hand(rewards, group_size, scale):
  """One group after the other, in float64."""
  advantages = []
  for first in range(0, len(rewards), group_size):
    group = [float(r) for r in rewards[first : first + group_size]]
    mean = sum(group) / group_size
    std = (sum((r - mean) ** 2 for r in group) / group_size) ** 0.5
    advantages += [(r - mean) / (std + 1e-6) if scale else r - mean for r in group]
  return advantages


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("group_size", [2, 3, 4, 7])
def test_group_relative_equals_a_loop_over_groups(group_size, scale):
  rewards = np.random.default_rng(group_size).uniform(0, 1, 5 * group_size).astype(np.float32)
  advantages = group_relative(rewards, group_size, scale=scale)
  assert advantages.dtype == np.float32
  assert advantages.shape == rewards.shape
  np.testing.assert_allclose(advantages, by_hand(rewards, group_size, scale), atol=1e-5)


def test_groups_are_neighbours_and_do_not_mix():
  advantages = group_relative(np.array([0.0, 1.0, 5.0, 9.0]), 2)
  np.testing.assert_allclose(advantages, [-1, 1, -1, 1], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exact_zeros_at_every_level_and_group_size(scale, dtype):
  for group_size in range(2, 17):
    levels = np.repeat(np.arange(101, dtype=dtype) / 100, group_size)
    np.testing.assert_array_equal(group_relative(levels, group_size, scale=scale), 0.0)


@pytest.mark.parametrize("scale", [True, False])
def test_absent_rewards_are_left_out_of_their_group(scale):
  nan = np.nan
  rewards = np.array([[0.2, nan, 0.5, 0.9], [nan, nan, 0.3, nan], [nan] * 4, [nan, 0.7, 0.7, 0.7]])
  advantages = group_relative(rewards.ravel(), 4, scale=scale).reshape(4, 4)
  np.testing.assert_allclose(
    advantages[0, [0, 2, 3]], by_hand([0.2, 0.5, 0.9], 3, scale), atol=1e-5
  )
  assert advantages[0, 1] == 0
  np.testing.assert_array_equal(advantages[1:], 0)


def test_rewards_that_differ_by_one_point_of_emotion_keep_their_signal():
  advantages = group_relative(np.float32([0.98, 0.98, 0.98, 0.99]), 4)
  np.testing.assert_allclose(advantages, [-(3**-0.5)] * 3 + [3**0.5], atol=1e-3)
