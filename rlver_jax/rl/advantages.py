"""Advantages and returns from rewards, as pure functions of arrays [B, T] with a mask.

A reward stands at the last token of what it rewards; only the policy's own tokens count, and
whatever lies between them (the user's words, the chat template) is stepped over. A reply is a run
of the policy's tokens. Estimators that know one number a dialogue take the sum of its rewards and
give every token the same advantage. Rows without any token of the policy (padding, dialogues that
were dropped) are absent: they count in no mean and get zero.

Axes: B rows (dialogues), T tokens, G groups. All arrays are float32 unless said otherwise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # added to a standard deviation
SAME = 1e-6  # rewards of a group that differ by less are equal

# Estimator -> what it needs beside the rewards.
ESTIMATORS = {
  "grpo": "group",
  "grpo_process": "group",
  "dr_grpo": "group",
  "rloo": "group",
  "reinforce_pp": "",
  "remax": "greedy",
  "gae": "critic",
}


class Groups(NamedTuple):
  """Which group each row belongs to (int32 [B], below `count`), in any order."""

  index_B: jax.Array
  count: int

  def sum(self, x_B: jax.Array) -> jax.Array:
    """The sum over each row's group, as [B]."""
    return jax.ops.segment_sum(x_B, self.index_B, self.count)[self.index_B]

  def min(self, x_B: jax.Array) -> jax.Array:
    return jax.ops.segment_min(x_B, self.index_B, self.count)[self.index_B]


def group_relative(
  rewards: jax.Array, present: jax.Array, groups: Groups, *, scale: bool
) -> jax.Array:
  """Each reward less the mean of its group's.

  rewards, present: [B], one for each dialogue, or [B, N], of which the present ones count.
  scale: divide by the group's (population) standard deviation: GRPO, DeepSeekMath, arXiv
    2402.03300, section 4.1; without it the estimator is Dr. GRPO's, arXiv 2503.20783.

  Returns the shape of `rewards`: zero where none is present, and throughout a group whose rewards
  are equal, or of which one is present.
  """
  rewards_BN, present_BN = (x.reshape(x.shape[0], -1) for x in (rewards, present))
  # Against the least of the group, so that equal rewards, be they sums of different parts, leave
  # no rounding for `scale` to blow up.
  least_B = groups.min(jnp.min(rewards_BN, 1, where=present_BN, initial=jnp.inf))
  above_BN = rewards_BN - least_B[:, None]
  above_BN = jnp.where(present_BN & (above_BN >= SAME), above_BN, 0.0)
  number_B = jnp.maximum(groups.sum(jnp.sum(present_BN, 1, dtype=jnp.float32)), 1.0)
  mean_B = groups.sum(jnp.sum(above_BN, 1)) / number_B
  deviation_BN = jnp.where(present_BN, above_BN - mean_B[:, None], 0.0)
  if scale:
    variance_B = groups.sum(jnp.sum(deviation_BN**2, 1)) / number_B
    deviation_BN /= jnp.sqrt(variance_B)[:, None] + EPSILON
  return deviation_BN.reshape(rewards.shape)


def process_relative(
  rewards_BT: jax.Array, mask_BT: jax.Array, groups: Groups, *, gamma: float
) -> jax.Array:
  """GRPO with process supervision: each reply's reward against those of all of its group's replies.

  DeepSeekMath, arXiv 2402.03300, section 4.1.3: the rewards less their mean, over their
  (population) standard deviation; the advantage of a token is the sum of those of its reply and of
  the later ones. Here each later one counts `gamma` times as much as the one before it.

  Returns [B, T]: zero off the mask, and throughout a group whose rewards are equal.
  """
  last_BT = mask_BT & ~jnp.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))

  def earn(total_B, token):  # the sum over the reply so far
    reward_B, mask_B = token
    total_B = jnp.where(mask_B, total_B + reward_B, 0.0)
    return total_B, total_B

  start = jnp.zeros(rewards_BT.shape[0])
  earned_BT = jax.lax.scan(earn, start, (rewards_BT.T, mask_BT.T))[1].T
  relative_BT = group_relative(earned_BT, last_BT, groups, scale=True)

  def collect(later_B, token):
    relative_B, last_B = token
    later_B = jnp.where(last_B, relative_B + gamma * later_B, later_B)
    return later_B, later_B

  advantages_BT = jax.lax.scan(collect, start, (relative_BT.T, last_BT.T), reverse=True)[1].T
  return jnp.where(mask_BT, advantages_BT, 0.0)


