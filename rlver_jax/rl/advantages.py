"""Advantages from rewards, as pure functions."""

import numpy as np


def group_relative(rewards_B: np.ndarray, group_size: int, *, scale: bool = True) -> np.ndarray:
  """GRPO: each reward against the others of its group.

  Args:
    rewards_B: rewards in batch order, the `group_size` of one group being neighbours. NaN stands
      for a dialogue without a reward, which counts as absent from its group.
    scale: divide by the group's (population) standard deviation, as in DeepSeekMath, arXiv
      2402.03300, section 4.1; without it the estimator is Dr. GRPO's, arXiv 2503.20783.

  Returns:
    float32 [B]; zero where the reward is absent, and throughout a group whose rewards are equal
    or of which fewer than two are present.
  """
  rewards = np.asarray(rewards_B, np.float64).reshape(-1, group_size)
  present = ~np.isnan(rewards)
  count = np.maximum(present.sum(1, keepdims=True), 1)
  # Against the first of the group, so that equal rewards leave no rounding for `scale` to blow up.
  first = np.take_along_axis(rewards, present.argmax(1)[:, None], 1)
  rewards = np.where(present, rewards - first, 0.0)
  advantages = np.where(present, rewards - rewards.sum(1, keepdims=True) / count, 0.0)
  if scale:
    advantages /= np.sqrt((advantages**2).sum(1, keepdims=True) / count) + 1e-6
  return advantages.reshape(-1).astype(np.float32)
