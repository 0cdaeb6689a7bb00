"""Advantages from rewards, as pure functions."""

import numpy as np


def group_relative(rewards_B: np.ndarray, group_size: int, *, scale: bool = True) -> np.ndarray:
  """GRPO: each reward against the others of its group.

  Args:
    rewards_B: rewards in batch order, the `group_size` of one group being neighbours.
    scale: divide by the group's (population) standard deviation, as in DeepSeekMath, arXiv
      2402.03300, section 4.1; without it the estimator is Dr. GRPO's, arXiv 2503.20783.

  Returns:
    float32 [B]; zero throughout a group whose rewards are equal.
  """
  rewards = np.asarray(rewards_B, np.float64).reshape(-1, group_size)
  # Against the first of the group, so that equal rewards leave no rounding for `scale` to blow up.
  rewards = rewards - rewards[:, :1]
  advantages = rewards - rewards.mean(1, keepdims=True)
  if scale:
    advantages /= rewards.std(1, keepdims=True) + 1e-6
  return advantages.reshape(-1).astype(np.float32)
