"""Files with one JSON value a line: read with the line in every error, written all or nothing."""

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


def read(path: str | os.PathLike, make: Callable[[Any], Value], what: str) -> list[Value]:
  """What `make` makes of the JSON value in each line of a file.

  what: what the file holds, as in "recorded dialogues". Raises UserError, with file and line, for
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
  for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
    try:
      found.append(make(json.loads(line)))
    except (Misfit, ValueError, RecursionError) as error:
      found_here = error if isinstance(error, Misfit) else f"no JSON, expected {what}"
      raise UserError(f"{path}, line {number}: found {found_here}.") from error
  return found


def field(entry: Any, name: str, kind: type) -> Any:
  """The value of a field of a JSON object, which is exactly of this type; Misfit otherwise."""
  value = entry.get(name) if isinstance(entry, dict) else None
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
