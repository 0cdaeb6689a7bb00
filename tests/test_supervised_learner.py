"""Supervised updates: packed rows against a row for each example, the loss against NumPy."""

import builders
import jax
import numpy as np
import optax
import pytest

from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.models import lora
from rlver_jax.rl.rows import make_packed_rows
from rlver_jax.supervised.chats import trained
from rlver_jax.supervised.learner import SupervisedLearner

VOCABULARY = 41
random = np.random.default_rng(3)


def ids(n):
  return tuple(random.integers(0, VOCABULARY, n).tolist())


# Plain chats, one with branches of a question, an answer, a question and an answer.
EXAMPLES = [
  [Segment(ids(5)), trained(ids(4)), Segment(ids(2)), trained(ids(3))],
  [Segment(ids(4)), trained(ids(2))],
  [
    Segment(ids(6)),
    Segment(ids(3), 1), trained(ids(4), 1), Segment(ids(2), 1), trained(ids(3), 1),
    Segment(ids(4)),
    Segment(ids(2), 2), trained(ids(2), 2),
  ],
  [Segment(ids(9)), trained(ids(7))],
]  # fmt: skip
PACKED = [[0, 1], [2], [3]]  # in rows of 40 tokens, and one of padding to fill two microbatches
TRAINED = sum(len(s.ids) for example in EXAMPLES for s in example if s.logprobs is not None)


@pytest.fixture(scope="module")
def model():
  return builders.model(VOCABULARY)


def packed(*rows, length=40):
  return make_packed_rows([[EXAMPLES[i] for i in row] for row in rows], length)


def make(policy, microbatch=2):
  """A learner whose update is the negative gradient."""
  return SupervisedLearner(
    builders.mesh(), optax.sgd(1.0), policy, microbatch=microbatch, chunk=16, max_grad_norm=1e9
  )


@pytest.fixture(scope="module")
def learner(model):
  """Shared, so that a shape of rows is compiled once."""
  return make(model)


def update(learner, policy, rows, base=None):
  """The numbers of an update, and what it changed."""
  before = jax.tree.map(np.array, policy)
  state = learner.init(jax.tree.map(lambda x: x.copy(), policy))
  state, numbers = learner.learn(state, base, learner.place(rows))
  change = jax.tree.map(lambda a, b: np.asarray(a) - b, state.policy.model, before)
  assert int(state.policy.updates) == bool(rows.mask.any())
  return jax.device_get(numbers), change


@pytest.fixture(scope="module")
def alone(learner, model):
  return update(learner, model, packed([0], [1], [2], [3]))


def test_the_loss_is_the_mean_over_the_trained_tokens_of_a_step(learner, model, alone):
  """Against log-softmax in NumPy of passes over each answer's own context."""
  total = 0.0
  for example in EXAMPLES:
    for n, segment in enumerate(example):
      if segment.logprobs is not None:
        seen = [i for s in example[:n] if s.branch in (0, segment.branch) for i in s.ids]
        (logprobs,) = builders.sequence_logprobs(model, seen, segment.ids)
        total -= logprobs.sum()
  numbers, _ = alone
  assert numbers["tokens"] == TRAINED and numbers["skipped"] == 0
  state = learner.init(jax.tree.map(lambda x: x.copy(), model))
  scored = learner.score(state, None, learner.place(packed(*PACKED, [])))
  assert float(scored) == pytest.approx(total / TRAINED, abs=1e-5)
  assert numbers["loss"] == pytest.approx(total / TRAINED, abs=1e-5)


@pytest.mark.parametrize("rows", ([*PACKED, []], [[3], [0, 1], [], [2]]), ids=["in order", "not"])
def test_packed_examples_give_the_loss_and_the_gradient_of_a_row_each(learner, model, alone, rows):
  assert_same(update(learner, model, packed(*rows)), alone)


@pytest.mark.slow
def test_other_rows_and_microbatches_give_the_same(model, alone):
  assert_same(update(make(model, 1), model, packed([3, 2], [1, 0], length=48)), alone)


def assert_same(found, wanted):
  for name in ("loss", "gradient_norm", "tokens"):
    assert found[0][name] == pytest.approx(wanted[0][name], abs=1e-5)
  largest = 0.0
  for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    largest = max(largest, np.abs(a).max())
  assert largest > 1e-2


def test_adapters_alone_are_changed_and_start_as_the_base_is(model, alone):
  adapters = lora.create(model, ("q", "down"), 2, 8.0, jax.random.key(0))
  numbers, change = update(make(adapters), adapters, packed(*PACKED, []), base=model)
  assert numbers["loss"] == pytest.approx(alone[0]["loss"], abs=1e-5)
  assert 0 < numbers["gradient_norm"] and set(change) == {"q", "down"}


def test_rows_in_which_nothing_is_trained_change_nothing(learner, model):
  rows = packed(*PACKED, [])._replace(mask=np.zeros((4, 40), bool))
  numbers, change = update(learner, model, rows)
  assert numbers["loss"] == 0 and not any(np.any(x) for x in jax.tree.leaves(change))
