"""The folder of one run: whose it is, and where things lie in it.

config.json       the configuration that the run belongs to; of runs that train:
checkpoints/      orbax checkpoints, by step
metrics.jsonl     one line a step; tensorboard/ has the same
dialogues/        the dialogues of each step, JSON lines
spent.json        what a remote simulated user has cost so far
evaluation/       dialogues on held-out scenarios before the first step and after the last
evaluation.json   what they came to; like the next two, written when the run ends
curves.png        the metrics as curves
summary.json      what the run came to
rescored.jsonl    what `evaluate.py` found when it scored the dialogues anew
report.html       the page that `report.py` makes of it
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from rlver_jax import files, flat_config
from rlver_jax.errors import UserError

SPENT_FILE = "spent.json"


def claim(workdir: str, config: ConfigDict) -> pathlib.Path:
  """Makes the folder, or checks that it holds a run of the same configuration.

  Raises UserError when it cannot be written, holds something else, or belongs to a run whose
  configuration differs in a field that a run may not change. Of several processes, which may
  share the folder, the first one claims it.
  """
  path = pathlib.Path(workdir).expanduser()
  file = path / "config.json"
  flat = flat_config.flatten(config)
  if jax.process_index() > 0:
    return path
  try:
    path.mkdir(parents=True, exist_ok=True)
    if file.exists():
      _check(path, json.loads(file.read_text(encoding="utf-8")), flat)
    elif any(not child.name.startswith(".") for child in path.iterdir()):
      raise UserError(
        f"workdir {path} holds files but no config.json, expected an empty folder or a run."
      )
    write_json(file, flat)
  except OSError as error:
    raise UserError(
      f"workdir {path} cannot be used ({error.strerror}), expected a folder that can be written."
    ) from error
  except ValueError as error:
    raise UserError(
      f"{file} is not a JSON object ({error}), expected the configuration of a run."
    ) from error
  return path


def read_config(workdir: str | os.PathLike) -> ConfigDict:
  """The configuration of the run in this folder (tuples are lists).

  Raises UserError when the folder holds no run, or one that lacks a field.
  """
  file = pathlib.Path(workdir) / "config.json"
  try:
    flat = json.loads(file.read_text(encoding="utf-8"))
    return flat_config.unflatten(flat)
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  except OSError as error:
    raise UserError(
      f"{file} cannot be read ({error.strerror}), expected the folder of a run."
    ) from error
  except (ValueError, AttributeError, TypeError) as error:
    raise UserError(
      f"{file} is not the configuration of a run ({type(error).__name__}: {error}), expected one "
      "that rlver_jax.main wrote."
    ) from error


def _check(path: pathlib.Path, old: Any, new: dict[str, Any]) -> None:
  if not isinstance(old, dict):
    raise ValueError(f"found a {type(old).__name__}")
  if field := flat_config.difference(old, new):
    raise UserError(
      f"workdir {path} belongs to a run with {field} = {old.get(field)!r}, found "
      f"{new.get(field)!r}, expected the same configuration or another --workdir."
    )


def dialogue_files(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  """The files with the dialogues of training, by step, in order."""
  paths = sorted((workdir / "dialogues").glob("*"))
  named = ((re.fullmatch(r"step_([0-9]+)\.jsonl", path.name), path) for path in paths)
  return dict(sorted((int(match[1]), path) for match, path in named if match))


def read_spent(path: pathlib.Path) -> dict[str, int]:
  """What the earlier starts of the run have spent; UserError where the file is damaged."""
  file = path / SPENT_FILE
  if not file.exists():
    return {}
  try:
    spent = json.loads(file.read_text(encoding="utf-8"))
    if not all(type(count) is int and count >= 0 for count in spent.values()):
      raise ValueError("a value that is no count")
    return spent
  except (AttributeError, ValueError) as error:
    raise UserError(
      f"{file} cannot be read ({error}), expected a JSON object of counts as a run writes it."
    ) from error


def write_spent(path: pathlib.Path, spent: dict[str, int]) -> None:
  """Keeps what the run has spent, whatever becomes of its steps; nothing where that is nothing."""
  if spent and jax.process_index() == 0:
    write_json(path / SPENT_FILE, spent)


class Spender(Protocol):
  """Who works behind a server, or may."""

  def spent(self) -> dict[str, int]: ...

  def resume(self, spent: dict[str, int]) -> None: ...

  def close(self) -> None: ...


@contextlib.contextmanager
def accounted(path: pathlib.Path, spenders: Mapping[str, Spender]) -> Iterator[None]:
  """Around the work of an evaluation: each goes on from what it has spent in earlier starts; what
  it has at the end, whatever ends it, is kept, and it is closed.

  spenders: by what stands before the names of what they spend.
  """
  before = read_spent(path)
  for prefix, spender in spenders.items():
    names = [name for name in spender.spent() if prefix + name in before]
    spender.resume({name: before[prefix + name] for name in names})
  try:
    yield
  finally:
    after = {
      f"{p}{name}": n for p, spender in spenders.items() for name, n in spender.spent().items()
    }
    with contextlib.suppress(OSError):  # a disk that is full is reported by what it stopped
      write_spent(path, after)
    for spender in spenders.values():
      spender.close()


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
  """Around what writes to the folder: a full or read-only disk is the user's to mend."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"workdir {workdir} cannot be written ({error.strerror or error}), expected a writable disk "
      "with room; the same command goes on."
    ) from error


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes a JSON file, all or nothing."""
  with files.replacing(file) as out:
    json.dump(value, out, indent=1, ensure_ascii=False, sort_keys=True)
