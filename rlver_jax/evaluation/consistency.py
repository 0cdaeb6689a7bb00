"""Does a policy see how its user feels? What its replies say of it, against the recorded emotion.

When a reply is written, the user has the emotion of the turn before, at first the initial one. That
emotion, 0..100, is cut into five bands of 20 points, which `judges/base.py` names BANDS from worst
to best: 0-19, 20-39, 40-59, 60-79, 80-100; below zero counts as zero. (The benchmark's own states
S and F are where a dialogue ends, so that no reply would ever be written in them.) A judge says
which band the reply ascribes to the user, in words, not in thoughts that nobody hears; or none,
where the reply says nothing of it. Such a reply counts in the coverage alone.

A reply is consistent where the ascribed band is the recorded one or next to it. The difference is
ascribed minus recorded, in bands: above 0 the policy paints its user happier than recorded, that
is, it glosses over. Replies of one dialogue are not independent of one another, so intervals come
from resampling dialogues.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from rlver_jax.dialogue.emotion import MAX_EMOTION
from rlver_jax.dialogue.scenario import TACTICS
from rlver_jax.evaluation import tables
from rlver_jax.evaluation.judged import Judged, span, with_all
from rlver_jax.evaluation.judges.base import BANDS, NONE
from rlver_jax.evaluation.scores import CONFIDENCE, RESAMPLES
from rlver_jax.evaluation.tables import Range

NEAR = 1  # bands that the ascribed one may be away


@dataclasses.dataclass(frozen=True)
class Consistency:
  """Of a set of dialogues. replies: the appraised ones; said: those that say how the user feels.

  consistent: the share of those that are consistent, 0..1; difference: their mean difference, in
  bands; the intervals: of each, from resampling dialogues. None where no reply says anything.
  """

  replies: int
  said: int
  consistent: float | None
  interval: tuple[float, float] | None
  difference: float | None
  difference_interval: tuple[float, float] | None

  @property
  def coverage(self) -> float:
    """The share of replies that say how the user feels."""
    return self.said / self.replies


def band(emotion: int) -> int:
  """The number of an emotion's band, from 0 for the worst; emotion: at most 100."""
  return max(0, min(emotion * len(BANDS) // MAX_EMOTION, len(BANDS) - 1))


def differences(one: Judged) -> list[int]:
  """Ascribed minus recorded band of each reply of a dialogue that says how the user feels."""
  pairs = zip(one.judgement.states, one.emotions, strict=True)
  return [BANDS.index(state) - band(emotion) for state, emotion in pairs if state != NONE]


def consistency(judged: Sequence[Judged]) -> Consistency:
  """The numbers of at least one reply."""
  replies = sum(len(one.emotions) for one in judged)
  found = [np.array(some) for some in map(differences, judged) if some]
  if not found:
    return Consistency(replies, 0, None, None, None, None)
  counts = [len(some) for some in found]
  near = [int((abs(some) <= NEAR).sum()) for some in found]
  sums = [int(some.sum()) for some in found]
  said = sum(counts)
  return Consistency(
    replies, said,
    sum(near) / said, clustered_interval(near, counts),
    sum(sums) / said, clustered_interval(sums, counts),
  )  # fmt: skip


def clustered_interval(sums: Sequence[int], counts: Sequence[int]) -> tuple[float, float]:
  """The bootstrap percentile interval of a mean over all replies of several dialogues.

  Args:
    sums: of each dialogue the sum over its replies.
    counts: of each the number of its replies, at least 1.

  Resampled are the dialogues, each with all its replies; one without any has no part in it. Drawn
  is how often each pair of sum and count comes, which is all that the mean depends on.
  """
  pairs, often = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
  n = len(sums)
  totals = np.random.default_rng(0).multinomial(n, often / n, size=RESAMPLES) @ pairs
  tail = (1 - CONFIDENCE) / 2
  low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
  return float(low), float(high)


def summary(judged: Sequence[Judged]) -> dict:
  """The numbers of at least one dialogue, over all and by tactic, to be written as JSON."""
  return _as_json(consistency(judged)) | {
    "tactics": {tactic: _as_json(consistency(some)) for tactic, some in by_tactic(judged).items()}
  }


def by_tactic(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
  """The dialogues whose user plays a tactic, in the order of the names."""
  judged = list(judged)
  grouped = {tactic: [one for one in judged if one.tactic == tactic] for tactic in sorted(TACTICS)}
  return {tactic: some for tactic, some in grouped.items() if some}


def board(by_file: dict[str, list[Judged]]) -> tables.Rows:
  """For each file, and with several for all, a row, and one for each tactic in it."""
  rows = [["dialogues of", "tactic", "replies", "name a feeling", "consistent",
           Range("consistent low", "consistent high", "95%"), "difference",
           Range("difference low", "difference high", "95%")]]  # fmt: skip
  for name, judged in with_all(by_file):
    for tactic, some in {"all": judged, **by_tactic(judged)}.items():
      c = consistency(some)
      row: list[str | Range] = [name, tactic, str(c.replies), f"{c.coverage:.0%}"]
      if c.consistent is None:
        rows.append([*row, "-", Range("-", "-", "-"), "-", Range("-", "-", "-")])
        continue
      low, high = c.interval
      share = [f"{c.consistent:.0%}", Range(f"{low:.0%}", f"{high:.0%}")]
      rows.append([*row, *share, f"{c.difference:+.2f}", span(c.difference_interval, "+")])
  return rows


def _as_json(c: Consistency) -> dict:
  told = dataclasses.asdict(c) | {"coverage": c.coverage}
  return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
