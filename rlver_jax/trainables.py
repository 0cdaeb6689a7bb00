"""What of a run's models is trained and what is frozen, and the learner around it.

The policy is trained whole, or by adapters beside a frozen base; the critic holds its own weights,
or its upper layers, or adapters beside a frozen base. Frozen weights that are equal are loaded
once: the base of both and the reference may be the same arrays.
"""

import dataclasses
import functools
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from rlver_jax import partitioning
from rlver_jax.models import critic as critic_lib
from rlver_jax.models import lora, weights
from rlver_jax.models import source as model_source
from rlver_jax.models.critic import Critic
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.models.source import ModelSource
from rlver_jax.rl.advantages import ESTIMATORS
from rlver_jax.rl.learner import Learner
from rlver_jax.rl.prepare import Frozen, LearnerSettings
from rlver_jax.rl.update import LossSettings
from rlver_jax.sources import Sources

# Added to the run's seed for weights that are drawn: those of embedded models, and adapters.
POLICY_WEIGHTS, SIMULATOR_WEIGHTS, CRITIC_WEIGHTS, ADAPTERS = 1, 2, 3, 4


def load_frozen(config: ConfigDict, sources: Sources) -> Frozen:
  """Loads what no step changes."""
  mesh, seed = sources.mesh, config.seed + POLICY_WEIGHTS

  @functools.cache
  def initial() -> Qwen2:  # the policy's own weights, in the dtype that it computes in
    return model_source.load_model(_frozen(sources.policy), mesh, seed)

  reference = None
  if sources.reference is not None:
    own = config.reference.path in ("", config.policy.path)
    reference = initial() if own else model_source.load_model(sources.reference, mesh, seed)
  return Frozen(
    base=initial() if config.lora.policy_rank else None,
    reference=reference,
    critic_base=initial() if sources.critic is not None and config.lora.critic_rank else None,
  )


def _frozen(source: ModelSource) -> ModelSource:
  config = dataclasses.replace(source.config, param_dtype=source.config.dtype)
  return dataclasses.replace(source, config=config)


def _adapters(config: ConfigDict, base: Qwen2, rank: int, number: int) -> lora.Adapters:
  key = jax.random.fold_in(jax.random.key(config.seed + ADAPTERS), number)
  return lora.create(base, tuple(config.lora.targets), rank, config.lora.alpha, key)


def _policy(config: ConfigDict, model: Qwen2) -> Any:
  """What is trained of a policy that starts from `model`."""
  rank = config.lora.policy_rank
  return _adapters(config, model, rank, 0) if rank else model


def _critic(config: ConfigDict, model: Qwen2) -> Critic:
  """What is trained of a critic that starts from `model`."""
  if rank := config.lora.critic_rank:
    return critic_lib.from_adapters(model, _adapters(config, model, rank, 1))
  return critic_lib.from_model(model, config.critic.shared_layers)


def abstract_policy(config: ConfigDict, source: ModelSource) -> Any:
  """What is trained of the policy, abstract."""
  return jax.eval_shape(functools.partial(_policy, config), weights.abstract_model(source.config))


def fresh(config: ConfigDict, sources: Sources, frozen: Frozen) -> tuple[Any, Critic | None]:
  """Policy and critic (or None) as a new run starts with them."""
  mesh = sources.mesh

  def make(function, model):
    """The function's result in shards, no array shared with `model`."""
    function = functools.partial(function, config)
    shardings = partitioning.model_shardings(mesh, jax.eval_shape(function, model))
    return jax.jit(function, out_shardings=shardings)(model)

  def load(source, number):
    return model_source.load_model(source, mesh, config.seed + number)

  # The critic first: where its weights are read from a file, most of them are dropped again.
  critic = None
  if sources.critic is not None and config.lora.critic_rank:
    critic = make(_critic, frozen.critic_base)
  elif sources.critic is not None and (config.critic.path or frozen.base is not None):
    number = CRITIC_WEIGHTS if config.critic.path else POLICY_WEIGHTS
    critic = make(_critic, load(sources.critic, number))
  if frozen.base is not None:
    return make(_policy, frozen.base), critic
  model = load(sources.policy, POLICY_WEIGHTS)
  if sources.critic is not None and critic is None:
    critic = make(_critic, model)
  return model, critic


