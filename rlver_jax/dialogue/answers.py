"""What a simulated user writes, read back: its appraisal, its change of emotion, its goodbye."""

import re
import unicodedata
from collections.abc import Collection, Mapping

from rlver_jax.dialogue import quotation
from rlver_jax.dialogue.emotion import MAX_CHANGE, MIN_CHANGE

PLAN_FIELDS = ("content", "completion", "activity", "feeling")

_INTEGER = re.compile(r"([+-]?)\s?([0-9]{1,2})")
_MINUS = str.maketrans("−–—", "---")  # NFKC leaves these dashes as they are
_MARKUP = "*_`~ \t"  # Markdown emphasis around a label or a value


def label_line(labels: Collection[str]) -> re.Pattern:
  """A line that begins with one of the labels, in whatever layout: (label, the rest)."""
  names = "|".join(re.escape(x) for x in sorted(labels, key=len, reverse=True))
  # A line that begins with > is a quotation in Markdown, and none of the form's. Nothing is tried
  # twice (*+ and ++), so that no line takes long.
  lead = r"\s*+(?:[-*+•#]++\s++|[0-9]{1,2}[.)、]\s*+)*+"
  return re.compile(rf"{lead}[{_MARKUP}]*+({names})[{_MARKUP}]*+[:：](.*)", re.IGNORECASE)


def parse_plan(
  text: str, pattern: re.Pattern, labelled: Mapping[str, str], frame: quotation.Frame, cut: bool
) -> tuple[dict[str, str], int | None]:
  """Reads an appraisal, which may hold quotations of the reply that it is about.

  A labelled line does not count inside the marks of a quotation (which reaches to the end where
  it is not closed) or after a Markdown `>`.

  Args:
    pattern: a labelled line, from `label_line`.
    labelled: casefolded label -> field.
    frame: the marks of a quotation.
    cut: the token limit ended the text, so that its last labelled line may be quoted or torn.

  Returns:
    The fields content, completion, activity and feeling ("" where absent; a field reaches to the
    next labelled line; the last one counts where a label comes twice) and the change, or None.
    The last line labelled as the change decides alone: where it holds anything but an integer in
    -10..10, an earlier one (a quotation of the reply, say) does not stand in. Nothing decides
    where the text is cut, where the form goes on after that line, or where an earlier such line
    differs, unless that one came before the form was whole and this one after: for all that can
    be told, the last one may be the quoted one.
  """
  found: dict[str, list[str]] = {}
  lines: list[str] = []
  changes: list[tuple[int | None, bool]] = []  # each, and whether the form was whole before it
  goes_on = quoted = False
  for line in text.splitlines():
    match = None if quoted else pattern.fullmatch(line)
    quoted = quotation.is_open(line, frame, quoted)
    if match:
      field = labelled[match[1].casefold()]
      if field == "change":
        changes.append((parse_change(match[2]), found.keys() >= set(PLAN_FIELDS)))
      goes_on = field != "change"
      lines = found[field] = [match[2]]
    else:
      lines.append(line)
  fields = {field: _plain("\n".join(found.get(field, ()))) for field in PLAN_FIELDS}
  if cut or goes_on or not changes:
    return fields, None
  last, whole = changes[-1]
  rivals = (change for change, after_whole in changes[:-1] if after_whole or not whole)
  return fields, None if any(change != last for change in rivals) else last


def parse_change(text: str) -> int | None:
  """The change of emotion: the integer in -10..10 that is all of `text`, or None."""
  text = unicodedata.normalize("NFKC", text).translate(_MINUS).strip()
  match = _INTEGER.fullmatch(text.strip(_MARKUP).rstrip(_MARKUP + ".。"))
  if not match:
    return None
  value = int(match[1] + match[2])
  return value if MIN_CHANGE <= value <= MAX_CHANGE else None


def goodbye_pattern(phrases: tuple[str, ...], language: str) -> re.Pattern:
  """Any of the phrases; one that starts or ends with a letter does so at a word boundary.

  Chinese has no such boundaries, so there only ASCII letters count as letters.
  """
  flags = re.ASCII if language == "zh" else re.NOFLAG
  alternatives = []
  for phrase in map(comparable, phrases):
    start = r"(?<!\w)" if re.match(r"\w", phrase, flags) else ""
    end = r"(?!\w)" if re.match(r"\w", phrase[-1], flags) else ""
    alternatives.append(start + re.escape(phrase) + end)
  return re.compile("|".join(alternatives), flags)


def comparable(text: str) -> str:
  """Casefolded, with one kind of apostrophe, full-width forms narrowed and spaces collapsed."""
  text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
  return " ".join(text.split())


def _plain(text: str) -> str:
  """A field's text without the Markdown emphasis around it."""
  return text.strip().strip(_MARKUP).strip()
