"""Recorded dialogues read back, and appraised once more: a reward must come out as it did.

Each turn is put to the simulated user as the run did: the same chat, from the recorded texts and
the user's own token ids, and the same numbers (seed, step, dialogue, turn, call). What comes out
is a function of these. With a language model one thing may differ: its caches are filled in other
pieces than in the run, so that log-probabilities differ in their last bits, which matters only
where two answers are as probable as each other.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue import records as records_lib
from rlver_jax.dialogue.dialogue import (
  Dialogue,
  Plan,
  PolicyReply,
  Rules,
  Stage,
  Turn,
  UserMessage,
)
from rlver_jax.dialogue.levels import Level
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.language_model import SILENCE
from rlver_jax.errors import UserError
from rlver_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A dialogue of a file as it was recorded: to its last appraised turn."""

  start: Dialogue  # before its first reply
  turns: tuple[Turn, ...]
  emotion: int  # at the end


@dataclasses.dataclass(frozen=True)
class Rescored:
  """What a recorded dialogue came to: for each turn (change, emotion), None where there is none."""

  recorded: Recorded
  turns: tuple[tuple[int | None, int], ...]

  @property
  def emotion(self) -> int:
    """The final emotion."""
    return self.turns[-1][1] if self.turns else self.recorded.start.rules.initial_emotion

  @property
  def equal(self) -> bool:
    """Whether all changes and emotions are as recorded."""
    recorded = tuple((turn.plan.change, turn.emotion) for turn in self.recorded.turns)
    return recorded == self.turns and self.emotion == self.recorded.emotion


class _Misfit(Exception):
  """A record does not fit: what was found and what was expected."""


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
  found = []
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}), expected dialogues of a run.") from error
  for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
    try:
      found.append(_recorded(json.loads(line), scenarios, rules, levels, tokenizer))
    except (_Misfit, ValueError, RecursionError) as error:
      what = error if isinstance(error, _Misfit) else "no JSON, expected a recorded dialogue"
      raise UserError(f"{path}, line {number}: found {what}.") from error
  return found


def _field(entry: Any, name: str, kind: type) -> Any:
  value = entry.get(name) if isinstance(entry, dict) else None
  if type(value) is not kind:
    raise _Misfit(f"{value!r:.60} as {name!r}, expected {kind.__name__}")
  return value


def _recorded(record, scenarios, rules, levels, tokenizer) -> Recorded:
  scenario = scenarios.get(name := _field(record, "id", str))
  if scenario is None:
    raise _Misfit(f"the scenario {name!r:.60}, expected one of the run's data.path")
  texts = {"player": "persona", "scene": "background", "task": "task", "character": "character"}
  for field, own in texts.items():
    if _field(record, field, str) != getattr(scenario, own):
      raise _Misfit(f"another {field!r} than that of scenario {name!r:.60} in the run's data.path")
  level = levels.get(_field(record, "level", str))
  if level is None:
    raise _Misfit(f"the level {record['level']!r:.60}, expected one of {', '.join(levels)}")
  own_rules = rules.at(level)
  index, group = _field(record, "dialogue", int), _field(record, "group", int)
  if not 0 <= index < 2**32:  # part of a random key
    raise _Misfit(f"{index} as 'dialogue', expected its number in the batch")
  history, emotion = _field(record, "history", list), _field(record, "emo_point", int)
  start = Dialogue(index, group, scenario, own_rules)
  if history:
    opening = _message(history[0], tokenizer if not scenario.first_message else None)
    if scenario.first_message and (opening is None or opening.text != scenario.first_message):
      raise _Misfit("another opening than that of the scenario")
    if start.stage is Stage.OPENING and opening is not None:
      start.advance(opening)
  # A last reply that the user had no room to appraise stands alone.
  pairs = zip(history[1::2], history[2::2], strict=False)
  turns = tuple(_turn(reply, user, tokenizer) for reply, user in pairs)
  if turns and (start.opening is None or any(turn.message is None for turn in turns[:-1])):
    raise _Misfit("a turn after the user has left, expected a message before it")
  return Recorded(start, turns, emotion)


