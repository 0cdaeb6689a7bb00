"""Levels: what a change comes to, and that the published one changes nothing."""

import decimal
import itertools

import pytest

from rlver_jax.dialogue import levels
from rlver_jax.dialogue.dialogue import Rules
from rlver_jax.dialogue.levels import VANILLA, Level

CHANGES = range(-10, 11)


def test_vanilla_changes_nothing():
  assert [VANILLA.felt(change) for change in CHANGES] == list(CHANGES)
  rules = Rules(initial_emotion=33, max_turns=5, failure_at=1, success_at=99)
  assert rules.at(VANILLA) == rules
  assert levels.NAMES.index(VANILLA.name) == 1  # between the other two


@pytest.mark.parametrize(
  "gain, loss", [*itertools.product((0.01, 0.5, 0.8, 1.0, 1.25, 3.0), repeat=2)]
)
def test_a_change_is_scaled_rounded_kept_in_range_and_of_its_sign(gain, loss):
  level = Level("x", gain=gain, loss=loss)
  for change in CHANGES:
    exact = decimal.Decimal(change) * decimal.Decimal(str(gain if change > 0 else loss))
    rounded = int(exact.quantize(decimal.Decimal(1), decimal.ROUND_HALF_UP))
    rounded = rounded or (change > 0) - (change < 0)
    felt = level.felt(change)
    assert felt == max(-10, min(10, rounded))
    assert type(felt) is int


def test_rules_at_a_level_start_elsewhere_and_keep_the_rest():
  level = Level("x", emotion_offset=-7)
  rules = Rules(initial_emotion=30, max_turns=5, failure_at=1, success_at=99)
  assert rules.at(level) == Rules(23, 5, 1, 99, level)
