"""Which level a group has: mixtures as functions of their numbers, curricula that go on."""

import json
import math
import random

import builders
import numpy as np
import pytest

from rlver_jax.dialogue import levels as levels_lib
from rlver_jax.dialogue.dialogue import Dialogue, NoRoom, Plan, PolicyReply, Rules, UserMessage
from rlver_jax.dialogue.environment import Curriculum, Environment, level_metrics, played
from rlver_jax.dialogue.levels import Level

EVEN = dict.fromkeys(levels_lib.NAMES, 1.0)
LEVELS = {name: Level(name) for name in levels_lib.NAMES}
CURRICULUM = Curriculum("easy", window=3, raise_at=60, lower_at=20)


def environment(kind, weights=EVEN, curriculum=CURRICULUM, seed=0):
  return Environment(kind, LEVELS, weights, curriculum, seed)


def names(env, step, groups=1):
  return [level.name for level in env.levels(step, groups)]


def finished(emotion, group=0, level="vanilla", changes=()):
  """A finished dialogue with this final emotion, after these changes."""
  rules = Rules(initial_emotion=emotion - sum(changes), failure_at=-1000, level=LEVELS[level])
  d = Dialogue(0, group, builders.scenario(), rules)
  for change in changes:
    d.advance(PolicyReply("Go on.", None, True, True, 1))
    d.advance(Plan(change))
    d.advance(UserMessage("Well."))
  d.advance(NoRoom())
  assert d.emotion == emotion
  return d


@pytest.mark.parametrize("kind", levels_lib.NAMES)
def test_a_level_by_its_name_is_that_of_every_group_for_good(kind):
  env = environment(kind)
  for step in range(20):
    assert names(env, step, 5) == [kind] * 5
    env.observe([finished(99)])
  assert env.state() == {}
  env.restore({})
  assert names(env, 20) == [kind]


def test_dialogues_whose_user_failed_move_nothing_and_count_nowhere():
  dialogues = [finished(95, level="easy")] + [finished(10, level="easy") for _ in range(3)]
  for dialogue in dialogues[1:]:
    dialogue.end = "failed"
  env = environment("curriculum", curriculum=Curriculum("easy", 1, raise_at=60, lower_at=20))
  env.observe(dialogues[1:])
  assert names(env, 1) == ["easy"]
  env.observe(dialogues)
  assert names(env, 2) == ["vanilla"]
  metrics = level_metrics(dialogues)
  assert (metrics["environment/easy_dialogues"], metrics["environment/easy_final_mean"]) == (1, 95)
  assert level_metrics(dialogues[1:]) == {}


# Mixtures.


def test_a_mixture_is_a_function_of_seed_step_and_group():
  table = [names(environment("mixture"), step, 6) for step in range(40)]
  used = environment("mixture")
  order = list(range(40))
  random.Random(0).shuffle(order)
  for step in order:  # in any order, for any number of groups, whatever was observed
    groups = 1 + step % 6
    assert names(used, step, groups) == table[step][:groups]
    used.observe([finished(step)])
  assert used.state() == {}
  others = [names(environment("mixture", seed=1), step, 6) for step in range(40)]
  assert others != table
  assert len(set(map(tuple, table))) > 35 and any(len(set(row)) == 3 for row in table)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.7, 0.1), (5.0, 0.0, 15.0)])
def test_a_mixture_has_the_shares_of_its_weights(weights):
  weights = dict(zip(levels_lib.NAMES, weights, strict=True))
  env = environment("mixture", weights)
  drawn = [name for step in range(500) for name in names(env, step, 8)]
  for name, weight in weights.items():
    share = weight / sum(weights.values())
    error = math.sqrt(share * (1 - share) / len(drawn))
    assert abs(drawn.count(name) / len(drawn) - share) <= 4 * error  # 0 exactly for a weight of 0


def test_what_a_run_may_play():
  assert played("easy", EVEN) == ("easy",)
  assert played("mixture", {"easy": 0.5, "vanilla": 0, "challenging": 2}) == ("easy", "challenging")
  assert played("curriculum", EVEN) == levels_lib.NAMES


# Curricula.


def test_a_curriculum_moves_by_the_mean_over_its_window_and_counts_anew():
  env = environment("curriculum")
  means = [90, 90, 0, 90, 90, 60, 60, 60, 60, 100, 100, 100, 0, 0, 0, 20, 20, 20, 0, 0, 0]
  at = []
  for step, mean in enumerate(means):
    at += names(env, step)
    env.observe([finished(mean - 10), finished(mean + 10 if mean < 100 else 100)])
  # Worked out by hand: (90 + 90 + 0) / 3 is enough for easy to end; at vanilla 90, 90, 60 are;
  # at challenging there is nothing harder, and (100, 0, 0), then (0, 0, 0) lower it.
  expected = ["easy"] * 3 + ["vanilla"] * 3 + ["challenging"] * 9 + ["vanilla"] * 3 + ["easy"] * 3
  assert at == expected


def test_a_curriculum_stays_between_its_thresholds():
  env = environment("curriculum", curriculum=Curriculum("vanilla", 1, 60, 20))
  for step in range(30):
    assert names(env, step, 4) == ["vanilla"] * 4
    env.observe([finished(21 + step)])


def test_a_curriculum_without_a_dialogue_waits():
  env = environment("curriculum", curriculum=Curriculum("easy", 1, 60, 20))
  env.observe([])
  assert names(env, 0) == ["easy"]


def test_a_curriculum_goes_on_from_its_state_as_if_never_stopped():
  draw = random.Random(0)
  batches = [[finished(draw.randrange(100)) for _ in range(3)] for _ in range(80)]
  curriculum = Curriculum("vanilla", window=4, raise_at=55.5, lower_at=45.5)
  whole, at = environment("curriculum", curriculum=curriculum), []
  for step, batch in enumerate(batches):
    at += names(whole, step)
    whole.observe(batch)
  assert set(at) == set(levels_lib.NAMES)
  stopped, metadata, again = environment("curriculum", curriculum=curriculum), None, []
  for step, batch in enumerate(batches):
    if metadata is not None:  # a new process, which has the checkpoint's JSON alone
      stopped = environment("curriculum", curriculum=curriculum)
      stopped.restore(json.loads(metadata))
    again += names(stopped, step)
    stopped.observe(batch)
    metadata = json.dumps({"step": step + 1} | stopped.state())
  assert again == at
  assert stopped.state() == whole.state()


# Metrics.


def test_metrics_by_level_worked_out_by_hand():
  dialogues = [
    finished(40, group=0, level="easy", changes=(3, -2)),
    finished(60, group=0, level="easy", changes=(1,)),
    finished(10, group=1, level="challenging"),
    finished(10, group=1, level="challenging"),
    finished(50, group=2, level="easy", changes=(0,)),
    finished(56, group=2, level="easy"),
  ]
  found = level_metrics(dialogues)
  assert math.isnan(found.pop("environment/challenging_accepted"))
  assert found == {
    "environment/easy_dialogues": 4.0,
    "environment/easy_final_mean": 51.5,
    "environment/easy_accepted": 0.5,
    "environment/easy_spread": (10 + 3) / 2,
    "environment/challenging_dialogues": 2.0,
    "environment/challenging_final_mean": 10.0,
    "environment/challenging_spread": 0.0,
  }
  assert all(type(value) is float for value in found.values())
  assert np.isclose(found["environment/easy_spread"], np.mean([np.std([40, 60]), np.std([50, 56])]))
