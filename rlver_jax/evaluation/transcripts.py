"""Recorded dialogues of any origin, one at a time and checked, for what their emotions say.

A file holds one JSON object a line, in the format of recorded Sentient-benchmark dialogues (see
`dialogue/records.py`, which writes it). Read are the fields that scores depend on: `id`,
`character`, `task`, `emo_point`, `emo_state`, and of `history` the roles, the user's
`emotion-point` and `planning.change`; where they are there also `tokens`, `end` and `tactic`. Each
message must have a text. Every emotion is computed again from the changes.
"""

import codecs
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.simulators.appraisal import character_type
from rlver_jax.errors import UserError
from rlver_jax.json_lines import Misfit, field

Value = TypeVar("Value")
LONGEST = 8 << 20  # bytes of a line: what a damaged file may take of memory


@dataclasses.dataclass(frozen=True)
class Transcript:
  """emotions: at the start and after each reply that was appraised, integers of at most 100.

  replies: how many the policy gave, at least one; tokens: those that it sampled, None where the
  record does not say. character: the type's English name (negative, passive,
  avoidant), or as the record has it. intention: one of `scenario.EMOTIONAL` and `RATIONAL`.
  tactic: one of `scenario.TACTICS`, "" for none.
  """

  id: str
  character: str
  intention: str
  emotions: tuple[int, ...]
  replies: int
  tokens: int | None = None
  tactic: str = ""

  @property
  def final(self) -> int:
    """The final emotion on the benchmark's scale of 0..100; in a run it may end below zero."""
    return max(0, self.emotions[-1])


@dataclasses.dataclass(frozen=True)
class Problem:
  """A record that can't be counted: its line (from 1), and what was found and expected."""

  line: int
  found: str


def names(paths: Iterable[str]) -> dict[str, str]:
  """What each of these files is called in tables: its name without its end; where two would have
  the same, all have their paths."""
  short = {path: pathlib.Path(path).stem.removesuffix("_result") for path in paths}
  return short if len(set(short.values())) == len(short) else {path: path for path in short}


def read(
  path: str | os.PathLike, known: Collection[str] | None = None
) -> Iterator[Transcript | Problem]:
  """The dialogues of a file in its order, with a Problem in place of each that is broken.

  Args:
    path: the file.
    known: ids of scenarios, of which each record has to be one; None: any.

  Raises:
    UserError: if the file can't be read.
  """

  def make(record: Any) -> Transcript:
    found = transcript(record)
    if known is not None and found.id not in known:
      raise Misfit(f"the id {found.id!r:.60}, expected one of the {len(known)} scenarios")
    return found

  return read_as(path, make)


def read_as(path: str | os.PathLike, make: Callable[[Any], Value]) -> Iterator[Value | Problem]:
  """As `read`, with what `make` makes of each record: a value with an `id`, or Misfit.

  Blank lines are passed over. Never more than a line is in memory.
  """
  line_of_id: dict[str, int] = {}
  try:
    with open(path, "rb") as file:
      for number, raw in _lines(file):
        if raw.strip():
          yield _read_line(raw, number, line_of_id, make)
  except OSError as error:
    raise UserError(
      f"{path} cannot be read ({error.strerror}), expected recorded dialogues."
    ) from error


def _lines(file) -> Iterator[tuple[int, bytes]]:
  """The lines with their numbers; of one that is too long, a beginning that is too long."""
  number = 0
  while raw := file.readline(LONGEST + 1):
    number += 1
    rest = raw
    while len(rest) > LONGEST and not rest.endswith(b"\n"):
      rest = file.readline(LONGEST + 1)
    # Of a file that was put together from several, also further lines begin with the mark.
    yield number, raw.removeprefix(codecs.BOM_UTF8)


def _read_line(raw: bytes, number: int, line_of_id: dict, make):
  try:
    if len(raw) > LONGEST:
      raise Misfit(f"more than {LONGEST >> 20} MiB, expected one recorded dialogue a line")
    found = make(_parse(raw))
    if found.id in line_of_id:
      raise Misfit(
        f"the id {found.id!r:.60} as in line {line_of_id[found.id]}, expected each scenario once"
      )
    line_of_id[found.id] = number
    return found
  except Misfit as misfit:
    return Problem(number, str(misfit))


