"""What a simulated user is to the rollout."""

from typing import Protocol

from rlver_jax.dialogue.dialogue import Answer, Dialogue


class Simulator(Protocol):
  """Answers the user's side of many dialogues at once.

  The rollout submits dialogues whose stage is OPENING, PLAN or MESSAGE and calls `poll` until
  it has an answer for each; an implementation may answer any subset at each call, in any order.
  What is answered may depend on the dialogue and on (seed, step) alone.
  """

  def start(self, step: int) -> None:
    """A new batch of dialogues begins; `step` enters the randomness."""

  def open(self, placed: dict[int, Dialogue]) -> None:
    """These dialogues begin, each in the slot that is its key and that it keeps to its end."""

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    """The dialogue in `slot` waits for what its stage says."""

  def poll(self) -> dict[int, Answer]:
    """Works on what was submitted and returns the answers that are ready, by slot."""
    ...
