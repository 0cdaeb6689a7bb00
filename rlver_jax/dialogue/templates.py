"""Prompt templates: one text file per language, read once and checked on reading.

    === name ===        opens a section; `#` lines before the first one are comments
    text with {field}   filled in by `Templates.render`; a literal brace is doubled

The simulated user is the assistant of an append-only chat: `system` (who it is), then for each
turn `helper` (the reply, quoted), `plan` or `choice` (appraise it) and `message` (speak).
Values are inserted verbatim and never read as a template, so nothing that a policy writes can
alter a prompt; `quote` keeps a reply from imitating the marks that frame it. What the simulator
writes is read back by `parse_plan` and `is_goodbye`.

A level of difficulty (`levels.py`) has a file of the same name in a folder of its own, with
those of the simulated user's sections that differ: `Templates.at` puts them in place.
"""

import dataclasses
import importlib.resources
import pathlib
import re
import string
from collections.abc import Sequence

from rlver_jax.dialogue import answers, quotation
from rlver_jax.dialogue.answers import PLAN_FIELDS
from rlver_jax.dialogue.levels import VANILLA
from rlver_jax.errors import UserError

LABELS = (*PLAN_FIELDS, "change")
SECTIONS = {  # section -> the placeholders that it must have, but for `OPTIONAL`, and no others
  "system": {"persona", "background", "character", "traits", "task"},
  "opening": {"emotion", "state"},
  "helper": {"reply"},
  "plan": {"emotion", "state"},
  "choice": {"emotion", "state"},
  "message": {"emotion", "state", "change", *PLAN_FIELDS},
  "labels": set(),
  "goodbye": set(),
  "policy": set(),
  "policy_think": set(),
}
# Placeholders that a section may do without: the model that is asked has them elsewhere (a message
# follows the appraisal that it repeats), or has learned to do without.
OPTIONAL = {
  "system": {"persona", "character", "traits"},
  "opening": {"emotion", "state"},
  "plan": {"emotion", "state"},
  "choice": {"emotion", "state"},
  "message": set(PLAN_FIELDS),
}
# Those that a level may have of its own: the simulated user's, but for what reads it back.
LEVEL_SECTIONS = {n: SECTIONS[n] for n in ("system", "opening", "plan", "choice", "message")}
# The package's own prompts, and those of its embedded models.
PACKAGE_FOLDERS = {"": "dialogue/prompts", "tiny": "assets/embedded/prompts"}

_HEADER = re.compile(r"===\s*(\S+)\s*===\s*")


@dataclasses.dataclass(frozen=True)
class Templates:
  """The templates of one language.

  sections: name -> parts, each a literal text and the field that follows it (None at the end).
  labels: the five names of the appraisal's lines, in order: content, ..., change.
  goodbye: the phrases that end a dialogue, as written in the file.
  levels: the templates of the levels that were loaded too, by name; `vanilla` are these.
  """

  language: str
  sections: dict[str, tuple[tuple[str, str | None], ...]]
  labels: dict[str, str]
  goodbye: tuple[str, ...]
  levels: "dict[str, Templates]" = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, "_label_line", answers.label_line(self.labels.values()))
    by_name = {label.casefold(): field for field, label in self.labels.items()}
    object.__setattr__(self, "_labelled", by_name)
    object.__setattr__(self, "_goodbye", answers.goodbye_pattern(self.goodbye, self.language))
    object.__setattr__(self, "_frame", quotation.frame_of(self.sections["helper"]))

  def at(self, level: str) -> "Templates":
    """The templates of a level; KeyError where they were not loaded."""
    return self if level == VANILLA.name else self.levels[level]

  def render(self, section: str, **fields) -> str:
    """The section's text with every field inserted verbatim.

    Raises:
      KeyError: there is no such section.
      TypeError: `fields` are not exactly the placeholders that the section may have.
    """
    parts = self.sections[section]
    if fields.keys() != SECTIONS[section]:
      raise TypeError(f"section {section} takes {sorted(SECTIONS[section])}, not {sorted(fields)}")
    return "".join(text + (str(fields[name]) if name else "") for text, name in parts)

  def quote(self, reply: str) -> list[str]:
    """The section `helper` in pieces, template and quoted reply in turn, the template first.

    The marks around the reply are spaced out where it holds them (see `quotation.py`), so that the
    quotation cannot seem to end; any other text is quoted as it is.
    """
    parts, reply = self.sections["helper"], quotation.neutral(reply, self._frame)
    return [piece for text, name in parts for piece in ((text, reply) if name else (text,))]

  def is_goodbye(self, text: str) -> bool:
    """Whether a message of the user holds a phrase that ends the dialogue."""
    return self._goodbye.search(answers.comparable(text)) is not None

  def parse_plan(self, text: str, cut: bool = False) -> tuple[dict[str, str], int | None]:
    """The fields and the change of the appraisal that the simulator wrote: `answers.parse_plan`."""
    return answers.parse_plan(text, self._label_line, self._labelled, self._frame, cut)


