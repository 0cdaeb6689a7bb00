"""A step's dialogues: groups without signal are replaced, baselines are kept apart."""

import types

import builders
import numpy as np
import pytest
import runs

from rlver_jax import collect
from rlver_jax.build import build_environment
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, Segment
from rlver_jax.dialogue.reward import RewardSettings

RULES = Rules(max_turns=1)


def spoken(index, group, scenario, change, greedy=False):
  """A finished dialogue of one turn after which the emotion has changed by `change`."""
  dialogue = Dialogue(index, group, scenario, RULES, greedy=greedy)
  dialogue.segments = [Segment((1, 2, 3)), Segment((4, 5), 0, (-1.0, -2.0)), Segment((6,))]
  dialogue.advance(PolicyReply("Yes.", None, True, True, 2))
  dialogue.advance(Plan(change))
  return dialogue


@pytest.fixture
def step(monkeypatch):
  """Plays a step whose groups' changes of emotion are given; returns (config, run, sources, asked).

  `changes` maps a group's number to the changes of its dialogues; others get 1, 1, ...
  """

  def make(changes, **fields):
    config = runs.config(**{"dialogue.scenarios_per_step": 3} | fields)
    run = types.SimpleNamespace(
      policy=None, simulator=None, rules=RULES, slots=6, row_lengths=(16,),
      reward=RewardSettings("final", 1.0, 1.0, 0.0, 0.0),
      learner=types.SimpleNamespace(
        settings=types.SimpleNamespace(estimator=config.algorithm.advantage)
      ),
    )  # fmt: skip
    scenarios = [builders.scenario(id=str(i)) for i in range(10)]
    asked = []

    def rollout(policy, simulator, chosen, *, group_size, first_group, baselines, **_):
      asked.append([int(s.id) for s in chosen])
      dialogues = []
      for group, scenario in enumerate(chosen, first_group):
        for i in range(group_size + baselines):
          change = changes.get(group, (1,) * (group_size + 1))[i]
          index = group * (group_size + baselines) + i
          dialogues.append(spoken(index, group, scenario, change, greedy=i == group_size))
      return dialogues

    monkeypatch.setattr(collect, "rollout", rollout)
    sources = types.SimpleNamespace(scenarios=scenarios)
    return config, run, sources, asked

  return make


def play(config, run, sources, step=0):
  environment = build_environment(config)
  return collect.play(config, sources, run, environment, step, lambda: None)


def changes_of(group):
  return [dialogue.turns[0].plan.change for dialogue in group]


def test_without_dynamic_sampling_every_group_is_taken_as_it_is(step):
  config, run, sources, asked = step({0: (1, 2)})
  played = play(config, run, sources)
  assert len(asked) == 1 and not played.dropped
  assert [changes_of(g) for g in played.groups] == [[1, 2], [1, 1], [1, 1]]
  assert [d.index for d in played.trained] == list(range(6)) and played.all == played.trained


def test_groups_whose_rewards_are_equal_are_replaced_by_others_in_their_place(step):
  # Group 1 has signal; of the next round's two (3, 4) one has; of the third round's (6) none.
  config, run, sources, asked = step(
    {1: (3, 5), 4: (0, 2)}, **{"algorithm.dynamic_sampling_rounds": 2}
  )
  played = play(config, run, sources)
  assert [len(chosen) for chosen in asked] == [3, 2, 1]
  assert [changes_of(g) for g in played.groups] == [[1, 1], [3, 5], [0, 2]]
  assert [g[0].group for g in played.groups] == [0, 1, 4]
  assert sorted(g[0].group for g in played.dropped) == [2, 3, 6]
  indices = [d.index for d in played.all]
  assert len(set(indices)) == len(indices) == 12  # no two share their randomness
  experience, metrics = collect.make_experience(run, played)
  assert metrics["reward/groups_without_signal"] == pytest.approx(1 / 3)
  assert metrics["reward/groups_replaced"] == 3
  # What the policy is measured by: all that it said, before groups were chosen by their rewards.
  changes = [1, 1, 3, 5, 0, 2] + [1, 1] * 3
  assert metrics["reward/mean"] == pytest.approx(np.mean([(30 + c) / 100 for c in changes]))
  np.testing.assert_array_equal(experience.groups, [0, 0, 1, 1, 2, 2])
  expected = [0.31, 0.31, 0.33, 0.35, 0.30, 0.32]
  np.testing.assert_allclose(
    experience.rewards[:, 4], expected, rtol=1e-6
  )  # the last sampled token
  assert np.count_nonzero(experience.rewards) == 6


def test_no_further_round_is_played_once_all_groups_have_signal(step):
  config, run, sources, asked = step(
    {g: (0, 1) for g in (0, 1, 2)}, **{"algorithm.dynamic_sampling_rounds": 5}
  )
  played = play(config, run, sources)
  assert len(asked) == 1 and not played.dropped


def test_the_scenarios_of_further_rounds_depend_on_step_and_seed_alone(step):
  fields = {"algorithm.dynamic_sampling_rounds": 3}
  config, run, sources, asked = step({}, **fields)
  for number in (4, 5, 4):
    play(config, run, sources, number)
  first, second, again = (asked[i : i + 4] for i in (0, 4, 8))
  assert first == again != second
  config, run, sources, asked = step({}, seed=1, **fields)
  play(config, run, sources, 4)
  assert asked != first


def test_a_dialogue_whose_user_failed_is_absent_from_its_group(step):
  config, run, sources, _ = step({0: (1, 2), 1: (4, 4), 2: (0, 9)})
  played = play(config, run, sources)
  for group in played.groups[:2]:
    group[1].end = "failed"
  experience, metrics = collect.make_experience(run, played)
  np.testing.assert_array_equal(experience.rows.mask.sum(1), [2, 0, 2, 0, 2, 2])
  assert metrics["reward/mean"] == pytest.approx(np.mean([0.31, 0.34, 0.30, 0.39]))
  assert metrics["reward/groups_without_signal"] == pytest.approx(2 / 3)


def test_greedy_baselines_are_not_trained_on(step):
  changes = {0: (1, 2, 7), 1: (1, 1, 0), 2: (4, 4, 4)}
  config, run, sources, _ = step(changes, **{"algorithm.advantage": "remax"})
  played = play(config, run, sources)
  assert [d.greedy for d in played.trained] == [False] * 6
  assert [d.greedy for d in played.baselines] == [True] * 3
  assert len(played.all) == 9
  experience, metrics = collect.make_experience(run, played)
  assert experience.rows.tokens.shape == (6, 16)
  np.testing.assert_allclose(experience.baselines, [0.37, 0.37, 0.30, 0.30, 0.34, 0.34], rtol=1e-6)
  assert "reward/groups_without_signal" not in metrics
  assert metrics["reward/mean"] == pytest.approx(np.mean([0.31, 0.32, 0.31, 0.31, 0.34, 0.34]))
