"""Chats as examples: `{"messages": [{"role": ..., "content": ..., "train": ...}]}`, one a line.

The first message may be the system's; without one a chat begins with what the chat template puts
there. `train` is optional and says whether this message is learned, where its role does not
decide. Other keys are left alone. Texts are encoded as ordinary
characters between the pieces of the chat template, so that no text is read as one of its marks.
"""

from collections.abc import Collection
from typing import Any

from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.json_lines import Misfit, field
from rlver_jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


def segments(record: Any, tokenizer: Tokenizer, roles: Collection[str]) -> list[Segment]:
  """The example that one line is.

  Learned are the texts of `roles`, each from the start of its message on, and after an
  assistant's also the token that ends it, as a sampler draws it. Raises Misfit for a line that is
  no chat, and for one in which nothing is learned.
  """
  chat, found = tokenizer.chat, []
  messages = field(record, "messages", list)
  for number, message in enumerate(messages):
    role, text = field(message, "role", str), field(message, "content", str)
    if role not in ROLES or (role == "system" and number):
      raise Misfit(f"the role {role!r:.60} in message {number + 1}, expected {_expected(number)}")
    if role != "system" and not number:
      if chat.unprompted is None:
        raise Misfit(f"the role {role!r} in message 1, expected system, as the template demands")
      found += [Segment(chat.unprompted)] if chat.unprompted else []
    learned = field(message, "train", bool) if "train" in message else role in roles
    start, end = getattr(chat, f"{role}_start"), getattr(chat, f"{role}_end")
    ids = tuple(tokenizer.encode(text))
    if role == "assistant":
      ids, end = (*ids, end[0]), end[1:]
    if learned and not ids:
      raise Misfit(f"an empty text in message {number + 1}, expected one to learn")
    found += [Segment(start), trained(ids) if learned else Segment(ids), Segment(end)]
  if not any(segment.logprobs for segment in found):
    raise Misfit("no message to learn, expected one at least of data.roles or with 'train' true")
  return found


def trained(ids: Collection[int], branch: int = 0) -> Segment:
  """A segment that is learned."""
  return Segment(tuple(ids), branch, (0.0,) * len(ids))


def _expected(number: int) -> str:
  return "user or assistant" if number else f"one of {', '.join(ROLES)}"
