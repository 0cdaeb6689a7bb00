"""What a run reads from, opened and checked before anything large is loaded.

Paths, headers, tokenizers, templates, scenarios and the mesh: everything that costs little.
"""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import partitioning
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.environment import played
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.scenario_dataset import ScenarioSource
from rlver_jax.dialogue.scenario_dataset import open_source as open_scenarios
from rlver_jax.dialogue.simulators import language_model
from rlver_jax.dialogue.templates import Templates
from rlver_jax.errors import UserError
from rlver_jax.models import source as model_source
from rlver_jax.models.source import ModelSource
from rlver_jax.rl.advantages import ESTIMATORS


@dataclasses.dataclass(frozen=True)
class Sources:
  """What a run reads from, opened and checked; no weights yet."""

  mesh: Mesh
  scenarios: ScenarioSource
  heldout: tuple[Scenario, ...]  # those of evaluation.path that are played; none without it
  templates: dict[str, Templates]
  policy: ModelSource
  reference: ModelSource | None
  critic: ModelSource | None
  simulator: ModelSource | None


def open_sources(config: ConfigDict) -> Sources:
  """Opens and checks everything that costs little; raises UserError for what is wrong."""
  mesh = open_mesh(config)
  scenarios = open_scenarios(config.data.path, config.data.cache_dir)
  heldout = _open_heldout(config, scenarios)
  every = [*scenarios, *heldout]
  levels = played(config.environment.level, config.environment.weights)
  templates = open_templates(config, every, levels)
  policy = model_source.open_source(
    config.policy.path,
    "policy.path",
    dtype=config.policy.dtype,
    param_dtype=config.policy.param_dtype,
    remat=config.policy.remat,
  )
  check_policy_room(config, policy, templates)
  simulator = open_simulator(config, every, templates)
  reference = None
  if config.algorithm.kl_coef:
    dtype = config.policy.dtype
    reference = model_source.open_source(
      config.reference.path or config.policy.path,
      "reference.path",
      dtype=dtype,
      param_dtype=dtype,
    )
    if reference.config.vocab_size != policy.config.vocab_size:
      raise UserError(
        f"reference.path has a vocabulary of {reference.config.vocab_size}, expected the "
        f"policy's, {policy.config.vocab_size}."
      )
  critic = _open_critic(config, policy)
  check_server(config)
  return Sources(mesh, scenarios, heldout, templates, policy, reference, critic, simulator)


def open_templates(
  config: ConfigDict, scenarios: Sequence[Scenario], levels: Sequence[str]
) -> dict[str, Templates]:
  """The templates of the scenarios' languages, for users of these levels."""
  languages = sorted({scenario.language for scenario in scenarios})
  folder = config.simulator.templates
  return {language: templates_lib.load(language, folder, levels) for language in languages}


def open_simulator(
  config: ConfigDict, scenarios: Sequence[Scenario], templates: dict[str, Templates]
) -> ModelSource | None:
  """The model of the simulated user, None where it has none here.

  Raises UserError for what is missing or broken, and for a scenario that it has no room for.
  """
  c = config.simulator
  if c.kind != "language_model":
    return None
  opened = model_source.open_source(c.path, "simulator.path", dtype=c.dtype, param_dtype=c.dtype)
  check_positions("simulator", opened, "simulator.cache_length", c.cache_length)
  language_model.check_room(
    opened.tokenizer, templates, scenarios, simulator_settings(config), c.cache_length
  )
  return opened


def check_server(config: ConfigDict) -> None:
  """Raises UserError unless the simulated user's server, where it has one, can be used."""
  if config.simulator.kind == "openai":
    from rlver_jax.dialogue.remote import simulator as remote  # late: others do without the client

    remote.check(config.simulator)


def open_mesh(config: ConfigDict) -> Mesh:
  """The mesh of a run of any task, which must divide its microbatches."""
  mesh, microbatch = partitioning.make_mesh(**config.mesh), config.training.microbatch
  if microbatch % (shards := partitioning.batch_shards(mesh)):
    raise UserError(
      f"training.microbatch is {microbatch}, expected a multiple of mesh.data * mesh.fsdp, which "
      f"is {shards}."
    )
  return mesh


