"""From a configuration and its opened sources to the live objects of a run: models, programs."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import partitioning, trainables
from rlver_jax.dialogue.dialogue import Rules
from rlver_jax.dialogue.environment import Curriculum, Environment
from rlver_jax.dialogue.levels import NAMES as LEVEL_NAMES
from rlver_jax.dialogue.levels import VANILLA, Level
from rlver_jax.dialogue.policy import Policy, PolicySettings
from rlver_jax.dialogue.reward import RewardSettings
from rlver_jax.dialogue.simulators import language_model
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator
from rlver_jax.models import source as model_source
from rlver_jax.models.lora import Adapted
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.rl.advantages import ESTIMATORS
from rlver_jax.rl.learner import Learner, LearnerState
from rlver_jax.rl.prepare import Frozen
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import EngineSettings
from rlver_jax.sampling.sampler import Sampling
from rlver_jax.sources import Sources, simulator_settings


@dataclasses.dataclass
class Run:
  """The live objects of a run."""

  policy: Policy
  simulator: Simulator
  learner: Learner
  state: LearnerState
  frozen: Frozen
  sampling_base: Qwen2 | None  # frozen.base as the policy's engine holds it
  rules: Rules
  reward: RewardSettings
  slots: int
  row_lengths: tuple[int, ...]

  def engines(self) -> list[tuple[str, Engine]]:
    """The sampling engines with their names in the metrics."""
    simulator = getattr(self.simulator, "engine", None)
    named = [("policy", self.policy.engine), ("simulator", simulator)]
    return [(name, engine) for name, engine in named if engine is not None]


def slots(config: ConfigDict, mesh: Mesh) -> int:
  """Slots of the engines: as asked for, rounded up so that the mesh's batch axis divides them."""
  wanted = config.sampling.slots or _dialogues_of_a_step(config)
  shards = partitioning.batch_shards(mesh)
  return -(-wanted // shards) * shards


def _dialogues_of_a_step(config: ConfigDict) -> int:
  greedy = ESTIMATORS[config.algorithm.advantage] == "greedy"  # one more dialogue a group
  return config.dialogue.scenarios_per_step * (config.dialogue.group_size + greedy)


def ladder(longest: int, smallest: int) -> tuple[int, ...]:
  """Sizes that double from `smallest` up to `longest`, with one halfway between."""
  sizes, size = [], smallest
  while size < longest:
    sizes += [size, size * 3 // 2]
    size *= 2
  return tuple(sorted({*(s for s in sizes if s < longest), longest}))


def engine_settings(
  config: ConfigDict, mesh: Mesh, cache_length: int, longest_answer: int
) -> EngineSettings:
  """The sizes of an engine whose slots hold `cache_length` tokens, by the section `sampling`;
  longest_answer: most tokens of an answer, beyond which none are drawn at a time."""
  s = config.sampling
  windows = ladder(cache_length, s.smallest_window)
  steps = min(s.decode_steps, longest_answer)
  return EngineSettings(slots(config, mesh), windows, tuple(s.extend_buckets), steps)


def row_lengths(config: ConfigDict) -> tuple[int, ...]:
  """The padded row lengths, up to the longest row that a dialogue can make."""
  s = config.sampling
  longest = s.max_prompt_tokens + s.max_response_tokens
  if config.dialogue.mode == "think":  # a thought and its reply stand beside the context
    longest += config.dialogue.max_turns * s.max_new_tokens
  return ladder(longest, config.training.smallest_row)


def build_rules(config: ConfigDict) -> Rules:
  """The rules of a dialogue at `vanilla`."""
  d = config.dialogue
  return Rules(d.initial_emotion, d.max_turns, d.failure_at, d.success_at)


def build_levels(config: ConfigDict) -> dict[str, Level]:
  """The levels of difficulty by name, the easiest first."""
  own = {name: Level(name, **config.environment[name]) for name in ("easy", "challenging")}
  return {name: own.get(name, VANILLA) for name in LEVEL_NAMES}


def build_environment(config: ConfigDict) -> Environment:
  """Which level the users of each step have."""
  e = config.environment
  curriculum = Curriculum(**e.curriculum)
  return Environment(e.level, build_levels(config), dict(e.weights), curriculum, config.seed)


def build_policy(config: ConfigDict, sources: Sources, model: Qwen2 | Adapted) -> Policy:
  """The policy with its engine around `model`, which is laid out for sampling."""
  s = config.sampling
  length = s.max_prompt_tokens + s.max_response_tokens
  engine = Engine(
    model,
    sources.mesh,
    engine_settings(config, sources.mesh, length, s.max_new_tokens),
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


def build_simulator(config: ConfigDict, sources: Sources, base: Qwen2 | None = None) -> Simulator:
  """The simulated user that the configuration asks for, its model loaded.

  base: the policy's frozen weights, laid out for sampling, which the simulator shares where they
  are its own.
  """
  if config.simulator.kind == "openai":
    from rlver_jax.dialogue.remote import simulator as remote  # late: others do without the client

    return remote.build(
      config.simulator, simulator_settings(config), sources.templates, config.seed
    )
  if sources.simulator is None:
    return ScriptedSimulator(sources.templates, config.seed)
  c, tokenizer = config.simulator, sources.simulator.tokenizer
  seed = config.seed + trainables.SIMULATOR_WEIGHTS
  if base is not None and _is_policys(config) and not sources.simulator.drawn:
    model = base
  else:
    model = model_source.load_model(sources.simulator, sources.mesh, seed)
  settings = simulator_settings(config)
  engine = Engine(
    partitioning.for_sampling(sources.mesh, model, c.dtype),
    sources.mesh,
    engine_settings(
      config, sources.mesh, c.cache_length, max(c.max_plan_tokens, c.max_message_tokens)
    ),
    Sampling(c.temperature, c.top_k, c.top_p),
    tokenizer.chat.stop_ids,
    config.seed,
    language_model.change_choices(tokenizer),
  )
  return language_model.LanguageModelSimulator(engine, tokenizer, sources.templates, settings)


def _is_policys(config: ConfigDict) -> bool:
  """Whether the simulated user is the model that the policy starts from."""
  c, p = config.simulator, config.policy
  return (c.path, c.dtype) == (p.path, p.dtype)


def build(
  config: ConfigDict,
  sources: Sources,
  restore: Callable[[LearnerState], LearnerState] | None = None,
) -> Run:
  """Loads the models, makes the state and compiles every program of the run.

  restore: gives the state of a run that goes on, for its abstract state; what is trained is then
  not loaded from its origin, as two states need not fit into memory.
  """
  mesh = sources.mesh
  frozen = trainables.load_frozen(config, sources)
  learner = trainables.make_learner(config, sources)
  if restore is not None:
    state = restore(learner.abstract_state)
  else:
    state = learner.init(*trainables.fresh(config, sources, frozen))
  base = frozen.base
  if base is not None:
    base = partitioning.for_sampling(mesh, base, config.policy.dtype)
  policy = build_policy(config, sources, sampling_policy(config, mesh, state, base))
  simulator = build_simulator(config, sources, base)
  d = config.dialogue
  run = Run(
    policy=policy,
    simulator=simulator,
    learner=learner,
    state=state,
    frozen=frozen,
    sampling_base=base,
    rules=build_rules(config),
    reward=RewardSettings(
      **config.reward,
      malformed_penalty=d.malformed_penalty,
      repeated_penalty=d.repeated_penalty,
    ),
    slots=slots(config, mesh),
    row_lengths=row_lengths(config),
  )
  for _, engine in run.engines():
    engine.compile()
  learner.compile(d.scenarios_per_step * d.group_size, run.row_lengths, frozen)
  jax.block_until_ready(run.state)
  return run


def sampling_policy(
  config: ConfigDict, mesh: Mesh, state: LearnerState, base: Qwen2 | None
) -> Qwen2 | Adapted:
  """The policy as it stands, laid out for sampling; `base` is, where there is one."""
  trained = partitioning.for_sampling(mesh, state.policy.model, config.policy.dtype)
  return trained if base is None else Adapted(base, trained)
