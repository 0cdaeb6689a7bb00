"""The weights that a tiny model starts from: drawn from a seed, but for heads that repeat.

To say again what was said takes two heads in a row (induction, arXiv 2209.11895): one that tells
each token what stands before it, and one that looks for where the present token stood before and
brings what followed. Large models find that by themselves; one of a million parameters takes longer
to than a laptop has time. So the first two layers start with such heads, and the rest is learned:

  layer 0  all that queries and keys have is a constant, by which rotation makes a token look one
           place back; what it finds there (A h) is written to directions of its own (B)
  layer 1  queries are A h and keys what layer 0 wrote, so that a token attends to where it stood
           before, one place on; only dimensions that rotation turns slowly are used, so that
           distance matters little; what is found there is added as it is
"""

import pathlib

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlver_jax.models import weights
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.models.source import ModelSource

BACK = 6.0  # of the constants by which a token looks back
MATCH = 2.5  # of queries and keys that look for the same token
WRITTEN = 0.1  # of what layer 0 writes, which is then about as large as an embedding
FOUND = 0.06  # of what layer 1 adds
SLOW = 0.02  # radians a place: dimensions that turn slower do not tell near from far
QUIET = 0.1  # what is left of drawn weights beside those that are put in place


def write(source: ModelSource, mesh: Mesh, seed: int, directory: pathlib.Path) -> None:
  """Writes the model of this configuration, drawn from `seed`, to a new Hugging Face directory."""
  model = weights.initialise(source.config, seed, mesh)
  repeat(model, np.random.default_rng(seed))
  weights.save(model, directory, source=source.directory, dtype="float32")


def repeat(model: Qwen2, random: np.random.Generator) -> None:
  """Puts such heads in the place of the first layer's first and of all that the second has."""
  c, layers = model.config, model.layers
  D, H, G, K = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
  half = K // 2
  speeds = c.rope_theta ** -(np.arange(half) / half)  # of the pairs (i, i + half), radians a place
  read, written = _directions(random, D, K), _directions(random, D, K)  # A and B: [D, K]

  q, k, v, o, down = (np.array(getattr(layers, name)[...]) for name in (*"qkvo", "down"))
  q_bias, k_bias = (np.array(getattr(layers, f"{name}_bias")[...]) for name in "qk")
  o *= QUIET  # else what is drawn drowns the embeddings
  down *= QUIET
  # Layer 0, the first keys and values and their queries: cos(speed * (distance - 1)) is largest
  # one place back.
  q[0, :, 0], k[0, :, 0] = QUIET * q[0, :, 0], QUIET * k[0, :, 0]
  k_bias[0, 0, :half] = BACK
  q_bias[0, 0] = BACK * np.concatenate([np.cos(speeds), -np.sin(speeds)])
  v[0, :, 0], o[0, 0] = read, WRITTEN * written.T
  # Layer 1: each of the keys and values has its own part of what was written, in slow dimensions.
  slow = np.flatnonzero(np.tile(speeds, 2) < SLOW)
  values = _directions(random, D, min(D, G * K))
  for g in range(G):
    chosen = np.arange(g * len(slow), (g + 1) * len(slow)) % K
    k[1, :, g] = 0
    k[1][:, g, slow] = MATCH * written[:, chosen]
    v[1, :, g] = values[:, g * K : (g + 1) * K]
    for h in range(g * H // G, (g + 1) * H // G):
      q[1, :, h] = 0
      q[1][:, h, slow] = MATCH * read[:, chosen]
      o[1, h] = FOUND * v[1, :, g].T
  made = {"q": q, "k": k, "v": v, "o": o, "down": down, "q_bias": q_bias, "k_bias": k_bias}
  for name, value in made.items():
    getattr(layers, name)[...] = jnp.asarray(value, c.param_dtype)


def _directions(random: np.random.Generator, size: int, count: int) -> np.ndarray:
  """`count` orthonormal directions, [size, count]."""
  return np.linalg.qr(random.standard_normal((size, count)))[0].astype(np.float32)
