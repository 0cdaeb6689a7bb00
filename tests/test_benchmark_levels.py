"""The report on levels, with the scripted user: what each level makes of the same replies."""

import pytest

from benchmarks import levels as report
from rlver_jax import build
from rlver_jax.dialogue import levels as levels_lib
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.dialogue import Rules
from rlver_jax.dialogue.simulators.appraisal import NEEDS, features
from rlver_jax.sources import open_sources


@pytest.fixture(scope="module", params=report.LANGUAGES)
def rows(request):
  """The columns by level, for the package's scenarios of a language."""
  config = report.configuration(None, request.param)
  sources = open_sources(config)
  simulator = build.build_simulator(config, sources)
  rules = Rules(initial_emotion=config.dialogue.initial_emotion)
  return {
    name: report.measure(simulator, list(sources.scenarios), rules.at(level), slots=8)
    for name, level in build.build_levels(config).items()
  }


@pytest.mark.parametrize("column", ["accepted", "degree", "initial", "final"])
def test_the_harder_a_level_the_less_is_accepted_and_expressed(rows, column):
  easy, vanilla, challenging = (rows[name][column] for name in levels_lib.NAMES)
  assert easy > vanilla > challenging


def test_the_levels_differ_by_more_than_a_little(rows):
  easy, vanilla, challenging = (rows[name] for name in levels_lib.NAMES)
  assert easy["degree"] > 2 * vanilla["degree"] > 4 * challenging["degree"] > 0
  assert easy["accepted"] > 1.1 * vanilla["accepted"] > 2 * challenging["accepted"] > 0
  assert vanilla["said"] == challenging["said"] == 0 < easy["said"]


def test_a_reply_that_meets_the_need_is_accepted_at_every_level(rows):
  """So that success is within reach: what is hard is to find out what is needed."""
  for columns in rows.values():
    assert columns["accepted"] >= columns["met"] > 0.9 / 9
  # And nothing else, or hardly.
  assert rows["challenging"]["accepted"] - rows["challenging"]["met"] < 0.01


def test_slots_change_nothing():
  config = report.configuration(None, "en")
  sources = open_sources(config)
  rules, some = Rules().at(build.build_levels(config)["easy"]), list(sources.scenarios)[:7]
  columns = [
    report.measure(build.build_simulator(config, sources), some, rules, slots) for slots in (2, 7)
  ]
  assert columns[0] == columns[1]


@pytest.mark.parametrize("language", report.LANGUAGES)
def test_the_replies_are_the_same_in_every_order_and_the_first_meets_the_need(language):
  scenarios, _ = scenario_lib.read(scenario_lib.resolve(language))
  for scenario in scenarios:
    told = report.replies(scenario, 0)
    assert len(set(told)) == len(told) == 9 and not any("{" in text for text in told)
    assert sorted(report.replies(scenario, 4)) == sorted(told)
    assert report.replies(scenario, 13) == told[4:] + told[:4]
    found = features(told[0], scenario, [], [scenario.first_message])
    assert NEEDS[scenario.intention] in found.strategies
