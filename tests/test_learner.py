"""A step of learning against a plain JAX version, NumPy's AdamW, and PyTorch."""

import copy as copy_lib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlver_jax.models import weights
from rlver_jax.models.qwen2 import Qwen2Config
from rlver_jax.partitioning import make_mesh
from rlver_jax.permutation import permutation
from rlver_jax.rl import rows as rows_lib
from rlver_jax.rl.learner import Learner
from rlver_jax.rl.prepare import Experience, Frozen, LearnerSettings
from rlver_jax.rl.rows import Rows
from rlver_jax.rl.update import LossSettings

CONFIG = Qwen2Config(
  53, 16, 24, 2, 4, 2, 4, rope_theta=100.0, tie_word_embeddings=True, remat="none"
)
B, T = 4, 14
ADVANTAGES = np.float32([1.3, -0.7, 0.4, -1.1])
# Adam divides by |gradient| + eps. With eps well above the rounding of float32 gradients (1e-7)
# a step is a smooth function of the gradient; with the usual 1e-8 it would be the rounding's
# sign wherever the gradient is zero, and no two programs would agree.
ADAMW = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
LOSS = LossSettings(
  policy_loss="clip",
  temperature=1.0,
  clip_low=0.2,
  clip_high=0.2,
  entropy_coef=0.001,
  kl_estimator="k3",
  kl_in_loss=False,
  value_clip=0.5,
  logprob_chunk=8,  # of a row's 14 positions at a time: 8, or 2 in a microbatch of 4
)
# With `remax` and baselines of zero, a row's advantage is its reward.
PLAIN = LearnerSettings(
  loss=LOSS,
  estimator="remax",
  aggregation="token_mean",
  aggregation_constant=10.0,
  whiten=False,
  gamma=1.0,
  lam=1.0,
  kl_in_reward=False,
  kl_coef=0.0,
  kl_target=0.0,
  kl_horizon=100.0,
  importance_cap=0.0,
  epochs=1,
  minibatches=1,
  microbatch=B,
  groups=B,
  max_grad_norm=1e6,
  critic_warmup_steps=0,
)


def with_loss(settings, **changes):
  return dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, **changes))


ALL_TERMS = with_loss(
  dataclasses.replace(
    PLAIN, microbatch=1, kl_coef=0.2, aggregation="sequence_mean", max_grad_norm=0.1
  ),
  temperature=0.7,
  clip_high=0.3,
  entropy_coef=0.05,
  kl_in_loss=True,
)
GSPO = with_loss(PLAIN, policy_loss="gspo", clip_low=0.02, clip_high=0.05)


def make_model(seed=0, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), weights.abstract_model(config)
  )


