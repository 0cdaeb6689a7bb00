"""Losses on token log-probabilities, as pure functions of arrays [B, T] with a mask.

A batch is summed with weights that are fixed before the gradient is taken, so that the sum of
its microbatches' losses is the loss of the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def token_weights(mask_BT: np.ndarray, aggregation: str, constant: float = 1.0) -> np.ndarray:
  """The weight of every token in the loss of the batch: float32 [B, T], zero off the mask.

  token_mean: every token alike (DAPO, arXiv 2503.14476). sequence_mean: every sequence alike,
  its tokens sharing its weight (GRPO, arXiv 2402.03300). constant: the sum of a sequence's
  tokens over `constant`, then the mean of sequences: no length normalisation (Dr. GRPO, arXiv
  2503.20783). Rows without any token count in no mean.
  """
  mask = np.asarray(mask_BT, np.float32)
  lengths_B1 = mask.sum(1, keepdims=True)
  sequences = max(1.0, float((lengths_B1 > 0).sum()))
  match aggregation:
    case "token_mean":
      return mask / max(1.0, float(mask.sum()))
    case "sequence_mean":
      return mask / np.maximum(lengths_B1, 1.0) / sequences
    case "constant":
      return mask / constant / sequences
  raise ValueError(f"unknown aggregation {aggregation!r}")


def clipped_ratio(
  logprobs_BT: jax.Array,
  old_logprobs_BT: jax.Array,
  advantages_BT: jax.Array,
  clip_low: float,
  clip_high: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """PPO's clipped surrogate, arXiv 1707.06347, equation 7, per token.

  Returns:
    (loss_BT, ratio_BT, clipped_BT): the loss to minimise, pi / pi_old, and where the clipped
    term decided (as float32 0 or 1).
  """
  ratio = jnp.exp(logprobs_BT - old_logprobs_BT)
  free = ratio * advantages_BT
  bound = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages_BT
  return -jnp.minimum(free, bound), ratio, (bound < free).astype(jnp.float32)


def kl_k3(logprobs_BT: jax.Array, reference_logprobs_BT: jax.Array) -> jax.Array:
  """Non-negative, unbiased estimate of KL(policy || reference) from the policy's own samples.

  The estimator r - 1 - log r with r = reference / policy (Schulman, "Approximating KL
  divergence", 2020; used by GRPO, arXiv 2402.03300, equation 4).
  """
  log_ratio = reference_logprobs_BT - logprobs_BT
  return jnp.exp(log_ratio) - 1.0 - log_ratio
