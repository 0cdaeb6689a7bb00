"""How near two simulated users are: the numbers against loops, and a user against itself."""

import math

import numpy as np
import pytest
from scipy import stats

from rlver_jax.dialogue import rescore
from rlver_jax.embedded import build, dialogues
from rlver_jax.embedded.scenarios import scripted_user
from rlver_jax.evaluation import fidelity
from rlver_jax.evaluation.fidelity import Replayed, compare

TURNS = dialogues.Plan("held_out", build.HELPERS["policy"], 0.0, turns=(3, 6))


def test_numbers_are_those_of_a_loop():
  rng = np.random.default_rng(0)
  replayed, pairs, finals = [], [], []
  for n in (3, 1, 7):
    recorded, found = rng.integers(-10, 11, (2, n)).tolist()
    if n == 7:
      found[2] = None
    replayed.append(Replayed(tuple(recorded), tuple(found), n // 3, 10 * n, 50, 50 - n, 0.5 * n))
    pairs += [(a, b) for a, b in zip(recorded, found, strict=True) if b is not None]
    finals += [n] if None not in found else []
  f = compare(replayed)
  assert (f.dialogues, f.turns) == (3, 11)
  assert f.error == pytest.approx(sum(abs(a - b) for a, b in pairs) / 10)
  sign = [(a > 0) - (a < 0) == (b > 0) - (b < 0) for a, b in pairs]
  assert f.sign == pytest.approx(sum(sign) / 10)
  # Spearman's is Pearson's of the mean ranks.
  ranks = [stats.rankdata(side) for side in zip(*pairs, strict=True)]
  assert f.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
  assert f.final_error == pytest.approx((3 + 1) / 2) and finals == [3, 1]
  assert (f.unparsed, f.unread, f.tokens) == pytest.approx((3 / 11, 1 / 11, 10.0))
  assert f.seconds == pytest.approx(0.5)
  assert fidelity.pairs(replayed).tolist() == [list(pair) for pair in pairs]
  counts = fidelity.counts(replayed)
  assert counts.shape == (21, 21) and counts.sum() == 10
  assert all(counts[a + 10, b + 10] == pairs.count((a, b)) for a, b in pairs)
  by_recorded = fidelity.by_recorded(replayed)
  assert list(by_recorded) == sorted({a for a, _ in pairs})
  assert all(found == sorted(b for a, b in pairs if a == at) for at, found in by_recorded.items())
  assert fidelity.finals(replayed).tolist() == [[50, 47], [50, 49]]


def test_where_nothing_varies_there_is_no_rank():
  f = compare([Replayed((3, 3), (1, 2), 0, 0, 36, 33)])
  assert math.isnan(f.spearman) and f.error == 1.5
  f = compare([Replayed((3,), (None,), 0, 0, 33, 30)])
  assert math.isnan(f.error) and math.isnan(f.sign) and f.unread == 1.0
  assert math.isnan(f.final_error) and not fidelity.by_recorded(
    [Replayed((3,), (None,), 0, 0, 3, 3)]
  )


def test_the_scripted_user_agrees_with_itself_and_not_with_another_one():
  played = [dialogues.play(TURNS, number, 0) for number in range(6)]
  recorded = [fidelity.recorded(dialogue) for dialogue in played]
  found = rescore.rescore(scripted_user(0), recorded, step=0, slots=4)
  f = compare([Replayed.of(r) for r in found])
  assert f.turns == sum(len(d.turns) for d in played) >= 18
  assert (f.error, f.sign, f.final_error, f.unread) == (0, 1, 0, 0)
  assert f.spearman == pytest.approx(1)
  # Each reply as if it had been said to the next user.
  others = [
    rescore.Recorded(a.start, b.turns, b.emotion)
    for a, b in zip(recorded, recorded[1:] + recorded[:1], strict=True)
  ]
  found = rescore.rescore(scripted_user(0), others, step=0, slots=4)
  assert compare([Replayed.of(r) for r in found]).error > 2
