"""A table as text for a terminal, as Markdown or as CSV."""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from rlver_jax import files
from rlver_jax.side_by_side import plain, width


class Range(NamedTuple):
  """A cell with two numbers, of which each has a column in CSV. In the head `name` is for both."""

  low: str
  high: str
  name: str = ""


Row = Sequence[str | Range]
Rows = Sequence[Row]  # the first is the head; all are as long


def text(rows: Rows) -> str:
  """Aligned columns, the first to the left, the others to the right."""
  found = shown(rows)
  widths = [max(map(width, column)) for column in zip(*found, strict=True)]
  lines = []
  for row in found:
    gaps = [" " * (most - width(cell)) for cell, most in zip(row, widths, strict=True)]
    first = row[0] + gaps[0]
    lines.append("  ".join([first, *map("".join, zip(gaps[1:], row[1:], strict=True))]).rstrip())
  return "\n".join(lines)


def markdown(rows: Rows) -> str:
  """A table of GitHub's Markdown."""
  head, *body = ([cell.replace("|", "\\|") for cell in row] for row in shown(rows))
  rule = ["---", *["---:"] * (len(head) - 1)]
  return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def to_csv(rows: Rows) -> str:
  """Comma-separated values (RFC 4180, with the line ends of this platform)."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  for row in rows:
    pairs = (cell[:2] if isinstance(cell, Range) else (cell,) for cell in row)
    writer.writerow([cell for pair in pairs for cell in pair])
  return file.getvalue().rstrip("\n")


def written(rows: Rows, form: str) -> str:
  """The table in one of `FORMATS`."""
  return FORMATS[form](rows)


def write(rows: Rows, workdir: pathlib.Path, name: str = "table") -> None:
  """Writes `name`.csv and `name`.md to a run's folder, each all or nothing."""
  for ending, form in (("csv", "csv"), ("md", "markdown")):
    with files.replacing(workdir / f"{name}.{ending}") as file:
      file.write(written(rows, form) + "\n")


def shown(rows: Rows) -> list[list[str]]:
  """The cells for a person: on one line, without control characters."""
  whole = (
    [c.name or f"{c.low} to {c.high}" if isinstance(c, Range) else c for c in row] for row in rows
  )
  return [[plain(cell) for cell in row] for row in whole]


FORMATS = {"text": text, "markdown": markdown, "csv": to_csv}