def _turn(reply, user, tokenizer) -> Turn:
  if _field(reply, "role", str) != "assistant":
    raise _Misfit(f"the role {reply['role']!r:.60}, expected user and assistant in turn")
  planning = _field(user, "planning", dict)
  said = PolicyReply(_field(reply, "content", str), None, True, True, _field(reply, "tokens", int))
  plan = Plan(
    _field(planning, "change", int), _field(planning, "content", str),
    _field(planning, "TargetCompletion", str), _field(planning, "activity", str),
    _field(planning, "analyse", str), _field(planning, "parsed", bool),
  )  # fmt: skip
  return Turn(said, plan, _field(user, "emotion-point", int), _message(user, tokenizer))


def _message(entry, tokenizer: Tokenizer | None) -> UserMessage | None:
  """The user's message, None where it said nothing more."""
  if _field(entry, "role", str) != "user":
    raise _Misfit(f"the role {entry['role']!r:.60}, expected user and assistant in turn")
  text, tokens = _field(entry, "content", str), _field(entry, "tokens", int)
  if not text:
    return None
  if tokenizer is None:
    return UserMessage(text, tokens=tokens)
  ids = _field(entry, "ids", list)
  known = all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
  if not known or tokenizer.special_ids.intersection(ids):
    raise _Misfit("'ids' that are no tokens of simulator.path, expected those of the message")
  if (tokenizer.decode(ids).strip() or SILENCE) != text:
    raise _Misfit("'ids' of another text, expected those of the message")
  return UserMessage(text, tokens=tokens, ids=tuple(ids))


def rescore(
  simulator: Simulator, dialogues: Sequence[Recorded], *, step: int, slots: int
) -> list[Rescored]:
  """Appraises every turn of the dialogues of one step (0-based) once more."""
  simulator.start(step)
  found = []
  for first in range(0, len(dialogues), slots):
    found += _rescore_some(simulator, dialogues[first : first + slots])
  return found


def _rescore_some(simulator: Simulator, recorded: Sequence[Recorded]) -> Iterator[Rescored]:
  """As many as there are slots, turn by turn; the history is always the recorded one."""
  dialogues = {
    slot: Dialogue(r.start.index, r.start.group, r.start.scenario, r.start.rules)
    for slot, r in enumerate(recorded)
  }
  for slot, r in enumerate(recorded):
    dialogues[slot].opening = r.start.opening
  simulator.open(dialogues)
  plans: list[list[int | None]] = [[] for _ in recorded]
  for turn in range(max(len(r.turns) for r in recorded)):
    waiting = {slot for slot, r in enumerate(recorded) if turn < len(r.turns)}
    for slot in waiting:
      d = dialogues[slot]
      d.pending, d.stage = (recorded[slot].turns[turn].reply,), Stage.PLAN
      simulator.submit(slot, d)
    while waiting:
      for slot, answer in simulator.poll(wait=True).items():
        d = dialogues[slot]
        plan = isinstance(answer, Plan)
        plans[slot].append(d.rules.level.felt(answer.change) if plan else None)
        d.turns.append(recorded[slot].turns[turn])
        d.pending, d.emotion = (), recorded[slot].turns[turn].emotion
        waiting.remove(slot)
  for r, changes in zip(recorded, plans, strict=True):
    emotion, turns = r.start.rules.initial_emotion, []
    for change in changes:
      emotion = emotion_lib.update(emotion, change or 0)
      turns.append((change, emotion))
    yield Rescored(r, tuple(turns))


def write(path: pathlib.Path, rescored: dict[int, list[Rescored]]) -> None:
  """Writes what was found, a line for each dialogue of each step (from 1), all or nothing."""
  records_lib.write_lines(
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
      for turn, (change, emotion) in zip(r.turns, found.turns, strict=True)
    ],
  }


def summary(rescored: Sequence[Rescored]) -> dict[str, str]:
  """What was found in all, as rows of a table."""
  pairs = [
    (turn.plan.change, change)
    for found in rescored
    for turn, (change, _) in zip(found.recorded.turns, found.turns, strict=True)
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
