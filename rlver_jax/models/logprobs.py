"""Log-probabilities and entropies of chosen tokens, without ever holding [tokens, vocabulary].

Only the positions in the mask are projected: they are moved to the front of each row, and a
loop with as many steps as the fullest row needs takes one chunk of them at a time. The
backward pass repeats the loop (the logits of a chunk are computed again rather than kept).

On a mesh the vocabulary is spread over all devices for the duration of the loop, each of which
sees the hidden states of a chunk of every row: they and their gradients are far smaller than
the projection, its gradient or the logits, none of which then travels inside the loop.
"""

import functools

import jax
import jax.numpy as jnp

from rlver_jax import partitioning
from rlver_jax.partitioning import constrain


def token_logprobs(
  hidden_BTD: jax.Array,
  unembedding_VD: jax.Array,
  targets_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of the distribution that it was drawn from.

  Args:
    hidden_BTD: final hidden states; position t predicts `targets_BT[:, t]`.
    unembedding_VD: the vocabulary projection, in the compute dtype.
    targets_BT: int32 token ids.
    mask_BT: bool; positions outside it are skipped and return zero.
    temperature: logits are divided by it before the softmax.
    chunk: positions of a row that are projected at a time.

  Returns:
    (logprobs_BT, entropies_BT), float32, in nats.
  """
  T = targets_BT.shape[1]
  pad = -T % chunk
  if _spread(unembedding_VD):
    # By way of the fsdp axis, from where the parameter's own layout is one exchange away.
    unembedding_VD = constrain(unembedding_VD, "vocab_fsdp", "whole")
    unembedding_VD = constrain(unembedding_VD, "vocab_spread", "whole")
  else:
    unembedding_VD = constrain(unembedding_VD, "vocab", "whole")
  order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
  count = jnp.max(jnp.sum(mask_BT, 1))
  hidden = jnp.take_along_axis(hidden_BTD, order_BT[..., None], 1)
  targets = jnp.take_along_axis(targets_BT, order_BT, 1)
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, pad)))
  packed = _packed_logprobs(temperature, chunk, hidden, unembedding_VD, targets, count)
  back_BT = jnp.argsort(order_BT, axis=1)
  logprobs, entropies = (jnp.take_along_axis(x[:, :T], back_BT, 1) for x in packed)
  return jnp.where(mask_BT, logprobs, 0.0), jnp.where(mask_BT, entropies, 0.0)


def _spread(w_VD):
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or partitioning.divides(mesh, w_VD.shape[0], "vocab_spread")


def _chunk(hidden_BTD, i, chunk, w_VD):
  """A chunk of hidden states: of all rows for a device that holds its own part of the vocabulary,
  and else of the device's own rows."""
  h_BCD = constrain(_slice(hidden_BTD, i, chunk), "batch", "length", "whole")
  return constrain(h_BCD, "whole", "length", "whole") if _spread(w_VD) else h_BCD


def _slice(x, i, chunk):
  return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1)


def _put(x, part, i, chunk):
  return jax.lax.dynamic_update_slice_in_dim(x, part, i * chunk, 1)


def _logits(h_BCD, w_VD, temperature):
  logits = jnp.einsum("bcd,vd->bcv", h_BCD, w_VD, preferred_element_type=jnp.float32)
  return logits / temperature


def _target_logits(h_BCD, w_VD, y_BC, temperature):
  # A product with the target's own row of the projection is cheaper than a gather from the
  # logits, and stays local when the vocabulary is sharded.
  return jnp.sum(h_BCD.astype(jnp.float32) * w_VD[y_BC].astype(jnp.float32), -1) / temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed_logprobs(temperature, chunk, hidden, unembedding, targets, count):
  return _packed_forward(temperature, chunk, hidden, unembedding, targets, count)[0]


def _packed_forward(temperature, chunk, hidden, unembedding, targets, count):
  zeros = jnp.zeros(targets.shape, jnp.float32)

  def body(i, carry):
    logprobs, entropies, normalisers = carry
    h, y = _chunk(hidden, i, chunk, unembedding), _slice(targets, i, chunk)
    logits = _logits(h, unembedding, temperature)
    top = jnp.max(logits, -1)
    exp = jnp.exp(logits - top[..., None])
    total = jnp.sum(exp, -1)
    normaliser = top + jnp.log(total)
    entropy = normaliser - jnp.sum(exp * logits, -1) / total
    logprob = _target_logits(h, unembedding, y, temperature) - normaliser
    return (
      _put(logprobs, logprob, i, chunk),
      _put(entropies, entropy, i, chunk),
      _put(normalisers, normaliser, i, chunk),
    )

  steps = (count + chunk - 1) // chunk
  logprobs, entropies, normalisers = jax.lax.fori_loop(0, steps, body, (zeros, zeros, zeros))
  residuals = (hidden, unembedding, targets, steps, normalisers, entropies)
  return (logprobs, entropies), residuals


def _packed_backward(temperature, chunk, residuals, cotangents):
  hidden, unembedding, targets, steps, normalisers, entropies = residuals
  d_logprobs, d_entropies = cotangents

  def body(i, carry):
    d_hidden, d_unembedding = carry
    h, y = _chunk(hidden, i, chunk, unembedding), _slice(targets, i, chunk)
    g, e = _slice(d_logprobs, i, chunk)[..., None], _slice(d_entropies, i, chunk)[..., None]
    log_p = _logits(h, unembedding, temperature) - _slice(normalisers, i, chunk)[..., None]
    # d logprob(y) / d logit_v = [v == y] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy).
    # The [v == y] part touches one row of the projection and is added below.
    slope = -jnp.exp(log_p) * (g + e * (log_p + _slice(entropies, i, chunk)[..., None]))
    d_logits = (slope / temperature).astype(h.dtype)
    g /= temperature
    d_h = jnp.einsum("bcv,vd->bcd", d_logits, unembedding, preferred_element_type=jnp.float32)
    d_h += g * unembedding[y].astype(jnp.float32)
    d_unembedding += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
    d_unembedding = d_unembedding.at[y].add(g * h.astype(jnp.float32))
    d_h = constrain(d_h.astype(hidden.dtype), "batch", "length", "whole")
    return _put(d_hidden, d_h, i, chunk), d_unembedding

  start = (jnp.zeros_like(hidden), jnp.zeros(unembedding.shape, jnp.float32))
  d_hidden, d_unembedding = jax.lax.fori_loop(0, steps, body, start)
  return d_hidden, d_unembedding.astype(unembedding.dtype), None, None


_packed_logprobs.defvjp(_packed_forward, _packed_backward)