def make_schedule(config: ConfigDict, model: str) -> optax.Schedule:
  """Learning rate of `policy` or `critic` by applied update, see `schedule`."""
  a = config.algorithm
  own = config.critic if model == "critic" else config.optimizer
  steps = config.steps
  if model == "policy" and ESTIMATORS[a.advantage] == "critic":
    steps = max(1, steps - config.critic.warmup_steps)
  updates = steps * a.epochs * a.minibatches
  return schedule(config, own.learning_rate, own.warmup_fraction, updates)


def schedule(
  config: ConfigDict, learning_rate: float, warmup_fraction: float, updates: int
) -> optax.Schedule:
  """Learning rate by applied update, of `updates` in all: linear warm-up, then constant or a
  cosine to zero, as `config.optimizer` says.

  The n-th of w warm-up updates (n from 1) has the rate n / w of the full one.
  """
  warmup = int(warmup_fraction * updates)
  after = optax.constant_schedule(learning_rate)
  if config.optimizer.schedule == "cosine":
    after = optax.cosine_decay_schedule(learning_rate, updates - warmup)
  rise = optax.linear_schedule(0.0, learning_rate, max(warmup, 1))
  return optax.join_schedules([lambda n: rise(n + 1), after], [warmup])


def make_optimizer(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
  """AdamW; gradients are clipped by the step itself, which reports their norm."""
  o = config.optimizer
  return optax.adamw(
    rate,
    b1=o.b1,
    b2=o.b2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    mu_dtype=o.moment_dtype,
  )


def make_learner(config: ConfigDict, sources: Sources) -> Learner:
  """The learner for this configuration; it knows shapes only."""
  critic = None
  if sources.critic is not None:
    shapes = weights.abstract_model(sources.critic.config)
    critic = jax.eval_shape(functools.partial(_critic, config), shapes)
  return Learner(
    sources.mesh,
    learner_settings(config),
    make_optimizer(config, make_schedule(config, "policy")),
    abstract_policy(config, sources.policy),
    None if critic is None else make_optimizer(config, make_schedule(config, "critic")),
    critic,
  )


def learner_settings(config: ConfigDict) -> LearnerSettings:
  """How the configuration wants a step to learn."""
  a, t = config.algorithm, config.training
  loss = LossSettings(
    policy_loss=a.loss,
    temperature=config.sampling.temperature or 1.0,  # greedy samples are scored at 1
    clip_low=a.clip_low,
    clip_high=a.clip_high,
    entropy_coef=a.entropy_coef,
    kl_estimator=a.kl_estimator,
    kl_in_loss=bool(a.kl_coef) and a.kl_in == "loss",
    value_clip=config.critic.value_clip,
    logprob_chunk=t.logprob_chunk,
  )
  return LearnerSettings(
    loss=loss,
    estimator=a.advantage,
    aggregation=a.aggregation,
    aggregation_constant=float(config.sampling.max_response_tokens),
    whiten=a.whiten,
    gamma=a.gamma,
    lam=a.lam,
    kl_in_reward=bool(a.kl_coef) and a.kl_in == "reward",
    kl_coef=a.kl_coef,
    kl_target=a.kl_target,
    kl_horizon=float(a.kl_horizon),
    importance_cap=a.importance_cap,
    epochs=a.epochs,
    minibatches=a.minibatches,
    microbatch=t.microbatch,
    groups=config.dialogue.scenarios_per_step,
    max_grad_norm=config.optimizer.max_grad_norm,
    critic_warmup_steps=config.critic.warmup_steps,
  )
