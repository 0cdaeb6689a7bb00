"""The Sentient benchmark's table from recorded dialogues, whoever recorded them.

    python -m rlver_jax.leaderboard FILE... [--by=character|intention|need|tactic]
        [--scenarios=FILE] [--table=models|differences] [--format=text|markdown|csv] [--skip_broken]

A row for each file: score (the mean final emotion with its bootstrap interval), how many dialogues
succeed and fail, replies and tokens of a reply. With several files the first row is compared with
each other one on the scenarios that both have, in a table of its own, which CSV has only with
--table=differences. Every emotion is computed again from its changes, and a record that is broken
or inconsistent is named by file and line; then nothing is counted, unless --skip_broken asks for
the others. Exit codes: 0, or 2 for a mistake in the command or the files.
"""

import pathlib
import sys
from collections.abc import Collection, Sequence

from absl import flags

from rlver_jax import cli
from rlver_jax.errors import UserError
from rlver_jax.evaluation import board, scores, tables, transcripts
from rlver_jax.evaluation.transcripts import Problem, Transcript

BY = flags.DEFINE_enum("by", None, list(scores.GROUPS), "Rows for each group of dialogues too.")
SCENARIOS = flags.DEFINE_string(
  "scenarios", None, "The scenarios that the dialogues are of: a file, or a name as for data.path."
)
FORMAT = flags.DEFINE_enum("format", "text", list(tables.FORMATS), "How tables are written.")
TABLE = flags.DEFINE_enum(
  "table", None, ["models", "differences"], "One table alone; by default both, in CSV the first."
)
SKIP_BROKEN = flags.DEFINE_bool("skip_broken", False, "Count the other records of a file.")


def main(paths: list[str]) -> int:
  if not paths:
    raise UserError("the command line names no file, expected files of recorded dialogues.")
  if len({pathlib.Path(path).expanduser().resolve() for path in paths}) < len(paths):
    raise UserError("the command line names a file twice, expected each once.")
  if BY.value and TABLE.value == "differences":
    raise UserError("--by is given, expected none with --table=differences, which has no groups.")
  known = _known(SCENARIOS.value)
  found, broken = {}, 0
  for path, name in transcripts.names(paths).items():
    found[name], left_out = _read(pathlib.Path(path).expanduser(), known)
    broken += left_out
  if broken and not SKIP_BROKEN.value:
    raise UserError(
      f"the files have {broken} that cannot be counted, expected none (--skip_broken counts the "
      "others)."
    )
  counted = {name: dialogues for name, dialogues in found.items() if dialogues}
  if not counted:
    raise UserError("no file has a record that can be counted, expected recorded dialogues.")
  cli.show("\n\n".join(tables.written(rows, FORMAT.value) for rows in _tables(counted)))
  return 0


def _tables(found: dict[str, list[Transcript]]) -> list[tables.Rows]:
  ordered = dict(sorted(found.items(), key=lambda item: -_mean(item[1])))
  models = board.models(ordered, BY.value)
  if TABLE.value == "models" or (TABLE.value is None and FORMAT.value == "csv"):
    return [models]
  if TABLE.value == "differences":
    if len(ordered) < 2:
      raise UserError("--table is differences, expected at least two files that can be counted.")
    return [board.comparison(ordered)]
  return [models, board.comparison(ordered)] if len(ordered) > 1 else [models]


def _mean(dialogues: Sequence[Transcript]) -> float:
  return sum(t.final for t in dialogues) / len(dialogues)


def _known(path: str | None) -> Collection[str] | None:
  """The ids of a scenario file."""
  if path is None:
    return None
  from rlver_jax.dialogue import scenario

  return {found.id for found in scenario.read(scenario.resolve(path))[0]}


def _read(path: pathlib.Path, known: Collection[str] | None) -> tuple[list[Transcript], int]:
  """The dialogues of a file that can be counted, and how much can't, which is named on stderr: a
  record, or a file without any."""
  good, broken = [], 0
  for found in transcripts.read(path, known):
    if isinstance(found, Problem):
      cli.show(f"{path}, line {found.line}: found {found.found}.", sys.stderr)
      broken += 1
    else:
      good.append(found)
  if broken:
    cli.show(f"{path}: broken records: {broken} of {broken + len(good)}.", sys.stderr)
  elif not good:
    cli.show(f"{path}: no record, expected recorded dialogues.", sys.stderr)
  return good, broken or not good


if __name__ == "__main__":
  cli.run(main, operands=True)
