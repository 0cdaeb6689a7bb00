"""What a step learns: from rows with rewards to advantages, and to updates of policy and critic.

`Learner.learn` is one step of any algorithm of the family: it scores the rows with the frozen
reference, the critic and, where asked for, the trainer's own policy, estimates advantages, and
then visits the minibatches, epoch by epoch, first with the critic, then with the policy. Every
device program is jitted, sharded and compiled once for each row length.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlver_jax import partitioning
from rlver_jax.models.critic import Critic
from rlver_jax.permutation import permutation
from rlver_jax.rl.prepare import (
  Experience,
  Frozen,
  LearnerSettings,
  below_critic,
  policy_model,
  prepare,
)
from rlver_jax.rl.rows import Rows
from rlver_jax.rl.update import (
  Batch,
  TrainState,
  abstract_train_state,
  gradient_step,
  new_train_state,
  policy_loss,
  value_loss,
)


class LearnerState(NamedTuple):
  """What learning changes: policy, critic (or None), and the KL coefficient (float32)."""

  policy: TrainState
  critic: TrainState | None
  kl_coef: jax.Array


class Learner:
  """The programs of a run's learning; the state is passed through it.

  policy, critic: what is trained of each (see `TrainState`), arrays or abstract; critic None for
  estimators without one. Optimizers do not clip gradients: the step itself does.
  """

  def __init__(
    self,
    mesh: Mesh,
    settings: LearnerSettings,
    policy_optimizer: optax.GradientTransformation,
    policy: Any,
    critic_optimizer: optax.GradientTransformation | None = None,
    critic: Critic | None = None,
  ):
    self.settings, self._mesh = settings, mesh
    self._optimizers = {"policy": policy_optimizer, "critic": critic_optimizer}
    state = LearnerState(
      abstract_train_state(policy, policy_optimizer),
      None if critic is None else abstract_train_state(critic, critic_optimizer),
      jax.ShapeDtypeStruct((), jnp.float32),
    )
    self.shardings = partitioning.model_shardings(mesh, state)
    self.abstract_state = partitioning.abstract(state, self.shardings)
    self._rows = NamedSharding(mesh, PartitionSpec(None, None, partitioning.RULES["batch"], None))
    self._everywhere = partitioning.replicated(mesh)
    self._compiled: dict[tuple[str, int], jax.stages.Compiled] = {}

  def init(self, policy: Any, critic: Critic | None = None) -> LearnerState:
    """A fresh state around `policy` and `critic`, whose buffers it takes over."""
    optimizers, shardings = self._optimizers, self.shardings
    return LearnerState(
      new_train_state(policy, optimizers["policy"], shardings.policy),
      None if critic is None else new_train_state(critic, optimizers["critic"], shardings.critic),
      jax.device_put(np.float32(self.settings.kl_coef), self.shardings.kl_coef),
    )

  def learn(
    self, state: LearnerState, frozen: Frozen, experience: Experience, *, step: int, seed: int
  ) -> tuple[LearnerState, dict[str, float]]:
    """One step's updates; `state` is donated.

    step (0-based) and seed decide how rows are shuffled into minibatches, and step whether the
    critic warms up, during which the policy and its KL coefficient stay as they are. Metrics are
    means over minibatches and epochs, by trained tokens, but for `update/skipped`, 1 where any
    update was not finite.
    """
    s = self.settings
    batch, kl_coef, metrics = self.prepare(state, frozen, experience, step=step, seed=seed)
    found: dict[str, list[dict[str, jax.Array]]] = {"critic": [], "update": []}
    passes = [i for _ in range(s.epochs) for i in range(s.minibatches)]
    if state.critic is not None:
      below = below_critic(state.policy.model, frozen)
      for i in passes:
        critic, values = self._run("critic", state.critic, below, batch, np.int32(i))
        state = state._replace(critic=critic)
        found["critic"].append(values)
    if state.critic is None or step >= s.critic_warmup_steps:
      for i in passes:
        arguments = (state.policy, frozen.base, batch, state.kl_coef, np.int32(i))
        policy, values = self._run("policy", *arguments)
        state = state._replace(policy=policy)
        found["update"].append(values)
      state = state._replace(kl_coef=kl_coef)
    metrics, found = jax.device_get((metrics, found))
    out = {name: float(value) for name, value in metrics.items()}
    skipped = 0.0
    for group, own in found.items():
      tokens = np.array([values.pop("tokens") for values in own], np.float64)
      shares = tokens / tokens.sum() if tokens.any() else np.ones(len(own)) / max(1, len(own))
      # Minibatches without a token say nothing (nor do their NaNs).
      parts = [(share, values) for share, values in zip(shares, own, strict=True) if share]
      for name in parts[0][1] if parts else ():
        mean = float(sum(share * values[name] for share, values in parts))
        out[name if "/" in name else f"{group}/{name}"] = mean
      skipped = max([skipped, *(float(values["skipped"]) for _, values in parts)])
    return state, out | {"update/skipped": skipped}

  def prepare(
    self, state: LearnerState, frozen: Frozen, experience: Experience, *, step: int, seed: int
  ) -> tuple[Batch, jax.Array, dict[str, jax.Array]]:
    """The batch [N, M, b, T] of N minibatches of M microbatches of b rows, with the next KL
    coefficient and the metrics of what was found on the way."""
    if self.settings.minibatches > 1:
      order = permutation(len(experience.groups), seed, step)
      experience = jax.tree.map(lambda x: x[order], experience)
    placed = jax.tree.map(self._place, experience)
    critic = None if state.critic is None else state.critic.model
    return self._run("prepare", state.policy.model, frozen, critic, state.kl_coef, placed)

  def _place(self, x: np.ndarray) -> jax.Array:
    """[B, T] cut into minibatches and microbatches, or [B] everywhere."""
    if x.ndim == 1:
      return jax.make_array_from_callback(x.shape, self._everywhere, lambda i: x[i])
    s = self.settings
    x = x.reshape(s.minibatches, -1, s.microbatch, x.shape[1])
    return jax.make_array_from_callback(x.shape, self._rows, lambda i: x[i])

  def _program(self, name: str) -> jax.stages.Wrapped:
    s, everywhere = self.settings, self._everywhere
    if name == "prepare":
      function = functools.partial(prepare, settings=s)
      return jax.jit(function, out_shardings=(self._rows, everywhere, everywhere))
    step = _policy_step if name == "policy" else _critic_step
    return jax.jit(
      functools.partial(step, settings=s, optimizer=self._optimizers[name]),
      donate_argnums=0,
      out_shardings=(getattr(self.shardings, name), everywhere),
    )

  def _run(self, name: str, *arguments):
    batch = next(x for x in arguments if isinstance(x, Batch | Experience))
    key = name, batch.rows.tokens.shape[-1]
    if key not in self._compiled:
      self._compiled[key] = self._lower(name, *arguments).compile()
    return self._compiled[key](*arguments)

  def _lower(self, name: str, *arguments) -> jax.stages.Lowered:
    with partitioning.layout(self._mesh):
      return self._program(name).lower(*arguments)

  def compile(self, rows: int, lengths: tuple[int, ...], frozen: Frozen) -> int:
    """Compiles for steps of `rows` rows of each length; returns the number of programs."""
    s, state = self.settings, self.abstract_state
    for length in lengths:

      def array(dtype, length=length):
        shape = (s.minibatches, rows // s.minibatches // s.microbatch, s.microbatch, length)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)

      def numbers(dtype):
        return jax.ShapeDtypeStruct((rows,), dtype, sharding=self._everywhere)

      ints, floats = array(jnp.int32), array(jnp.float32)
      experience = Experience(
        Rows(ints, ints, ints, array(jnp.bool), floats), floats, numbers(jnp.int32),
        numbers(jnp.float32),
      )  # fmt: skip
      scored = floats if frozen.reference is not None else None
      values = floats if state.critic is not None else None
      batch = Batch(experience.rows, *[floats] * 5, scored, values)
      critic = None if state.critic is None else state.critic.model
      calls = {"prepare": (state.policy.model, frozen, critic, state.kl_coef, experience)}
      calls["policy"] = (state.policy, frozen.base, batch, state.kl_coef, np.int32(0))
      if critic is not None:
        below = below_critic(state.policy.model, frozen)
        calls["critic"] = (state.critic, below, batch, np.int32(0))
      for name, arguments in calls.items():
        self._compiled[name, length] = self._lower(name, *arguments).compile()
    return len(self._compiled)


def _policy_step(state: TrainState, base, batch: Batch, kl_coef, index, *, settings, optimizer):
  def loss(trained, microbatch):
    model = policy_model(trained, Frozen(base))
    return policy_loss(model, microbatch, kl_coef, settings.loss)

  minibatch = _pick(batch, index)
  return gradient_step(state, minibatch, loss, optimizer, settings.max_grad_norm)


def _critic_step(state: TrainState, below, batch: Batch, index, *, settings, optimizer):
  def loss(critic, microbatch):
    return value_loss(critic, below, microbatch, settings.loss)

  minibatch = _pick(batch, index)
  return gradient_step(state, minibatch, loss, optimizer, settings.max_grad_norm)


def _pick(batch: Batch, index) -> Batch:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)
