"""Two dialogues next to each other on a terminal, turn by turn.

A column of a terminal holds a Latin letter; a Chinese character takes two, an accent that is put on
another character none. What a model wrote is shown as text: no control character of it is sent.
"""

import itertools
import unicodedata
from collections.abc import Sequence

from rlver_jax.dialogue.dialogue import Dialogue, PolicyReply

WIDTH = 99  # columns in all
BETWEEN = " | "
COLUMN = (WIDTH - len(BETWEEN)) // 2
# The most columns of text that are shown
LONGEST = 8 * COLUMN  # of a message or a reply,
LONGEST_THOUGHT = 3 * COLUMN  # and of a thought.
ENDS = {
  "goodbye": "the user left",
  "success": "success",
  "failure": "failure",
  "turns": "the last turn",
  "length": "no room for more",
  "failed": "the user failed",
}


def dialogues(*named: tuple[str, Dialogue]) -> list[str]:
  """Lines of at most WIDTH columns with two dialogues, each with its name above it."""
  blocks = [_blocks(name, dialogue) for name, dialogue in named]
  lines = []
  for pair in itertools.zip_longest(*blocks, fillvalue=()):
    for left, right in itertools.zip_longest(*pair, fillvalue=""):
      lines.append(f"{left}{' ' * (COLUMN - width(left))}{BETWEEN}{right}".rstrip())
  return lines


def _blocks(name: str, dialogue: Dialogue) -> list[list[str]]:
  """The lines of a dialogue, in blocks that are shown at the same height: its end, then turns."""
  d = dialogue
  replies, emotion = d.replies, d.rules.initial_emotion
  said = d.user_messages
  title = f"{name.upper()}: emotion {emotion} -> {d.emotion} ({ENDS[d.end]})"
  blocks = [[*wrap(title, COLUMN), "-" * COLUMN]]
  for i, message in enumerate(said):
    lines = wrap(f"USER: {shortened(message, LONGEST)}", COLUMN)
    if i < len(replies):
      lines += wrap(f"POLICY: {_shown(replies[i])}", COLUMN)
    if i < d.turn:
      change = d.turns[i].emotion - emotion
      emotion = d.turns[i].emotion
      lines.append(f"[emotion {emotion} ({change:+d})]")
    blocks.append([*lines, ""])
  return blocks


def _shown(reply: PolicyReply) -> str:
  text = shortened(reply.text, LONGEST)
  if not reply.thought:
    return text
  return f"(thinks: {shortened(reply.thought, LONGEST_THOUGHT)}) {text}"


def width(text: str) -> int:
  """How many columns of a terminal a text takes."""
  return sum(_width(character) for character in text)


def _width(character: str) -> int:
  if unicodedata.category(character) in ("Mn", "Me", "Cf"):
    return 0
  return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def plain(text: str) -> str:
  """The text on one line: blanks of any kind are one space, control characters are gone."""
  return " ".join(visible(text).split())


def visible(text: str) -> str:
  """The text without control characters; of blanks, line breaks and spaces are left."""
  kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
  return "".join(" " if c.isspace() and c != "\n" else c for c in kept)


def shortened(text: str, most: int) -> str:
  """The text on one line, cut with an ellipsis where it takes more than `most` columns."""
  text = plain(text)
  if width(text) <= most:
    return text
  ends = itertools.accumulate(map(_width, text))
  return text[: sum(end < most for end in ends)].rstrip() + "…"


def wrap(text: str, columns: int) -> list[str]:
  """The text in lines of at most so many columns (at least 2).

  A line ends at a space, or at a wide character, which may stand at the end of a line or begin
  one; a word that is longer than a line is cut.
  """
  lines: list[str] = []
  line = ""
  for piece in _pieces(plain(text)):
    while width(line) + width(piece.rstrip()) > columns:
      if line.strip():
        lines.append(line.rstrip())
        line = ""
        continue
      fits = sum(end <= columns for end in itertools.accumulate(map(_width, piece)))
      lines.append(piece[:fits])
      piece = piece[fits:]
    line += piece
  return [*lines, line.rstrip()] if line.strip() or not lines else lines


def _pieces(text: str) -> Sequence[str]:
  """The parts of a text that a line may end after: words with the space behind, wide characters."""
  pieces, start = [], 0
  for i, (character, following) in enumerate(itertools.pairwise(text)):
    widths = _width(character), _width(following)
    # An accent stays with what it is put on.
    if character == " " or (2 in widths and widths[1]):
      pieces.append(text[start : i + 1])
      start = i + 1
  return [*pieces, text[start:]]
