"""Adapters against merged weights, NumPy products and a frozen base."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax import partitioning
from rlver_jax.models import lora, weights
from rlver_jax.models.attention import tree_attention
from rlver_jax.models.qwen2 import Qwen2Config

CONFIG = Qwen2Config(41, 24, 40, 3, 6, 2, 4, rope_theta=100.0, initializer_range=0.3)
TOKENS_BT = np.random.default_rng(1).integers(0, 41, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def base():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    weights.abstract_model(CONFIG),
  )


def adapters_of(base, targets=lora.TARGETS, rank=3, alpha=6.0, fill=True):
  adapters = lora.create(base, targets, rank, alpha, jax.random.key(0))
  if fill:  # as after some training
    rng = np.random.default_rng(2)
    adapters = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), adapters)
  return adapters


@jax.jit
def hidden(model):
  positions_BT = jnp.broadcast_to(jnp.arange(TOKENS_BT.shape[1]), TOKENS_BT.shape)
  return model(TOKENS_BT, positions_BT, tree_attention(jnp.zeros_like(TOKENS_BT)))[0]


def test_fresh_adapters_change_nothing(base):
  adapted = lora.Adapted(base, adapters_of(base, fill=False))
  np.testing.assert_array_equal(hidden(adapted), hidden(base))
  assert all(np.abs(a.down[...]).max() > 0 for a in adapted.adapters.values())


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q", "v"), ("o",), ("down",)])
def test_merged_weights_compute_what_the_adapted_model_does(base, targets):
  adapted = lora.Adapted(base, adapters_of(base, targets))
  merged = lora.merge(adapted)
  np.testing.assert_allclose(hidden(adapted), hidden(merged), atol=2e-5)
  assert np.abs(hidden(adapted) - hidden(base)).max() > 1e-2
  for name in ("embed", "norm", "head"):
    np.testing.assert_array_equal(getattr(merged, name)[...], getattr(base, name)[...])
  for name in lora.TARGETS:
    same = np.array_equal(getattr(merged.layers, name)[...], getattr(base.layers, name)[...])
    assert same == (name not in targets)


def test_a_merged_weight_is_the_sum_of_the_paper(base):
  """W + alpha / r * A B, each as a matrix [inputs, outputs] of one layer."""
  adapters = adapters_of(base, ("q", "o", "up"))
  merged = lora.merge(lora.Adapted(base, adapters))
  inputs = {"q": 24, "o": 24, "up": 24}  # o takes 6 heads of 4
  for name, adapter in adapters.items():
    for layer in range(3):
      down, up, before, after = (
        np.asarray(x[...][layer], np.float64)
        for x in (
          adapter.down, adapter.up, getattr(base.layers, name), getattr(merged.layers, name)
        )
      )  # fmt: skip
      product = down.reshape(inputs[name], 3) @ up.reshape(3, -1)
      expected = before.reshape(inputs[name], -1) + 6.0 / 3 * product
      np.testing.assert_allclose(after.reshape(inputs[name], -1), expected, atol=1e-5)


def test_gradients_reach_the_adapters_as_if_the_weights_were_merged(base):
  adapters, probe = adapters_of(base), np.random.default_rng(3).standard_normal((2, 9, 24))

  def of_adapted(adapters):
    return jnp.sum(hidden(lora.Adapted(base, adapters)) * probe)

  def of_merged(adapters):
    return jnp.sum(hidden(lora.merge(lora.Adapted(base, adapters))) * probe)

  ours, expected = (jax.grad(f)(adapters) for f in (of_adapted, of_merged))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3)
    assert np.abs(b).max() > 1e-2


def test_adapters_stay_in_float32_beside_a_bfloat16_base():
  base = weights.initialise(
    Qwen2Config(41, 24, 40, 2, 6, 2, 4, dtype="bfloat16", param_dtype="bfloat16"),
    0,
    builders.mesh(),
  )
  adapters = adapters_of(base, ("q", "down"))
  assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"float32"}
  assert hidden(lora.Adapted(base, adapters)).dtype == jnp.bfloat16
  merged = lora.merge(lora.Adapted(base, adapters))
  assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"bfloat16"}


def test_adapters_are_cut_like_the_weights_they_stand_beside(base):
  mesh = jax.sharding.AbstractMesh((1, 2, 2), partitioning.MESH_AXES)
  adapters = jax.eval_shape(lambda: lora.create(base, ("q", "down"), 3, 6.0, jax.random.key(0)))
  shardings = partitioning.model_shardings(mesh, adapters)
  spec = jax.sharding.PartitionSpec
  assert shardings["q"].down.get_value().spec == spec(None, ("fsdp",), None)
  assert shardings["q"].up.get_value().spec == spec(None, None, ("tensor",), None)
  assert shardings["down"].down.get_value().spec == spec(None, ("tensor",), None)
  assert shardings["down"].up.get_value().spec == spec(None, None, ("fsdp",))