def copy(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


def make_rows():
  """Two rows of plain replies, a tree of two thoughts, and one in which nothing was sampled."""
  rng = np.random.default_rng(1)
  branch = np.zeros((B, T), np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  mask = np.zeros((B, T), bool)
  mask[0, 3:6], mask[0, 8:11], branch[0, 11:] = True, True, -1
  mask[1, 5:14] = True
  branch[2] = [0] * 4 + [1] * 3 + [0] * 3 + [2] * 2 + [-1] * 2
  positions[2] = [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 0, 0]
  mask[2] = branch[2] > 0
  branch[3] = -1
  tokens = rng.integers(0, 53, (B, T)).astype(np.int32)
  old = np.where(mask, rng.normal(0, 0.3, (B, T)), 0).astype(np.float32)
  return Rows(tokens, positions, branch, mask, old)


def plain_logprobs(model, rows, temperature):
  """Log-probabilities and entropies [B, T] at every token but the first, from all logits."""
  T = rows.tokens.shape[1]
  seen = np.zeros((len(rows.tokens), T, T), bool)
  for b, i, j in np.argwhere(np.ones(seen.shape, bool)):
    seen[b, i, j] = j <= i and rows.branch[b, j] in (0, rows.branch[b, i])

  def attention(q, k, v, layer, state):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[3] ** 0.5
    probabilities = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    return jnp.einsum("bhts,bshk->bthk", probabilities, v), state

  hidden, _ = model(rows.tokens, rows.positions, attention)
  log_p = jax.nn.log_softmax(hidden @ model.unembedding().T / temperature)[:, :-1]
  logprobs = jnp.take_along_axis(log_p, rows.tokens[:, 1:, None], -1)[..., 0]
  entropies = -jnp.sum(jnp.exp(log_p) * log_p, -1)
  return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (logprobs, entropies))


@functools.cache
def sampled_rows(temperature):
  """The rows with sampler's log-probabilities near those of `make_model()`: some ratios clip."""
  rows = make_rows()
  plain = jax.jit(functools.partial(plain_logprobs, rows=rows, temperature=temperature))
  logprobs, _ = plain(make_model())
  return rows._replace(logprobs=np.where(rows.mask, logprobs + rows.logprobs, 0))


def experience_of(rows, advantages=ADVANTAGES):
  """Rows that each earn their advantage at the last token, against baselines of zero."""
  rewards = np.zeros(rows.mask.shape, np.float32)
  for b, advantage in enumerate(advantages):
    if rows.mask[b].any():
      rewards[b, np.flatnonzero(rows.mask[b])[-1]] = advantage
  count = len(rewards)
  return Experience(rows, rewards, np.arange(count, dtype=np.int32), np.zeros(count, np.float32))


def plain_loss(model, rows, advantages, settings, reference=None):
  """The loss of a whole batch and its metrics, term by term as the papers write them."""
  s, kl_coef = settings.loss, settings.kl_coef
  logprobs, entropies = plain_logprobs(model, rows, s.temperature)
  ratio = jnp.exp(logprobs - rows.logprobs)
  if s.policy_loss == "gspo":  # of a whole row
    away = jnp.where(rows.mask, logprobs - rows.logprobs, 0).sum(1)
    ratio = jnp.exp(away / np.maximum(rows.mask.sum(1), 1))[:, None] * jnp.ones_like(ratio)
  a = advantages[:, None]
  kept = jnp.clip(ratio, 1 - s.clip_low, 1 + s.clip_high)
  surrogate = -jnp.minimum(ratio * a, kept * a)
  kl = jnp.zeros_like(ratio)
  if reference is not None:
    away = plain_logprobs(reference, rows, s.temperature)[0] - logprobs
    kl = jnp.exp(away) - away - 1

  def mean(x):  # over the trained tokens of the batch
    return jnp.sum(jnp.where(rows.mask, x, 0)) / rows.mask.sum()

  def aggregate(x):
    if settings.aggregation == "token_mean":
      return mean(x)
    means = [jnp.mean(x[b][rows.mask[b]]) for b in range(len(x)) if rows.mask[b].any()]
    return sum(means) / len(means)

  loss = aggregate(surrogate - s.entropy_coef * entropies + kl_coef * kl)
  clipped = (kept != ratio) & (ratio * a > kept * a)
  return loss, {
    "update/loss": loss,
    "update/policy_loss": aggregate(surrogate),
    "update/entropy": mean(entropies),
    "update/ratio": mean(ratio),
    "update/clip_fraction": mean(clipped),
    "update/kl_sampler": mean(rows.logprobs - logprobs),
    **({} if reference is None else {"update/kl_reference": mean(kl)}),
  }


def plain_gradients(model, rows, settings, reference=None):
  loss = functools.partial(
    plain_loss, rows=rows, advantages=ADVANTAGES, settings=settings, reference=reference
  )
  (_, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
  return jax.tree.leaves(copy(gradients)), metrics


def norm_of(gradients):
  return sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients) ** 0.5


def adamw_step(parameters, gradients):
  """The first step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), by hand in float64."""
  o, after = ADAMW, []
  for p, g in zip(parameters, gradients, strict=True):
    g = g.astype(np.float64)
    mean, square = (1 - o["b1"]) * g, (1 - o["b2"]) * g**2
    direction = (mean / (1 - o["b1"])) / (np.sqrt(square / (1 - o["b2"])) + o["eps"])
    after.append(p - o["learning_rate"] * (direction + o["weight_decay"] * p))
  return after


def close(ours, expected, atol=1e-5):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=atol)


@functools.cache
def learner_for(settings):
  return Learner(make_mesh(1, 1, 1), settings, optax.adamw(**ADAMW), make_model())


def first_step(settings, rows, reference=None, advantages=ADVANTAGES):
  """State of the policy and metrics of the first step of `make_model()`."""
  learner, frozen = learner_for(settings), Frozen(reference=reference)
  state = learner.init(make_model())
  state, metrics = learner.learn(state, frozen, experience_of(rows, advantages), step=0, seed=0)
  return state.policy, metrics


def applied_gradients(state):
  """The clipped gradients of the first update, from AdamW's first moment."""
  return [np.asarray(m) / (1 - ADAMW["b1"]) for m in jax.tree.leaves(state.opt_state[0].mu)]


