"""Prompt templates: one text file of sections (see `sections.py`) per language.

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
from collections.abc import Sequence

from rlver_jax.dialogue import answers, quotation
from rlver_jax.dialogue import sections as sections_lib
from rlver_jax.dialogue.answers import PLAN_FIELDS
from rlver_jax.dialogue.levels import VANILLA
from rlver_jax.dialogue.sections import Parts
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


@dataclasses.dataclass(frozen=True)
class Templates:
  """The templates of one language.

  sections: name -> parts, each a literal text and the field that follows it (None at the end).
  labels: the five names of the appraisal's lines, in order: content, ..., change.
  goodbye: the phrases that end a dialogue, as written in the file.
  levels: the templates of the levels that were loaded too, by name; `vanilla` are these.
  """

  language: str
  sections: dict[str, Parts]
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
    return sections_lib.filled(parts, fields)

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
  sections_lib.check_all_there(path, sections, SECTIONS)
  labels = _labels(sections_lib.literal(sections["labels"]), path, first_line["labels"])
  _check_plan(sections["plan"], labels, path, first_line["plan"])
  lines = sections_lib.literal(sections["goodbye"]).splitlines()
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


def _read(path, allowed: dict[str, set[str]]) -> tuple[dict[str, Parts], dict[str, int]]:
  return sections_lib.read(
    path, allowed, "prompt templates", optional=OPTIONAL, may_be_empty=("labels", "goodbye")
  )


def _check_plan(parts, labels: dict[str, str], path, first_line: int) -> None:
  for label in labels.values():
    if not re.search(rf"{re.escape(label)}\s*[:：]", sections_lib.literal(parts)):
      raise UserError(
        f"{path}, line {first_line}: section 'plan' does not name the label {label!r},"
        f" expected a line '{label}: ...' as in section 'labels'"
      )


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
