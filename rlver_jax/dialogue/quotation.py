"""The frame of a quoted reply: marks that the text between them cannot imitate.

The section `helper` of the templates puts a reply between two lines, `<<<` and `>>>` in the
package's own. Where a reply holds such a mark, it is spaced out; where an appraisal holds a
quotation in these marks, what is in it is not the simulator's own.
"""

import re

from rlver_jax.dialogue.sections import Parts

Frame = tuple[str, str]  # the marks before and after; "" for one that words cannot be told from
# Characters without a shape, which would hide between those of a mark.
_UNSEEN = "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"


def frame_of(parts: Parts) -> Frame:
  """What stands in the lines next to the field: at least two characters, none a letter or digit."""
  at = next(i for i, (_, name) in enumerate(parts) if name)
  before, after = parts[at][0].rstrip(), parts[at + 1][0].lstrip()
  start, end = before.split("\n")[-1].strip(), after.split("\n")[0].strip()
  return _mark(start), _mark(end)


def _mark(text: str) -> str:
  return text if len(text) > 1 and not re.search(r"[\w\s]", text) else ""


def neutral(text: str, frame: Frame) -> str:
  """The text with a blank after each character of a mark, so that it holds none.

  A mark is found in full-width forms too, and with unseen characters in it. All other text, and
  all text without a mark, stays as it is.
  """
  for mark in frame:
    if mark:
      text = _pattern(mark).sub(" ".join(mark) + " ", text)
  return text


def _pattern(mark: str) -> re.Pattern:
  wide = [chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in mark]
  return re.compile(
    f"{_UNSEEN}*".join(f"[{re.escape(c + w)}]" for c, w in zip(mark, wide, strict=True))
  )


def is_open(line: str, frame: Frame, before: bool) -> bool:
  """Whether a quotation is open at the end of a line, given whether one was before it."""
  start, end = frame
  if not (start and end):
    return False
  if start == end:
    return before != (line.count(start) % 2 == 1)
  opened, closed = line.rfind(start), line.rfind(end)
  return before if opened == closed else opened > closed
