"""Tree attention against a loop in NumPy and against one plain causal row per turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models import weights
from rlver_jax.models.attention import CONTEXT, DOCUMENT, PADDING, tree_attention
from rlver_jax.models.qwen2 import Qwen2Config

CONFIG = Qwen2Config(41, 24, 40, 3, 6, 2, 4, rope_theta=100.0, initializer_range=0.3)
# Context, a thought with its reply, the next turn's context, and so on.
BRANCH_T = np.array([0] * 5 + [1] * 4 + [0] * 3 + [2] * 2 + [0] * 4 + [3] * 3 + [-1] * 3, np.int32)
TOKENS_T = np.random.default_rng(1).integers(0, 41, len(BRANCH_T)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    weights.abstract_model(CONFIG),
  )


def tree_positions(branch_T):
  """A branch, and the context after it, both count on from the context before it."""
  positions, context, last, inside = [], 0, None, 0
  for branch in branch_T.tolist():
    inside = inside + 1 if branch == last else 0
    last = branch
    if branch == CONTEXT:
      positions.append(context)
      context += 1
    else:
      positions.append(context + inside if branch != PADDING else 0)
  return np.array(positions, np.int32)


@jax.jit
def forward(model, tokens_BT, positions_BT, branch_BT):
  """Hidden states, and the log-probabilities of all tokens at each position."""
  hidden_BTD, _ = model(tokens_BT, positions_BT, tree_attention(branch_BT))
  return hidden_BTD, jax.nn.log_softmax(hidden_BTD @ model.unembedding().T)


def test_a_tree_row_equals_one_row_per_turn(model):
  turns = [np.flatnonzero(BRANCH_T == turn)[-1] for turn in (1, 2, 3)]
  seen = [[t for t in range(last + 1) if BRANCH_T[t] in (0, BRANCH_T[last])] for last in turns]
  shape = (3, len(BRANCH_T))  # causal rows: what fills one up changes nothing before it
  alone = np.zeros(shape, np.int32)
  for row, places in zip(alone, seen, strict=True):
    row[: len(places)] = TOKENS_T[places]
  plain = forward(model, alone, np.tile(np.arange(shape[1]), (3, 1)), np.zeros(shape, np.int32))
  tree_rows = (TOKENS_T, tree_positions(BRANCH_T), BRANCH_T)
  tree = forward(model, *(np.tile(x, (3, 1)) for x in tree_rows))
  for row, places in enumerate(seen):
    for a, b in zip(tree, plain, strict=True):
      np.testing.assert_allclose(a[row, places], b[row, : len(places)], atol=1e-4)


def test_padding_is_inert(model):
  rows = [TOKENS_T, tree_positions(BRANCH_T), BRANCH_T]
  real = BRANCH_T != PADDING
  T = real.sum()
  changed = [np.where(real, rows[0], 7), np.where(real, rows[1], 9), rows[2]]
  padded = forward(model, *(np.stack(pair) for pair in zip(rows, changed, strict=True)))
  expected = forward(model, *(x[None, real] for x in rows))
  for a, b in zip(padded, expected, strict=True):
    assert not np.array_equal(a[0, T:], a[1, T:])
    np.testing.assert_array_equal(a[0, :T], a[1, :T])
    np.testing.assert_allclose(a[0, :T], b[0], atol=1e-5)


def test_a_row_of_padding_alone_stays_finite(model):
  zeros = np.zeros((1, 6), np.int32)
  hidden, _ = forward(model, zeros, zeros, np.full((1, 6), PADDING, np.int32))
  assert np.isfinite(hidden).all()


def random_qkv(T, *, B=2, H=4, G=2, K=3, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal((B, T, n, K)).astype(np.float32) for n in (H, G, G)]


def attend_by_hand(q, k, v, branch_BT):
  """Softmax over what each token sees, one token and head at a time, in float64."""
  B, T, H, K = q.shape
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(B, T, H):
    g = h // (H // k.shape[2])
    own = branch_BT[b, t]
    context = own if own == PADDING else own - own % DOCUMENT  # that of its document
    seen = [s for s in range(t + 1) if branch_BT[b, s] in (context, own)]
    scores = np.array([q[b, t, h].astype(float) @ k[b, s, g] / K**0.5 for s in seen])
    weight = np.exp(scores - scores.max())
    out[b, t, h] = weight / weight.sum() @ v[b, seen, g]
  return out


# Blocks that do not divide the 10 tokens, that do, and that are longer than the row.
@pytest.mark.parametrize("query_block", [3, 5, 512])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # one row at a time, or all at once
def test_attention_equals_a_loop_over_tokens(query_block, platform, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  second, third = DOCUMENT, 2 * DOCUMENT
  branch_BT = np.array(
    [
      [0, 0, 1, 1, 0, 2, 2, 0, 3, -1],
      [0, 1, 0, 0, 0, 0, 0, -1, -1, -1],
      [0, 1, 0, second, second, second + 1, second, second + 2, third, third],
    ]
  )
  qkv = random_qkv(10, B=3)
  attention = tree_attention(jnp.asarray(branch_BT), query_block)
  out, state = jax.jit(lambda *qkv: attention(*qkv, 0, {"state": 1}))(*qkv)
  assert state == {"state": 1}
  np.testing.assert_allclose(out, attend_by_hand(*qkv, branch_BT), atol=1e-5)


def test_documents_of_a_row_are_as_if_alone(model):
  """A tree, a plain chain and a tree again, in one row and in a row each."""
  documents = [BRANCH_T[:14], np.zeros(5, np.int32), BRANCH_T[:9]]
  ends = np.cumsum([len(d) for d in documents])
  numbers = np.concatenate([i * DOCUMENT + d for i, d in enumerate(documents)]).astype(np.int32)
  positions = np.concatenate([tree_positions(d) for d in documents])
  tokens = np.resize(TOKENS_T, len(numbers))
  packed = forward(model, tokens[None], positions[None], numbers[None])
  for document, end in zip(documents, ends, strict=True):
    here = slice(end - len(document), end)
    alone = forward(model, tokens[None, here], positions[None, here], document[None])
    for a, b in zip(packed, alone, strict=True):
      np.testing.assert_allclose(a[:, here], b, atol=1e-4)


@pytest.mark.parametrize("query_block", [6, 7])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_through_query_blocks_equal_those_of_the_whole(
  query_block, platform, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  branch_BT = jnp.asarray(np.array([BRANCH_T[:18], np.zeros(18)], np.int32))
  qkv = random_qkv(18, seed=1)
  target = random_qkv(18, seed=2)[0]

  def total(qkv, block):
    return jnp.sum(target * tree_attention(branch_BT, block)(*qkv, 0, None)[0])

  gradient = jax.jit(jax.grad(total), static_argnums=1)
  blocked, whole = (gradient(qkv, block) for block in (query_block, 18))
  for a, b in zip(blocked, whole, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def sizes(jaxpr):
  """Element counts of all arrays made in a jaxpr and in those inside it."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from sizes(inner)


@pytest.mark.parametrize("T", [64, 70])  # blocks of 16 divide the first row, not the second
def test_a_row_longer_than_a_block_makes_no_square_array(T):
  qkv = random_qkv(T, B=1)
  branch_BT = jnp.zeros((1, T), jnp.int32)

  def total(qkv, block):
    return jnp.sum(tree_attention(branch_BT, block)(*qkv, 0, None)[0])

  heads = 4
  largest = [
    max(sizes(jax.make_jaxpr(jax.value_and_grad(total), static_argnums=1)(qkv, block).jaxpr))
    for block in (16, T)
  ]
  assert largest[0] <= heads * 16 * T
  assert largest[1] == heads * T * T  # what the walk finds where the array exists
