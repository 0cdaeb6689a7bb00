"""One optimizer step on a model: microbatches visited by a scan, gradients added up in float32.

The same step trains the policy, by reinforcement or by examples, and the critic; they differ in
their loss. An update whose loss or gradient is not finite, or whose rows have no token to learn
from, leaves the state as it was.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlver_jax import partitioning
from rlver_jax.models.attention import tree_attention
from rlver_jax.models.critic import Critic
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.lora import Adapted
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.rl import losses
from rlver_jax.rl.rows import Rows


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """The loss of policy and critic; fields as in configs/recipe.py, section `algorithm`.

  temperature: that of the sampler, which drew from logits / temperature. logprob_chunk: tokens,
  over all rows of a microbatch, whose logits are alive at a time. kl_in_loss: whether the loss
  has a KL term (the coefficient is an argument, as it may adapt).
  """

  policy_loss: str
  temperature: float
  clip_low: float
  clip_high: float
  entropy_coef: float
  kl_estimator: str
  kl_in_loss: bool
  value_clip: float
  logprob_chunk: int


class TrainState(NamedTuple):
  """What a step changes of one model: `model` is all that is trained of it (the whole of it, or
  its adapters), `updates` (int32) counts the steps that were applied."""

  model: Any
  opt_state: optax.OptState
  updates: jax.Array


def abstract_train_state(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state around a model, abstract or not, without its shardings."""
  return jax.eval_shape(lambda m: TrainState(m, optimizer.init(m), jnp.int32(0)), model)


