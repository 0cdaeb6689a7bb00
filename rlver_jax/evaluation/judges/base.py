"""What a judge of dialogues gives, and what it is to the evaluation that asks it."""

import dataclasses
from typing import Protocol

from rlver_jax.dialogue.dialogue import Failed, NoRoom
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.dialogue.simulators.appraisal import STRATEGIES

CAPABILITIES = (
  "empathic_depth", "core_insight", "solution_crafting", "dialogue_guidance", "style_adaptability"
)  # fmt: skip
# The social-cognition plane: from solution- to empathy-oriented, from structured to creative.
AXES = ("orientation", "form")
LEAST, MOST = 1, 5  # of a capability and on an axis
NONE = "none"  # a reply that uses no strategy
NAMES = (*STRATEGIES, NONE)
# How a reply can say that the user feels, from worst to best: names of five bands of emotion, see
# `consistency.py`.
BANDS = ("miserable", "unhappy", "mixed", "relieved", "happy")
STATES = (*BANDS, NONE)  # none: it says nothing of it


@dataclasses.dataclass(frozen=True)
class Judgement:
  """What a judge found in one dialogue.

  scores: of each of CAPABILITIES, reasons: for it, plane: the place on each of AXES; integers in
  LEAST..MOST. strategies: of each appraised reply the STRATEGIES that it uses, perhaps none;
  states: of each the one of STATES that it ascribes to the user.
  """

  scores: dict[str, int]
  reasons: dict[str, str]
  plane: dict[str, int]
  strategies: tuple[tuple[str, ...], ...]
  states: tuple[str, ...]


# NoRoom: the dialogue is too long for the judge; Failed: who was asked gave no answer to be read.
Verdict = Judgement | NoRoom | Failed


class Judge(Protocol):
  """Judges several dialogues at once, each in a slot.

  What is found depends on the dialogue, its index and the seed alone. What stands below `poll` is
  for a judge that is far away; one on this machine inherits it.
  """

  def open(self, placed: dict[int, Recorded]) -> None:
    """These dialogues are to be judged, each in the slot that is its key."""

  def poll(self, wait: bool = False) -> dict[int, Verdict]:
    """Works on what was opened and returns the verdicts that are ready, by slot.

    wait: nobody else has anything to do, so the call may take a moment for the first one.
    """
    ...

  def spent(self) -> dict[str, int]:
    """What counts against the budgets of a run, so far."""
    return {}

  def resume(self, spent: dict[str, int]) -> None:
    """Goes on from what an earlier start of the run has spent."""

  def close(self) -> None:
    """The run is over."""
