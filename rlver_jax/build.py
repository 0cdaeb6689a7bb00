"""From a configuration and its opened sources to the live objects of a run: models, programs."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import partitioning
from rlver_jax.dialogue.dialogue import Rules
from rlver_jax.dialogue.policy import Policy, PolicySettings
from rlver_jax.dialogue.simulators import language_model
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator
from rlver_jax.models import source as model_source
from rlver_jax.models import weights
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.rl.update import TrainState, Updater, UpdateSettings, sampling_copy
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import EngineSettings
from rlver_jax.sampling.sampler import Sampling
from rlver_jax.sources import Sources, simulator_settings

# Added to the run's seed for the weights of embedded models, so that they differ.
POLICY_WEIGHTS, SIMULATOR_WEIGHTS = 1, 2


@dataclasses.dataclass
class Run:
  """The live objects of a run."""

  policy: Policy
  simulator: Simulator
  updater: Updater
  state: TrainState
  reference: Qwen2 | None
  rules: Rules
  slots: int
  row_lengths: tuple[int, ...]
  schedule: optax.Schedule

  def engines(self) -> list[tuple[str, Engine]]:
    """The sampling engines with their names in the metrics."""
    simulator = getattr(self.simulator, "engine", None)
    named = [("policy", self.policy.engine), ("simulator", simulator)]
    return [(name, engine) for name, engine in named if engine is not None]


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """Learning rate by applied update: linear warm-up, then constant or a cosine to zero.

  The n-th of w warm-up updates (n from 1) has the rate n / w of the full one.
  """
  o = config.optimizer
  updates = config.steps * config.algorithm.epochs
  warmup = int(o.warmup_fraction * updates)
  after = optax.constant_schedule(o.learning_rate)
  if o.schedule == "cosine":
    after = optax.cosine_decay_schedule(o.learning_rate, updates - warmup)
  rise = optax.linear_schedule(0.0, o.learning_rate, max(warmup, 1))
  return optax.join_schedules([lambda n: rise(n + 1), after], [warmup])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW; gradients are clipped by the update itself, which reports their norm."""
  o = config.optimizer
  return optax.adamw(
    schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mu_dtype=o.moment_dtype
  )


def _update_settings(config: ConfigDict) -> UpdateSettings:
  a = config.algorithm
  return UpdateSettings(
    microbatch=config.training.microbatch,
    temperature=config.sampling.temperature or 1.0,  # greedy samples are scored at 1
    clip_low=a.clip_low,
    clip_high=a.clip_high,
    entropy_coef=a.entropy_coef,
    kl_coef=a.kl_coef,
    aggregation=a.aggregation,
    aggregation_constant=float(config.sampling.max_response_tokens),
    max_grad_norm=config.optimizer.max_grad_norm,
    logprob_chunk=config.training.logprob_chunk,
  )


def slots(config: ConfigDict, mesh: Mesh) -> int:
  """Slots of the engines: as asked for, rounded up so that the mesh's batch axis divides them."""
  wanted = config.sampling.slots
  wanted = wanted or config.dialogue.scenarios_per_step * config.dialogue.group_size
  shards = partitioning.batch_shards(mesh)
  return -(-wanted // shards) * shards


def ladder(longest: int, smallest: int, *, middle: bool) -> tuple[int, ...]:
  """Sizes that double from `smallest` up to `longest`, if asked for with one halfway between."""
  sizes, size = [], smallest
  while size < longest:
    sizes += [size, size * 3 // 2] if middle else [size]
    size *= 2
  return tuple(sorted({*(s for s in sizes if s < longest), longest}))


def row_lengths(config: ConfigDict) -> tuple[int, ...]:
  """The padded row lengths: doubling up to the longest row that a dialogue can make."""
  s = config.sampling
  longest = s.max_prompt_tokens + s.max_response_tokens
  if config.dialogue.mode == "think":  # a thought and its reply stand beside the context
    longest += config.dialogue.max_turns * s.max_new_tokens
  return ladder(longest, config.training.smallest_row, middle=False)


def build_policy(config: ConfigDict, sources: Sources, model: Qwen2) -> Policy:
  """The policy with its engine around a sampling copy of `model`."""
  s = config.sampling
  length = s.max_prompt_tokens + s.max_response_tokens
  engine = Engine(
    model,
    sources.mesh,
    EngineSettings(
      slots(config, sources.mesh),
      ladder(length, s.smallest_window, middle=True),
      tuple(s.extend_buckets),
      min(s.decode_steps, s.max_new_tokens),
    ),
    Sampling(s.temperature, s.top_k, s.top_p),
    sources.policy.tokenizer.chat.stop_ids,
    config.seed,
  )
  settings = PolicySettings(
    config.dialogue.mode == "think",
    s.max_new_tokens,
    s.max_prompt_tokens,
    s.max_response_tokens,
  )
  return Policy(engine, sources.policy.tokenizer, sources.templates, settings)


def build_simulator(config: ConfigDict, sources: Sources) -> Simulator:
  """The simulated user that the configuration asks for, its model loaded."""
  if config.simulator.kind == "openai":
    from rlver_jax.dialogue.simulators import remote  # late: others do without the client

    return remote.build(
      config.simulator, simulator_settings(config), sources.templates, config.seed
    )
  if sources.simulator is None:
    return ScriptedSimulator(sources.templates, config.seed)
  c, s, tokenizer = config.simulator, config.sampling, sources.simulator.tokenizer
  model = model_source.load_model(sources.simulator, sources.mesh, config.seed + SIMULATOR_WEIGHTS)
  settings = simulator_settings(config)
  engine = Engine(
    model,
    sources.mesh,
    EngineSettings(
      slots(config, sources.mesh),
      ladder(c.cache_length, s.smallest_window, middle=True),
      tuple(s.extend_buckets),
      min(s.decode_steps, max(c.max_plan_tokens, c.max_message_tokens)),
    ),
    Sampling(c.temperature, c.top_k, c.top_p),
    tokenizer.chat.stop_ids,
    config.seed,
    language_model.change_choices(tokenizer),
  )
  return language_model.LanguageModelSimulator(engine, tokenizer, sources.templates, settings)


def build(
  config: ConfigDict,
  sources: Sources,
  restore: Callable[[TrainState], TrainState] | None = None,
) -> Run:
  """Loads the models, makes the state and compiles every program of the run.

  restore: gives the state of a run that goes on, for its abstract state; the policy's own weights
  are then not loaded, as two states need not fit into memory.
  """
  mesh = sources.mesh
  reference = None
  if sources.reference is not None:
    reference = model_source.load_model(sources.reference, mesh, config.seed + POLICY_WEIGHTS)
  schedule = make_schedule(config)
  shapes = weights.abstract_model(sources.policy.config)
  updater = Updater(mesh, make_optimizer(config, schedule), _update_settings(config), shapes)
  if restore is not None:
    state = restore(updater.abstract_state)
  else:
    model = model_source.load_model(sources.policy, mesh, config.seed + POLICY_WEIGHTS)
    state = updater.init(model)
  policy = build_policy(config, sources, sampling_copy(state.model))
  simulator = build_simulator(config, sources)
  d = config.dialogue
  rules = Rules(d.initial_emotion, d.max_turns, d.failure_at, d.success_at)
  run = Run(
    policy,
    simulator,
    updater,
    state,
    reference,
    rules,
    slots(config, mesh),
    row_lengths(config),
    schedule,
  )
  for _, engine in run.engines():
    engine.compile()
  rows = d.scenarios_per_step * d.group_size
  updater.compile(rows, run.row_lengths, reference=reference)
  jax.block_until_ready(run.state)
  return run
