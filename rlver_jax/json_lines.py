"""Files with one JSON value a line: read with the line in every error, written all or nothing, or
line by line where each is worth keeping as soon as it is there."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from rlver_jax import files
from rlver_jax.errors import UserError

Value = TypeVar("Value")


class Misfit(Exception):
  """A line does not fit: what was found and what was expected."""


def read(
  path: str | os.PathLike, make: Callable[[Any], Value], what: str, growing: bool = False
) -> list[Value]:
  """What `make` makes of the JSON value in each line of a file.

  what: what the file holds, as in "recorded dialogues". growing: lines may still be added, so an
  end without a line break is left out. Raises UserError, with file and line, for
  a file that cannot be read and for the first line that is no JSON or for which `make` raises
  Misfit.
  """
  found = []
  try:
    # Not `splitlines`: JSON strings may hold other line separators, such as U+2028.
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} cannot be read ({reason}), expected {what}.") from error
  for number, line in enumerate(lines[:-1] if growing or lines[-1] == "" else lines, 1):
    try:
      found.append(make(json.loads(line)))
    except (Misfit, ValueError, RecursionError) as error:
      found_here = error if isinstance(error, Misfit) else f"no JSON, expected {what}"
      raise UserError(f"{path}, line {number}: found {found_here}.") from error
  return found


def field(entry: Any, name: str, kind: type, default: Any = None) -> Any:
  """The value of a field of a JSON object, which is exactly of this type; Misfit otherwise.

  default: of this type, for an object without the field; None: it has to be there.
  """
  if not isinstance(entry, dict):
    raise Misfit(f"{entry!r:.60}, expected a JSON object")
  if default is None and name not in entry:
    raise Misfit(f"no {name!r}, expected {kind.__name__}")
  value = entry.get(name, default)
  if type(value) is not kind:
    raise Misfit(f"{value!r:.60} as {name!r}, expected {kind.__name__}")
  return value


def write(path: str | os.PathLike, values: Iterable[dict[str, Any]]) -> None:
  """Writes JSON objects to a file, one a line, all or nothing; its folder is made if need be."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as file:
    for value in values:
      file.write(json.dumps(value, ensure_ascii=False) + "\n")


def append(path: str | os.PathLike, value: dict[str, Any]) -> None:
  """Adds a line, which is on the disk when the function returns."""
  with open(path, "ab") as file:
    file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def mend(path: str | os.PathLike) -> None:
  """Removes the end of a line that `append` was killed in; a file that is not there stays so."""
  path = pathlib.Path(path)
  if path.exists() and not (raw := path.read_bytes()).endswith(b"\n"):
    os.truncate(path, raw.rfind(b"\n") + 1)
