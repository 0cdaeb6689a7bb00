"""Token rows against examples worked out by hand."""

import random

import numpy as np
import pytest

from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.models.attention import DOCUMENT
from rlver_jax.rl.rows import make_packed_rows, make_rows, pack, place_rewards, row_length

DIRECT = [
  Segment((10, 11, 12)),
  Segment((20, 21), 0, (-0.5, -0.25)),
  Segment((13,)),
  Segment((22,), 0, (-1.0,)),
  Segment((14, 15)),  # nothing sampled follows: it trains nothing and is left out
]
THINK = [
  Segment((10, 11)),
  Segment((30, 31, 32), 1, (-0.1, -0.2, -0.3)),  # thought and reply
  Segment((32, 12)),  # the reply again, without its thought, and the next user message
  Segment((33, 34), 2, (-0.4, -0.5)),
  Segment((34, 13)),
]


def rows_of(*dialogues, length):
  rows = make_rows(dialogues, length)
  assert all(x.shape == (len(dialogues), length) for x in rows)
  return rows


def test_a_row_of_direct_replies():
  rows = rows_of(DIRECT, length=10)
  assert rows.tokens.tolist() == [[10, 11, 12, 20, 21, 13, 22, 0, 0, 0]]
  assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 0, 0]]
  assert rows.branch.tolist() == [[0, 0, 0, 0, 0, 0, 0, -1, -1, -1]]
  assert rows.mask.tolist() == [[False] * 3 + [True, True, False, True] + [False] * 3]
  np.testing.assert_array_equal(rows.logprobs, [[0, 0, 0, -0.5, -0.25, 0, -1, 0, 0, 0]])


def test_a_branch_and_the_context_after_it_both_continue_from_the_context_before():
  rows = rows_of(THINK, length=11)
  assert rows.tokens.tolist() == [[10, 11, 30, 31, 32, 32, 12, 33, 34, 0, 0]]
  assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0]]
  assert rows.branch.tolist() == [[0, 0, 1, 1, 1, 0, 0, 2, 2, -1, -1]]
  assert rows.mask.tolist() == [[False] * 2 + [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2]
  expected = np.float32([0, 0, -0.1, -0.2, -0.3, 0, 0, -0.4, -0.5, 0, 0])
  np.testing.assert_array_equal(rows.logprobs[0], expected)


def test_dtypes():
  rows = rows_of(DIRECT, length=8)
  names = [x.dtype.name for x in rows]
  assert names == ["int32", "int32", "int32", "bool", "float32"]


def test_dialogues_in_which_nothing_was_sampled_are_padding():
  rows = rows_of([], [Segment((10, 11, 12))], DIRECT, length=7)
  assert rows.branch[:2].tolist() == [[-1] * 7] * 2
  assert not rows.mask[:2].any()
  assert not rows.tokens[:2].any()
  assert rows.tokens[2].tolist() == [10, 11, 12, 20, 21, 13, 22]


def test_row_length_counts_up_to_the_last_sampled_token():
  lengths = [row_length(d) for d in (DIRECT, THINK, [], [Segment((1, 2))], DIRECT[:2])]
  assert lengths == [7, 9, 0, 0, 5]


def test_a_reward_stands_at_the_last_token_of_its_reply():
  placed = place_rewards([DIRECT, [], THINK], [[0.5, -2.0], [], [0.25, 1.0]], 11)
  assert placed.dtype == np.float32
  assert placed.tolist() == [
    [0, 0, 0, 0, 0.5, 0, -2, 0, 0, 0, 0],
    [0] * 11,
    [0, 0, 0, 0, 0.25, 0, 0, 0, 1, 0, 0],
  ]


def test_a_dialogue_in_which_nothing_was_sampled_earns_nothing():
  assert not place_rewards([[Segment((10, 11, 12))], []], [[], []], 5).any()


@pytest.mark.parametrize("seed", range(20))
def test_rewards_lie_where_a_walk_over_the_segments_puts_them(seed):
  """Random dialogues, token by token; no reward lies off the policy's tokens."""
  draw = random.Random(seed)
  dialogues, rewards, expected = [], [], np.zeros((4, 64), np.float32)
  for b in range(4):
    segments, values, at = [], [], 0
    for _ in range(draw.randrange(5)):
      for logprobs in (None, (-1.0,)):
        n = draw.randint(1, 6)
        segments.append(Segment((7,) * n, 0, logprobs and logprobs * n))
        at += n
      values.append(draw.randint(-100, 100) / 64)
      expected[b, at - 1] = values[-1]
    segments.append(Segment((8, 8)))
    dialogues.append(segments)
    rewards.append(values)
  placed = place_rewards(dialogues, rewards, 64)
  np.testing.assert_array_equal(placed, expected)
  assert not placed[~make_rows(dialogues, 64).mask].any()


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_every_reply_needs_a_reward_of_its_own(values):
  with pytest.raises(ValueError):
    place_rewards([DIRECT], [values], 10)


BRANCHES = [  # a question and two answers in a branch, as a simulated user's turn
  Segment((10, 11)),
  Segment((12,)),
  Segment((20, 21), 1),
  Segment((30, 31), 1, (0.0, 0.0)),
  Segment((22,), 1),
  Segment((32,), 1, (0.0,)),
  Segment((13, 32)),
  Segment((33,), 2, (0.0,)),
]


def test_segments_of_one_branch_follow_one_another():
  rows = rows_of(BRANCHES, length=12)
  assert rows.tokens.tolist() == [[10, 11, 12, 20, 21, 30, 31, 22, 32, 13, 32, 33]]
  assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5]]
  assert rows.branch.tolist() == [[0] * 3 + [1] * 6 + [0] * 2 + [2]]
  assert np.flatnonzero(rows.mask[0]).tolist() == [5, 6, 8, 11]


