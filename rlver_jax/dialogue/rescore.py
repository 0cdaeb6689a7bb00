"""Recorded dialogues read back, and appraised once more: a reward must come out as it did.

Each turn is put to the simulated user as the run did: the same chat, from the recorded texts and
the user's own token ids, and the same numbers (seed, step, dialogue, turn, call). What comes out
is a function of these. With a language model one thing may differ: its caches are filled in other
pieces than in the run, so that log-probabilities differ in their last bits, which matters only
where two answers are as probable as each other.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rlver_jax import json_lines
from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue import records as records_lib
from rlver_jax.dialogue.dialogue import (
  Answer,
  Dialogue,
  Plan,
  Rules,
  Stage,
  Turn,
  UserMessage,
)
from rlver_jax.dialogue.levels import Level
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.json_lines import Misfit, field
from rlver_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A dialogue of a file as it was recorded: to its last appraised turn."""

  start: Dialogue  # before its first reply
  turns: tuple[Turn, ...]
  emotion: int  # at the end


@dataclasses.dataclass(frozen=True)
class Rescored:
  """What a recorded dialogue came to: for each turn the new answer, which need not be a Plan."""

  recorded: Recorded
  answers: tuple[Answer, ...]

  @property
  def changes(self) -> tuple[int | None, ...]:
    """The change of emotion of each turn, as it is felt at the dialogue's level; None for none."""
    level = self.recorded.start.rules.level
    return tuple(level.felt(a.change) if isinstance(a, Plan) else None for a in self.answers)

  @property
  def emotions(self) -> tuple[int, ...]:
    """The emotion after each turn; one without a change leaves it as it was."""
    emotion, found = self.recorded.start.rules.initial_emotion, []
    for change in self.changes:
      emotion = emotion_lib.update(emotion, change or 0)
      found.append(emotion)
    return tuple(found)

  @property
  def emotion(self) -> int:
    """The final emotion."""
    return (self.recorded.start.rules.initial_emotion, *self.emotions)[-1]

  @property
  def equal(self) -> bool:
    """Whether all changes and emotions are as recorded."""
    turns = self.recorded.turns
    changes, emotions = tuple(t.plan.change for t in turns), tuple(t.emotion for t in turns)
    equal = (changes, emotions) == (self.changes, self.emotions)
    return equal and self.emotion == self.recorded.emotion


def read(
  path: pathlib.Path,
  scenarios: dict[str, Scenario],
  rules: Rules,
  levels: dict[str, Level],
  tokenizer: Tokenizer | None,
) -> list[Recorded]:
  """The dialogues of a file.

  Args:
    scenarios: by id.
    rules: at `vanilla`.
    tokenizer: of a language-model user, whose token ids must then be there; None for another.

  Raises UserError, with file and line, for a record that is not one of such a run.
  """

  def make(record) -> Recorded:
    return _recorded(record, scenarios, rules, levels, tokenizer)

  return json_lines.read(path, make, "a recorded dialogue")


def _recorded(record, scenarios, rules, levels, tokenizer) -> Recorded:
  scenario = scenarios.get(name := field(record, "id", str))
  if scenario is None:
    raise Misfit(f"the scenario {name!r:.60}, expected one of the run's data.path")
  texts = {"player": "persona", "scene": "background", "task": "task", "character": "character"}
  for key, own in texts.items():
    if field(record, key, str) != getattr(scenario, own):
      raise Misfit(f"another {key!r} than that of scenario {name!r:.60} in the run's data.path")
  level = levels.get(field(record, "level", str))
  if level is None:
    raise Misfit(f"the level {record['level']!r:.60}, expected one of {', '.join(levels)}")
  own_rules = rules.at(level)
  index, group = field(record, "dialogue", int), field(record, "group", int)
  if not 0 <= index < 2**32:  # part of a random key
    raise Misfit(f"{index} as 'dialogue', expected its number in the batch")
  emotion = field(record, "emo_point", int)
  opening, _, turns = records_lib.exchange(record)
  start = Dialogue(index, group, scenario, own_rules)
  sampled = [turn.message for turn in turns]
  if scenario.first_message:
    if record["history"] and (opening is None or opening.text != start.opening.text):
      raise Misfit("another opening than that of the scenario")
  elif opening is not None:
    start.advance(opening)
    sampled.append(opening)
  for message in sampled:
    if tokenizer is not None and message is not None:
      _check_ids(message, tokenizer)
  return Recorded(start, turns, emotion)


