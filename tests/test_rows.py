"""Token rows against examples worked out by hand."""

import random

import numpy as np
import pytest

from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.rl.rows import make_rows, place_rewards, row_length

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
