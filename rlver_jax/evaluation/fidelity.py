"""How well a simulated user appraises as another one did, on the same dialogues.

Every reply of recorded dialogues is appraised anew, after the very words that were said before it,
and the change of emotion is compared with the recorded one.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import Dialogue, Plan
from rlver_jax.dialogue.rescore import Recorded, Rescored

_CHANGES = emotion_lib.MAX_CHANGE - emotion_lib.MIN_CHANGE + 1


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
  recorded, found = pairs(replayed).T
  turns = sum(len(r.found) for r in replayed)
  varied = len(set(recorded.tolist())) > 1 and len(set(found.tolist())) > 1
  return Fidelity(
    dialogues=len(replayed),
    turns=turns,
    error=_mean(np.abs(recorded - found)),
    sign=_mean(np.sign(recorded) == np.sign(found)),
    spearman=float(scipy.stats.spearmanr(recorded, found).statistic) if varied else math.nan,
    final_error=_mean(np.abs(np.diff(finals(replayed)))),
    unparsed=sum(r.unparsed for r in replayed) / turns,
    unread=1 - len(found) / turns,
    tokens=sum(r.tokens for r in replayed) / turns,
    seconds=sum(r.seconds for r in replayed) / turns,
  )


def pairs(replayed: Sequence[Replayed]) -> np.ndarray:
  """The recorded and the new change of each turn that has one: integers [turns, 2]."""
  found = [
    (recorded, new)
    for r in replayed
    for recorded, new in zip(r.recorded, r.found, strict=True)
    if new is not None
  ]
  return np.array(found, np.int64).reshape(-1, 2)


def counts(replayed: Sequence[Replayed]) -> np.ndarray:
  """How many turns have each pair of changes: integers [recorded, new], both from -10 to 10."""
  table = np.zeros((_CHANGES, _CHANGES), np.int64)
  np.add.at(table, tuple((pairs(replayed) - emotion_lib.MIN_CHANGE).T), 1)
  return table


def by_recorded(replayed: Sequence[Replayed]) -> dict[int, list[int]]:
  """The new changes of the turns with each recorded one, in the order of these."""
  found: dict[int, list[int]] = {}
  for recorded, new in sorted(pairs(replayed).tolist()):
    found.setdefault(recorded, []).append(new)
  return found


def finals(replayed: Sequence[Replayed]) -> np.ndarray:
  """The recorded and the new final emotion of each dialogue of which every turn has a change:
  integers [dialogues, 2]."""
  whole = [(r.recorded_final, r.found_final) for r in replayed if None not in r.found]
  return np.array(whole, np.int64).reshape(-1, 2)


def recorded(finished: Dialogue) -> Recorded:
  """A finished dialogue as one that was recorded."""
  start = Dialogue(finished.index, finished.group, finished.scenario, finished.rules)
  if start.opening is None and finished.opening is not None:
    start.advance(finished.opening)
  return Recorded(start, tuple(finished.turns), finished.emotion)


def _mean(values: np.ndarray) -> float:
  return float(np.mean(values)) if values.size else math.nan
