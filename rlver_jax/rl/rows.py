"""From dialogues to token rows: the ids as they were sampled, and what is trained on.

A document is one view of one dialogue: its context once, with each thought and its reply as a
branch where it was sampled (`models/attention.py`). A row of reinforcement learning holds one, a
row of supervised training as many as fit. Axes: B rows, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.models.attention import CONTEXT, DOCUMENT, PADDING


class Rows(NamedTuple):
  """A batch of padded rows, each array [B, T].

  tokens: int32 ids. positions: int32, for the rotary embedding; a branch continues from the
  context before it, and so does the context after it. branch: int32, see `tree_attention`.
  mask: bool, the tokens that are trained (each is predicted by the token before it in the row,
  so never the first of a document). logprobs: float32, the sampler's, where the mask is set.
  """

  tokens: np.ndarray
  positions: np.ndarray
  branch: np.ndarray
  mask: np.ndarray
  logprobs: np.ndarray


def row_length(segments: Sequence[Segment]) -> int:
  """Tokens in the row of these segments: all up to the last that was sampled."""
  return sum(len(s.ids) for s in _trained(segments))


def _trained(segments: Sequence[Segment]) -> Sequence[Segment]:
  last = max((i for i, s in enumerate(segments) if s.logprobs is not None), default=-1)
  return segments[: last + 1]


def place_rewards(
  dialogues: Sequence[Sequence[Segment]], rewards: Sequence[Sequence[float]], length: int
) -> np.ndarray:
  """Rewards at the last token of what they reward: float32 [B, length], zero elsewhere.

  rewards: of each dialogue, one for each of its sampled segments, in order.
  """
  placed = np.zeros((len(dialogues), length), np.float32)
  for row, segments, values in zip(placed, dialogues, rewards, strict=True):
    trained = _trained(segments)
    ends = np.cumsum([len(s.ids) for s in trained], dtype=int)
    sampled = [end - 1 for s, end in zip(trained, ends, strict=True) if s.logprobs is not None]
    for at, value in zip(sampled, values, strict=True):
      row[at] = value
  return placed


def make_rows(dialogues: Sequence[Sequence[Segment]], length: int) -> Rows:
  """One padded row of `length` tokens for each list of segments.

  A dialogue in which nothing was sampled becomes a row of padding.
  """
  return make_packed_rows([[segments] for segments in dialogues], length)


def pack(order: Iterable[int], lengths: Sequence[int], length: int) -> Iterator[list[int]]:
  """Which documents go into each row of `length` tokens: taken in `order`, each goes into the row
  in progress if it fits there, else into a new one. `lengths` are those of all documents, none of
  them longer than a row."""
  row, room = [], length
  for i in order:
    if lengths[i] > room:
      yield row
      row, room = [], length
    row.append(i)
    room -= lengths[i]
  if row:
    yield row


def make_packed_rows(rows_of: Sequence[Sequence[Sequence[Segment]]], length: int) -> Rows:
  """One padded row of `length` tokens for each list of documents, which are lists of segments."""
  shape = (len(rows_of), length)
  rows = Rows(
    tokens=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    branch=np.full(shape, PADDING, np.int32),
    mask=np.zeros(shape, bool),
    logprobs=np.zeros(shape, np.float32),
  )
  for b, documents in enumerate(rows_of):
    at = 0
    for number, segments in enumerate(documents):
      at = _place(rows, b, at, number, _trained(segments))
  return rows


def _place(rows: Rows, b: int, start: int, document: int, segments: Sequence[Segment]) -> int:
  """Writes a document into row `b` from `start` on; returns where it ends."""
  at, context, position, last = start, 0, 0, CONTEXT
  for segment in segments:
    n = len(segment.ids)
    if segment.branch != last:  # a branch, and the context after it, go on from the context before
      position, last = context, segment.branch
    here = (b, slice(at, at + n))
    rows.tokens[here] = segment.ids
    rows.positions[here] = np.arange(position, position + n)
    rows.branch[here] = document * DOCUMENT + segment.branch
    if segment.logprobs is not None:
      rows.mask[here] = True
      rows.logprobs[here] = segment.logprobs
    at, position = at + n, position + n
    if segment.branch == CONTEXT:
      context = position
  rows.mask[b, start : start + 1] = False  # nothing predicts it
  return at
