"""The recorded dialogues that an evaluation looks at, and the line that it keeps of each.

Files of any origin, in the format of recorded Sentient-benchmark dialogues, are read with every
record checked. What is found of a dialogue is kept as a line of a file in the run's folder as soon
as it is there, so that the same command goes on with the others.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from rlver_jax import cli, json_lines, processes
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Rules
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.errors import UserError
from rlver_jax.evaluation import transcripts
from rlver_jax.evaluation.transcripts import Problem
from rlver_jax.json_lines import Misfit, field

Key = tuple[str, str]  # of a dialogue: its file and its id
Value = TypeVar("Value")


def read(
  data: ConfigDict, scenario_of: Callable[[Any], Scenario] = records.scenario_of
) -> dict[Key, Recorded]:
  """The dialogues of the files in `data.recorded`, in their order and numbered in it.

  Args:
    data: the fields `recorded` (files with commas between them), `dialogues` (how many of the first
      ones of each file are read; 0: all) and `skip_broken`.
    scenario_of: the scenario that a record tells of; Misfit for a record that will not do.

  Every record that is broken is named by file and line. Raises UserError for files that cannot be
  read or hold no dialogue with an appraised reply, and unless `skip_broken` for broken records.
  """
  paths = [path.strip() for path in data.recorded.split(",")]
  if "" in paths or len({pathlib.Path(p).expanduser().resolve() for p in paths}) < len(paths):
    raise UserError(f"data.recorded is '{data.recorded}', expected files, each once.")
  dialogues: dict[Key, Recorded] = {}
  broken: dict[str, int] = {}
  for file in paths:
    read_here, broken[file] = _read_file(pathlib.Path(file).expanduser(), data, scenario_of)
    for found in read_here:
      found.start.index = found.start.group = len(dialogues)  # a part of the random numbers
      dialogues[file, found.start.scenario.id] = found
  if sum(broken.values()) and not data.skip_broken:
    counts = ", ".join(f"{file}: {count}" for file, count in broken.items() if count)
    raise UserError(
      f"data.recorded has records that are broken ({counts}), expected none (data.skip_broken "
      "leaves them out)."
    )
  return dialogues


@dataclasses.dataclass(frozen=True)
class _Line:
  """A record; `id` is what `transcripts.read_as` tells records apart by."""

  id: str
  recorded: Recorded


def _read_file(path: pathlib.Path, data: ConfigDict, scenario_of) -> tuple[list[Recorded], int]:
  """The dialogues of a file, and how many of its records are broken."""

  def make(record: Any) -> _Line:
    told = transcripts.transcript(record)
    return _Line(told.id, _recorded(record, told.emotions, scenario_of))

  found, broken, idle = [], 0, 0
  for line in transcripts.read_as(path, make):
    if isinstance(line, Problem):
      broken += 1
      if processes.is_first():
        cli.show(f"{path}, line {line.line}: found {line.found}.", sys.stderr)
    elif not line.recorded.turns:
      idle += 1
    else:
      found.append(line.recorded)
    if data.dialogues and len(found) == data.dialogues:
      break
  if broken and not data.skip_broken:
    return [], broken
  if not found:
    raise UserError(f"{path} has no dialogue with an appraised reply, expected recorded dialogues.")
  if (broken or idle) and processes.is_first():
    print(f"{path}: left out {broken} broken records and {idle} without an appraised reply.")
  return found, broken


def _recorded(record: Any, emotions: tuple[int, ...], scenario_of) -> Recorded:
  opening, _, turns = records.exchange(record)
  if opening is None:
    raise Misfit("an opening without text, expected what the user said first")
  # Ids are those of another tokenizer.
  said = [turn.message and dataclasses.replace(turn.message, ids=None) for turn in turns]
  turns = tuple(dataclasses.replace(t, message=m) for t, m in zip(turns, said, strict=True))
  scenario = dataclasses.replace(scenario_of(record), first_message=opening.text)
  start = Dialogue(0, 0, scenario, Rules(initial_emotion=emotions[0]))
  return Recorded(start, turns, emotions[-1])


def kept(
  file: pathlib.Path,
  dialogues: Mapping[Key, Recorded],
  make: Callable[[Any, Recorded], Value],
  what: str,
) -> dict[Key, Value]:
  """What a run's file holds of dialogues, in their order; nothing where there is no file.

  Args:
    make: a value from a line, which has `file` and `id`, and its dialogue; Misfit where they do
      not go together.
    what: what the file holds, as in "what this replay wrote".

  Raises UserError, with file and line, where it is damaged or tells of other dialogues.
  """
  if not file.exists():
    return {}

  def read_line(line: Any) -> tuple[Key, Value]:
    key = field(line, "file", str), field(line, "id", str)
    if key not in dialogues:
      raise Misfit(f"the dialogue {key[1]!r:.60}, expected one of data.recorded")
    return key, make(line, dialogues[key])

  found = dict(json_lines.read(file, read_line, what))
  return {key: found[key] for key in dialogues if key in found}


def done(file: pathlib.Path, look: Callable[[], Mapping[Key, Any]]) -> set[Key]:
  """The dialogues that `look` finds in a run's file, the same in all processes.

  A line that was cut off by a kill is removed first.
  """

  def find() -> list[Key]:
    with workdir_lib.writing(file.parent):
      json_lines.mend(file)
    return list(look())

  return {(path, name) for path, name in processes.ask_first(find)}


def by_file(found: Mapping[Key, Value]) -> dict[str, list[Value]]:
  """What was found, by the name of its file in tables."""
  names = transcripts.names(dict.fromkeys(path for path, _ in found))
  grouped: dict[str, list[Value]] = {name: [] for name in names.values()}
  for (path, _), value in found.items():
    grouped[names[path]].append(value)
  return grouped
