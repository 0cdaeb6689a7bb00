"""The Sentient benchmark's numbers of a set of dialogues, and the difference between two sets.

Score, success and failure are as the benchmark reports them (SAGE, arXiv 2505.02847): the mean
final emotion, and how many dialogues end at 100 and below 10. Intervals are bootstrap percentiles
over dialogues; two models are compared scenario by scenario. Means of integers are kept as
fractions, so that they can be rounded exactly.
"""

import dataclasses
import fractions
import math
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.stats

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.scenario import EMOTIONAL
from rlver_jax.evaluation.transcripts import Transcript

CONFIDENCE = 0.95
RESAMPLES = 9999
_BATCH = 10**6  # numbers of a permutation test that are in memory at a time

# What dialogues can be grouped by; one with None is in no group.
GROUPS = {
  "character": lambda t: t.character,
  "intention": lambda t: t.intention,
  "need": lambda t: "emotional" if t.intention in EMOTIONAL else "rational",
  "tactic": lambda t: t.tactic or None,
}


@dataclasses.dataclass(frozen=True)
class Score:
  """mean: of the final emotions, in points. success, failure: counts of dialogues. The intervals
  are of these three. replies: the mean number a dialogue. tokens: the mean number that the policy
  sampled for a reply, its thought included; None where the records do not say.
  """

  dialogues: int
  mean: fractions.Fraction
  interval: tuple[float, float]
  success: int
  success_interval: tuple[float, float]
  failure: int
  failure_interval: tuple[float, float]
  replies: float
  tokens: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
  """scenarios: those that both have. mean: of the differences of final emotion, in points.

  interval: of the mean. p: how often a difference as large comes from swapping the two models at
  random in each scenario (a paired permutation test, two-sided).
  """

  scenarios: int
  mean: fractions.Fraction
  interval: tuple[float, float]
  p: float


def score(transcripts: Sequence[Transcript]) -> Score:
  """The numbers of at least one dialogue."""
  final = np.array([t.final for t in transcripts])
  succeeds, fails = final >= emotion_lib.SUCCESS, final < emotion_lib.FAILURE
  replies = sum(t.replies for t in transcripts)
  tokens = [t.tokens for t in transcripts if t.tokens is not None]
  return Score(
    dialogues=len(final),
    mean=fractions.Fraction(int(final.sum()), len(final)),
    interval=interval(final),
    success=int(succeeds.sum()),
    success_interval=_of_count(succeeds),
    failure=int(fails.sum()),
    failure_interval=_of_count(fails),
    replies=replies / len(final),
    tokens=sum(tokens) / replies if replies and len(tokens) == len(final) else None,
  )


def grouped(transcripts: Iterable[Transcript], by: str) -> dict[str, list[Transcript]]:
  """The dialogues by one of `GROUPS`, the groups in the order of their names."""
  found: dict[str, list[Transcript]] = {}
  for transcript in transcripts:
    if (group := GROUPS[by](transcript)) is not None:
      found.setdefault(group, []).append(transcript)
  return dict(sorted(found.items()))


def difference(ours: Sequence[Transcript], theirs: Sequence[Transcript]) -> Difference | None:
  """How much higher `ours` end on the scenarios that both have; None if there is none."""
  final = {t.id: t.final for t in theirs}
  found = np.array([t.final - final[t.id] for t in ours if t.id in final])
  if not found.size:
    return None
  mean = fractions.Fraction(int(found.sum()), len(found))
  if len(found) == 1:  # swapping one scenario's two says nothing
    return Difference(1, mean, interval(found), 1.0)
  test = scipy.stats.permutation_test(
    (found,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True,
    batch=max(1, _BATCH // len(found)), rng=np.random.default_rng(0),
  )  # fmt: skip
  return Difference(len(found), mean, interval(found), float(test.pvalue))


def rounded(mean: fractions.Fraction) -> str:
  """To one decimal, halves away from zero, as the leaderboard prints scores."""
  tenths = math.floor(abs(mean) * 10 + fractions.Fraction(1, 2))
  return f"{'-' if mean < 0 and tenths else ''}{tenths // 10}.{tenths % 10}"


def _of_count(chosen: np.ndarray) -> tuple[float, float]:
  low, high = interval(chosen.astype(int))
  return low * len(chosen), high * len(chosen)


def interval(values: np.ndarray) -> tuple[float, float]:
  """The bootstrap percentile interval of the mean of at least one integer.

  Drawn is how often each comes in a resample, which is all that its mean depends on.
  """
  distinct, counts = np.unique(values, return_counts=True)
  n = len(values)
  drawn = np.random.default_rng(0).multinomial(n, counts / n, size=RESAMPLES)
  tail = (1 - CONFIDENCE) / 2
  low, high = np.quantile(drawn @ distinct / n, [tail, 1 - tail])
  return float(low), float(high)
