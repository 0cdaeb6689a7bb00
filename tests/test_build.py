"""From a configuration to schedules and sizes."""

import math
import types

import numpy as np
import pytest
import runs

from rlver_jax import build, trainables
from rlver_jax.dialogue.levels import VANILLA, Level


def schedule(steps, epochs=1, fraction=0.0, kind="constant", model="policy", number=None, **more):
  """The rates of the first `number` updates, by default one an epoch of each step."""
  config = runs.config(
    **{
      "steps": steps,
      "algorithm.epochs": epochs,
      "optimizer.warmup_fraction": fraction,
      "optimizer.schedule": kind,
      "optimizer.learning_rate": 2.0,
      "critic.learning_rate": 6.0,
      "critic.warmup_fraction": 0.25,
    }
    | more
  )
  rate = trainables.make_schedule(config, model)
  return [float(rate(n)) for n in range(number or steps * epochs)]


def test_warm_up_rises_to_the_full_rate_and_stays_there():
  np.testing.assert_allclose(schedule(8, fraction=0.5), [0.5, 1, 1.5, 2, 2, 2, 2, 2], rtol=1e-6)
  np.testing.assert_allclose(schedule(4, 2, 0.25), [1, 2, 2, 2, 2, 2, 2, 2], rtol=1e-6)
  np.testing.assert_allclose(schedule(3, fraction=0.02), [2, 2, 2], rtol=1e-6)


def test_a_cosine_falls_from_the_full_rate_towards_zero():
  expected = [1, 2] + [1 + math.cos(math.pi * n / 6) for n in range(6)]
  np.testing.assert_allclose(schedule(8, fraction=0.25, kind="cosine"), expected, rtol=1e-6)


def test_levels_are_those_of_the_configuration_and_vanilla():
  config = runs.config(**{"environment.easy.gain": 1.5, "environment.challenging.hints": -0.5})
  levels = build.build_levels(config)
  assert list(levels) == ["easy", "vanilla", "challenging"]
  assert levels["vanilla"] == VANILLA
  assert (levels["easy"].gain, levels["challenging"].hints) == (1.5, -0.5)
  for name in ("easy", "challenging"):
    fields = {f: getattr(levels[name], f) for f in config.environment[name]}
    assert levels[name] == Level(name, **fields) and fields == config.environment[name].to_dict()


def test_every_minibatch_of_every_epoch_is_an_update():
  more = {"algorithm.minibatches": 2}
  expected = [0.5, 1, 1.5, 2, 2, 2, 2, 2]
  np.testing.assert_allclose(schedule(2, 2, 0.5, number=8, **more), expected, rtol=1e-6)


def test_the_critic_has_a_rate_and_a_warm_up_of_its_own():
  options = {"fraction": 0.5, "model": "critic", "algorithm.advantage": "gae"}
  np.testing.assert_allclose(schedule(8, **options), [3, 6, 6, 6, 6, 6, 6, 6], rtol=1e-6)
  falling = [3, 6] + [3 + 3 * math.cos(math.pi * n / 6) for n in range(6)]
  np.testing.assert_allclose(schedule(8, kind="cosine", **options), falling, rtol=1e-6)


def test_the_policys_schedule_begins_when_the_critic_has_warmed_up():
  """Of its own updates, which are fewer; only where there is a critic to wait for."""
  more = {"critic.warmup_steps": 4, "fraction": 0.5, "number": 4}
  gae, grpo = {"algorithm.advantage": "gae"}, {"algorithm.advantage": "grpo"}
  np.testing.assert_allclose(schedule(8, **more, **gae), [1, 2, 2, 2], rtol=1e-6)
  np.testing.assert_allclose(schedule(8, **more, **grpo), [0.5, 1, 1.5, 2], rtol=1e-6)


def test_a_critic_may_warm_up_for_all_of_a_run():
  more = {"critic.warmup_steps": 9, "algorithm.advantage": "gae"}
  for kind in ("constant", "cosine"):
    assert schedule(4, kind=kind, number=1, **more) == [2.0]


@pytest.mark.parametrize(
  ("longest", "smallest", "sizes"),
  [
    (1024, 1024, (1024,)),
    (1000, 1024, (1000,)),
    (1025, 1024, (1024, 1025)),
    (5000, 1024, (1024, 1536, 2048, 3072, 4096, 5000)),
    (7, 1, (1, 2, 3, 4, 6, 7)),
  ],
)
def test_ladders_double_up_to_the_longest(longest, smallest, sizes):
  assert build.ladder(longest, smallest) == sizes


def test_the_longest_row_has_room_for_every_thought_beside_the_context():
  direct = runs.config(**{"training.smallest_row": 256})
  assert build.row_lengths(direct) == (256, 384, 512, 640)
  think = runs.config(**{"training.smallest_row": 256, "dialogue.mode": "think"})
  assert build.row_lengths(think) == (256, 384, 512, 656)


@pytest.mark.parametrize(
  ("asked", "shards", "expected"), [(0, 1, 4), (3, 1, 3), (3, 4, 4), (0, 3, 6)]
)
def test_slots_are_all_of_a_step_or_as_asked_and_a_multiple_of_the_shards(
  asked, shards, expected, monkeypatch
):
  mesh = types.SimpleNamespace(shape={"data": shards, "fsdp": 1, "tensor": 2})
  assert build.slots(runs.config(**{"sampling.slots": asked}), mesh) == expected


def test_greedy_baselines_have_slots_too():
  mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1})
  assert build.slots(runs.config(**{"algorithm.advantage": "remax"}), mesh) == 2 * (2 + 1)
