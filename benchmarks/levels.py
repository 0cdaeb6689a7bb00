"""What the levels of difficulty do to a simulated user, over the same replies.

    python -m benchmarks.levels [--model DIR] [--scenarios N]

Each scenario of the package is played at each level with the replies of `replies.toml`, in an
order that turns from scenario to scenario. The user opens the chat itself and hears them all,
also where it would have left, so that every level judges the same replies:

  accepted    share of replies that raised the emotion
  met         share of replies that raised it by what a met need raises it at least
  degree      degree of expression of the user's messages: see rlver_jax/dialogue/expression.py
  hinted, said   share of messages that hint at the need; that ask for it plainly
  feeling     share of messages that name a feeling
  initial, final   mean emotion at the start, and where the dialogue would have ended

The user is the scripted one, or with --model a language model as a run would have it.
"""

import argparse
import dataclasses
import importlib.resources
import pathlib
import tomllib
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import grpo
from rlver_jax import build
from rlver_jax.dialogue.dialogue import Dialogue, PolicyReply, Rules, Stage, UserMessage
from rlver_jax.dialogue.expression import HINTED, SAID, expression, names_feeling
from rlver_jax.dialogue.levels import Level
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators import appraisal
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.scripted import details
from rlver_jax.sources import open_sources

LANGUAGES = ("en", "zh")
NEEDS = tuple(appraisal.NEEDS)
COLUMNS = ("accepted", "met", "degree", "hinted", "said", "feeling", "initial", "final")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", help="Hugging Face directory of a language-model user")
  parser.add_argument("--scenarios", type=int, help="of each language; by default all")
  args = parser.parse_args()
  print(f"{'user':<15} {'level':<12}" + "".join(f"{name:>9}" for name in COLUMNS))
  rows: dict[str, list[dict]] = {}
  for language in LANGUAGES:
    config = configuration(args.model, language, min(8, args.scenarios or 8))
    sources = open_sources(config)
    simulator = build.build_simulator(config, sources)
    if engine := getattr(simulator, "engine", None):
      engine.compile()
    scenarios = list(sources.scenarios)[: args.scenarios]
    for level in build.build_levels(config).values():
      rules = Rules(initial_emotion=config.dialogue.initial_emotion).at(level)
      found = measure(simulator, scenarios, rules, build.slots(config, sources.mesh))
      rows.setdefault(level.name, []).append(found)
      _print(f"{config.simulator.kind[:12]} {language}", level, found)
  for name, found in rows.items():
    mean = {column: np.mean([row[column] for row in found]) for column in COLUMNS}
    _print("both", Level(name), mean)


def configuration(model: str | None, language: str, slots: int = 8) -> ConfigDict:
  """A run's configuration with the simulated user that was asked for, all levels in play."""
  config = grpo.get_config("qwen2.5-0.5b")
  config.environment.level = "curriculum"
  config.data.path = language
  config.sampling.slots = slots
  config.policy.dtype = "float32"
  if not model:
    config.policy.path, config.simulator.kind = "tiny", "scripted"
    return config
  config.policy.path = config.simulator.path = str(pathlib.Path(model))
  if jax.default_backend() == "cpu":
    config.simulator.dtype = "float32"
  return config


def measure(
  simulator: Simulator, scenarios: Sequence[Scenario], rules: Rules, slots: int
) -> dict[str, float]:
  """The COLUMNS for these scenarios, played by `rules` at most `slots` at a time."""
  plays = []
  for first in range(0, len(scenarios), slots):
    plays += _play(simulator, scenarios, range(first, min(first + slots, len(scenarios))), rules)
  changes = [turn.plan.change for d, _ in plays for turn in d.turns]
  messages = [(text, d.scenario) for d, _ in plays for text in d.user_messages]
  degrees = np.array([expression(text, scenario) for text, scenario in messages])
  return {
    "accepted": np.mean([change > 0 for change in changes]),
    "met": np.mean([change >= appraisal.LEVELS["met"] for change in changes]),
    "degree": degrees.mean(),
    "hinted": np.mean(degrees == HINTED),
    "said": np.mean(degrees == SAID),
    "feeling": np.mean([names_feeling(text, s.language) for text, s in messages]),
    "initial": float(rules.initial_emotion),
    "final": np.mean([_final(d, rules, left) for d, left in plays]),
  }


def replies(scenario: Scenario, turn: int) -> list[str]:
  """The replies to the scenario's user, beginning with number `turn` of them."""
  file = importlib.resources.files("benchmarks") / "replies.toml"
  texts = tomllib.loads(file.read_text(encoding="utf-8"))[scenario.language]
  need = scenario.intention
  other = NEEDS[(NEEDS.index(need) + len(NEEDS) // 2) % len(NEEDS)]  # what it does not ask for
  kinds = [text for text in texts.values() if isinstance(text, str)]
  told = [texts["met"][need], texts["near"][need], texts["met"][other], *kinds]
  x, y = (*details(scenario), scenario.topic, scenario.topic)[:2]
  told = [text.format(x=x, y=y) for text in told]
  turn %= len(told)
  return told[turn:] + told[:turn]


def _play(
  simulator: Simulator, scenarios: Sequence[Scenario], chosen: Sequence[int], rules: Rules
) -> list[tuple[Dialogue, int | None]]:
  """The chosen scenarios' dialogues, each with the turn in which its user would have left."""
  told = {slot: replies(scenarios[i], i) for slot, i in enumerate(chosen)}
  dialogues, left = {}, {}
  for slot, i in enumerate(chosen):
    scenario = dataclasses.replace(scenarios[i], first_message="")
    endless = {"failure_at": -1000, "success_at": 1000, "max_turns": len(told[slot])}
    dialogues[slot] = Dialogue(i, i, scenario, dataclasses.replace(rules, **endless))
  simulator.start(0)
  simulator.open(dialogues)
  for slot, dialogue in dialogues.items():
    simulator.submit(slot, dialogue)
  while any(d.stage is not Stage.DONE for d in dialogues.values()):
    for slot, answer in simulator.poll().items():
      dialogue = dialogues[slot]
      if isinstance(answer, UserMessage) and answer.goodbye:
        left.setdefault(slot, dialogue.turn)
        answer = dataclasses.replace(answer, goodbye=False)
      dialogue.advance(answer)
      if dialogue.stage is Stage.POLICY:
        dialogue.advance(PolicyReply(told[slot][dialogue.turn], None, True, True, 0))
      if dialogue.stage is not Stage.DONE:
        simulator.submit(slot, dialogue)
  return [(dialogue, left.get(slot)) for slot, dialogue in dialogues.items()]


def _final(dialogue: Dialogue, rules: Rules, left: int | None) -> int:
  """The emotion where the dialogue would have ended by the rules, or when the user left."""
  for number, turn in enumerate(dialogue.turns):
    if not rules.failure_at < turn.emotion < rules.success_at or number == left:
      return turn.emotion
  return dialogue.emotion


def _print(user: str, level: Level, values: dict[str, float]) -> None:
  shown = "".join(
    f"{values[name]:>9.1f}" if name in ("initial", "final") else f"{values[name]:>9.0%}"
    for name in COLUMNS
  )
  print(f"{user:<15} {level.name:<12}{shown}", flush=True)


if __name__ == "__main__":
  main()