def load(language: str, folder: str = "", levels: Sequence[str] = ()) -> Templates:
  """Reads FOLDER/{language}.txt, or a file of the package where `folder` is one of PACKAGE_FOLDERS.

  levels: names of levels whose FOLDER/{level}/{language}.txt is read too.

  Raises:
    UserError: a file or a section is missing, a section is unknown or comes twice, a
      placeholder is unknown or missing, a label is missing, or there is no goodbye phrase.
  """
  package = importlib.resources.files("rlver_jax")
  own = PACKAGE_FOLDERS.get(folder)
  root = pathlib.Path(folder) if own is None else pathlib.Path(str(package / own))
  path = root / f"{language}.txt"
  sections, first_line = _read(path, SECTIONS)
  if absent := [name for name in SECTIONS if name not in sections]:
    raise UserError(f"{path} has no section {absent[0]!r}, expected a line '=== {absent[0]} ==='")
  labels = _labels(_literal(sections["labels"]), path, first_line["labels"])
  _check_plan(sections["plan"], labels, path, first_line["plan"])
  lines = _literal(sections["goodbye"]).splitlines()
  goodbye = tuple(line.strip() for line in lines if line.strip())
  if not goodbye:
    raise UserError(f"{path} has no phrase in section 'goodbye', expected at least one")
  templates = Templates(language, sections, labels, goodbye)
  others = [level for level in levels if level != VANILLA.name]
  of_levels = {level: _load_level(templates, root / level / f"{language}.txt") for level in others}
  return dataclasses.replace(templates, levels=of_levels)


def _load_level(templates: Templates, path) -> Templates:
  """The templates with the sections of a level's file in place of their own."""
  sections, first_line = _read(path, LEVEL_SECTIONS)
  if not sections:
    expected = ", ".join(LEVEL_SECTIONS)
    raise UserError(f"{path} has no section, expected at least one of {expected}")
  if "plan" in sections:
    _check_plan(sections["plan"], templates.labels, path, first_line["plan"])
  return dataclasses.replace(templates, sections=templates.sections | sections)


def _read(path, allowed: dict[str, set[str]]) -> tuple[dict[str, tuple], dict[str, int]]:
  """The parts of each section of a file, and the number of its first line."""
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"the prompt templates {path} cannot be read ({error}), a UTF-8 text file was expected"
    ) from error
  lines = _split(text, path, allowed)
  sections = {name: _parse(name, numbered, path) for name, numbered in lines.items()}
  return sections, {name: numbered[0][0] if numbered else 0 for name, numbered in lines.items()}


def _literal(parts: tuple[tuple[str, str | None], ...]) -> str:
  """A section's text without its fields."""
  return "".join(text for text, _ in parts)


def _check_plan(parts, labels: dict[str, str], path, first_line: int) -> None:
  for label in labels.values():
    if not re.search(rf"{re.escape(label)}\s*[:：]", _literal(parts)):
      raise UserError(
        f"{path}, line {first_line}: section 'plan' does not name the label {label!r},"
        f" expected a line '{label}: ...' as in section 'labels'"
      )


def _split(text: str, path, allowed: dict[str, set[str]]) -> dict[str, list[tuple[int, str]]]:
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


def _parse(name: str, lines: list[tuple[int, str]], path) -> tuple[tuple[str, str | None], ...]:
  """A section's (literal text, field) pairs, checked against what the section must have."""
  expected = SECTIONS[name]
  wanted = f"expected {', '.join(sorted(expected)) or 'none'}"
  parts, literal, seen = [], [], set()
  for i, (number, line) in enumerate(lines):
    where = f"{path}, line {number}"
    try:
      pieces = list(string.Formatter().parse(line))
    except ValueError as error:
      raise UserError(
        f"{where}: found a brace that cannot be read ({error}), a literal brace is doubled"
      ) from error
    for text, field, spec, conversion in pieces:
      literal.append(text)
      if field is None:
        continue
      if field not in expected or spec or conversion:
        raise UserError(
          f"{where}: section {name!r} has the unknown placeholder {{{field}}}, {wanted}"
        )
      parts.append(("".join(literal), field))
      literal = []
      seen.add(field)
    if i + 1 < len(lines):
      literal.append("\n")
  if missing := sorted(expected - OPTIONAL.get(name, set()) - seen):
    where = f"{path}, line {lines[0][0]}" if lines else f"{path}"
    raise UserError(f"{where}: section {name!r} lacks the placeholder {{{missing[0]}}}, {wanted}")
  parts.append(("".join(literal), None))
  if name not in ("labels", "goodbye") and not seen and not parts[0][0].strip():
    raise UserError(f"{path}: section {name!r} is empty, expected text")
  return tuple(parts)


def _labels(text: str, path, first_line: int) -> dict[str, str]:
  """The labels by field, in the order of `LABELS`."""
  labels: dict[str, str] = {}
  for number, line in enumerate(text.splitlines(), first_line):
    if not line.strip():
      continue
    field, _, label = (x.strip() for x in line.partition(":"))
    taken = {x.casefold() for x in labels.values()}
    if field not in LABELS or field in labels or not label or label.casefold() in taken:
      raise UserError(
        f"{path}, line {number}: found {line.strip()!r} in section 'labels',"
        f" expected 'field: label' once for each of {', '.join(LABELS)}"
      )
    labels[field] = label
  if absent := [field for field in LABELS if field not in labels]:
    raise UserError(
      f"{path}: section 'labels' has no label for {absent[0]!r}, expected a line '{absent[0]}: ...'"
    )
  return {field: labels[field] for field in LABELS}
