"""Qwen2.5 (dense, 0.5B to 72B) in Flax NNX, written for functional use.

A `Qwen2` is a pytree: pass it to `jax.jit`, `jax.grad` and optax as it is. The layers are one
`Block` whose parameters carry a leading layer axis and are scanned, so compile time does not
grow with depth. The model computes hidden states only; how a token sees others is the
caller's `attention` (`attention.py` for whole rows, `sampling/` for a cache), and the
vocabulary projection is applied in pieces by whoever needs it (`logprobs.py`, the sampler).

Axes: B batch, T tokens, L layers, D model, F feed-forward, G key/value heads, R query heads
per key/value head, H = G * R query heads, K head size, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlver_jax.partitioning import constrain

REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}

# attention(q_BTHK, k_BTGK, v_BTGK, layer, state) -> (out_BTHK, state)
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

# The linear maps of a layer: what each does to its input (left) with its weight (right).
LINEAR = {
  "q": "btd,dhk->bthk",
  "k": "btd,dgk->btgk",
  "v": "btd,dgk->btgk",
  "o": "bthk,hkd->btd",
  "gate": "btd,df->btf",
  "up": "btd,df->btf",
  "down": "btf,fd->btd",
}


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
  """Sizes and numerics of one model; field names follow Hugging Face's `config.json`."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 1_000_000.0
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  max_position_embeddings: int = 32_768
  initializer_range: float = 0.02
  dtype: str = "float32"  # of activations and products
  param_dtype: str = "float32"  # of stored parameters
  remat: str = "full"  # what the backward pass recomputes: a key of REMAT_POLICIES


class Block(nnx.Module):
  """One transformer layer: attention and gated feed-forward, both pre-normalised."""

  def __init__(self, config: Qwen2Config, key: jax.Array):
    c, keys = config, iter(jax.random.split(key, 7))
    D, F, H, G, K = (
      c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    )  # fmt: skip

    def normal(*shape, axes):
      scale = c.initializer_range
      value = scale * jax.random.normal(next(keys), shape, jnp.float32)
      return nnx.Param(value.astype(c.param_dtype), axes=axes)

    def constant(make, *shape, axes):
      return nnx.Param(make(shape, c.param_dtype), axes=axes)

    self.config = config
    self.attention_norm = constant(jnp.ones, D, axes=("norm",))
    self.q = normal(D, H, K, axes=("embed", "heads", "head"))
    self.k = normal(D, G, K, axes=("embed", "kv_heads", "head"))
    self.v = normal(D, G, K, axes=("embed", "kv_heads", "head"))
    self.q_bias = constant(jnp.zeros, H, K, axes=("heads", "head"))
    self.k_bias = constant(jnp.zeros, G, K, axes=("kv_heads", "head"))
    self.v_bias = constant(jnp.zeros, G, K, axes=("kv_heads", "head"))
    self.o = normal(H, K, D, axes=("heads", "head", "embed"))
    self.mlp_norm = constant(jnp.ones, D, axes=("norm",))
    self.gate = normal(D, F, axes=("embed", "mlp"))
    self.up = normal(D, F, axes=("embed", "mlp"))
    self.down = normal(F, D, axes=("mlp", "embed"))

  def __call__(self, x_BTD, rope, attention: Attention, layer, state, adapters=None):
    """`adapters`, for this layer, adds to the linear maps that it names (see `lora.py`)."""
    c = self.config

    def linear(name, x):
      y = jnp.einsum(LINEAR[name], x, getattr(self, name)[...].astype(c.dtype))
      if adapters is not None and name in adapters:
        y += adapters[name](LINEAR[name], x)
      return y

    h_BTD = rms_norm(x_BTD, self.attention_norm[...], c.rms_norm_eps)
    q_BTHK = linear("q", h_BTD) + self.q_bias[...].astype(c.dtype)
    k_BTGK = linear("k", h_BTD) + self.k_bias[...].astype(c.dtype)
    v_BTGK = linear("v", h_BTD) + self.v_bias[...].astype(c.dtype)
    q_BTHK, k_BTGK, v_BTGK = (
      _rows_apart(x, heads)
      for x, heads in ((q_BTHK, "heads"), (k_BTGK, "kv_heads"), (v_BTGK, "kv_heads"))
    )
    out_BTHK, state = attention(rotate(q_BTHK, rope), rotate(k_BTGK, rope), v_BTGK, layer, state)
    out_BTHK = constrain(out_BTHK, "stream", "length", "heads", "head")
    x_BTD += linear("o", out_BTHK)
    x_BTD = constrain(x_BTD, "stream", "length", "whole")
    h_BTD = rms_norm(x_BTD, self.mlp_norm[...], c.rms_norm_eps)
    x_BTD += linear("down", jax.nn.silu(linear("gate", h_BTD)) * linear("up", h_BTD))
    return constrain(x_BTD, "stream", "length", "whole"), state


