"""Losses on token log-probabilities and values, as pure functions of arrays [B, T] with a mask.

A batch is summed with weights that are fixed before the gradient is taken, so that the sum of
its microbatches' losses is the loss of the batch. All arrays are float32, masks are bool.
"""

import jax
import jax.numpy as jnp

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
POLICY_LOSSES = ("clip", "gspo")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_clamped")
KL_CLAMP = 10.0  # the most of one token in k3_clamped, in nats


def token_weights(mask_BT: jax.Array, aggregation: str, constant: float = 1.0) -> jax.Array:
  """The weight of every token in the loss of the batch: [B, T], zero off the mask.

  token_mean: every token alike (DAPO, arXiv 2503.14476). sequence_mean: every sequence alike,
  its tokens sharing its weight (GRPO, arXiv 2402.03300). constant: the sum of a sequence's
  tokens over `constant`, then the mean of sequences: no length normalisation (Dr. GRPO, arXiv
  2503.20783). Rows without any token count in no mean.
  """
  mask = mask_BT.astype(jnp.float32)
  lengths_B1 = jnp.sum(mask, 1, keepdims=True)
  sequences = jnp.maximum(jnp.sum(lengths_B1 > 0), 1)
  match aggregation:
    case "token_mean":
      return mask / jnp.maximum(jnp.sum(mask), 1.0)
    case "sequence_mean":
      return mask / jnp.maximum(lengths_B1, 1.0) / sequences
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

  clip_high > clip_low is DAPO's clip-higher, arXiv 2503.14476, section 3.1.

  Returns:
    (loss_BT, ratio_BT, clipped_BT): the loss to minimise, pi / pi_old, and where the clipped
    term decided (as float32 0 or 1).
  """
  return _clipped(jnp.exp(logprobs_BT - old_logprobs_BT), advantages_BT, clip_low, clip_high)


def sequence_ratio(
  logprobs_BT: jax.Array,
  old_logprobs_BT: jax.Array,
  advantages_BT: jax.Array,
  mask_BT: jax.Array,
  clip_low: float,
  clip_high: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """GSPO's clipped surrogate with one ratio a sequence, arXiv 2507.18071, equations 5, 7 and 14.

  The ratio is exp of the mean over the row's tokens (a whole dialogue here) of log pi - log
  pi_old; in its per-token form each token carries the ratio's value and its own gradient, so
  advantages may differ from token to token. Returns as `clipped_ratio`.
  """
  difference_BT = jnp.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
  number_B1 = jnp.maximum(jnp.sum(mask_BT, 1, keepdims=True), 1)
  mean_B1 = jax.lax.stop_gradient(jnp.sum(difference_BT, 1, keepdims=True) / number_B1)
  ratio_BT = jnp.exp(mean_B1 + logprobs_BT - jax.lax.stop_gradient(logprobs_BT))
  return _clipped(ratio_BT, advantages_BT, clip_low, clip_high)


def _clipped(ratio, advantages, clip_low, clip_high):
  free = ratio * advantages
  bound = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  return -jnp.minimum(free, bound), ratio, (bound < free).astype(jnp.float32)


def truncated_importance(
  logprobs_BT: jax.Array, sampler_logprobs_BT: jax.Array, cap: float
) -> jax.Array:
  """min(pi_trainer / pi_sampler, cap): corrects for a sampler whose numbers differ from the
  trainer's (Yao et al., "Your efficient RL framework secretly brings you off-policy RL
  training", 2025; the truncation is that of IMPALA, arXiv 1802.01561, section 4.1)."""
  return jnp.minimum(jnp.exp(logprobs_BT - sampler_logprobs_BT), cap)


def kl(estimator: str, logprobs_BT: jax.Array, reference_logprobs_BT: jax.Array) -> jax.Array:
  """Estimate of KL(policy || reference) at the policy's own samples, per token, in nats.

  With log r = log reference - log policy (Schulman, "Approximating KL divergence", 2020):
  k1 = -log r (unbiased, either sign; as a loss its gradient is zero on average, so it belongs
  into the reward), k2 = (log r)^2 / 2, k3 = r - 1 - log r (unbiased, never negative; GRPO, arXiv
  2402.03300, equation 4), k3_clamped = k3, at most KL_CLAMP, with log r within +-2 KL_CLAMP, so
  that one token cannot overflow.
  """
  log_ratio = reference_logprobs_BT - logprobs_BT
  match estimator:
    case "k1":
      return -log_ratio
    case "k2":
      return 0.5 * log_ratio**2
    case "k3":
      return jnp.exp(log_ratio) - 1.0 - log_ratio
    case "k3_clamped":
      log_ratio = jnp.clip(log_ratio, -2 * KL_CLAMP, 2 * KL_CLAMP)
      return jnp.minimum(jnp.exp(log_ratio) - 1.0 - log_ratio, KL_CLAMP)
  raise ValueError(f"unknown KL estimator {estimator!r}")


def clipped_value(
  values_BT: jax.Array, old_values_BT: jax.Array, returns_BT: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
  """PPO's value loss: half the larger of the squared errors of V and of V kept near V_old.

  The clipping is that of the PPO implementation (Engstrom et al., arXiv 2005.12729, section 3).

  Returns:
    (loss_BT, clipped_BT): the loss, and where the clipped value decided (float32 0 or 1).
  """
  kept = old_values_BT + jnp.clip(values_BT - old_values_BT, -clip, clip)
  free, bound = (values_BT - returns_BT) ** 2, (kept - returns_BT) ** 2
  return 0.5 * jnp.maximum(free, bound), (bound > free).astype(jnp.float32)


def explained_variance(
  values_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
  """1 - Var(returns - values) / Var(returns) over the mask: 1 is perfect, 0 a constant's worth.

  NaN where the returns do not vary.
  """
  error = jnp.var(returns_BT - values_BT, where=mask_BT)
  # Against the least, so that equal returns leave no rounding to divide by.
  returns_BT = returns_BT - jnp.min(returns_BT, where=mask_BT, initial=jnp.inf)
  variance = jnp.var(returns_BT, where=mask_BT)
  return jnp.where(variance > 0, 1.0 - error / variance, jnp.nan)


def adapted_kl_coef(
  coefficient: jax.Array, kl_mean: jax.Array, target: float, horizon: float, samples: jax.Array
) -> jax.Array:
  """The adaptive coefficient of a KL penalty: it rises where the KL is above `target`.

  Ziegler et al., arXiv 1909.08593, section 2.2. horizon: in samples, of which the last step had
  `samples`, at most so many. It stays where the KL is no number.
  """
  error = jnp.where(jnp.isfinite(kl_mean), jnp.clip(kl_mean / target - 1.0, -0.2, 0.2), 0.0)
  return coefficient * (1.0 + error * samples / horizon)
