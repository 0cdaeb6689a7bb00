"""What a simulated user is to the rollout and to the run."""

from typing import Protocol

from rlver_jax.dialogue.dialogue import Answer, Dialogue


class Simulator(Protocol):
  """Answers the user's side of many dialogues at once.

  The rollout submits dialogues whose stage is OPENING, PLAN or MESSAGE and calls `poll` until
  it has an answer for each; an implementation may answer any subset at each call, in any order.
  What is answered may depend on the dialogue and on (seed, step) alone.

  What stands below `poll` is for a simulator that is far away; one on this machine inherits it.
  """

  far: bool = False  # its answers come from elsewhere, while this machine has nothing to do

  def start(self, step: int) -> None:
    """A new batch of dialogues begins; `step` enters the randomness."""

  def open(self, placed: dict[int, Dialogue]) -> None:
    """These dialogues begin, each in the slot that is its key and that it keeps to its end."""

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    """The dialogue in `slot` waits for what its stage says."""

  def poll(self, wait: bool = False) -> dict[int, Answer]:
    """Works on what was submitted and returns the answers that are ready, by slot.

    wait: nobody else has anything to do, so the call may take a moment for the first answer.
    """
    ...

  def take_metrics(self) -> dict[str, float]:
    """Metrics of the work since the last call, by name, besides those of an engine."""
    return {}

  def spent(self) -> dict[str, int]:
    """What counts against the budgets of a run, so far."""
    return {}

  def resume(self, spent: dict[str, int]) -> None:
    """Goes on from what an earlier start of the run has spent."""

  def close(self) -> None:
    """The run is over."""