def _rows_apart(x_BTHK: jax.Array, heads: str) -> jax.Array:
  """Queries, keys or values laid out for attention: rows apart, each head whole.

  First as the weights put them out. In training that is the same, and makes XLA gather a layer's
  weights for its rows; left to itself it holds the activations of all rows on every device.
  """
  x_BTHK = constrain(x_BTHK, "stream", "length", heads, "head")
  return constrain(x_BTHK, "batch", "length", heads, "whole")


class Qwen2(nnx.Module):
  """The whole model; `layers` is a `Block` with a leading layer axis on every parameter.

  Each parameter's metadata `axes` names its logical axes (without the layer axis);
  `partitioning.py` maps those names to the mesh.
  """

  def __init__(self, config: Qwen2Config, key: jax.Array):
    c = config
    embed_key, head_key, layers_key = jax.random.split(key, 3)

    def table(key):
      value = c.initializer_range * jax.random.normal(key, (c.vocab_size, c.hidden_size))
      return nnx.Param(value.astype(c.param_dtype), axes=("vocab", "embed"))

    self.config = config
    self.embed = table(embed_key)
    layer_keys = jax.random.split(layers_key, c.num_hidden_layers)
    self.layers = jax.vmap(lambda key: Block(c, key))(layer_keys)
    self.norm = nnx.Param(jnp.ones(c.hidden_size, c.param_dtype), axes=("norm",))
    self.head = None if c.tie_word_embeddings else table(head_key)

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attention: Attention,
    state: Any = None,
    adapters: Any = None,
  ) -> tuple[jax.Array, Any]:
    """Final hidden states of `tokens_BT` (int32) at `positions_BT` (int32, for the rotation).

    `state` (a cache, or None) travels through the layers in the scan's carry, where XLA
    updates it in place; `adapters` (see `lora.py`) or None are added to the linear maps. Returns
    (hidden_BTD after the last norm, state).
    """
    c = self.config
    x_BTD = embed(self.embed[...], tokens_BT, c.dtype)
    x_BTD, state = run_layers(c, self.layers, x_BTD, positions_BT, attention, state, adapters)
    return rms_norm(x_BTD, self.norm[...], c.rms_norm_eps), state

  def unembedding(self) -> jax.Array:
    """The vocabulary projection, [V, D] in the compute dtype: logits = hidden @ its transpose."""
    return (self.embed if self.head is None else self.head)[...].astype(self.config.dtype)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
  """The tokens' rows of the table, [B, T, D]."""
  # Each device looks up its part of the width for all rows of its `data` group, and then rows
  # take the place of the width. Left to itself XLA holds every row of the batch for this.
  x_BTD = constrain(table_VD[tokens_BT].astype(dtype), "data_rows", "length", "embed")
  return constrain(x_BTD, "stream", "length", "whole")


def run_layers(
  config: Qwen2Config,
  layers: Block,
  x_BTD: jax.Array,
  positions_BT: jax.Array,
  attention: Attention,
  state: Any = None,
  adapters: Any = None,
  *,
  lowest: int | None = None,
) -> tuple[jax.Array, Any]:
  """Scans a stack of layers, or the `lowest` so many of it; arguments as of `Qwen2.__call__`."""
  rope = rotation(positions_BT, config.head_dim, config.rope_theta)
  count = jax.tree.leaves(layers)[0].shape[0]

  def step(carry, layer):
    (block, adapters), index = layer
    return block(carry[0], rope, attention, index, carry[1], adapters), None

  def picked(carry, index):  # a layer at a time: a slice of the stack would be a second copy
    one = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), stack)
    return step(carry, (one, index))

  stack = (layers, adapters)
  if lowest is not None and lowest < count:
    body, xs = picked, jnp.arange(lowest)
  else:
    body, xs = step, (stack, jnp.arange(count))
  if REMAT_POLICIES[config.remat] is not None:
    body = jax.checkpoint(body, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
  return jax.lax.scan(body, (x_BTD, state), xs)[0]


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
  """Root-mean-square normalisation over the last axis, in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon)
  return (y * weight.astype(jnp.float32)).astype(x.dtype)


def rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the rotary angles, each float32 [B, T, 1, head_dim / 2]."""
  frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary position embedding in the half-split layout (Su et al., arXiv 2104.09864)."""
  cos, sin = rope
  x1, x2 = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTHK.dtype)
