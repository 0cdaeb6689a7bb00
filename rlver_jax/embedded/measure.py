"""How models of the embedded world do on held-out users, in numbers for their manifests."""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import grpo
from rlver_jax import build, partitioning
from rlver_jax import sources as sources_lib
from rlver_jax.dialogue import rescore
from rlver_jax.dialogue.dialogue import HELD_OUT_STEP, Dialogue
from rlver_jax.dialogue.rollout import rollout
from rlver_jax.dialogue.simulators import appraisal
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator
from rlver_jax.embedded import dialogues as dialogues_lib
from rlver_jax.embedded.dialogues import Plan
from rlver_jax.embedded.helper import Habits
from rlver_jax.evaluation import fidelity
from rlver_jax.evaluation.fidelity import Fidelity
from rlver_jax.models import source as model_source

HELD_OUT = ("tiny-held-out", 64)  # the scenarios, and how many they are
SEED = 0  # of those scenarios, and of what is said
DRAWS = 2  # dialogues of a policy on each scenario


@dataclasses.dataclass(frozen=True)
class Replies:
  """What a policy says to held-out users that are scripted.

  good: the share of its replies that do one of the things that a user may need, and nothing poor;
  matched: of these, the share that do what their user needs. A policy whose good replies do not
  depend on the user has an eighth of them matched, whatever its loss. What training by dialogues
  can make more of is there from the start or nowhere.
  """

  turns: int
  good: float
  matched: float


def replies(path: str, mode: str) -> Replies:
  """What the policy in this directory (or of this name) says, in training's own way of sampling."""
  config = _config()
  config.dialogue.mode, config.policy.path, config.simulator.kind = mode, path, "scripted"
  sources = sources_lib.open_sources(config)
  model = model_source.load_model(sources.policy, sources.mesh, SEED)
  model = partitioning.for_sampling(sources.mesh, model, config.policy.dtype)
  policy = build.build_policy(config, sources, model)
  policy.engine.compile()
  played = rollout(
    policy,
    ScriptedSimulator(sources.templates, SEED),
    sources.scenarios,
    group_size=DRAWS,
    rules=build.build_rules(config),
    slots=build.slots(config, sources.mesh),
    step=HELD_OUT_STEP,
  )
  return count(played)


def count(played: Sequence[Dialogue]) -> Replies:
  """As `Replies` has it; both shares are 0 where there is nothing to count."""
  turns, good, matched = 0, 0, 0
  for dialogue in played:
    need, earlier = appraisal.NEEDS[dialogue.scenario.intention], []
    for text in (reply.text for reply in dialogue.replies):
      told = dialogue.user_messages[: len(earlier) + 1]
      found = appraisal.features(text, dialogue.scenario, earlier, told)
      does = found.strategies.keys() & set(appraisal.NEEDS.values())
      turns += 1
      if does and not found.poor:
        good += 1
        matched += need in does
      earlier.append(text)
  return Replies(turns, good / max(turns, 1), matched / max(good, 1))


def appraisals(path: str, habits: Habits) -> Fidelity:
  """How the simulated user in this directory (or of this name) appraises what a helper with these
  habits says."""
  config = _config()
  config.simulator.update(path=path, temperature=0.0)
  plan = Plan("held_out", habits, 0.0, turns=(10, 10))
  dialogues = [dialogues_lib.play(plan, number, SEED) for number in range(HELD_OUT[1])]
  sources = sources_lib.open_sources(config)
  slots = build.slots(config, sources.mesh)
  simulator = build.build_simulator(config, sources)
  recorded = [fidelity.recorded(dialogue) for dialogue in dialogues]
  found = rescore.rescore(simulator, recorded, step=0, slots=slots)
  return fidelity.compare([fidelity.Replayed.of(r) for r in found])


def _config() -> ConfigDict:
  config = grpo.get_config("tiny")
  config.data.path, config.evaluation.path = HELD_OUT[0], ""
  return config
