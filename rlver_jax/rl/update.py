"""The policy update: one jitted, sharded step over a batch of rows, state donated.

The batch is cut into microbatches that a `lax.scan` visits one after another; gradients are
added up in float32. An update whose loss or gradient is not finite, or whose rows have no token
to learn from, leaves the state as it was.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlver_jax import partitioning
from rlver_jax.models.attention import tree_attention
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.rl import losses
from rlver_jax.rl.rows import Rows


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
  """microbatch: rows at a time. temperature: that of the sampler, which drew from logits /
  temperature. logprob_chunk: tokens, over all rows of a microbatch, whose logits are alive at a
  time."""

  microbatch: int
  temperature: float
  clip_low: float
  clip_high: float
  entropy_coef: float
  kl_coef: float
  aggregation: str
  aggregation_constant: float
  max_grad_norm: float
  logprob_chunk: int


class TrainState(NamedTuple):
  """What an update changes. `updates` (int32) counts those that were applied."""

  model: Qwen2
  opt_state: optax.OptState
  updates: jax.Array


class Batch(NamedTuple):
  """Rows on the device, every array [M, b, T]: M microbatches of b rows.

  advantages, weights (of each token in the loss), reference_logprobs (zeros where no reference
  is used) are float32 and like `rows.logprobs` belong to the token that they stand at.
  """

  rows: Rows
  advantages: jax.Array
  weights: jax.Array
  reference_logprobs: jax.Array


def row_logprobs(
  model: Qwen2, rows: Rows, *, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Log-probability and entropy (nats, float32 [B, T]) of every token in `rows.mask`, zero
  elsewhere; each stands at its own token, not at the one that predicts it. The logits of about
  `chunk` tokens are alive at a time."""
  B, T = rows.tokens.shape
  hidden_BTD, _ = model(rows.tokens, rows.positions, tree_attention(rows.branch))

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


def loss(model: Qwen2, batch: Batch, settings: UpdateSettings) -> tuple[jax.Array, tuple]:
  """The loss of one microbatch; beside it the surrogate's part and sums over its tokens."""
  rows, s = batch.rows, settings
  logprobs, entropies = row_logprobs(model, rows, temperature=s.temperature, chunk=s.logprob_chunk)
  surrogate, ratio, clipped = losses.clipped_ratio(
    logprobs, rows.logprobs, batch.advantages, s.clip_low, s.clip_high
  )
  kl = losses.kl_k3(logprobs, batch.reference_logprobs) if s.kl_coef else jnp.zeros_like(ratio)
  per_token = surrogate - s.entropy_coef * entropies + s.kl_coef * kl
  total = jnp.sum(batch.weights * per_token)
  surrogate = jnp.sum(batch.weights * surrogate)
  mask = rows.mask.astype(jnp.float32)
  sums = {
    "update/entropy": jnp.sum(mask * entropies),
    "update/ratio": jnp.sum(mask * ratio),
    "update/clip_fraction": jnp.sum(mask * clipped),
    "update/kl_sampler": jnp.sum(mask * (rows.logprobs - logprobs)),
    "update/kl_reference": jnp.sum(mask * kl),
  }
  return total, (surrogate, sums)


def _update(state: TrainState, batch: Batch, *, optimizer, settings) -> tuple[TrainState, dict]:
  def accumulate(carry, microbatch):
    (value, parts), gradients = jax.value_and_grad(loss, has_aux=True)(
      state.model, microbatch, settings
    )
    gradients = partitioning.constrain_model(gradients)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (gradients, value, parts)), None

  first = jax.tree.map(lambda x: x[0], batch)
  shapes = jax.eval_shape(lambda: loss(state.model, first, settings))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (state.model, *shapes))
  (gradients, value, (surrogate, sums)), _ = jax.lax.scan(accumulate, zeros, batch)
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)

  def apply(state, gradients):
    scale = jnp.minimum(1.0, settings.max_grad_norm / (norm + 1e-6))
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.model)
    return TrainState(optax.apply_updates(state.model, changes), opt_state, state.updates + 1)

  # A `where` on every array instead would keep XLA from updating the state in place.
  learns = finite & jnp.any(batch.rows.mask)
  state = jax.lax.cond(learns, apply, lambda state, _: state, state, gradients)
  tokens = jnp.maximum(1.0, jnp.sum(batch.rows.mask))
  metrics = {name: total / tokens for name, total in sums.items()}
  metrics |= {
    "update/loss": value,
    "update/policy_loss": surrogate,
    "update/gradient_norm": norm,
    "update/skipped": 1.0 - finite.astype(jnp.float32),
  }
  return state, metrics


