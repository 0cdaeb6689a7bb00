"""The key/value cache of a sampling engine, and attention to it.

Row b of every array is slot b of the cache. Row b holds `start_B[b]` tokens that count; what
lies beyond is forgotten and will be overwritten, so setting a length back is a rewind.

Axes as in `models/qwen2.py`, and S cache length, W attention window (W <= S, static).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlver_jax.models.attention import NEGATIVE
from rlver_jax.models.qwen2 import Attention


class Cache(NamedTuple):
  """Keys and values of every slot, each [L, B, G, S, K]."""

  k: jax.Array
  v: jax.Array


CPU_KEY_BLOCK = 128  # keys and values that are read at a time
CACHE_AXES = ("layers", "batch", "kv_heads", "length", "head")


def scores(q_BTHK: jax.Array, k_BGSK: jax.Array) -> jax.Array:
  """Scaled products of queries and keys: float32 [B, G, H / G, T, S]."""
  B, T, H, K = q_BTHK.shape
  G = k_BGSK.shape[1]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  return K**-0.5 * jnp.einsum("btgrk,bgsk->bgrts", q, k_BGSK, preferred_element_type=jnp.float32)


def positions(cache_LBGSK: jax.Array, layer: int, first: jax.Array | int, count: int) -> jax.Array:
  """Positions first to first + count of one layer: [B, G, count, K]."""
  _, B, G, _, K = cache_LBGSK.shape
  return jax.lax.dynamic_slice(cache_LBGSK, (layer, 0, 0, first, 0), (1, B, G, count, K))[0]


def cached_attention(start_B: jax.Array, count_B: jax.Array, window: int) -> Attention:
  """Attention of T new tokens a row to the row's cache, into which they are written first.

  start_B: int32, where the new tokens begin; count_B: how many of the T are real (the others
  write nothing). Every start + count must be within `window`. The model's state is the Cache.

  On a CPU keys and values are read in blocks that stay in its cache, as far as the longest row
  reaches, with a running softmax (Milakov and Gimelshein, arXiv 1805.02867).
  """
  block = min(window, CPU_KEY_BLOCK) if jax.default_backend() == "cpu" else window

  def attention(q_BTHK, k_BTGK, v_BTGK, layer, cache):
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    position_BT = start_B[:, None] + jnp.arange(T)
    # A position outside the cache is dropped by the scatter.
    target_BT = jnp.where(jnp.arange(T) < count_B[:, None], position_BT, cache.k.shape[3])
    place = (layer, jnp.arange(B)[:, None], slice(None), target_BT)
    cache = Cache(
      cache.k.at[place].set(k_BTGK, mode="drop"), cache.v.at[place].set(v_BTGK, mode="drop")
    )

    def read(i, carry):
      """Adds the i-th block: the greatest score, the sum of weights, and the weighted values."""
      top, total, out = carry
      first = jnp.minimum(i * block, window - block)
      place_S = first + jnp.arange(block)
      # The last block may begin within the one before.
      seen_BTS = (place_S <= position_BT[..., None]) & (place_S >= i * block)
      found = scores(q_BTHK, positions(cache.k, layer, first, block))
      found = jnp.where(seen_BTS[:, None, None], found, NEGATIVE)
      new_top = jnp.maximum(top, jnp.max(found, -1, keepdims=True))
      weights, kept = jnp.exp(found - new_top), jnp.exp(top - new_top)
      values = jnp.einsum(
        "bgrts,bgsk->bgrtk", weights.astype(v_BTGK.dtype), positions(cache.v, layer, first, block),
        preferred_element_type=jnp.float32,
      )  # fmt: skip
      return new_top, total * kept + jnp.sum(weights, -1, keepdims=True), out * kept + values

    zeros = jnp.zeros((B, G, H // G, T, 1))
    carry = zeros + NEGATIVE, zeros, jnp.zeros((B, G, H // G, T, K))
    if block == window:
      _, total, out = read(0, carry)
    else:
      blocks = jnp.max(start_B + count_B - 1) // block + 1
      _, total, out = jax.lax.fori_loop(0, blocks, read, carry)
    return jnp.moveaxis(out / total, 3, 1).reshape(q_BTHK.shape).astype(q_BTHK.dtype), cache

  return attention
