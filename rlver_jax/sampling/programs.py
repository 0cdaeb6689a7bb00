"""The jitted programs of the sampling engine, as pure functions on a key/value cache.

Rows and axes are those of `cache.py`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.models.attention import NEGATIVE
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.partitioning import constrain
from rlver_jax.sampling.cache import Cache, cached_attention, positions, scores
from rlver_jax.sampling.choices import Choices
from rlver_jax.sampling.sampler import Sampling, draw, row_key

READ_BLOCK = 16  # tokens of a row whose logits are alive at a time


def extend(
  model: Qwen2,
  cache: Cache,
  tokens_BT: jax.Array,
  start_B: jax.Array,
  count_B: jax.Array,
  *,
  window,
) -> Cache:
  """Reads `count_B[b]` more tokens into row b, after its first `start_B[b]`; returns the cache."""
  positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
  attention = cached_attention(start_B, count_B, window)
  return model(tokens_BT, positions_BT, attention, cache)[1]


def read(
  model: Qwen2,
  cache: Cache,
  tokens_BT: jax.Array,
  targets_BT: jax.Array,
  start_B: jax.Array,
  count_B: jax.Array,
  *,
  window: int,
) -> tuple[Cache, tuple[jax.Array, jax.Array]]:
  """As `extend`, and what the model thinks of the token after each one that it reads.

  Returns the cache and, of each target, the log-probability (float32 [B, T], in nats) and whether
  no token is more probable (bool [B, T]); what stands beyond a row's count means nothing.
  """
  T = tokens_BT.shape[1]
  positions_BT = start_B[:, None] + jnp.arange(T)
  attention = cached_attention(start_B, count_B, window)
  hidden_BTD, cache = model(tokens_BT, positions_BT, attention, cache)
  unembedding_VD = model.unembedding()
  size = math.gcd(T, READ_BLOCK)

  def block(piece):
    hidden_BSD, targets_BS = piece
    logits = jnp.einsum(
      "bsd,vd->bsv", hidden_BSD, unembedding_VD, preferred_element_type=jnp.float32
    )
    logits = constrain(constrain(logits, "stream", "length", "vocab"), "batch", "length", "whole")
    own = jnp.take_along_axis(logits, targets_BS[..., None], -1)[..., 0]
    return own - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1) == targets_BS

  def blocks(x):  # [T / size, B, size, ...]
    return jnp.moveaxis(x.reshape(x.shape[0], T // size, size, *x.shape[2:]), 1, 0)

  found = jax.lax.map(block, (blocks(hidden_BTD), blocks(targets_BT)))
  return cache, tuple(jnp.moveaxis(x, 0, 1).reshape(targets_BT.shape) for x in found)


def install(cache: Cache, prefixes: Cache, source_B: jax.Array) -> Cache:
  """Copies row `source_B[b]` of `prefixes` into row b of the cache; -1 leaves the row alone."""
  chosen_B = (source_B >= 0)[:, None, None, None]
  row_B = jnp.maximum(source_B, 0)

  def layer(i, cache):
    # On a mesh every device sees all rows of what it copies from: one layer at a time.
    def copy(c, p):
      return c.at[i].set(jnp.where(chosen_B, p[i][row_B], c[i]))

    return jax.tree.map(copy, cache, prefixes)

  return jax.lax.fori_loop(0, cache.k.shape[0], layer, cache)


class Drawn(NamedTuple):
  """What `decode` drew: [B, N] arrays with -1 (0.0) where a row drew nothing, and who stopped."""

  tokens_BN: jax.Array
  logprobs_BN: jax.Array
  stopped_B: jax.Array


def decode(
  model: Qwen2,
  cache: Cache,
  start_B: jax.Array,
  pending_B: jax.Array,
  numbers_B5: jax.Array,
  drawn_B: jax.Array,
  budget_B: jax.Array,
  greedy_B: jax.Array,
  limit: jax.Array,
  *,
  window: int,
  steps: int,
  sampling: Sampling,
  stop_ids: tuple[int, ...],
) -> tuple[Cache, Drawn]:
  """Draws tokens until every row has stopped or spent its budget, at most `limit` a row.

  Args:
    start_B: tokens in the cache; `pending_B` is the next one, known but not yet read.
    numbers_B5: uint32 numbers that determine the row's key (`sampler.row_key`).
    drawn_B: tokens of this answer drawn by earlier calls; the n-th token of an answer uses the
      row's key folded with n, whatever call it falls in.
    budget_B: how many tokens the answer may have in all; 0 for a row that is not sampled.
    greedy_B: bool, rows that take the most probable token whatever the temperature.
    limit: at most this many now, <= `steps` (the static size of the result).

  Returns:
    The cache (which then holds all but the last drawn token) and what was drawn.
  """
  B = start_B.shape[0]
  keys_B = jax.vmap(row_key)(numbers_B5)
  unembedding_VD = model.unembedding()
  stop_ids = jnp.asarray(stop_ids, jnp.int32)

  def going(state):
    return (state["step"] < limit) & jnp.any(state["live"])

  def body(s):
    live, n = s["live"], s["step"]
    attention = cached_attention(s["position"], live.astype(jnp.int32), window)
    hidden_B1D, cache = model(s["token"][:, None], s["position"][:, None], attention, s["cache"])
    logits_BV = jnp.einsum(
      "bd,vd->bv", hidden_B1D[:, 0], unembedding_VD, preferred_element_type=jnp.float32
    )
    # Each device multiplies with its part of the vocabulary, and draws for its part of the rows.
    logits_BV = constrain(constrain(logits_BV, "stream", "vocab"), "batch", "whole")
    token, logprob = draw(
      logits_BV, jax.vmap(jax.random.fold_in)(keys_B, s["drawn"]), sampling, greedy_B
    )
    drawn = s["drawn"] + live
    stopped = live & jnp.isin(token, stop_ids)
    return {
      "step": n + 1,
      "cache": cache,
      "position": s["position"] + live,
      "token": jnp.where(live, token, s["token"]),
      "drawn": drawn,
      "stopped": s["stopped"] | stopped,
      "live": live & ~stopped & (drawn < budget_B),
      "tokens": s["tokens"].at[:, n].set(jnp.where(live, token, -1)),
      "logprobs": s["logprobs"].at[:, n].set(jnp.where(live, logprob, 0.0)),
    }

  state = jax.lax.while_loop(
    going,
    body,
    {
      "step": jnp.int32(0),
      "cache": cache,
      "position": start_B,
      "token": pending_B,
      "drawn": drawn_B,
      "stopped": jnp.zeros(B, bool),
      "live": drawn_B < budget_B,
      "tokens": jnp.full((B, steps), -1, jnp.int32),
      "logprobs": jnp.zeros((B, steps), jnp.float32),
    },
  )
  return state["cache"], Drawn(state["tokens"], state["logprobs"], state["stopped"])


def score(
  model: Qwen2,
  cache: Cache,
  start_B: jax.Array,
  pending_B: jax.Array,
  *,
  window: int,
  choices: Choices,
) -> jax.Array:
  """Log-probability of each continuation of each row's text: float32 [B, C]. Writes nothing."""
  B, N = start_B.shape[0], len(choices.node_tokens)
  tokens_BN = jnp.broadcast_to(jnp.asarray(choices.node_tokens, jnp.int32), (B, N))
  tokens_BN = tokens_BN.at[:, 0].set(pending_B)
  ancestors_NN = jnp.asarray(np.array(choices.ancestors))

  def attention(q_BTHK, k_BTGK, v_BTGK, layer, state):
    k_own, v_own = jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGK, 1, 2)
    seen_BW = jnp.arange(window) < start_B[:, None]
    past = scores(q_BTHK, positions(cache.k, layer, 0, window))
    past = jnp.where(seen_BW[:, None, None, None], past, NEGATIVE)
    own = jnp.where(ancestors_NN, scores(q_BTHK, k_own), NEGATIVE)
    weights = jax.nn.softmax(jnp.concatenate([past, own], -1), -1).astype(v_BTGK.dtype)
    values = jnp.concatenate([positions(cache.v, layer, 0, window), v_own], 2)
    out = jnp.einsum("bgrts,bgsk->btgrk", weights, values)
    return out.reshape(q_BTHK.shape), state

  positions_BN = start_B[:, None] + jnp.asarray(choices.depths)
  hidden_BND, _ = model(tokens_BN, positions_BN, attention)
  hidden_BED = hidden_BND[:, jnp.asarray(choices.parents)]
  targets_BE = jnp.broadcast_to(jnp.asarray(choices.edge_tokens, jnp.int32), hidden_BED.shape[:2])
  everywhere = jnp.ones(targets_BE.shape, bool)
  logprobs_BE, _ = token_logprobs(
    hidden_BED, model.unembedding(), targets_BE, everywhere, chunk=min(16, len(choices.parents))
  )
  member_CE = jnp.asarray(np.array(choices.member), jnp.float32)
  return jnp.einsum("be,ce->bc", logprobs_BE, member_CE, precision="highest")