class Updater:
  """The update and the reference's log-probabilities, compiled once for each row length."""

  def __init__(
    self,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    settings: UpdateSettings,
    model: Qwen2,
  ):
    self.settings, self._mesh, self._optimizer = settings, mesh, optimizer
    abstract = jax.eval_shape(lambda m: TrainState(m, optimizer.init(m), jnp.int32(0)), model)
    self.shardings = partitioning.model_shardings(mesh, abstract)
    self.abstract_state = partitioning.abstract(abstract, self.shardings)
    everywhere = partitioning.replicated(mesh)
    self._rows_sharding = NamedSharding(
      mesh, PartitionSpec(None, partitioning.RULES["batch"], None)
    )
    self._jit_update = jax.jit(
      functools.partial(_update, optimizer=optimizer, settings=settings),
      donate_argnums=0,
      out_shardings=(self.shardings, everywhere),
    )
    score = functools.partial(
      row_logprobs, temperature=settings.temperature, chunk=settings.logprob_chunk
    )
    self._jit_score = jax.jit(
      lambda model, rows: jax.lax.map(lambda r: score(model, r)[0], rows),
      out_shardings=self._rows_sharding,
    )
    self._compiled: dict[tuple[str, int], jax.stages.Compiled] = {}

  def init(self, model: Qwen2) -> TrainState:
    """A fresh state around `model`, whose buffers it takes over."""
    moments = jax.jit(self._optimizer.init, out_shardings=self.shardings.opt_state)(model)
    updates = jax.device_put(np.int32(0), self.shardings.updates)
    return TrainState(model, moments, updates)

  def batch(self, rows: Rows, advantages_B: np.ndarray, reference: Qwen2 | None = None) -> Batch:
    """Rows with their advantages, cut into microbatches and put on the devices.

    rows: [B, T] with B a multiple of the microbatch. The reference's log-probabilities are
    computed here where a reference is given.
    """
    s = self.settings
    weights = losses.token_weights(rows.mask, s.aggregation, s.aggregation_constant)
    advantages = np.broadcast_to(np.asarray(advantages_B, np.float32)[:, None], rows.mask.shape)
    arrays = (rows, advantages, weights)
    rows, advantages, weights = jax.tree.map(self._place, arrays)
    if reference is None:
      zeros = self._place(np.zeros(weights.shape, np.float32))
      return Batch(rows, advantages, weights, zeros)
    return Batch(rows, advantages, weights, self._run("score", self._jit_score, reference, rows))

  def _place(self, x: np.ndarray) -> jax.Array:
    if x.ndim == 2:
      x = x.reshape(-1, self.settings.microbatch, x.shape[1])
    return jax.make_array_from_callback(x.shape, self._rows_sharding, lambda i: x[i])

  def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; `state` is donated. The metrics are scalars still on the device."""
    return self._run("update", self._jit_update, state, batch)

  def _run(self, name, function, owner, batch):
    length = jax.tree.leaves(batch)[0].shape[-1]
    if (name, length) not in self._compiled:
      self._compiled[name, length] = self._lower(function, owner, batch).compile()
    return self._compiled[name, length](owner, batch)

  def _lower(self, function, owner, batch):
    with jax.set_mesh(self._mesh):  # for `partitioning.constrain`
      return function.lower(owner, batch)

  def compile(self, rows: int, lengths: tuple[int, ...], *, reference: Qwen2 | None) -> int:
    """Compiles for batches of `rows` rows of each length; returns the number of programs."""
    for length in lengths:
      shape = (rows // self.settings.microbatch, self.settings.microbatch, length)

      def array(dtype, shape=shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows_sharding)

      ints, floats = array(jnp.int32), array(jnp.float32)
      batch = Batch(Rows(ints, ints, ints, array(jnp.bool), floats), floats, floats, floats)
      lowered = self._lower(self._jit_update, self.abstract_state, batch)
      self._compiled["update", length] = lowered.compile()
      if reference is not None:
        scored = self._lower(self._jit_score, reference, batch.rows)
        self._compiled["score", length] = scored.compile()
    return len(self._compiled)


def sampling_copy(model: Qwen2) -> Qwen2:
  """The model as the sampler wants it: in the compute dtype. The same arrays where that is the
  parameters' own dtype, so that a float32 model on CPU is not held twice."""
  if model.config.dtype == model.config.param_dtype:
    return model
  # Array by array, each laid out as it was: these casts are compiled once for all steps.
  return jax.tree.map(lambda x: x.astype(model.config.dtype), model)
