"""The user's emotion: an integer score, its update and its named states.

Source: SAGE (arXiv 2505.02847) and RLVER (arXiv 2507.03112): each turn changes the score by
an integer in -10..10; it is capped at 100; the reward of a dialogue is its last value / 100.
"""

MIN_CHANGE, MAX_CHANGE = -10, 10
MAX_EMOTION = 100
SUCCESS, FAILURE = 100, 10  # final emotion >= SUCCESS succeeds, < FAILURE fails
STATES = ((100, "S"), (70, "A"), (40, "B"), (10, "C"))


def update(emotion: int, change: int) -> int:
  """The emotion after `change`, capped at 100; it may fall below zero."""
  return min(MAX_EMOTION, emotion + change)


def state(emotion: int) -> str:
  """The state's letter: S at 100, A from 70, B from 40, C from 10, F below."""
  return next((letter for lowest, letter in STATES if emotion >= lowest), "F")


def reward(emotion: int) -> float:
  """The dialogue's reward in 0..1 for its final emotion."""
  return max(emotion, 0) / MAX_EMOTION