def leave_one_out(totals_B: jax.Array, present_B: jax.Array, groups: Groups) -> jax.Array:
  """RLOO: each dialogue's reward less the mean of the others of its group.

  Ahmadian et al., arXiv 2402.14740, equation 4. Returns [B], zero for one without others.
  """
  number_B = groups.sum(present_B.astype(jnp.float32))
  relative_B = group_relative(totals_B, present_B, groups, scale=False)
  return relative_B * number_B / jnp.maximum(number_B - 1, 1.0)


def against_greedy(totals_B: jax.Array, present_B: jax.Array, baselines_B: jax.Array) -> jax.Array:
  """ReMax: each dialogue's reward less that of the greedy dialogue on the same scenario.

  Li et al., arXiv 2310.10505, equation 5. baselines_B: the greedy dialogue's reward, NaN where
  there is none. Returns [B], zero there.
  """
  known_B = present_B & ~jnp.isnan(baselines_B)
  return jnp.where(known_B, totals_B - baselines_B, 0.0)


def gae(
  rewards_BT: jax.Array,
  values_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  gamma: float,
  lam: float,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over the policy's own tokens.

  Schulman et al., arXiv 1506.02438, equations 11 and 16: delta_t = r_t + gamma V_t' - V_t and
  A_t = delta_t + gamma lam A_t', where t' is the next of the policy's tokens in the row, however
  many other tokens lie between (beyond the last one both are zero).

  Args:
    rewards_BT: what each token earned.
    values_BT: V_t, the value of the state in which token t was drawn.
    mask_BT: bool, the policy's tokens.

  Returns:
    (advantages_BT, returns_BT = advantages + values), zero off the mask.
  """

  def step(carry, token):
    next_value, next_advantage = carry
    reward, value, mask = token
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    carry = jnp.where(mask, value, next_value), jnp.where(mask, advantage, next_advantage)
    return carry, jnp.where(mask, advantage, 0.0)

  start = jnp.zeros(rewards_BT.shape[0]), jnp.zeros(rewards_BT.shape[0])
  tokens = jax.tree.map(jnp.transpose, (rewards_BT, values_BT, mask_BT))
  advantages_BT = jax.lax.scan(step, start, tokens, reverse=True)[1].T
  return advantages_BT, jnp.where(mask_BT, advantages_BT + values_BT, 0.0)


def whiten(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Mean zero and (population) variance one over the mask; zero off it, and where all are equal."""
  number = jnp.maximum(jnp.sum(mask_BT), 1)
  x_BT = jnp.where(mask_BT, x_BT - jnp.min(x_BT, where=mask_BT, initial=jnp.inf), 0.0)
  deviation_BT = jnp.where(mask_BT, x_BT - jnp.sum(x_BT) / number, 0.0)
  return deviation_BT / (jnp.sqrt(jnp.sum(deviation_BT**2) / number) + EPSILON)


def estimate(
  estimator: str,
  rewards_BT: jax.Array,
  mask_BT: jax.Array,
  groups: Groups,
  *,
  baselines_B: jax.Array,
  values_BT: jax.Array | None,
  gamma: float,
  lam: float,
) -> tuple[jax.Array, jax.Array]:
  """Advantages and returns, both [B, T], by one of `ESTIMATORS`.

  reinforce_pp is REINFORCE++ (Hu, arXiv 2501.03262): the undiscounted or discounted reward to
  come at each token, whitened over the whole batch.
  """
  if estimator == "gae":
    return gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
  zeros_BT = jnp.zeros_like(rewards_BT)
  to_come_BT, returns_BT = gae(rewards_BT, zeros_BT, mask_BT, gamma=gamma, lam=1.0)
  if estimator == "reinforce_pp":
    return whiten(to_come_BT, mask_BT), returns_BT
  if estimator == "grpo_process":
    return process_relative(rewards_BT, mask_BT, groups, gamma=gamma), returns_BT
  present_B = jnp.any(mask_BT, 1)
  totals_B = jnp.sum(rewards_BT, 1, where=mask_BT)
  match estimator:
    case "grpo" | "dr_grpo":
      scale = estimator == "grpo"
      advantages_B = group_relative(totals_B, present_B, groups, scale=scale)
    case "rloo":
      advantages_B = leave_one_out(totals_B, present_B, groups)
    case "remax":
      advantages_B = against_greedy(totals_B, present_B, baselines_B)
    case _:
      raise ValueError(f"unknown advantage estimator {estimator!r}")
  return jnp.where(mask_BT, advantages_B[:, None], 0.0), returns_BT
