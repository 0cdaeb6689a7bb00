"""How well a simulated user appraises as another one did, on the same dialogues.

Every reply of recorded dialogues is appraised anew, after the very words that were said before it,
and the change of emotion is compared with the recorded one.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from rlver_jax.dialogue.dialogue import Dialogue, Plan
from rlver_jax.dialogue.rescore import Recorded, Rescored


@dataclasses.dataclass(frozen=True)
class Replayed:
  """What one dialogue came to. recorded, found: the changes of emotion of its turns, None where the
  simulated user gave none that could be read. unparsed: turns whose change could not be read from
  the appraisal, so that it was asked for by itself. tokens: that the simulated user sampled.
  recorded_final, found_final: the emotions that the changes lead to from the same start. seconds:
  that the dialogue took, of those that were replayed beside one another a share."""

  recorded: tuple[int, ...]
  found: tuple[int | None, ...]
  unparsed: int
  tokens: int
  recorded_final: int
  found_final: int
  seconds: float = 0.0

  @classmethod
  def of(cls, rescored: Rescored, seconds: float = 0.0) -> "Replayed":
    """From what `rescore.rescore` found."""
    plans = [answer for answer in rescored.answers if isinstance(answer, Plan)]
    return cls(
      tuple(turn.plan.change for turn in rescored.recorded.turns),
      rescored.changes,
      sum(not plan.parsed for plan in plans),
      sum(plan.tokens for plan in plans),
      max(0, rescored.recorded.emotion),
      max(0, rescored.emotion),
      seconds,
    )


@dataclasses.dataclass(frozen=True)
class Fidelity:
  """How near the changes are, over all turns that have one.

  error: mean absolute difference, in points. sign: share of equal signs (0 is a sign of its own).
  spearman: rank correlation, NaN where one side is constant. final_error: mean absolute difference
  of the final emotions, in points, over the dialogues of which every turn has a change. unparsed,
  unread: shares of the turns whose change could not be read from the appraisal, and that have none.
  tokens, seconds: sampled and taken for a turn.
  """

  dialogues: int
  turns: int
  error: float
  sign: float
  spearman: float
  final_error: float
  unparsed: float
  unread: float
  tokens: float
  seconds: float


def compare(replayed: Sequence[Replayed]) -> Fidelity:
  """The numbers of dialogues with at least one turn; NaN for what there is nothing to tell of."""
  pairs = [
    (recorded, found) for r in replayed for recorded, found in zip(r.recorded, r.found, strict=True)
  ]
  known = np.array([pair for pair in pairs if pair[1] is not None], np.int64).reshape(-1, 2)
  recorded, found = known.T
  varied = len(set(recorded.tolist())) > 1 and len(set(found.tolist())) > 1
  whole = [abs(r.recorded_final - r.found_final) for r in replayed if None not in r.found]
  return Fidelity(
    dialogues=len(replayed),
    turns=len(pairs),
    error=_mean(np.abs(recorded - found)),
    sign=_mean(np.sign(recorded) == np.sign(found)),
    spearman=float(scipy.stats.spearmanr(recorded, found).statistic) if varied else math.nan,
    final_error=_mean(np.array(whole)),
    unparsed=sum(r.unparsed for r in replayed) / len(pairs),
    unread=1 - len(known) / len(pairs),
    tokens=sum(r.tokens for r in replayed) / len(pairs),
    seconds=sum(r.seconds for r in replayed) / len(pairs),
  )


def recorded(finished: Dialogue) -> Recorded:
  """A finished dialogue as one that was recorded."""
  start = Dialogue(finished.index, finished.group, finished.scenario, finished.rules)
  if start.opening is None and finished.opening is not None:
    start.advance(finished.opening)
  return Recorded(start, tuple(finished.turns), finished.emotion)


def _mean(values: np.ndarray) -> float:
  return float(np.mean(values)) if values.size else math.nan
