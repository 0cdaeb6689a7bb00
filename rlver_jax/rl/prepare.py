"""From a step's rows and rewards to a batch that can be learned from.

The rows are scored with whatever the algorithm needs (the frozen reference, the critic, the
trainer's own policy), a microbatch at a time, and advantages are estimated over the whole step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.models.critic import Critic
from rlver_jax.models.lora import Adapted
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.rl import advantages as advantages_lib
from rlver_jax.rl import losses
from rlver_jax.rl.rows import Rows
from rlver_jax.rl.update import Batch, LossSettings, row_logprobs, row_values


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
  """How a step learns; fields as in configs/recipe.py, sections `algorithm` and `training`.

  minibatches: optimizer steps an epoch; microbatch: rows at a time; groups: how many groups the
  rows of a step belong to.
  """

  loss: LossSettings
  estimator: str
  aggregation: str
  aggregation_constant: float
  whiten: bool
  gamma: float
  lam: float
  kl_in_reward: bool
  kl_coef: float
  kl_target: float
  kl_horizon: float
  importance_cap: float
  epochs: int
  minibatches: int
  microbatch: int
  groups: int
  max_grad_norm: float
  critic_warmup_steps: int


class Frozen(NamedTuple):
  """Weights that no step changes: `base` is what the policy's adapters stand beside, None where the
  whole policy is trained; `reference` is that of the KL term, or None; `critic_base` is what the
  critic's adapters stand beside, None where it has none. They may be the same arrays."""

  base: Qwen2 | None = None
  reference: Qwen2 | None = None
  critic_base: Qwen2 | None = None


class Experience(NamedTuple):
  """A step's rows on the host: rewards [B, T] at the last token of what they reward, the group of
  each row (int32 [B]), and the reward of the greedy dialogue on its scenario ([B], NaN where there
  is none, zeros where it is not used)."""

  rows: Rows
  rewards: np.ndarray
  groups: np.ndarray
  baselines: np.ndarray


def policy_model(trained: Any, frozen: Frozen) -> Qwen2 | Adapted:
  """The policy as a model that can be called."""
  return trained if frozen.base is None else Adapted(frozen.base, trained)


def below_critic(policy: Any, frozen: Frozen) -> Qwen2:
  """The model of which the critic uses a part without training it (see `critic.py`)."""
  if frozen.critic_base is not None:
    return frozen.critic_base
  return policy if frozen.base is None else frozen.base


def prepare(
  policy: Any,
  frozen: Frozen,
  critic: Critic | None,
  kl_coef: jax.Array,
  experience: Experience,
  *,
  settings: LearnerSettings,
) -> tuple[Batch, jax.Array, dict[str, jax.Array]]:
  """The batch of a step, the next KL coefficient, and metrics of what was found on the way.

  policy: what is trained of it. Every array of the experience and of the batch is [N, M, b, T]: N
  minibatches of M microbatches of b rows; groups and baselines are [B], in the order of the rows.
  """
  s, rows = settings, experience.rows
  shape = rows.tokens.shape

  def scored(one):  # a microbatch at a time
    flat = jax.tree.map(lambda x: x.reshape(-1, *shape[2:]), rows)
    return jax.lax.map(one, flat).reshape(shape)

  def logprobs(model):
    return scored(
      lambda r: row_logprobs(model, r, temperature=s.loss.temperature, chunk=s.loss.logprob_chunk)[
        0
      ]
    )

  metrics = {}
  number = jnp.maximum(jnp.sum(rows.mask), 1)
  old, truncation = rows.logprobs, jnp.ones(shape, jnp.float32)
  if s.importance_cap:
    old = logprobs(policy_model(policy, frozen))
    truncation = losses.truncated_importance(old, rows.logprobs, s.importance_cap)
    gap = jnp.where(rows.mask, old - rows.logprobs, 0.0)
    metrics |= {
      "mismatch/kl": -jnp.sum(gap) / number,
      "mismatch/largest": jnp.max(jnp.abs(gap)),
      "mismatch/truncated": jnp.sum(rows.mask & (jnp.exp(gap) > s.importance_cap)) / number,
    }
  rewards, reference = experience.rewards, None
  if frozen.reference is not None:
    reference = logprobs(frozen.reference)
    kl = jnp.where(rows.mask, losses.kl(s.loss.kl_estimator, old, reference), 0.0)
    mean = jnp.sum(kl) / number
    metrics["kl/mean"], metrics["kl/coefficient"] = mean, kl_coef
    if s.kl_in_reward:
      rewards = rewards - kl_coef * kl
    if s.kl_target:
      samples = jnp.sum(jnp.any(rows.mask, -1))
      kl_coef = losses.adapted_kl_coef(kl_coef, mean, s.kl_target, s.kl_horizon, samples)
  values = None
  if critic is not None:
    below = below_critic(policy, frozen)
    values = scored(lambda r: row_values(critic, below, r))

  def flat(x):
    return x.reshape(-1, shape[3])

  mask = flat(rows.mask)
  advantages, returns = advantages_lib.estimate(
    s.estimator,
    flat(rewards),
    mask,
    advantages_lib.Groups(experience.groups, s.groups),
    baselines_B=experience.baselines,
    values_BT=None if values is None else flat(values),
    gamma=s.gamma,
    lam=s.lam,
  )
  # As estimated, before they are whitened.
  metrics["advantage/mean"] = jnp.sum(advantages) / number
  metrics["advantage/largest"] = jnp.max(jnp.abs(advantages))
  if values is not None:
    metrics["critic/explained_variance"] = losses.explained_variance(flat(values), returns, mask)
    metrics["critic/value_mean"] = jnp.sum(values) / number
    metrics["critic/return_mean"] = jnp.sum(returns) / number
  if s.whiten:
    advantages = advantages_lib.whiten(advantages, mask)
  weights = jax.vmap(lambda m: losses.token_weights(m, s.aggregation, s.aggregation_constant))(
    mask.reshape(s.minibatches, -1, shape[3])
  )
  advantages, returns, weights = (x.reshape(shape) for x in (advantages, returns, weights))
  batch = Batch(rows, old, advantages, returns, weights, truncation, reference, values)
  return batch, kl_coef, metrics
