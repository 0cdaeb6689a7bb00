"""What runs left in their folders, read for a page.

A run that still goes on is read as far as it has come. Dialogues of training are many: they are
read one step at a time.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlver_jax import heldout, json_lines
from rlver_jax import metrics as metrics_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Rules
from rlver_jax.dialogue.levels import Level
from rlver_jax.dialogue.scenario import intention_of
from rlver_jax.errors import UserError
from rlver_jax.evaluation import benchmark
from rlver_jax.evaluation.transcripts import Transcript, transcript

TASKS = ("rl", "sft", "benchmark")


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's folder.

  name: tells it from the page's other runs. metrics: the lines of metrics.jsonl. held_out: what
  there is by kind of user, then by `heldout.WHENS`. benchmark: the dialogues of a benchmark, each
  with what its scores are counted from (None where a partner failed). training: by step, the files
  of dialogues. ended: it has written its summary.
  """

  name: str
  folder: pathlib.Path
  config: ConfigDict
  metrics: list[dict[str, Any]]
  held_out: heldout.Played
  benchmark: list[tuple[Dialogue, Transcript | None]]
  training: dict[int, pathlib.Path]
  ended: bool


def read(paths: Sequence[str]) -> list[Run]:
  """The runs in these folders; UserError for one that is no run's, or holds what is damaged."""
  folders = [pathlib.Path(path).expanduser() for path in paths]
  if len({folder.resolve() for folder in folders}) < len(folders):
    raise UserError("the command line names a folder twice, expected each once.")
  names = [folder.resolve().name for folder in folders]
  return [
    _read(folder, str(folder) if names.count(name) > 1 else name)
    for folder, name in zip(folders, names, strict=True)
  ]


def read_named(folders: Mapping[str, str | os.PathLike]) -> dict[str, Run]:
  """The runs in these folders by the names that they are to have; UserError as for `read`."""
  return {name: _read(pathlib.Path(path).expanduser(), name) for name, path in folders.items()}


def _read(folder: pathlib.Path, name: str) -> Run:
  config = workdir_lib.read_config(folder)
  if config.task not in TASKS:
    raise UserError(
      f"{folder} holds a run of task '{config.task}', expected one of: {', '.join(TASKS)}."
    )
  held_out, played = {}, []
  if config.task == "rl":
    held_out = _held_out(folder, config)
  elif config.task == "benchmark" and (file := folder / benchmark.DIALOGUES).exists():
    played = json_lines.read(
      file, lambda record: (dialogue_of(record), _scored(record)), "dialogues", growing=True
    )
  training = workdir_lib.dialogue_files(folder)
  ended = (folder / metrics_lib.SUMMARY_FILE).exists()
  metrics = metrics_lib.read_metrics(folder)
  return Run(name, folder, config, metrics, held_out, played, training, ended)


def _held_out(folder: pathlib.Path, config: ConfigDict) -> heldout.Played:
  found: heldout.Played = {}
  for user in heldout.users(config):
    for when in heldout.WHENS:
      if (file := heldout.file(config, folder, when, user)).exists():
        found.setdefault(user, {})[when] = json_lines.read(file, dialogue_of, "dialogues")
    if len(both := found.get(user, {})) == len(heldout.WHENS):
      before, after = ([d.scenario.id for d in both[when]] for when in heldout.WHENS)
      if before != after:
        raise UserError(
          f"{heldout.file(config, folder, 'after', user)} is of other scenarios than the dialogues "
          "before training, expected the same in the same order."
        )
  return found


def training(run: Run) -> Iterator[tuple[int, list[Dialogue]]]:
  """The dialogues of training, a step at a time; UserError where they are damaged."""
  for step, file in run.training.items():
    yield step, json_lines.read(file, dialogue_of, "dialogues")


def counts(run: Run) -> dict[int, int]:
  """How many dialogues of training there are, by step."""
  try:
    return {step: file.read_bytes().count(b"\n") for step, file in run.training.items()}
  except OSError as error:
    raise UserError(
      f"{error.filename} cannot be read ({error.strerror}), expected dialogues."
    ) from error


def dialogue_of(record: Any) -> Dialogue:
  """A record's dialogue, whose scenario and start are as the record tells; Misfit otherwise.

  Of its rules only the initial emotion and the level's name are known.
  """
  scenario = records.scenario_of(record)
  intention_of(scenario.task)
  _, emotion, _ = records.exchange(record)
  level = Level(json_lines.field(record, "level", str))
  rules = Rules(Rules.initial_emotion if emotion is None else emotion, level=level)
  return records.dialogue_of(record, scenario, rules)


def _scored(record: Any) -> Transcript | None:
  return None if record["end"] == "failed" else transcript(record)
