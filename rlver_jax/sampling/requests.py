"""What goes into a sampling engine and what comes out of it."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class EngineSettings:
  """Sizes of an engine.

  windows: ascending attention windows; the last is the cache length of a slot.
  extend_buckets: ascending numbers of tokens read at a time.
  decode_steps: at most this many tokens are drawn before the host looks again.
  """

  slots: int
  windows: tuple[int, ...]
  extend_buckets: tuple[int, ...]
  decode_steps: int

  @property
  def cache_length(self) -> int:
    return self.windows[-1]


@dataclasses.dataclass(frozen=True)
class Request:
  """Ids the slot must hold, the numbers of its key (with the seed in front), most new tokens, and
  whether the most probable token is taken whatever the engine's temperature."""

  ids: tuple[int, ...]
  numbers: tuple[int, int, int, int]  # step, dialogue, turn, call
  max_new_tokens: int
  greedy: bool = False


@dataclasses.dataclass
class Sample:
  """Ids drawn for a request, their log-probabilities, and whether a stop id ended them."""

  ids: list[int]
  logprobs: list[float]
  stopped: bool = False


class Likelihood(NamedTuple):
  """Of N ids of a text: their log-probabilities (float32 [N], in nats), and whether each is the
  most probable one at its place (bool [N])."""

  logprobs: np.ndarray
  best: np.ndarray


@dataclasses.dataclass
class EngineStats:
  """Work done since the last `take_stats`: tokens (padding not counted), and seconds."""

  prefilled: int = 0
  extended: int = 0
  drawn: int = 0
  scored: int = 0
  seconds: float = 0.0


def common_length(held: list[int], ids: Iterable[int]) -> int:
  """How many leading ids two contexts share."""
  n = 0
  for a, b in zip(held, ids, strict=False):
    if a != b:
      break
    n += 1
  return n
