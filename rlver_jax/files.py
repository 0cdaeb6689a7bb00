"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[TextIO]:
  """A UTF-8 file to write into, which takes the place of `path` at the end of the `with` block.

  Where the block raises, or the process ends in it, `path` stays as it was.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  with temporary.open("w", encoding="utf-8") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
