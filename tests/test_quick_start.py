"""The quick start, cut down to its first steps: the policy learns, and shows that it has."""

import pytest
import runs

from configs import grpo
from rlver_jax import closing, heldout
from rlver_jax.sources import open_sources

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

STEPS, SCENARIOS = 3, 32


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The configuration, the folder and the summary of the run."""
  config, workdir = grpo.get_config(), tmp_path_factory.mktemp("run")
  config.steps, config.evaluation.scenarios = STEPS, SCENARIOS
  config.log.tensorboard, config.compilation_cache = False, ""
  config.mesh.update(data=1, fsdp=-1)  # this process has its one device already
  return config, workdir, runs.play(config, workdir)


@pytest.fixture(scope="module")
def users(finished):
  return finished[2]["report"]["held_out"]["users"]


@pytest.mark.parametrize("user", ["language_model", heldout.SCRIPTED])
def test_emotion_rises_on_held_out_scenarios(users, user):
  """By more than chance, for the simulated user that it was trained with and for another."""
  found = users[user]
  assert found["before"]["final_emotion"] <= 40
  assert found["gain"]["mean"] >= max(10, 3 * found["gain"]["standard_error"])
  assert found["after"]["failure"] < found["before"]["failure"]


@pytest.mark.parametrize("user", ["language_model", heldout.SCRIPTED])
def test_no_memorised_reply_wins(users, user):
  """The policy uses many strategies, the right one more often than before, in words of its own."""
  before, after = users[user]["before"], users[user]["after"]
  assert after["strategies"] >= 5
  assert after["matched"] > before["matched"]
  assert after["repeated"] < 0.5


def test_the_end_of_the_run_shows_it(finished):
  config, workdir, summary = finished
  text = closing.describe(summary, config, open_sources(config), workdir)
  assert f"{SCENARIOS} held-out scenarios, before -> after training:" in text
  assert "language model" in text and "scripted user" in text and "before and after" in text
  assert text.splitlines()[-1] == f"curves: {workdir / closing.CURVES_FILE}"
  assert (workdir / closing.CURVES_FILE).read_bytes().startswith(b"\x89PNG")