def new_train_state(
  model: Any, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
  """A fresh state around `model`, whose buffers it takes over."""
  moments = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(model)
  return TrainState(model, moments, jax.device_put(np.int32(0), shardings.updates))


class Batch(NamedTuple):
  """Rows on the device with what the losses need, every array [..., T] like the rows' own.

  All but `rows` are float32 and belong to the token that they stand at. old_logprobs: of the
  policy before this step. advantages, returns: see `advantages.py`. weights: of each token in the
  loss of its minibatch; truncation: its importance weight. reference_logprobs, values (of the
  critic before this step): None where neither is used.
  """

  rows: Rows
  old_logprobs: jax.Array
  advantages: jax.Array
  returns: jax.Array
  weights: jax.Array
  truncation: jax.Array
  reference_logprobs: jax.Array | None
  values: jax.Array | None


class Parts(NamedTuple):
  """Metrics of a microbatch by name: `added` over microbatches as they are, and `by_token`, sums
  over tokens that become means."""

  added: dict[str, jax.Array]
  by_token: dict[str, jax.Array]


def row_logprobs(
  model: Qwen2 | Adapted, rows: Rows, *, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Log-probability and entropy (nats, float32 [B, T]) of every token in `rows.mask`, zero
  elsewhere; each stands at its own token, not at the one that predicts it. The logits of about
  `chunk` tokens are alive at a time."""
  B, T = rows.tokens.shape
  attention = tree_attention(rows.branch)
  hidden_BTD, _ = model(rows.tokens, rows.positions, attention)

  def ahead(x):
    return jnp.roll(x, -1, axis=1)

  # Position t predicts the token at t + 1; the first token of a row is never predicted.
  mask = ahead(rows.mask.at[:, 0].set(False))
  outputs = token_logprobs(
    hidden_BTD,
    model.unembedding(),
    ahead(rows.tokens),
    mask,
    temperature=temperature,
    chunk=max(1, min(chunk // B, T)),
  )
  return tuple(jnp.roll(x, 1, axis=1) for x in outputs)


def row_values(critic: Critic, frozen: Qwen2, rows: Rows) -> jax.Array:
  """The value of the state in which each token of `rows.mask` was drawn, zero elsewhere."""
  after_BT = critic(frozen, rows.tokens, rows.positions, tree_attention(rows.branch))
  return jnp.where(rows.mask, jnp.roll(after_BT, 1, axis=1), 0.0)


def policy_loss(
  model: Qwen2 | Adapted, batch: Batch, kl_coef: jax.Array, settings: LossSettings
) -> tuple[jax.Array, Parts]:
  """The loss of one microbatch, and its metrics."""
  rows, s = batch.rows, settings
  logprobs, entropies = row_logprobs(model, rows, temperature=s.temperature, chunk=s.logprob_chunk)
  old, advantages = batch.old_logprobs, batch.advantages
  if s.policy_loss == "gspo":
    surrogate, ratio, clipped = losses.sequence_ratio(
      logprobs, old, advantages, rows.mask, s.clip_low, s.clip_high
    )
  else:
    surrogate, ratio, clipped = losses.clipped_ratio(
      logprobs, old, advantages, s.clip_low, s.clip_high
    )
  surrogate *= batch.truncation
  per_token = surrogate - s.entropy_coef * entropies
  mask = rows.mask.astype(jnp.float32)
  by_token = {
    "update/entropy": jnp.sum(mask * entropies),
    "update/ratio": jnp.sum(mask * ratio),
    "update/clip_fraction": jnp.sum(mask * clipped),
    "update/kl_sampler": jnp.sum(mask * (rows.logprobs - logprobs)),
  }
  if batch.reference_logprobs is not None:
    kl = losses.kl(s.kl_estimator, logprobs, batch.reference_logprobs)
    by_token["update/kl_reference"] = jnp.sum(mask * kl)
    per_token += kl_coef * kl if s.kl_in_loss else 0.0
  added = {"update/policy_loss": jnp.sum(batch.weights * surrogate)}
  return jnp.sum(batch.weights * per_token), Parts(added, by_token)


def value_loss(
  critic: Critic, frozen: Qwen2, batch: Batch, settings: LossSettings
) -> tuple[jax.Array, Parts]:
  """The critic's loss of one microbatch, and its metrics."""
  values = row_values(critic, frozen, batch.rows)
  per_token, clipped = losses.clipped_value(
    values, batch.values, batch.returns, settings.value_clip
  )
  mask = batch.rows.mask.astype(jnp.float32)
  by_token = {"critic/clip_fraction": jnp.sum(mask * clipped)}
  return jnp.sum(batch.weights * per_token), Parts({}, by_token)


def gradient_step(
  state: TrainState,
  batch: Any,
  loss: Callable[[Any, Any], tuple[jax.Array, Parts]],
  optimizer: optax.GradientTransformation,
  max_grad_norm: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of the optimizer on a minibatch of M microbatches.

  batch: a tree of arrays [M, ...] with a field `rows` of Rows [M, b, T]; `loss` is given the model
  and one microbatch, and its values are added up.

  The metrics are `loss`, `gradient_norm` (before it is clipped to `max_grad_norm`), `skipped` (1
  where it was not finite), `tokens` (that were trained), and the parts of the loss.
  """

  def accumulate(carry, microbatch):
    (value, parts), gradients = jax.value_and_grad(loss, has_aux=True)(state.model, microbatch)
    gradients = partitioning.constrain_model(gradients)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (gradients, value, parts)), None

  first = jax.tree.map(lambda x: x[0], batch)
  shapes = jax.eval_shape(lambda: loss(state.model, first))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (state.model, *shapes))
  (gradients, value, parts), _ = jax.lax.scan(accumulate, zeros, batch)
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)

  def apply(state, gradients):
    scale = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.model)
    return TrainState(optax.apply_updates(state.model, changes), opt_state, state.updates + 1)

  # A `where` on every array instead would keep XLA from updating the state in place.
  learns = finite & jnp.any(batch.rows.mask)
  state = jax.lax.cond(learns, apply, lambda state, _: state, state, gradients)
  tokens = jnp.sum(batch.rows.mask)
  means = {name: total / jnp.maximum(1, tokens) for name, total in parts.by_token.items()}
  skipped = 1.0 - finite.astype(jnp.float32)
  numbers = {"loss": value, "gradient_norm": norm, "skipped": skipped, "tokens": tokens}
  return state, parts.added | means | numbers