@pytest.mark.parametrize("settings", [PLAIN, ALL_TERMS, GSPO], ids=["plain", "all_terms", "gspo"])
def test_a_step_equals_a_plain_version(settings):
  model = make_model()
  reference = make_model(5) if settings.kl_coef else None
  rows = sampled_rows(settings.loss.temperature)
  gradients, expected = plain_gradients(model, rows, settings, reference)
  state, metrics = first_step(settings, rows, reference)

  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)
  assert 0 < expected["update/clip_fraction"] < 1
  assert metrics["update/skipped"] == 0
  assert int(state.updates) == 1

  norm = norm_of(gradients)
  np.testing.assert_allclose(metrics["update/gradient_norm"], norm, rtol=1e-4)  # before clipping
  assert (norm > settings.max_grad_norm) == (settings is ALL_TERMS)
  gradients = [g * min(1.0, settings.max_grad_norm / norm) for g in gradients]
  close(applied_gradients(state), gradients)
  before = jax.tree.leaves(copy(model))
  close(state.model, adamw_step(before, gradients))
  moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(state.model), before, strict=True)]
  assert max(moved) > 5e-3


def test_the_reference_is_scored_where_one_is_given():
  reference, rows = make_model(5), make_rows()
  learner, frozen = learner_for(ALL_TERMS), Frozen(reference=reference)
  state = learner.init(make_model())
  experience = experience_of(rows)
  batch, _, metrics = learner.prepare(state, frozen, experience, step=0, seed=0)
  expected, _ = plain_logprobs(reference, rows, ALL_TERMS.loss.temperature)
  scored = np.asarray(batch.reference_logprobs).reshape(B, T)
  close(scored, np.where(rows.mask, expected, 0))
  assert batch.reference_logprobs.shape == (1, B, 1, T)  # microbatches of one row
  away = np.asarray(expected, np.float64) - rows.logprobs
  np.testing.assert_allclose(
    metrics["kl/mean"], (np.exp(away) - away - 1)[rows.mask].mean(), rtol=1e-5
  )
  plain = learner_for(PLAIN)
  batch, *_ = plain.prepare(plain.init(make_model()), Frozen(), experience, step=0, seed=0)
  assert batch.reference_logprobs is None and batch.values is None


def test_the_number_of_microbatches_changes_nothing():
  rows = sampled_rows(ALL_TERMS.loss.temperature)
  results = []
  for microbatch in (1, B):
    settings = dataclasses.replace(ALL_TERMS, microbatch=microbatch)
    state, metrics = first_step(settings, rows, make_model(5))
    results.append(copy((state.model, applied_gradients(state), metrics)))
  close(*results)


