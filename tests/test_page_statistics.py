"""Means and shares with intervals, and paths of emotion, against SciPy and by hand."""

import numpy as np
import pytest
import scipy.stats
from test_closing import played

from rlver_jax.dialogue import scenario
from rlver_jax.page import statistics

SCENARIO = scenario.read(scenario.resolve("en"))[0][0]


@pytest.mark.parametrize(("hits", "of"), [(0, 32), (5, 32), (32, 32), (1, 1), (700, 1000)])
def test_shares_have_wilsons_interval(hits, of):
  found = statistics.share([True] * hits + [False] * (of - hits))
  wanted = scipy.stats.binomtest(hits, of).proportion_ci(0.95, method="wilson")
  assert found.value == hits / of
  assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_means_have_a_bootstrap_interval():
  values = [int(v) for v in np.random.default_rng(1).integers(0, 101, 40)]
  found = statistics.mean(values)
  test = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=2)
  assert found.value == np.mean(values)
  bounds = test.confidence_interval
  assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=0.5)
  assert statistics.mean([7]) == statistics.Estimate(7.0, None, None)
  assert statistics.mean([]) is None and statistics.share([]) is None


def test_a_dialogue_that_has_ended_keeps_its_emotion():
  # From 30 on; the third one's user failed.
  dialogues = [played(SCENARIO, 0, 10, -4, 6), played(SCENARIO, 1, -8), played(SCENARIO, 2)]
  assert [point.value for point in statistics.trajectory(dialogues)] == [30, 31, 29, 32]
  assert statistics.trajectory(dialogues[2:]) == []
  assert statistics.outcomes(dialogues)["emotion/final_mean"].value == 32


def test_outcomes_count_successes_and_failures():
  ends = {100: (10,) * 7, 5: (-10, -10, -5), 35: (5,)}
  dialogues = [played(SCENARIO, i, *changes) for i, changes in enumerate(ends.values())]
  assert [d.emotion for d in dialogues] == list(ends)
  found = statistics.outcomes(dialogues)
  assert found["emotion/success_rate"].value == found["emotion/failure_rate"].value == 1 / 3


def test_numbers_are_evenly_spread():
  assert statistics.evenly(3, 5) == [0, 1, 2]
  assert statistics.evenly(101, 5) == [0, 25, 50, 75, 100]
  assert statistics.evenly(9, 1) == [0] and statistics.evenly(9, 0) == []
  found = statistics.evenly(1000, 7)
  assert len(set(found)) == 7 and max(np.diff(found)) - min(np.diff(found)) <= 1
