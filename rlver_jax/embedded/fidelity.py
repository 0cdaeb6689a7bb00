"""How well a simulated user appraises as the scripted one does, on the same dialogues.

Every reply of the given dialogues is appraised anew, after the very words that were said before
it, and the change of emotion is compared with the scripted user's.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlver_jax.dialogue import rescore
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.simulators.base import Simulator


@dataclasses.dataclass(frozen=True)
class Fidelity:
  """turns: how many were compared. sign: share of equal signs (0 is a sign of its own).
  error: mean absolute difference of the changes, in points. unread: share without a change."""

  turns: int
  sign: float
  error: float
  unread: float


def fidelity(simulator: Simulator, dialogues: Sequence[Dialogue], *, slots: int) -> Fidelity:
  """Compares a simulated user with what was recorded in finished dialogues."""
  recorded = [rescore.Recorded(_start(d), tuple(d.turns), d.emotion) for d in dialogues]
  pairs = [
    (turn.plan.change, change)
    for found in rescore.rescore(simulator, recorded, step=0, slots=slots)
    for turn, (change, _) in zip(found.recorded.turns, found.turns, strict=True)
  ]
  known = np.array([pair for pair in pairs if pair[1] is not None], np.int64).reshape(-1, 2)
  truth, found = known.T
  return Fidelity(
    turns=len(pairs),
    sign=float(np.mean(np.sign(truth) == np.sign(found))),
    error=float(np.mean(np.abs(truth - found))),
    unread=1 - len(known) / len(pairs),
  )


def _start(finished: Dialogue) -> Dialogue:
  """The dialogue as it was before its first reply."""
  start = Dialogue(finished.index, finished.group, finished.scenario, finished.rules)
  if start.opening is None and finished.opening is not None:
    start.advance(finished.opening)
  return start
