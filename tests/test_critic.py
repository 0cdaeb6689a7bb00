"""The critic in its three forms, and PPO's step, against plain versions in JAX and NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_learner as plain

from rlver_jax.models import critic as critic_lib
from rlver_jax.models import lora
from rlver_jax.models.attention import tree_attention
from rlver_jax.partitioning import make_mesh
from rlver_jax.rl.learner import Learner
from rlver_jax.rl.prepare import Frozen

B, T = plain.B, plain.T
PPO = dataclasses.replace(
  plain.with_loss(plain.PLAIN, value_clip=0.05), estimator="gae", whiten=True, gamma=0.9, lam=0.8
)


def with_head(critic):
  """The critic with a value head that tells states apart."""
  head = np.random.default_rng(4).normal(0, 0.2, critic.head.shape).astype(np.float32)
  return dataclasses.replace(critic, head=critic.head.replace(jnp.asarray(head)))


@functools.cache
def forms():
  """Each form of a critic that computes the same: (critic, the frozen model that it reads)."""
  model = plain.make_model(3)
  rng = np.random.default_rng(5)
  fresh = lora.create(model, ("q", "down"), 2, 4.0, jax.random.key(0))
  adapters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)
  merged = lora.merge(lora.Adapted(model, adapters))
  return {
    "own": (with_head(critic_lib.from_model(model, 0)), plain.make_model(8), model),
    "shared": (with_head(critic_lib.from_model(model, 1)), model, model),
    "adapters": (with_head(critic_lib.from_adapters(model, adapters)), model, merged),
  }


def plain_values(model, head, rows):
  """The value before each token of the mask: the head on the hidden state one place earlier."""
  hidden, _ = jax.jit(lambda m: m(rows.tokens, rows.positions, tree_attention(rows.branch)))(model)
  after = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  return np.where(rows.mask, np.pad(after, ((0, 0), (1, 0)))[:, :-1], 0)


@functools.cache
def learner_for(form, settings=PPO):
  critic = forms()[form][0]
  adamw = optax.adamw(**plain.ADAMW)
  return Learner(make_mesh(1, 1, 1), settings, adamw, plain.make_model(), adamw, critic)


def frozen_for(form):
  _, frozen, _ = forms()[form]
  return Frozen(critic_base=frozen) if form != "own" else Frozen()


def rewarded():
  """Rows of two replies each that earn something at the end of both."""
  rows = plain.sampled_rows(1.0)
  experience = plain.experience_of(rows)
  experience.rewards[0, 5] = 0.7
  experience.rewards[2, 6] = -0.4
  return rows, experience


def gae_by_hand(rewards, values, mask, gamma, lam):
  advantages = np.zeros(rewards.shape)
  for b in range(len(rewards)):
    own = np.flatnonzero(mask[b])
    ahead = next_value = 0.0
    for t in own[::-1]:
      delta = rewards[b, t] + gamma * next_value - values[b, t]
      ahead = delta + gamma * lam * ahead
      advantages[b, t], next_value = ahead, values[b, t]
  return advantages


def copied(tree):
  return jax.tree.map(jnp.array, tree)


@pytest.mark.parametrize("form", ["own", "shared", "adapters"])
def test_values_advantages_and_returns_equal_a_loop(form):
  critic, _, model = forms()[form]
  rows, experience = rewarded()
  learner = learner_for(form)
  state = learner.init(plain.make_model(), copied(critic))
  batch, _, metrics = learner.prepare(state, frozen_for(form), experience, step=0, seed=0)
  values = plain_values(model, critic.head[...], rows)
  np.testing.assert_allclose(np.asarray(batch.values).reshape(B, T), values, atol=1e-5)
  advantages = gae_by_hand(experience.rewards, values, rows.mask, 0.9, 0.8)
  returns = np.where(rows.mask, advantages + values, 0)
  np.testing.assert_allclose(np.asarray(batch.returns).reshape(B, T), returns, atol=1e-5)
  own = advantages[rows.mask]
  white = np.where(rows.mask, (advantages - own.mean()) / own.std(), 0)
  np.testing.assert_allclose(np.asarray(batch.advantages).reshape(B, T), white, atol=1e-4)
  left = (returns - values)[rows.mask].var() / returns[rows.mask].var()
  np.testing.assert_allclose(metrics["critic/explained_variance"], 1 - left, atol=1e-4)


@pytest.mark.parametrize("form", ["own", "shared", "adapters"])
def test_the_critics_step_equals_a_plain_version(form):
  """The value loss with values that have moved beyond the clip, its gradient and AdamW."""
  critic, frozen, _ = forms()[form]
  rows, experience = rewarded()
  learner = learner_for(form)
  state = learner.init(plain.make_model(), copied(critic))
  batch, *_ = learner.prepare(state, frozen_for(form), experience, step=0, seed=0)
  moved = np.random.default_rng(6).normal(0, 0.1, (1, 1, B, T)).astype(np.float32)
  batch = batch._replace(values=batch.values + moved * rows.mask)
  old, returns = (np.asarray(x).reshape(B, T) for x in (batch.values, batch.returns))

  def loss(critic):
    after = critic(frozen, rows.tokens, rows.positions, tree_attention(jnp.asarray(rows.branch)))
    values = jnp.pad(after, ((0, 0), (1, 0)))[:, :-1]
    near = jnp.clip(values, old - 0.05, old + 0.05)
    worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * jnp.sum(jnp.where(rows.mask, worse, 0)) / rows.mask.sum()

  value, gradients = jax.jit(jax.value_and_grad(loss))(critic)
  before = jax.tree.leaves(plain.copy(critic))
  state, metrics = learner._run("critic", state.critic, frozen, batch, np.int32(0))
  np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
  assert 0 < metrics["critic/clip_fraction"] < 1
  leaves = jax.tree.leaves(plain.copy(gradients))
  np.testing.assert_allclose(metrics["gradient_norm"], plain.norm_of(leaves), rtol=1e-4)
  plain.close(plain.applied_gradients(state), leaves)
  plain.close(state.model, plain.adamw_step(before, leaves))


def test_a_whole_ppo_step_trains_both_and_what_is_shared_stays():
  critic, _, _ = forms()["shared"]
  _, experience = rewarded()
  learner = learner_for("shared", dataclasses.replace(PPO, epochs=2))
  state = learner.init(plain.make_model(), copied(critic))
  state, metrics = learner.learn(state, Frozen(), experience, step=0, seed=0)
  assert int(state.policy.updates) == int(state.critic.updates) == 2
  assert metrics["update/skipped"] == metrics["critic/skipped"] == 0
  assert {"critic/loss", "critic/gradient_norm", "update/loss"} <= metrics.keys()
  assert state.critic.model.embed is None
  assert jax.tree.leaves(state.critic.model.layers)[0].shape[0] == 1  # of the two layers


def test_while_the_critic_warms_up_the_policy_stays():
  critic, *_ = forms()["own"]
  _, experience = rewarded()
  learner = learner_for("own", dataclasses.replace(PPO, critic_warmup_steps=2))
  state = learner.init(plain.make_model(), copied(critic))
  before = jax.tree.leaves(plain.make_model())
  updates = []
  for step in range(3):
    state, metrics = learner.learn(state, Frozen(), experience, step=step, seed=0)
    updates.append((int(state.critic.updates), int(state.policy.updates)))
    same = all(
      np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.policy.model), before, strict=True)
    )
    assert same == (step < 2)
    assert ("update/loss" in metrics) == (step == 2)
  assert updates == [(1, 0), (2, 0), (3, 1)]


def test_a_critic_whose_loss_is_not_finite_is_left_alone_and_counted():
  critic, *_ = forms()["own"]
  _, experience = rewarded()
  rewards = experience.rewards.copy()
  rewards[0, 5] = np.inf
  learner = learner_for("own")
  state = learner.init(plain.make_model(), copied(critic))
  state, metrics = learner.learn(
    state, Frozen(), experience._replace(rewards=rewards), step=0, seed=0
  )
  assert metrics["update/skipped"] == metrics["critic/skipped"] == 1
  plain.close(state.critic.model, jax.tree.leaves(plain.copy(critic)), atol=0)


def test_adapters_of_policy_and_critic_train_beside_one_frozen_base():
  base = plain.make_model(3)
  adapters = lora.create(base, ("q", "v"), 2, 4.0, jax.random.key(1))
  critic = critic_lib.from_adapters(base, lora.create(base, ("q",), 2, 4.0, jax.random.key(2)))
  adamw = optax.adamw(**plain.ADAMW)
  learner = Learner(make_mesh(1, 1, 1), PPO, adamw, adapters, adamw, critic)
  _, experience = rewarded()
  state = learner.init(copied(adapters), copied(critic))
  before = plain.copy(base)
  frozen = Frozen(base=base, critic_base=base)
  for step in range(2):
    state, metrics = learner.learn(state, frozen, experience, step=step, seed=0)
  assert metrics["update/skipped"] == 0
  plain.close(base, jax.tree.leaves(before), atol=0)
  for trained, start in ((state.policy.model, adapters), (state.critic.model, critic)):
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(start), strict=True):
      assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0
