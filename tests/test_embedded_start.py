"""The weights that a tiny model starts from: before any training it half repeats what it read."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax import partitioning
from rlver_jax.embedded import start
from rlver_jax.errors import UserError
from rlver_jax.models import source, weights
from rlver_jax.models.attention import tree_attention


def opened():
  return source.open_source(
    "tiny-policy", "policy.path", dtype="float32", param_dtype="float32", from_scratch=True
  )


def place_of_what_followed(model, gap: int) -> float:
  """Of distinct tokens, others and the same again: the mean share of the vocabulary that is less
  probable than the token that followed the first time."""
  random = np.random.default_rng(gap)
  drawn = random.permutation(2000)[: 40 + gap]
  tokens = np.concatenate([drawn, drawn[:40]])[None]
  positions = np.arange(tokens.size)[None]
  attention = tree_attention(jnp.zeros(tokens.shape, jnp.int32))
  hidden, _ = model(jnp.asarray(tokens), jnp.asarray(positions), attention)
  logits = np.asarray(hidden[0, -40:-1] @ model.unembedding().T)
  followed = logits[np.arange(39), drawn[1:40]]
  return float(np.mean(logits < followed[:, None]))


@pytest.mark.parametrize("gap", [0, 60])
def test_what_followed_before_is_expected_again(gap):
  found, mesh = opened(), partitioning.make_mesh(1, 1, 1)
  model = weights.initialise(found.config, 3, mesh)
  assert 0.3 < place_of_what_followed(model, gap) < 0.7
  start.repeat(model, np.random.default_rng(3))
  assert place_of_what_followed(model, gap) > 0.75


def test_the_directory_is_a_function_of_the_seed_and_holds_a_model(tmp_path):
  found, mesh = opened(), partitioning.make_mesh(1, 1, 1)
  for name, seed in (("a", 1), ("b", 1), ("c", 2)):
    start.write(found, mesh, seed, tmp_path / name)
  a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
  assert a == b != c
  read = source.open_source(
    str(tmp_path / "a"), "policy.path", dtype="float32", param_dtype="float32"
  )
  model = source.load_model(read, mesh, seed=0)
  # The layers after the first two are as they were drawn.
  drawn = weights.initialise(found.config, 1, mesh)
  for name in ("q", "k", "v", "gate", "up"):
    np.testing.assert_array_equal(
      getattr(model.layers, name)[...][2:], getattr(drawn.layers, name)[...][2:]
    )


@pytest.mark.parametrize("path", ["tiny-policy", "tiny-simulator"])
def test_a_model_that_has_to_be_made_first_is_not_drawn_instead(path, monkeypatch, tmp_path):
  made = source.embedded_directory(path)
  shutil.copytree(made, tmp_path / path, ignore=shutil.ignore_patterns("*.safetensors"))
  monkeypatch.setattr(source, "embedded_directory", lambda name: tmp_path / name)
  with pytest.raises(UserError, match=r"model\.safetensors"):
    source.open_source(path, "policy.path", dtype="float32", param_dtype="float32")
