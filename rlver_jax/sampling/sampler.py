"""From logits to a token: one independent draw per row, from that row's own key."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


def row_key(numbers: jax.Array) -> jax.Array:
  """The key of one row: its numbers (seed, step, dialogue, turn, call), folded in in order."""
  key = jax.random.key(numbers[0])
  for number in numbers[1:]:
    key = jax.random.fold_in(key, number)
  return key


def draw(
  logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, greedy_B: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row.

  Args:
    logits_BV: float32.
    keys_B: one key per row.
    sampling: static.
    greedy_B: bool, rows that take the most probable token whatever the temperature; None: no row.

  Returns:
    (tokens_B int32, logprobs_B float32): the log-probability is that of the whole distribution
    at this temperature (at 1 when greedy), before top-k and top-p cut it.
  """
  if sampling.temperature > 0:
    logits_BV = logits_BV / sampling.temperature
  top_B1 = jnp.max(logits_BV, -1, keepdims=True)
  mass_BV = jnp.exp(logits_BV - top_B1)
  if sampling.temperature > 0:
    tokens_B = jax.vmap(_draw_row)(keys_B, _keep(mass_BV, sampling))
    if greedy_B is not None:
      tokens_B = jax.lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.where(greedy_B, jnp.argmax(logits_BV, -1), tokens_B),
        lambda: tokens_B,
      )
  else:
    tokens_B = jnp.argmax(logits_BV, -1)
  chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
  logprobs_B = chosen_B - top_B1[:, 0] - jnp.log(jnp.sum(mass_BV, -1))
  return tokens_B.astype(jnp.int32), logprobs_B


def _keep(mass_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """The mass with everything outside top-k, then outside the nucleus of top-p, set to zero."""
  if sampling.top_k > 0:
    k = min(sampling.top_k, mass_BV.shape[-1])
    mass_BV = jnp.where(mass_BV >= jax.lax.top_k(mass_BV, k)[0][:, -1:], mass_BV, 0.0)
  if sampling.top_p < 1:
    mass_BV = jnp.where(mass_BV >= _least_of_nucleus(mass_BV, sampling.top_p), mass_BV, 0.0)
  return mass_BV


def _least_of_nucleus(mass_BV: jax.Array, top_p: float) -> jax.Array:
  """The smallest mass in the nucleus (Holtzman et al., arXiv 1904.09751): the fewest entries that
  hold a share `top_p` of all; float32 [B, 1].

  By bisection, since sorting a vocabulary takes many times as long. Floats that are not negative
  are in the order of their bits, so that as many halvings as there are bits lead to the float.
  """
  enough_B1 = top_p * jnp.sum(mass_BV, -1, keepdims=True)

  def as_float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, bounds):
    low_B1, high_B1 = bounds
    middle_B1 = low_B1 + (high_B1 - low_B1) // 2
    above_BV = jnp.where(mass_BV >= as_float(middle_B1), mass_BV, 0.0)
    holds_B1 = jnp.sum(above_BV, -1, keepdims=True) >= enough_B1
    return jnp.where(holds_B1, middle_B1, low_B1), jnp.where(holds_B1, high_B1, middle_B1)

  # Entries from the lower bound upwards hold enough, those from the upper one do not.
  top_B1 = jax.lax.bitcast_convert_type(jnp.max(mass_BV, -1, keepdims=True), jnp.int32)
  low_B1, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top_B1), top_B1 + 1))
  return as_float(low_B1)


def _draw_row(key: jax.Array, mass_V: jax.Array) -> jax.Array:
  """Draws an index with probability proportional to `mass_V` by two inverse-CDF look-ups.

  A block first, then an entry of the block: two uniform numbers instead of one Gumbel number
  per entry (the costliest part of a step on CPU), and sums over hundreds of terms rather than
  a cumulative sum over the whole vocabulary, whose rounding would lose rare tokens.
  """
  size = mass_V.shape[0]
  block = max(1, round(size**0.5))
  mass = jnp.pad(mass_V, (0, -size % block)).reshape(-1, block)
  uniform = jax.random.uniform(key, (2,))

  def pick(weights, u):
    cumulative = jnp.cumsum(weights)
    index = jnp.sum(cumulative <= u * cumulative[-1])
    # Rounding can push the threshold onto an entry without mass, or past the end.
    index = jnp.minimum(index, weights.shape[0] - 1)
    return jnp.where(weights[index] > 0, index, jnp.argmax(weights))

  row = pick(jnp.sum(mass, -1), uniform[0])
  return row * block + pick(mass[row], uniform[1])
