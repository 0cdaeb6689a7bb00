"""Attention over whole token rows, for training and scoring.

A row may be a tree: the context once, and branches that hang off it (a thought and the reply
it led to, which later turns see without the thought). Token i sees token j when j <= i and j
is context or in i's own branch. A plain causal row is a tree without branches. A row may also
hold several documents, one after the other, each such a tree of its own: no token sees another
document. The number of a token's branch says both, as document * DOCUMENT + branch.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlver_jax import partitioning
from rlver_jax.models.qwen2 import Attention

CONTEXT = 0  # branch number of a context token
PADDING = -1  # number of a padding token: it sees, and is seen by, padding alone
DOCUMENT = 1 << 16  # added to the branch numbers of a row's next document
QUERY_BLOCK = 512  # queries whose scores are alive at a time
CPU_QUERY_BLOCK = 32  # ... so that they stay in a CPU's cache
SECTIONS = 4  # of a long row
NEGATIVE = -1e30  # a score that softmax turns into zero without producing NaN


def grouped_scores(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
  """Scaled dot products of queries with their group's keys: float32 [B, G, R, T, S]."""
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q = q_BTHK.reshape(B, T, G, H // G, K)
  scores = jnp.einsum("btgrk,bsgk->bgrts", q, k_BSGK, preferred_element_type=jnp.float32)
  return scores * K**-0.5


def context_of(branch: jax.Array) -> jax.Array:
  """The number of the context tokens that a token with this number sees; padding sees none."""
  return jnp.where(branch == PADDING, PADDING, branch // DOCUMENT * DOCUMENT + CONTEXT)


def tree_attention(branch_BT: jax.Array, query_block: int | None = None) -> Attention:
  """Attention for rows whose tokens belong to the branches `branch_BT` (int32; see module).

  Queries are processed in equal blocks of at most `query_block` (by default what suits the
  platform), each recomputed in the backward pass, so that no [T, T] array is alive for a row
  longer than a block. The blocks of each of `SECTIONS` parts of a row leave out the keys after
  that part, which none of them sees. A CPU takes one row at a time.
  """
  on_cpu = jax.default_backend() == "cpu"
  if query_block is None:
    query_block = CPU_QUERY_BLOCK if on_cpu else QUERY_BLOCK

  attend = functools.partial(_attend, query_block=query_block)
  if on_cpu:
    attend = functools.partial(_one_by_one, attend)

  def attention(q_BTHK, k_BTGK, v_BTGK, layer, state):
    del layer
    return attend(q_BTHK, k_BTGK, v_BTGK, branch_BT), state

  return attention


def _one_by_one(function: Callable[..., jax.Array], *rows_B: jax.Array) -> jax.Array:
  """`function` of arrays of rows, one row of each device's at a time: what it makes of so few
  stays in a CPU's cache."""
  B, mesh = len(rows_B[0]), jax.sharding.get_abstract_mesh()
  shards = partitioning.batch_shards(mesh) if mesh.size > 1 else 1
  shards = math.gcd(shards, B)

  def apart(x):  # [B, ...] -> [B / shards, shards, ...]
    return jnp.moveaxis(x.reshape(shards, B // shards, *x.shape[1:]), 1, 0)

  out = jax.lax.map(lambda rows: function(*rows), tuple(map(apart, rows_B)))
  return jnp.moveaxis(out, 0, 1).reshape(B, *out.shape[2:])


def _attend(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  branch_BT: jax.Array,
  *,
  query_block: int,
) -> jax.Array:
  """What the queries draw from the values that they see, [B, T, H, K]."""
  T = branch_BT.shape[1]
  order_T = jnp.arange(T)

  def block(q_BtHK, branch_Bt, order_t, k_BSGK, v_BSGK):
    """What queries draw from the first S tokens of their rows."""
    S = k_BSGK.shape[1]
    branch_BS, order_S = branch_BT[:, :S], order_T[:S]
    same_BtS = branch_Bt[:, :, None] == branch_BS[:, None]
    # Context is numbered as its document is.
    own_context_BtS = context_of(branch_Bt)[:, :, None] == branch_BS[:, None]
    seen_BtS = (order_S[None, None] <= order_t[None, :, None]) & (own_context_BtS | same_BtS)
    scores = jnp.where(seen_BtS[:, None, None], grouped_scores(q_BtHK, k_BSGK), NEGATIVE)
    weights = jax.nn.softmax(scores, -1).astype(v_BSGK.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v_BSGK).reshape(q_BtHK.shape)

  if T <= query_block:
    return block(q_BTHK, branch_BT, order_T, k_BTGK, v_BTGK)
  section = -(-T // (query_block * SECTIONS))  # blocks of a section
  n = section * SECTIONS
  size = -(-T // n)

  def split(x):  # [B, T, ...] -> [n, B, size, ...], the last block filled up with zeros
    x = jnp.pad(x, ((0, 0), (0, n * size - T), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], n, size, *x.shape[2:]), 1, 0)

  blocks = (split(q_BTHK), split(branch_BT), jnp.arange(n * size).reshape(n, size))

  def of_section(first):
    """What the blocks of a section draw: [section, B, size, H, K]."""
    keys = k_BTGK[:, : (first + section) * size], v_BTGK[:, : (first + section) * size]
    one = jax.checkpoint(lambda queries: block(*queries, *keys))
    return jax.lax.map(one, jax.tree.map(lambda x: x[first : first + section], blocks))

  out = jnp.concatenate([of_section(first) for first in range(0, n, section)])
  out_BTHK = jnp.moveaxis(out, 0, 1).reshape(len(q_BTHK), -1, *q_BTHK.shape[2:])
  return out_BTHK[:, :T]
