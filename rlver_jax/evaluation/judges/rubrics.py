"""What a judge is told and asked: a file of sections (see `dialogue/sections.py`) per language.

The judge reads a conversation that only grows: what the user wanted, then what both said, each
quoted between marks that no text in between can imitate. Each question comes last.
"""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Callable

from rlver_jax.dialogue import quotation
from rlver_jax.dialogue import sections as sections_lib
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.dialogue.sections import Parts
from rlver_jax.dialogue.simulators.appraisal import STRATEGIES
from rlver_jax.errors import UserError
from rlver_jax.evaluation.judges.base import AXES, BANDS, CAPABILITIES

# Sections that say what names mean, a line 'name: meaning' for each.
MEANINGS = {"strategies": STRATEGIES, "states": BANDS}
SECTIONS = {  # section -> the placeholders that it must have, and no others
  "system": ("strategies", "states"),
  "strategies": (),
  "states": (),
  "intention": ("text",),
  "user": ("text",),
  "helper": ("text",),
  "strategy": (),
  "state": (),
  "reason": ("rubric",),
  "number": (),
  "reason_and_number": ("rubric",),
  "axis": ("rubric",),
  "best": ("number", "passage"),
  "worst": ("number", "passage"),
  **dict.fromkeys((*CAPABILITIES, *AXES), ()),
}


@dataclasses.dataclass(frozen=True)
class Rubrics:
  """The texts of one language."""

  language: str
  sections: dict[str, Parts]

  @property
  def system(self) -> str:
    """What a judge's chat begins with; it has the names of MEANINGS with what they mean."""
    listed = {
      section: "\n".join(f"- {line}" for line in _lines(self.sections[section]))
      for section in MEANINGS
    }
    return self.render("system", **listed)

  def render(self, section: str, **fields: object) -> str:
    """A section's text with its fields, which are not quoted."""
    return sections_lib.filled(self.sections[section], fields)

  def question(self, section: str, rubric: str) -> str:
    """A section that asks about one of CAPABILITIES or AXES."""
    return self.render(section, rubric=self.render(rubric))

  def quote(self, section: str, text: str) -> list[str]:
    """`intention`, `user` or `helper` in pieces, frame and text in turn, the frame first.

    The marks of the frame are spaced out where the text holds them.
    """
    parts = self.sections[section]
    text = quotation.neutral(text, quotation.frame_of(parts))
    return [piece for part, name in parts for piece in ((part, text) if name else (part,))]


def read_aloud(
  rubrics: Rubrics, recorded: Recorded, plain: Callable[[str], str] = lambda text: text
) -> list[list[str]]:
  """What the judge has read when each appraised reply was just given, and at the end.

  Each item is what is new, in pieces to be encoded apart, so that no text changes another's ids.
  plain: is done to every text that is quoted.
  """

  def quote(section: str, text: str) -> list[str]:
    return rubrics.quote(section, plain(text))

  start, shown = recorded.start, []
  new, said = [*quote("intention", start.scenario.task), "\n\n"], start.opening
  for turn in recorded.turns:
    new += [*quote("user", said.text), "\n\n", *quote("helper", turn.reply.text)]
    shown.append(new)
    new, said = ["\n\n"], turn.message
  shown.append([*new, *quote("user", said.text)] if said is not None else [])
  return shown


def load(language: str, folder: str = "") -> Rubrics:
  """Reads FOLDER/{language}.txt, the package's own where `folder` is empty.

  Raises UserError for a file that cannot be read, a section that is missing, unknown, empty or
  there twice, a placeholder that is missing or unknown, and other strategies or states than there
  are.
  """
  package = importlib.resources.files("rlver_jax") / "assets" / "rubrics"
  path = pathlib.Path(folder).expanduser() if folder else pathlib.Path(str(package))
  path = path / f"{language}.txt"
  sections, first_line = sections_lib.read(path, SECTIONS, "rubrics")
  sections_lib.check_all_there(path, sections, SECTIONS)
  for section, names in MEANINGS.items():
    named = sorted(line.partition(":")[0].strip() for line in _lines(sections[section]))
    if named != sorted(names):
      raise UserError(
        f"{path}, line {first_line[section]}: section '{section}' names {', '.join(named)}, "
        f"expected a line 'name: meaning' for each of {', '.join(names)}."
      )
  return Rubrics(language, sections)


def _lines(parts: Parts) -> list[str]:
  """The lines of a section without fields, but for blank ones."""
  lines = sections_lib.literal(parts).splitlines()
  return [line.strip() for line in lines if line.strip()]
