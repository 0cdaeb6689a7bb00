"""The shipped tiny models: their files, how the simulated user judges, and what it says."""

import json

import pytest
import safetensors

from rlver_jax.embedded import build
from rlver_jax.models import source

MODELS = ("policy", "simulator")


def directory(model: str):
  return source.embedded_directory(f"tiny-{model}")


@pytest.mark.parametrize("model", MODELS)
def test_files_are_those_of_the_manifest(model):
  manifest = json.loads((directory(model) / build.MANIFEST).read_text("utf-8"))
  assert manifest["files"] == build.digests(directory(model))
  assert manifest["command"] == f"python -m rlver_jax.embedded.build --model={model}"
  assert manifest["seed"] == build.SEEDS[model]


def test_files_are_small_and_of_the_rebuilt_tokenizer():
  sizes = [path.stat().st_size for model in MODELS for path in directory(model).iterdir()]
  assert sum(sizes) < 12 * 2**20
  for model in MODELS:
    with safetensors.safe_open(directory(model) / "model.safetensors", "np") as tensors:
      kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    for name in ("tokenizer.json", "chat_template.jinja"):
      origin = source.embedded_directory("tiny") / name
      assert (directory(model) / name).read_bytes() == origin.read_bytes()
    opened = source.open_source(
      f"tiny-{model}", "policy.path", dtype="float32", param_dtype="float32"
    )
    assert not opened.drawn


def test_the_simulated_user_judges_like_the_scripted_one():
  """On replies to held-out scenarios, whose stories and names it has never seen."""
  found = build.measure("tiny-simulator")
  assert found.turns >= 400
  assert found.sign >= 0.9 and found.error <= 1.5 and found.unread <= 0.02
