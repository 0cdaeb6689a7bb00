"""The device programs of supervised training: one update, and the loss on rows kept apart.

The loss is the mean negative log-likelihood, in nats, of the trained tokens of all rows of a step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlver_jax import partitioning
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.rl.prepare import Frozen, policy_model
from rlver_jax.rl.rows import Rows
from rlver_jax.rl.update import (
  Parts,
  TrainState,
  abstract_train_state,
  gradient_step,
  new_train_state,
  row_logprobs,
)


class SupervisedState(NamedTuple):
  """What training changes; named as in `learner.LearnerState`, so that an export reads both."""

  policy: TrainState


class SupervisedBatch(NamedTuple):
  """Rows [M, b, T] of M microbatches, and for each [M] the weight of its tokens in the loss."""

  rows: Rows
  weight: jax.Array


class SupervisedLearner:
  """The programs of a run, each compiled once for a shape of rows; the state is passed through.

  policy: what is trained (see `TrainState`), arrays or abstract. microbatch: rows at a time.
  chunk: tokens of a microbatch whose logits are alive at a time. The optimizer does not clip
  gradients: the step does, to `max_grad_norm`.
  """

  def __init__(
    self,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    policy: Any,
    *,
    microbatch: int,
    chunk: int,
    max_grad_norm: float,
  ):
    self._mesh, self._optimizer, self._microbatch = mesh, optimizer, microbatch
    state = SupervisedState(abstract_train_state(policy, optimizer))
    self.shardings = partitioning.model_shardings(mesh, state)
    self.abstract_state = partitioning.abstract(state, self.shardings)
    self._rows = NamedSharding(mesh, PartitionSpec(None, partitioning.RULES["batch"], None))
    everywhere = partitioning.replicated(mesh)
    settings = {"optimizer": optimizer, "max_grad_norm": max_grad_norm, "chunk": chunk}
    self._programs = {
      "learn": jax.jit(
        functools.partial(_learn, **settings),
        donate_argnums=0,
        out_shardings=(self.shardings, everywhere),
      ),
      "score": jax.jit(functools.partial(_score, chunk=chunk), out_shardings=everywhere),
    }
    self._compiled: dict[tuple[str, tuple[int, ...]], jax.stages.Compiled] = {}

  def init(self, policy: Any) -> SupervisedState:
    """A fresh state around `policy`, whose buffers it takes over."""
    return SupervisedState(new_train_state(policy, self._optimizer, self.shardings.policy))

  def place(self, rows: Rows) -> Rows:
    """Rows [B, T] of the host on the devices, [M, b, T]; the microbatch must divide B."""

    def one(x: np.ndarray) -> jax.Array:
      x = x.reshape(-1, self._microbatch, x.shape[-1])
      return jax.make_array_from_callback(x.shape, self._rows, lambda i: x[i])

    return jax.tree.map(one, rows)

  def learn(
    self, state: SupervisedState, base: Qwen2 | None, rows: Rows
  ) -> tuple[SupervisedState, dict[str, jax.Array]]:
    """One update on placed rows; `state` is donated, `base` is what adapters stand beside.

    The metrics, not waited for, are those of `update.gradient_step`.
    """
    return self._run("learn", state, base, rows)

  def score(self, state: SupervisedState, base: Qwen2 | None, rows: Rows) -> jax.Array:
    """The loss on placed rows, without an update; not waited for."""
    return self._run("score", state, base, rows)

  def compile(self, base: Qwen2 | None, count: int, length: int, scored: Rows | None) -> None:
    """Compiles for updates on `count` rows of `length` tokens, and scores of the rows `scored`."""
    shape = (count // self._microbatch, self._microbatch, length)
    ints, floats, mask = (
      jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)
      for dtype in (jnp.int32, jnp.float32, jnp.bool)
    )
    calls = {"learn": Rows(ints, ints, ints, mask, floats)}
    if scored is not None:
      calls["score"] = scored
    for name, rows in calls.items():
      lowered = self._lower(name, self.abstract_state, base, rows)
      self._compiled[name, rows.tokens.shape] = lowered.compile()

  def _run(self, name: str, state: SupervisedState, base: Qwen2 | None, rows: Rows) -> Any:
    key = name, rows.tokens.shape
    if key not in self._compiled:
      self._compiled[key] = self._lower(name, state, base, rows).compile()
    return self._compiled[key](state, base, rows)

  def _lower(self, name: str, *arguments) -> jax.stages.Lowered:
    with partitioning.layout(self._mesh):
      return self._programs[name].lower(*arguments)


def _learn(state: SupervisedState, base, rows: Rows, *, optimizer, max_grad_norm, chunk):
  share = 1.0 / jnp.maximum(1, jnp.sum(rows.mask))

  def loss(trained, microbatch: SupervisedBatch):
    total = _negative_log_likelihood(trained, base, microbatch.rows, chunk)
    return total * microbatch.weight, Parts({}, {})

  batch = SupervisedBatch(rows, jnp.full(len(rows.tokens), share))
  policy, numbers = gradient_step(state.policy, batch, loss, optimizer, max_grad_norm)
  return SupervisedState(policy), numbers


def _score(state: SupervisedState, base, rows: Rows, *, chunk):
  def add(total, microbatch):
    return total + _negative_log_likelihood(state.policy.model, base, microbatch, chunk), None

  total, _ = jax.lax.scan(add, jnp.float32(0.0), rows)
  return total / jnp.maximum(1, jnp.sum(rows.mask))


def _negative_log_likelihood(trained, base, rows: Rows, chunk: int) -> jax.Array:
  """The sum over the trained tokens of rows [b, T], in nats."""
  model = policy_model(trained, Frozen(base))
  logprobs, _ = row_logprobs(model, rows, temperature=1.0, chunk=chunk)
  return -jnp.sum(logprobs)
