"""Means and shares of dialogues with 95% intervals, and the path of emotion from turn to turn.

Intervals are over dialogues, as if each were drawn by itself; those of a group share a scenario.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.evaluation import scores

_NORMAL = float(scipy.stats.norm.ppf((1 + scores.CONFIDENCE) / 2))


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean and its interval; low and high are None where a single dialogue says nothing of it."""

  value: float
  low: float | None
  high: float | None


def mean(values: Sequence[int]) -> Estimate | None:
  """The mean of integers with its bootstrap interval; None of nothing."""
  if not values:
    return None
  if len(values) == 1:
    return Estimate(float(values[0]), None, None)
  return Estimate(float(np.mean(values)), *scores.interval(np.asarray(values)))


def share(hits: Sequence[bool]) -> Estimate | None:
  """The share that is true with its Wilson interval, which is no point at 0 or 1 either."""
  if not hits:
    return None
  n, z = len(hits), _NORMAL
  p = sum(hits) / n
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def outcomes(dialogues: Sequence[Dialogue]) -> dict[str, Estimate | None]:
  """Of the dialogues whose user did not fail, by the names of metrics."""
  final = [d.emotion for d in dialogues if not d.failed]
  return {
    "emotion/final_mean": mean(final),
    "emotion/success_rate": share([e >= emotion_lib.SUCCESS for e in final]),
    "emotion/failure_rate": share([e < emotion_lib.FAILURE for e in final]),
  }


def trajectory(dialogues: Sequence[Dialogue]) -> list[Estimate]:
  """The mean emotion at the start and after each turn, of those whose user did not fail.

  A dialogue that has ended keeps its emotion, so that every mean is of the same dialogues and the
  last one is of the final emotions.
  """
  paths = [emotions(d) for d in dialogues if not d.failed]
  longest = max(map(len, paths), default=0)
  return [mean([p[min(turn, len(p) - 1)] for p in paths]) for turn in range(longest)]


def emotions(dialogue: Dialogue) -> list[int]:
  """The emotion at the start and after each turn."""
  return [dialogue.rules.initial_emotion, *(turn.emotion for turn in dialogue.turns)]


def evenly(total: int, most: int) -> list[int]:
  """At most so many of the numbers below `total`, evenly spread, the first and last among them."""
  if total <= most:
    return list(range(total))
  if most < 2:
    return list(range(most))
  return [i * (total - 1) // (most - 1) for i in range(most)]