def _parse(raw: bytes) -> Any:
  try:
    return json.loads(raw.decode("utf-8"))
  except UnicodeDecodeError as error:
    byte = raw[error.start]
    raise Misfit(f"0x{byte:02x} as byte {error.start + 1}, expected text in UTF-8") from error
  # ValueError covers numbers of absurd length too, RecursionError absurd nesting.
  except (ValueError, RecursionError) as error:
    raise Misfit("no JSON, expected one recorded dialogue a line") from error


def transcript(record: Any) -> Transcript:
  """What a record says, once all its emotions follow from one another; Misfit otherwise."""
  if not isinstance(record, dict):
    raise Misfit(f"{record!r:.60}, expected a JSON object")
  history = field(record, "history", list)
  if record.get("end") == "failed":
    raise Misfit("a dialogue in which a partner failed, expected one with a final emotion")
  if not history:
    raise Misfit("an empty history, expected what was said")
  roles = [_role(history, i) for i in range(len(history))]
  if len(roles) == 1:
    raise Misfit("a history of one message, expected a reply to it")
  emotions = [_emotion(history[0], "the opening", lowest=0)]
  for i in range(2, len(history), 2):
    emotions.append(_next_emotion(emotions[-1], history[i], f"message {i + 1}"))
  _check_end(record, emotions[-1])
  name, task, character = (_text(record, key) for key in ("id", "task", "character"))
  return Transcript(
    name,
    character_type(character, scenario_lib.language_of(task)) or character,
    scenario_lib.intention_of(task),
    tuple(emotions),
    len(history) // 2,
    _tokens(record.get("tokens")),
    scenario_lib.tactic_of(record),
  )


def _text(record: dict, name: str) -> str:
  text = field(record, name, str)
  if not text.strip():
    raise Misfit(f"{text!r:.60} as {name!r}, expected a text")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
    raise Misfit(f"{text!r:.60} as {name!r}, expected Unicode text") from error
  return text


def _tokens(counts: Any) -> int | None:
  """The policy's tokens where they are told as a run tells them."""
  told = counts.get("policy") if isinstance(counts, dict) else None
  return told if type(told) is int and told > 0 else None


def _role(history: list, i: int) -> str:
  """The role of a message: the user's and the policy's have to take turns, and each has a text."""
  expected = ("user", "assistant")[i % 2]
  role = history[i].get("role") if isinstance(history[i], dict) else history[i]
  if role != expected:
    raise Misfit(f"{role!r:.60} as the role of message {i + 1}, expected '{expected}'")
  content = history[i].get("content")
  if not isinstance(content, str):
    raise Misfit(f"{content!r:.60} as 'content' of message {i + 1}, expected a text")
  return expected


def _emotion(entry: dict, where: str, lowest: int = emotion_lib.MIN_CHANGE) -> int:
  """The user's emotion. Its last change may lead below zero."""
  value = _integer(entry, "emotion-point", where)
  if not lowest <= value <= emotion_lib.MAX_EMOTION:
    raise Misfit(
      f"{value} as 'emotion-point' of {where}, expected at most {emotion_lib.MAX_EMOTION} and at "
      f"least {lowest}"
    )
  return value


def _next_emotion(before: int, entry: dict, where: str) -> int:
  planning = entry.get("planning")
  if not isinstance(planning, dict):
    raise Misfit(f"{planning!r:.60} as 'planning' of {where}, expected an object with the change")
  change = _integer(planning, "change", where)
  if not emotion_lib.MIN_CHANGE <= change <= emotion_lib.MAX_CHANGE:
    raise Misfit(
      f"{change} as 'change' of {where}, expected {emotion_lib.MIN_CHANGE} to "
      f"{emotion_lib.MAX_CHANGE}"
    )
  after, computed = _emotion(entry, where), emotion_lib.update(before, change)
  if after not in (computed, max(0, computed)):  # some stop at zero
    raise Misfit(
      f"{after} as 'emotion-point' of {where}, expected {computed} ({before} and a change of "
      f"{change:+d})"
    )
  return after


def _check_end(record: dict, last: int) -> None:
  final, state = field(record, "emo_point", int), field(record, "emo_state", str)
  if final != last:
    raise Misfit(f"{final} as 'emo_point', expected {last}, the emotion after the last change")
  expected = f"Emotion-{emotion_lib.state(final)}"
  if state != expected:
    raise Misfit(f"{state!r:.60} as 'emo_state', expected '{expected}' for {final} points")


def _integer(entry: dict, name: str, where: str) -> int:
  value = entry.get(name)
  if type(value) is not int:
    raise Misfit(f"{value!r:.60} as {name!r} of {where}, expected an integer")
  return value
