"""The shipped models of the embedded world: what they are made of, and how well they do."""

import json
import random

import pytest
import safetensors
from test_tokenizer import check_chat, check_text

from rlver_jax import tokenizer as tokenizer_lib
from rlver_jax.dialogue.dialogue import Dialogue, PolicyReply, Rules
from rlver_jax.dialogue.simulators import appraisal
from rlver_jax.dialogue.simulators.scripted import details
from rlver_jax.embedded import build, dialogues, helper, measure, scenarios
from rlver_jax.models import source

MOST_BYTES = 12_000_000  # of both models, whole

models = pytest.mark.parametrize("model", list(build.STAGES))


def directory(model):
  return build.ASSETS / f"tiny-{model}"


def manifest(model):
  return json.loads((directory(model) / build.MANIFEST).read_text("utf-8"))


@models
def test_the_files_are_those_of_the_manifest_and_its_recipe_is_todays(model):
  found = manifest(model)
  assert found["files"] == build.digests(directory(model))
  assert "model.safetensors" in found["files"]
  assert found["stages"] == [stage.recipe() for stage in build.STAGES[model]]
  assert found["seed"] == build.SEEDS[model]
  assert found["command"] == f"python -m rlver_jax.embedded.build --model={model}"


def test_both_are_small_and_in_bfloat16():
  sizes = [path.stat().st_size for model in build.STAGES for path in directory(model).iterdir()]
  assert 4_000_000 < sum(sizes) < MOST_BYTES
  for model in build.STAGES:
    with safetensors.safe_open(directory(model) / "model.safetensors", "numpy") as file:
      names = file.keys()
      assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}


@models
def test_it_is_an_ordinary_model_whose_tokenizer_takes_any_text(model):
  opened = source.open_source(
    f"tiny-{model}", "policy.path", dtype="float32", param_dtype="float32"
  )
  assert not opened.drawn and opened.config.tie_word_embeddings
  tokenizer = tokenizer_lib.load(directory(model))
  check_text(tokenizer, directory(model))
  check_chat(tokenizer, directory(model))


@pytest.mark.slow
@pytest.mark.optimised
def test_the_simulated_user_appraises_as_well_as_we_want_and_its_manifest_says():
  """On what a helper with the policy's last habits says to users whose words are in no training
  text."""
  found = measure.appraisals("tiny-simulator", build.HELPERS["policy"])
  told = manifest("simulator")["held_out"]["policy"]
  assert found.turns == told["turns"] and found.unread < 0.02
  assert found.sign >= 0.9 and found.error <= 1.5
  assert found.sign == pytest.approx(told["sign"], abs=0.02)
  assert found.error == pytest.approx(told["error"], abs=0.2)


@pytest.mark.slow
@pytest.mark.optimised
def test_the_policy_tells_what_a_user_needs_before_it_is_trained_by_dialogues():
  """Its good replies are mostly what their user needs, where an eighth would be by chance."""
  found = measure.replies("tiny-policy", "direct")
  told = manifest("policy")["held_out"]["direct"]
  assert found.good < 0.7 < found.matched
  assert found.good == pytest.approx(told["good"], abs=0.05)
  assert found.matched == pytest.approx(told["matched"], abs=0.05)


def test_good_and_matched_replies_are_counted():
  told = scenarios.scenario("held_out", 0, 0)
  need = appraisal.NEEDS[told.intention]
  other = next(name for name in helper.GOOD if name != need)
  rng, x = random.Random(0), details(told)[0]
  table = scenarios.words()
  said = [
    table["good"][need]["first"][0], table["good"][need]["first"][1],
    table["good"][other]["first"][0], scenarios.pick(rng, table["poor"]["dismissive"]),
  ]  # fmt: skip
  replies = iter(said)

  def reply(dialogue):
    return PolicyReply(next(replies).format(x=x, z="the moon"), None, True, True, 0)

  dialogue = Dialogue(0, 0, told, Rules(60, len(said)))
  played = dialogues.finish(dialogue, 0, reply, patient=True)
  assert measure.count([played]) == measure.Replies(4, 0.75, pytest.approx(2 / 3))
  assert measure.count([]) == measure.Replies(0, 0, 0)
