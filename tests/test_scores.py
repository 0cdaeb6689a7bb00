"""The benchmark's numbers against the published rows, closed forms and loops."""

import dataclasses
import fractions
import itertools
import json
import pathlib

import numpy as np
import pytest
import scipy.stats

from rlver_jax.evaluation import scores
from rlver_jax.evaluation.transcripts import Transcript

SAGE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "sage"


def transcripts(finals, characters=("passive",), intentions=("listen",)):
  return [
    Transcript(f"s{i}", c, n, (40, final), i % 3 + 1)
    for i, (final, c, n) in enumerate(
      zip(finals, itertools.cycle(characters), itertools.cycle(intentions), strict=False)
    )
  ]


def test_counts_and_means():
  s = scores.score(transcripts([100, 10, 9, 0, -4, 99]))
  assert (s.dialogues, s.mean * 6, s.success, s.failure, s.replies) == (6, 218, 1, 3, 2.0)
  assert scores.rounded(s.mean) == "36.3" and s.tokens is None


@pytest.mark.parametrize(
  ("finals", "rounded"),
  [
    ([31, 32, 32, 32], "31.8"),  # 31.75
    ([33, 33, 33, 34], "33.3"),  # 33.25, which binary rounding halves to even
    ([0] * 19 + [1], "0.1"),  # 0.05, which no binary number is
    ([100], "100.0"),
  ],
)
def test_halves_are_rounded_up(finals, rounded):
  assert scores.rounded(scores.score(transcripts(finals)).mean) == rounded


@pytest.mark.parametrize(
  ("mean", "rounded"),
  [((21, 4), "5.3"), ((-21, 4), "-5.3"), ((-1, 30), "0.0"), ((-1, 20), "-0.1"), ((0, 1), "0.0")],
)
def test_differences_are_rounded_as_scores_are(mean, rounded):
  assert scores.rounded(fractions.Fraction(*mean)) == rounded


def test_tokens_are_those_of_a_reply_where_every_record_tells():
  told = [dataclasses.replace(t, tokens=10 * t.replies + 1) for t in transcripts([1, 2, 3])]
  assert scores.score(told).tokens == pytest.approx((60 + 3) / 6)
  assert scores.score([*told, *transcripts([4])]).tokens is None


def test_the_interval_is_that_of_the_normal_approximation_for_many_dialogues():
  finals = np.random.default_rng(1).integers(0, 101, 400)
  low, high = scores.score(transcripts(finals.tolist())).interval
  half = 1.96 * finals.std() / 20
  np.testing.assert_allclose([low, high], finals.mean() + np.array([-half, half]), atol=0.15)


def test_the_interval_is_that_of_resampled_dialogues():
  """Against drawing the dialogues themselves, one by one."""
  finals = np.array([0, 3, 20, 20, 70, 100, 100])
  rng = np.random.default_rng(5)
  means = rng.choice(finals, (40_000, 7)).mean(1)
  found = scores.score(transcripts(finals.tolist())).interval
  np.testing.assert_allclose(found, np.quantile(means, [0.025, 0.975]), atol=1.5)


def test_intervals_of_counts_are_binomial():
  """Resampling n dialogues of which k succeed draws from the binomial distribution of n and k/n."""
  finals = [100] * 12 + [50] * 25 + [9] * 3
  found = scores.score(transcripts(finals))
  assert (found.success, found.failure) == (12, 3)
  for bounds, count in ((found.success_interval, 12), (found.failure_interval, 3)):
    expected = scipy.stats.binom.ppf([0.025, 0.975], 40, count / 40)
    np.testing.assert_allclose(bounds, expected, atol=1)


def test_one_dialogue_has_an_interval_without_width():
  assert scores.score(transcripts([37])).interval == (37.0, 37.0)


def test_a_difference_is_paired_by_scenario():
  ours, theirs = transcripts([50, 60, 70]), transcripts([40, 60, 90, 0])[::-1]
  d = scores.difference(ours, theirs)
  assert d.scenarios == 3 and d.mean == fractions.Fraction(10 + 0 - 20, 3)
  assert scores.difference(ours, [Transcript("x", "passive", "listen", (40, 1), 1)]) is None


def test_p_is_the_share_of_swaps_that_differ_as_much():
  """All 2^9 ways of swapping the two models in a scenario."""
  rng = np.random.default_rng(0)
  a, b = rng.integers(20, 90, 9), rng.integers(0, 80, 9)
  differences = a - b
  means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=9)]
  greater = np.mean([m >= differences.mean() - 1e-9 for m in means])
  less = np.mean([m <= differences.mean() + 1e-9 for m in means])
  found = scores.difference(transcripts(a.tolist()), transcripts(b.tolist()))
  assert found.p == pytest.approx(min(1.0, 2 * min(greater, less)))


def test_equal_models_do_not_differ():
  same = transcripts([3, 50, 70])
  d = scores.difference(same, same)
  assert (d.mean, d.interval, d.p) == (0.0, (0.0, 0.0), 1.0)


def test_groups():
  found = transcripts([1, 2, 3, 4], ("passive", "negative"), ("listen", "advice", "motives"))
  assert {k: [t.final for t in v] for k, v in scores.grouped(found, "need").items()} == {
    "emotional": [1, 4], "rational": [2, 3],
  }  # fmt: skip
  assert list(scores.grouped(found, "character")) == ["negative", "passive"]
  assert list(scores.grouped(found, "intention")) == ["advice", "listen", "motives"]


@pytest.mark.skipif(not SAGE.exists(), reason="no recorded dialogues beside the checkout")
@pytest.mark.parametrize(
  ("name", "row"),
  [
    ("gpt-4o-0808", ("31.8", 7, 51)),
    ("deepseek-v3-1227", ("37.6", 5, 39)),
    ("llama3.3-70b", ("33.3", 7, 47)),
  ],
)
def test_the_published_rows(name, row):
  from rlver_jax.evaluation import transcripts as read

  path = SAGE / f"{name}_result.jsonl"
  found = list(read.read(path))
  s = scores.score(found)
  assert (scores.rounded(s.mean), s.success, s.failure) == row
  # Character types and needs, counted by the words of the file.
  raw = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
  count = {k: len(v) for k, v in scores.grouped(found, "character").items()}
  words = {"negative": "负面型", "passive": "被动型", "avoidant": "回避型"}
  assert count == {k: sum(r["character"] == word for r in raw) for k, word in words.items()}
