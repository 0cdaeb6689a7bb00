"""Chunked log-probabilities against a plain log-softmax over all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.logprobs import token_logprobs

B, T, D, V = 3, 11, 6, 97


def inputs(dtype=np.float32, scale=1.0):
  """Hidden states, projection, targets, and a ragged mask with a full and an almost empty row."""
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(scale * rng.standard_normal((B, T, D)), dtype)
  unembedding = jnp.asarray(rng.standard_normal((V, D)), dtype)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  targets[0, :3] = 5  # the same token more than once in a chunk
  mask = rng.random((B, T)) < 0.5
  mask[1], mask[2] = True, False
  mask[2, 7] = True
  return hidden, unembedding, jnp.asarray(targets), jnp.asarray(mask)


def plain(hidden, unembedding, targets, mask, *, temperature=1.0):
  logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
  log_p = jax.nn.log_softmax(logits / temperature)
  logprobs = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  entropies = -jnp.sum(jnp.exp(log_p) * log_p, -1)
  return jnp.where(mask, logprobs, 0.0), jnp.where(mask, entropies, 0.0)


run = jax.jit(
  lambda f, *args, **settings: f(*args, **settings),
  static_argnums=0,
  static_argnames=("temperature", "chunk"),
)


def gradient(function):
  """The jitted gradient in hidden states and projection."""
  return jax.jit(jax.grad(function, argnums=(0, 1)))


def close(ours, expected, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# Chunks of one position, of some that do not divide T, and longer than a row.
@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (5, 0.6), (64, 0.6)])
def test_values_equal_a_plain_log_softmax(chunk, temperature):
  arrays = inputs()
  ours = run(token_logprobs, *arrays, temperature=temperature, chunk=chunk)
  close(ours, plain(*arrays, temperature=temperature))
  assert [x.dtype.name for x in ours] == ["float32", "float32"]
  assert not any(np.asarray(x)[~np.asarray(arrays[3])].any() for x in ours)


def weighted(function, hidden, unembedding, targets, mask):
  """A scalar that depends on every log-probability and every entropy in its own way."""
  rng = np.random.default_rng(1)
  outputs = function(hidden, unembedding, targets, mask)
  return sum(jnp.sum(rng.standard_normal((B, T)) * x) for x in outputs)


@pytest.mark.parametrize("chunk, temperature", [(4, 0.6), (64, 1.0)])
def test_gradients_equal_those_of_a_plain_log_softmax(chunk, temperature):
  ours, expected = (
    gradient(functools.partial(weighted, f))(*inputs())
    for f in (
      functools.partial(token_logprobs, temperature=temperature, chunk=chunk),
      functools.partial(plain, temperature=temperature),
    )
  )
  assert all(np.abs(g).max() > 0.1 for g in expected)
  close(ours, expected)


def test_a_tied_table_gets_the_gradients_of_both_its_uses():
  _, table, targets, mask = inputs()
  tokens = jnp.roll(targets, 3, axis=1)

  def total(function, table):
    return weighted(function, jnp.tanh(table[tokens]), table, targets, mask)

  chunked = functools.partial(token_logprobs, chunk=4)
  ours, expected = (jax.jit(jax.grad(functools.partial(total, f)))(table) for f in (chunked, plain))
  close(ours, expected)


def test_an_all_false_mask_gives_zeros_and_zero_gradients():
  hidden, unembedding, targets, mask = inputs()
  nothing = jnp.zeros_like(mask)
  ours = run(token_logprobs, hidden, unembedding, targets, nothing, chunk=4)
  close(ours, [np.zeros((B, T))] * 2, 0)
  total = functools.partial(weighted, functools.partial(token_logprobs, chunk=4))
  gradients = gradient(total)(hidden, unembedding, targets, nothing)
  assert not any(np.asarray(g).any() for g in gradients)


def test_very_large_logits_stay_finite_and_right():
  arrays = inputs(scale=3e3)
  assert float(jnp.abs(arrays[0]).max()) > 5e3
  chunked = functools.partial(token_logprobs, chunk=4)
  for a, b in zip(run(token_logprobs, *arrays, chunk=4), plain(*arrays), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-2)
  gradients = gradient(functools.partial(weighted, chunked))(*arrays)
  assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_inputs_give_float32_values_and_gradients_to_their_precision():
  arrays = inputs(jnp.bfloat16)
  chunked = functools.partial(token_logprobs, chunk=4)
  ours = run(token_logprobs, *arrays, chunk=4)
  assert [x.dtype.name for x in ours] == ["float32", "float32"]
  close(ours, plain(*arrays), 1e-4)  # products of bfloat16 numbers, summed in float32
  wide = [x.astype(jnp.float32) for x in arrays[:2]]
  ours, expected = (
    gradient(functools.partial(weighted, f))(*first, *arrays[2:])
    for f, first in ((chunked, arrays[:2]), (plain, wide))
  )
  for a, b in zip(ours, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    error = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
    assert error < 0.01  # bfloat16 keeps 8 bits


def shapes(jaxpr):
  """Shapes of all arrays made in a jaxpr and in those inside it."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in equation.outvars)
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from shapes(inner)


def rows_over_the_vocabulary(function):
  """The most entries that any array of `function`'s program has for each vocabulary entry."""
  jaxpr = jax.make_jaxpr(function)(*inputs()).jaxpr
  return max(int(np.prod(shape)) // V for shape in shapes(jaxpr) if V in shape)


def test_no_array_holds_tokens_times_vocabulary():
  chunk = 3
  chunked = functools.partial(token_logprobs, temperature=0.7, chunk=chunk)
  # The projection and its gradient, D rows, are smaller than a chunk's logits here.
  assert chunk * B >= D
  assert rows_over_the_vocabulary(chunked) == chunk * B
  assert rows_over_the_vocabulary(plain) == B * T  # what the walk finds where the array exists
  for function, largest in ((chunked, chunk * B), (plain, B * T)):
    gradient = jax.value_and_grad(functools.partial(weighted, function), argnums=(0, 1))
    assert rows_over_the_vocabulary(gradient) == largest