def _check_ids(message: UserMessage, tokenizer: Tokenizer) -> None:
  """Raises Misfit unless a message has the ids that a language-model user sampled."""
  if message.ids is None:
    raise Misfit("no 'ids', expected list")
  if not records_lib.are_ids(message.ids, tokenizer):
    raise Misfit("'ids' that are no tokens of simulator.path, expected those of the message")
  if not records_lib.spells(message, tokenizer):
    raise Misfit("'ids' of another text, expected those of the message")


def rescore(
  simulator: Simulator,
  dialogues: Sequence[Recorded],
  *,
  step: int,
  slots: int,
  on_round: Callable[[], None] = lambda: None,
  on_end: Callable[[Rescored], None] = lambda rescored: None,
) -> list[Rescored]:
  """Appraises every turn of the dialogues of one step (0-based) once more.

  Args:
    slots: dialogues under way at once; a finished one's slot goes to the next in line.
    on_round: called once a round; what it raises ends it.
    on_end: called with each dialogue when its last turn is appraised, in no fixed order.
  """
  simulator.start(step)
  answers: list[list[Answer]] = [[] for _ in dialogues]
  waiting = collections.deque(i for i, r in enumerate(dialogues) if r.turns)
  free, active = list(range(slots)), {}

  def ask(slot: int) -> None:
    number, d = active[slot]
    d.pending = (dialogues[number].turns[d.turn].reply,)
    d.stage = Stage.PLAN
    simulator.submit(slot, d)

  while waiting or active:
    on_round()
    placed = {}
    while waiting and free:
      number, slot = waiting.popleft(), free.pop(0)
      active[slot] = number, _begun(dialogues[number])
      placed[slot] = active[slot][1]
    if placed:
      simulator.open(placed)
      for slot in placed:
        ask(slot)
    for slot, answer in simulator.poll(wait=True).items():
      number, d = active[slot]
      recorded = dialogues[number]
      answers[number].append(answer)
      # The history is always the recorded one.
      d.turns.append(turn := recorded.turns[d.turn])
      d.pending, d.emotion = (), turn.emotion
      if d.turn < len(recorded.turns):
        ask(slot)
      else:
        del active[slot]
        free.append(slot)
        on_end(Rescored(recorded, tuple(answers[number])))
  return [Rescored(r, tuple(some)) for r, some in zip(dialogues, answers, strict=True)]


def _begun(recorded: Recorded) -> Dialogue:
  """The dialogue as it was before its first reply, to be taken through its turns."""
  start = recorded.start
  dialogue = Dialogue(start.index, start.group, start.scenario, start.rules)
  dialogue.opening = start.opening
  return dialogue


def write(path: pathlib.Path, rescored: dict[int, list[Rescored]]) -> None:
  """Writes what was found, a line for each dialogue of each step (from 1), all or nothing."""
  json_lines.write(
    path, (_line(step, found) for step, of_step in rescored.items() for found in of_step)
  )


def _line(step: int, found: Rescored) -> dict[str, Any]:
  r = found.recorded
  return {
    "step": step,
    "dialogue": r.start.index,
    "id": r.start.scenario.id,
    "equal": found.equal,
    "emo_point": r.emotion,
    "rescored_emo_point": found.emotion,
    "turns": [
      {
        "change": turn.plan.change,
        "rescored_change": change,
        "emotion-point": turn.emotion,
        "rescored_emotion-point": emotion,
      }
      for turn, change, emotion in zip(r.turns, found.changes, found.emotions, strict=True)
    ],
  }


def summary(rescored: Sequence[Rescored]) -> dict[str, str]:
  """What was found in all, as rows of a table."""
  pairs = [
    (turn.plan.change, change)
    for found in rescored
    for turn, change in zip(found.recorded.turns, found.changes, strict=True)
  ]
  differences = [abs(a - b) for a, b in pairs if b is not None]
  mean = sum(differences) / len(differences) if differences else 0.0
  return {
    "dialogues": str(len(rescored)),
    "equal final emotions": str(sum(f.emotion == f.recorded.emotion for f in rescored)),
    "turns": str(len(pairs)),
    "equal changes": str(sum(a == b for a, b in pairs)),
    "mean absolute difference": f"{mean:.2f}",
  }
