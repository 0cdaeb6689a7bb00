"""From dialogues to token rows: the ids as they were sampled, and what is trained on.

A row is the policy's view of one dialogue: its context once, with each thought and its reply
as a branch where it was sampled (`models/attention.py`). Axes: B rows, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.models.attention import CONTEXT, PADDING


class Rows(NamedTuple):
  """A batch of padded rows, each array [B, T].

  tokens: int32 ids. positions: int32, for the rotary embedding; a branch continues from the
  context before it, and so does the context after it. branch: int32, see `tree_attention`.
  mask: bool, the tokens that the policy sampled (each is predicted by the token before it in
  the row). logprobs: float32, the sampler's, where the mask is set.
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
  shape = (len(dialogues), length)
  rows = Rows(
    tokens=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    branch=np.full(shape, PADDING, np.int32),
    mask=np.zeros(shape, bool),
    logprobs=np.zeros(shape, np.float32),
  )
  for b, segments in enumerate(dialogues):
    at = position = 0
    for segment in _trained(segments):
      n = len(segment.ids)
      here = (b, slice(at, at + n))
      rows.tokens[here] = segment.ids
      rows.positions[here] = np.arange(position, position + n)
      rows.branch[here] = segment.branch
      if segment.logprobs is not None:
        rows.mask[here] = True
        rows.logprobs[here] = segment.logprobs
      at += n
      if segment.branch == CONTEXT:
        position += n
  return rows
