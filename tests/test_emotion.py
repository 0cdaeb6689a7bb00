"""The emotion's update, states and reward at their bounds."""

import pytest

from rlver_jax.dialogue import emotion


@pytest.mark.parametrize(
  ("value", "state"),
  (
    (100, "S"),
    (99, "A"),
    (70, "A"),
    (69, "B"),
    (40, "B"),
    (39, "C"),
    (10, "C"),
    (9, "F"),
    (0, "F"),
    (-25, "F"),
  ),
)
def test_states_at_their_bounds(value, state):
  assert emotion.state(value) == state


@pytest.mark.parametrize(
  ("value", "change", "after"),
  ((30, 10, 40), (30, -10, 20), (30, 0, 30), (95, 5, 100), (95, 10, 100), (100, 1, 100),
   (100, -3, 97), (3, -10, -7), (-7, -10, -17), (-7, 10, 3)),
)  # fmt: skip
def test_updates_are_capped_above_only(value, change, after):
  assert emotion.update(value, change) == after


@pytest.mark.parametrize(
  ("value", "reward"), ((100, 1.0), (55, 0.55), (1, 0.01), (0, 0.0), (-1, 0.0), (-40, 0.0))
)
def test_reward_is_the_final_emotion_in_hundredths_and_never_negative(value, reward):
  assert emotion.reward(value) == pytest.approx(reward, abs=0)