@pytest.mark.slow
def test_epochs_and_minibatches_are_so_many_steps_on_shuffled_rows():
  """Against optax on plain gradients: two epochs of two minibatches of two rows."""
  settings = dataclasses.replace(PLAIN, epochs=2, minibatches=2, microbatch=1)
  rows = sampled_rows(1.0)
  learner, experience = learner_for(settings), experience_of(rows)
  state = learner.init(make_model())
  state, metrics = learner.learn(state, Frozen(), experience, step=3, seed=7)
  order = permutation(B, 7, 3)
  assert sorted(order.tolist()) == list(range(B)) and order.tolist() != list(range(B))

  model, optimizer = make_model(), optax.adamw(**ADAMW)
  opt_state, losses_seen = optimizer.init(model), []
  for half in (order[:2], order[2:]) * 2:
    part = Rows(*(x[half] for x in rows))
    loss = functools.partial(plain_loss, rows=part, advantages=ADVANTAGES[half], settings=settings)
    (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    changes, opt_state = optimizer.update(gradients, opt_state, model)
    model = optax.apply_updates(model, changes)
    losses_seen += [float(value)] * int(part.mask.sum())
  close(state.policy.model, jax.tree.leaves(copy(model)))
  assert int(state.policy.updates) == 4
  np.testing.assert_allclose(metrics["update/loss"], np.mean(losses_seen), atol=1e-5)


def test_truncated_importance_weights_correct_for_another_sampler():
  """The ratio is then to the trainer's own log-probabilities, which are one before the step."""
  settings = dataclasses.replace(PLAIN, importance_cap=1.2)
  rows = sampled_rows(1.0)
  model = make_model()
  new, _ = plain_logprobs(model, rows, 1.0)
  gap = np.where(rows.mask, np.asarray(new, np.float64) - rows.logprobs, 0)
  state, metrics = first_step(settings, rows)
  weight = np.minimum(np.exp(gap), 1.2)
  number = rows.mask.sum()
  np.testing.assert_allclose(metrics["mismatch/kl"], -gap[rows.mask].mean(), atol=1e-5)
  np.testing.assert_allclose(metrics["mismatch/largest"], np.abs(gap).max(), atol=1e-5)
  truncated = (np.exp(gap) > 1.2)[rows.mask].mean()
  assert 0 < truncated < 1
  np.testing.assert_allclose(metrics["mismatch/truncated"], truncated, atol=1e-6)
  expected = -(np.where(rows.mask, weight, 0) * ADVANTAGES[:, None]).sum() / number
  np.testing.assert_allclose(metrics["update/policy_loss"], expected, atol=1e-5)
  assert metrics["update/ratio"] == pytest.approx(1, abs=1e-5)

  def loss(model):  # the gradient of weight * ratio * A where nothing is clipped
    logprobs, entropies = plain_logprobs(model, rows, 1.0)
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    per_token = -weight * ratio * ADVANTAGES[:, None] - settings.loss.entropy_coef * entropies
    return jnp.sum(jnp.where(rows.mask, per_token, 0)) / number

  close(applied_gradients(state), jax.tree.leaves(copy(jax.jit(jax.grad(loss))(model))))


def test_kl_in_the_reward_lowers_each_tokens_reward_and_adapts():
  """With `reinforce_pp` the advantage is the whitened reward to come, less the KL to come."""
  settings = dataclasses.replace(
    with_loss(PLAIN, kl_estimator="k1"),
    estimator="reinforce_pp", kl_in_reward=True, kl_coef=0.3, kl_target=0.01, kl_horizon=40.0,
  )  # fmt: skip
  rows, reference = sampled_rows(1.0), make_model(5)
  learner = learner_for(settings)
  experience = experience_of(rows)
  state, frozen = learner.init(make_model()), Frozen(reference=reference)
  batch, kl_coef, metrics = learner.prepare(state, frozen, experience, step=0, seed=0)
  scored, _ = plain_logprobs(reference, rows, 1.0)
  kl = np.where(rows.mask, rows.logprobs - np.asarray(scored, np.float64), 0)
  to_come = np.zeros((B, T))
  for b in range(B):
    ahead = 0.0
    for t in reversed(range(T)):
      if rows.mask[b, t]:
        ahead += experience.rewards[b, t] - 0.3 * kl[b, t]
        to_come[b, t] = ahead
  values = to_come[rows.mask]
  expected = np.where(rows.mask, (to_come - values.mean()) / values.std(), 0)
  close(np.asarray(batch.advantages).reshape(B, T), expected)
  error = np.clip(kl[rows.mask].mean() / 0.01 - 1, -0.2, 0.2)
  np.testing.assert_allclose(kl_coef, 0.3 * (1 + error * 3 / 40.0), rtol=1e-6)  # 3 rows have tokens
  assert float(kl_coef) != pytest.approx(0.3)
  assert metrics["kl/coefficient"] == pytest.approx(0.3)
  after, _ = learner.learn(state, frozen, experience, step=0, seed=0)
  assert float(after.kl_coef) == float(kl_coef)


@pytest.fixture(scope="module")
def running():
  """A learner, its rows, and a state whose moments are not zero."""
  learner, rows = learner_for(PLAIN), sampled_rows(PLAIN.loss.temperature)
  state = learner.init(make_model())
  state, _ = learner.learn(state, Frozen(), experience_of(rows), step=0, seed=0)
  return learner, rows, copy(state)


def on_device(learner, state):
  return jax.tree.map(jax.device_put, state, learner.shardings)


def bits(x):
  return np.atleast_1d(np.asarray(x)).view(np.uint8)


# In order: an infinite loss, a loss that is no number, and a loss of ordinary size whose
# gradient overflows (the ratio of a bad reply, exp(80), enters the norm squared).
@pytest.mark.parametrize("trouble", ["infinite", "nan", "gradient"])
def test_an_update_that_is_not_finite_changes_no_bit(trouble, running):
  learner, rows, before = running
  logprobs, advantages = rows.logprobs.copy(), ADVANTAGES.copy()
  if trouble == "nan":
    advantages[0] = np.nan
  else:
    logprobs[1, 7] -= {"infinite": 1000.0, "gradient": 80.0}[trouble]
  bad = experience_of(rows._replace(logprobs=logprobs), advantages)
  state = on_device(learner, before)
  state, metrics = learner.learn(state, Frozen(), bad, step=1, seed=0)
  assert metrics["update/skipped"] == 1
  assert bool(np.isfinite(metrics["update/loss"])) == (trouble == "gradient")
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(bits(a), bits(b))
  state, metrics = learner.learn(state, Frozen(), experience_of(rows), step=2, seed=0)
  assert metrics["update/skipped"] == 0  # and the run can go on
  assert int(state.policy.updates) == int(before.policy.updates) + 1


def test_an_update_with_nothing_to_learn_from_changes_no_bit(running):
  """Not even by weight decay and momentum."""
  learner, rows, before = running
  padding = rows_lib.make_rows([[]] * len(rows.mask), rows.mask.shape[1])
  experience = experience_of(padding)
  state, metrics = learner.learn(on_device(learner, before), Frozen(), experience, step=1, seed=0)
  assert (metrics["update/skipped"], metrics["update/loss"]) == (0, 0)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(bits(a), bits(b))
  state, _ = learner.learn(state, Frozen(), experience_of(rows), step=2, seed=0)
  assert int(state.policy.updates) == int(before.policy.updates) + 1


def test_the_state_is_donated(running):
  learner, rows, before = running
  state = on_device(learner, before)
  learner.learn(state, Frozen(), experience_of(rows), step=1, seed=0)
  assert all(x.is_deleted() for x in jax.tree.leaves((state.policy.model, state.policy.opt_state)))


def test_a_row_of_padding_weighs_nothing(running):
  """Whatever its ids."""
  learner, rows, before = running
  tokens = rows.tokens.copy()
  tokens[3] = 11
  results = []
  for changed in (rows, rows._replace(tokens=tokens)):
    state = on_device(learner, before)
    results.append(learner.learn(state, Frozen(), experience_of(changed), step=1, seed=0))
  close(*[(copy(state.policy.model), metrics) for state, metrics in results], atol=1e-7)


def test_one_step_equals_pytorch(tmp_path):
  """Every term of the loss, gradient clipping and AdamW, on a Hugging Face model."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  theirs = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=53,
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rope_theta=100.0,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      attn_implementation="eager",
    )
  )
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path / "before")
  other = copy_lib.deepcopy(theirs)
  with torch.no_grad():
    for parameter in other.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  other.save_pretrained(tmp_path / "reference")

  s, ragged = ALL_TERMS.loss, make_rows()
  rows = ragged._replace(  # causal rows, which is what their model knows
    branch=np.zeros((B, T), np.int32), positions=np.tile(np.arange(T, dtype=np.int32), (B, 1))
  )
  ids = torch.tensor(rows.tokens, dtype=torch.long)
  mask, advantages = torch.tensor(rows.mask), torch.tensor(ADVANTAGES)[:, None]
  first = torch.zeros(B, 1)  # nothing predicts the first token of a row

  def distribution(model):
    return torch.log_softmax(model(ids).logits[:, :-1] / s.temperature, -1)

  def chosen(log_p):
    return torch.cat([first, log_p.gather(-1, ids[:, 1:, None])[..., 0]], 1)

  log_p = distribution(theirs)
  logprobs, reference = chosen(log_p), chosen(distribution(other)).detach()
  entropy = torch.cat([first, torch.distributions.Categorical(logits=log_p).entropy()], 1)
  old = (logprobs.detach() + torch.tensor(rows.logprobs)) * mask
  ratio = torch.exp(logprobs - old)
  kept = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
  surrogate = -torch.minimum(ratio * advantages, kept * advantages)
  kl = torch.exp(reference - logprobs) - 1 - (reference - logprobs)
  per_token = surrogate - s.entropy_coef * entropy + ALL_TERMS.kl_coef * kl
  loss = torch.stack([x[m].mean() for x, m in zip(per_token, mask, strict=True) if m.any()]).mean()
  loss.backward()
  norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), ALL_TERMS.max_grad_norm)
  assert norm > 2 * ALL_TERMS.max_grad_norm
  torch.optim.AdamW(
    theirs.parameters(),
    lr=ADAMW["learning_rate"],
    betas=(ADAMW["b1"], ADAMW["b2"]),
    eps=ADAMW["eps"],
    weight_decay=ADAMW["weight_decay"],
  ).step()
  theirs.save_pretrained(tmp_path / "after")

  mesh = make_mesh(1, 1, 1)
  model, expected, ours = (
    weights.load(tmp_path / name, CONFIG, mesh) for name in ("before", "after", "reference")
  )
  learner = learner_for(ALL_TERMS)
  experience = experience_of(rows._replace(logprobs=old.numpy()))
  state, metrics = learner.learn(
    learner.init(model), Frozen(reference=ours), experience, step=0, seed=0
  )
  np.testing.assert_allclose(metrics["update/loss"], loss.item(), atol=1e-5)
  np.testing.assert_allclose(metrics["update/gradient_norm"], norm.item(), rtol=1e-4)
  close(state.policy.model, jax.tree.leaves(expected))