def test_a_packed_row_is_its_documents_one_after_the_other():
  documents = [THINK, BRANCHES, DIRECT]
  packed = make_packed_rows([documents, [], [DIRECT]], 40)
  assert [x.dtype for x in packed] == [x.dtype for x in make_rows([DIRECT], 40)]
  at = 0
  for number, document in enumerate(documents):
    n = row_length(document)
    alone = make_rows([document], n)
    for name, together in packed._asdict().items():
      expected = getattr(alone, name)[0] + (number * DOCUMENT if name == "branch" else 0)
      np.testing.assert_array_equal(together[0, at : at + n], expected, err_msg=name)
    at += n
  assert (packed.branch[0, at:] == -1).all() and not packed.mask[0, at:].any()
  assert (packed.branch[1] == -1).all()
  for together, alone in zip(packed, make_rows([DIRECT], 40), strict=True):
    np.testing.assert_array_equal(together[2], alone[0])


def test_the_first_token_of_a_document_is_never_trained():
  bare = [Segment((5, 6, 7), 0, (0.0,) * 3)]
  packed = make_packed_rows([[bare, bare]], 8)
  assert packed.mask.tolist() == [[False, True, True, False, True, True, False, False]]


@pytest.mark.parametrize("seed", range(10))
def test_documents_are_packed_in_order_and_a_row_ends_where_the_next_does_not_fit(seed):
  draw = random.Random(seed)
  lengths = [draw.randint(1, 16) for _ in range(30)]
  order = draw.sample(range(30), 30)
  rows = list(pack(iter(order), lengths, 16))
  assert [i for row in rows for i in row] == order
  for row, following in zip(rows, [*rows[1:], None], strict=True):
    used = sum(lengths[i] for i in row)
    assert row and used <= 16
    assert following is None or used + lengths[following[0]] > 16


def test_nothing_is_packed_into_no_rows():
  assert list(pack([], [], 8)) == []
