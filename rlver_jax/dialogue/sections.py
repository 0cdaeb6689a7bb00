"""Text files of named sections, read once and checked on reading.

=== name ===        opens a section; `#` lines before the first one are comments
text with {field}   filled in later; a literal brace is doubled
"""

import re
import string
from collections.abc import Collection, Mapping

from rlver_jax.errors import UserError

Parts = tuple[tuple[str, str | None], ...]  # literal text and the field after it (None at the end)

_HEADER = re.compile(r"===\s*(\S+)\s*===\s*")


def read(
  path,
  allowed: Mapping[str, Collection[str]],
  what: str,
  *,
  optional: Mapping[str, Collection[str]] | None = None,
  may_be_empty: Collection[str] = (),
) -> tuple[dict[str, Parts], dict[str, int]]:
  """The parts of each section of a file, and the number of its first line.

  Args:
    path: of the file, a pathlib.Path.
    allowed: section -> the placeholders that it must have, and no others.
    what: what the file is called, as in "prompt templates".
    optional: section -> those of them that it may do without.
    may_be_empty: sections that need no text.

  Raises UserError for a file that cannot be read, an unknown section or one that comes twice or is
  empty, an unknown or missing placeholder, and text before the first section.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"the {what} {path} cannot be read ({error}), a UTF-8 text file was expected"
    ) from error
  lines = _split(text, path, allowed)
  sections = {
    name: _parse(
      name, numbered, path, set(allowed[name]), set((optional or {}).get(name, ())), may_be_empty
    )
    for name, numbered in lines.items()
  }
  return sections, {name: numbered[0][0] if numbered else 0 for name, numbered in lines.items()}


def check_all_there(path, sections: Collection[str], expected: Collection[str]) -> None:
  """Raises UserError for the first expected section that a file does not have."""
  if absent := [name for name in expected if name not in sections]:
    raise UserError(f"{path} has no section {absent[0]!r}, expected a line '=== {absent[0]} ==='")


def literal(parts: Parts) -> str:
  """A section's text without its fields."""
  return "".join(text for text, _ in parts)


def filled(parts: Parts, fields: Mapping[str, object]) -> str:
  """A section's text with every field inserted verbatim."""
  return "".join(text + (str(fields[name]) if name else "") for text, name in parts)


def _split(text: str, path, allowed: Collection[str]) -> dict[str, list[tuple[int, str]]]:
  """Section name -> its numbered lines, without the blank ones around them."""
  sections: dict[str, list[tuple[int, str]]] = {}
  current = None
  for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
    if header := _HEADER.fullmatch(line):
      name = header[1]
      if name not in allowed:
        raise UserError(
          f"{path}, line {number}: unknown section {name!r}, expected one of {', '.join(allowed)}"
        )
      if name in sections:
        raise UserError(f"{path}, line {number}: section {name!r} comes twice, expected once")
      current = sections[name] = []
    elif current is not None:
      current.append((number, line))
    elif line.strip() and not line.startswith("#"):
      raise UserError(
        f"{path}, line {number}: found text before the first section,"
        " expected a comment that starts with # or a line '=== name ==='"
      )
  for lines in sections.values():
    while lines and not lines[-1][1].strip():
      lines.pop()
    while lines and not lines[0][1].strip():
      lines.pop(0)
  return sections


def _parse(
  name: str,
  lines: list[tuple[int, str]],
  path,
  expected: set[str],
  optional: set[str],
  may_be_empty: Collection[str],
) -> Parts:
  """A section's (literal text, field) pairs, checked against what the section must have."""
  wanted = f"expected {', '.join(sorted(expected)) or 'none'}"
  parts, text_so_far, seen = [], [], set()
  for i, (number, line) in enumerate(lines):
    where = f"{path}, line {number}"
    try:
      pieces = list(string.Formatter().parse(line))
    except ValueError as error:
      raise UserError(
        f"{where}: found a brace that cannot be read ({error}), a literal brace is doubled"
      ) from error
    for text, field, spec, conversion in pieces:
      text_so_far.append(text)
      if field is None:
        continue
      if field not in expected or spec or conversion:
        raise UserError(
          f"{where}: section {name!r} has the unknown placeholder {{{field}}}, {wanted}"
        )
      parts.append(("".join(text_so_far), field))
      text_so_far = []
      seen.add(field)
    if i + 1 < len(lines):
      text_so_far.append("\n")
  if missing := sorted(expected - optional - seen):
    where = f"{path}, line {lines[0][0]}" if lines else f"{path}"
    raise UserError(f"{where}: section {name!r} lacks the placeholder {{{missing[0]}}}, {wanted}")
  parts.append(("".join(text_so_far), None))
  if name not in may_be_empty and not seen and not parts[0][0].strip():
    raise UserError(f"{path}: section {name!r} is empty, expected text")
  return tuple(parts)
