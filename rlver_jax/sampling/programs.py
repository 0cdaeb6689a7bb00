"""The jitted programs of the sampling engine, as pure functions on a key/value cache.

Row b of every array is slot b of the cache. Row b holds `start_B[b]` tokens that count; what
lies beyond is forgotten and will be overwritten, so setting a length back is a rewind.

Axes as in `models/qwen2.py`, and S cache length, W attention window (W <= S, static).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.models.attention import NEGATIVE
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen2 import Attention, Qwen2
from rlver_jax.partitioning import constrain
from rlver_jax.sampling.sampler import Sampling, draw, row_key


class Cache(NamedTuple):
  """Keys and values of every slot, each [L, B, G, S, K]."""

  k: jax.Array
  v: jax.Array


CPU_KEY_BLOCK = 128  # keys and values that are read at a time
READ_BLOCK = 16  # tokens of a row whose logits are alive at a time
CACHE_AXES = ("layers", "batch", "kv_heads", "length", "head")


def _scores(q_BTHK, k_BGSK):
  B, T, H, K = q_BTHK.shape
  G = k_BGSK.shape[1]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  return K**-0.5 * jnp.einsum("btgrk,bgsk->bgrts", q, k_BGSK, preferred_element_type=jnp.float32)


def _positions(cache_LBGSK, layer, first, count):
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
      scores = _scores(q_BTHK, _positions(cache.k, layer, first, block))
      scores = jnp.where(seen_BTS[:, None, None], scores, NEGATIVE)
      new_top = jnp.maximum(top, jnp.max(scores, -1, keepdims=True))
      weights, kept = jnp.exp(scores - new_top), jnp.exp(top - new_top)
      values = jnp.einsum(
        "bgrts,bgsk->bgrtk", weights.astype(v_BTGK.dtype), _positions(cache.v, layer, first, block),
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


@dataclasses.dataclass(frozen=True)
class Choices:
  """A list of continuations as a trie, so that what they share is read once.

  Node 0 is the pending token of a row; the others are the inner nodes of the trie (a leaf is
  never read: only its probability is wanted). Edge e leads from node `parents[e]` to the token
  `edge_tokens[e]`. `member[c][e]` tells whether continuation c uses edge e.
  """

  node_tokens: tuple[int, ...]
  depths: tuple[int, ...]
  ancestors: tuple[tuple[bool, ...], ...]  # [node][node]: is the second the first or above it
  parents: tuple[int, ...]
  edge_tokens: tuple[int, ...]
  member: tuple[tuple[bool, ...], ...]


def choices(continuations: Sequence[Sequence[int]]) -> Choices:
  """The trie of token-id lists, none of which may be empty or a prefix of another."""
  nodes: dict[tuple[int, ...], int] = {(): 0}
  edges: dict[tuple[int, ...], int] = {}
  for continuation in continuations:
    for end in range(1, len(continuation) + 1):
      path = tuple(continuation[:end])
      edges.setdefault(path, len(edges))
      if end < len(continuation):
        nodes.setdefault(path, len(nodes))
  leaves = [tuple(c) for c in continuations]
  if len(set(leaves)) < len(leaves) or any(not leaf or leaf in nodes for leaf in leaves):
    raise ValueError("continuations must differ, and none may be empty or begin another one")
  paths = list(nodes)
  return Choices(
    node_tokens=tuple(path[-1] if path else 0 for path in paths),
    depths=tuple(len(path) for path in paths),
    ancestors=tuple(tuple(a[: len(b)] == b for b in paths) for a in paths),
    parents=tuple(nodes[path[:-1]] for path in edges),
    edge_tokens=tuple(path[-1] for path in edges),
    member=tuple(tuple(leaf[: len(path)] == path for path in edges) for leaf in leaves),
  )


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
    past = _scores(q_BTHK, _positions(cache.k, layer, 0, window))
    past = jnp.where(seen_BW[:, None, None, None], past, NEGATIVE)
    own = jnp.where(ancestors_NN, _scores(q_BTHK, k_own), NEGATIVE)
    weights = jax.nn.softmax(jnp.concatenate([past, own], -1), -1).astype(v_BTGK.dtype)
    values = jnp.concatenate([_positions(cache.v, layer, 0, window), v_own], 2)
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