def _open_heldout(config: ConfigDict, scenarios: ScenarioSource) -> tuple[Scenario, ...]:
  """The held-out scenarios; UserError where one of them is trained on."""
  if not config.evaluation.path:
    return ()
  path = scenario_lib.resolve(config.evaluation.path)
  heldout = scenario_lib.read(path)[0][: config.evaluation.scenarios]
  trained = {_situation(scenario) for scenario in scenarios}
  for scenario in heldout:
    if _situation(scenario) in trained:
      raise UserError(
        f"evaluation.path has the scenario {scenario.id!r}, which data.path has too, expected "
        "scenarios that the run does not train on."
      )
  return tuple(heldout)


def _situation(scenario: Scenario) -> tuple[str, str, str]:
  return scenario.persona, scenario.background, scenario.task


def _open_critic(config: ConfigDict, policy: ModelSource) -> ModelSource | None:
  """Where the critic starts from, None for estimators without one."""
  if ESTIMATORS[config.algorithm.advantage] != "critic":
    return None
  critic = model_source.open_source(
    config.critic.path or config.policy.path,
    "critic.path",
    dtype=config.policy.dtype,
    param_dtype=config.policy.param_dtype,
    remat=config.policy.remat,
  )
  if critic.config.vocab_size != policy.config.vocab_size:
    raise UserError(
      f"critic.path has a vocabulary of {critic.config.vocab_size}, expected the policy's, "
      f"{policy.config.vocab_size}."
    )
  shared, layers = config.critic.shared_layers, critic.config.num_hidden_layers
  if shared >= layers:
    raise UserError(
      f"critic.shared_layers is {shared}, expected fewer than the critic's {layers} layers."
    )
  sizes = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps",
  )  # fmt: skip
  if shared and any(getattr(critic.config, s) != getattr(policy.config, s) for s in sizes):
    raise UserError(
      f"critic.shared_layers is {shared}, expected 0 with a critic.path whose sizes are not the "
      "policy's."
    )
  return critic


def check_policy_room(
  config: ConfigDict,
  source: ModelSource,
  templates: dict[str, Templates],
  scenarios: Sequence[Scenario] = (),
) -> None:
  """Raises UserError unless the policy has room for its instructions, for what the users of these
  scenarios say first, and for one reply."""
  s, chat = config.sampling, source.tokenizer.chat
  section = "policy_think" if config.dialogue.mode == "think" else "policy"
  instructions = {name: len(chat.system(t.render(section))) for name, t in templates.items()}
  for language, prompt in instructions.items():
    if prompt >= s.max_prompt_tokens:
      raise UserError(
        f"sampling.max_prompt_tokens is {s.max_prompt_tokens}, expected room for the {prompt} "
        f"tokens of the policy's instructions ('{language}') and the user's first message."
      )
  for scenario in scenarios:
    message = (*chat.user(scenario.first_message), *chat.assistant_start)
    prompt = instructions[scenario.language] + len(message)
    if scenario.first_message and prompt > s.max_prompt_tokens:
      raise UserError(
        f"sampling.max_prompt_tokens is {s.max_prompt_tokens}, expected room for the {prompt} "
        f"tokens that scenario {scenario.id!r:.60} begins with."
      )
  if s.max_new_tokens > s.max_response_tokens:
    raise UserError(
      f"sampling.max_new_tokens is {s.max_new_tokens}, expected at most "
      f"sampling.max_response_tokens ({s.max_response_tokens})."
    )
  field = "sampling.max_prompt_tokens + sampling.max_response_tokens"
  check_positions("policy", source, field, s.max_prompt_tokens + s.max_response_tokens)


def check_positions(name: str, source: ModelSource, field: str, length: int) -> None:
  """Raises UserError where `field` asks for more positions, `length`, than the model has."""
  if length > (positions := source.config.max_position_embeddings):
    raise UserError(
      f"{field} is {length}, expected at most the {positions} positions of the {name} model."
    )


def simulator_settings(config: ConfigDict) -> language_model.SimulatorSettings:
  """How the configuration wants the language-model simulator to answer."""
  s = config.simulator
  greedy = not s.temperature and s.kind == "language_model"  # it would answer the same again
  return language_model.SimulatorSettings(
    s.score, s.appraise, s.max_plan_tokens, s.max_message_tokens, 0 if greedy else s.reparse
  )
