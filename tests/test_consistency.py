"""What replies say of the user's feelings against the record, by other arithmetic."""

import csv
import json

import numpy as np
import pytest
from test_capabilities import config, judged, play
from test_transcripts import lines

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.evaluation import consistency
from rlver_jax.evaluation.judged import Judged
from rlver_jax.evaluation.judges.base import BANDS, NONE, STATES, Judgement


def dialogue(states, emotions, tactic=""):
  judgement = Judgement({}, {}, {}, tuple(() for _ in states), tuple(states))
  return Judged(judgement, {}, (0,) * len(states), tuple(emotions), tactic)


def drawn(count, seed=0):
  """Dialogues of 1 to 6 replies; each policy has a bias of its own, so that replies cluster."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(count):
    n = rng.integers(1, 7)
    emotions = rng.integers(-5, 101, n)
    bias = rng.integers(-3, 4)
    states = [
      NONE if rng.random() < 0.3 else BANDS[int(np.clip(max(0, e) // 20 + bias, 0, 4))]
      for e in emotions
    ]
    made.append(dialogue(states, map(int, emotions)))
  return made


@pytest.mark.parametrize(
  ("emotion", "band"),
  [(-7, 0), (0, 0), (19, 0), (20, 1), (39, 1), (40, 2), (59, 2), (60, 3), (79, 3), (80, 4), (99, 4),
   (100, 4)],
)  # fmt: skip
def test_bands_are_20_points_wide(emotion, band):
  assert consistency.band(emotion) == band


def test_shares_and_differences_are_those_of_a_loop():
  some = drawn(40)
  near, sums, said, replies = 0, 0, 0, 0
  for one in some:
    for state, emotion in zip(one.judgement.states, one.emotions, strict=True):
      replies += 1
      if state == NONE:
        continue
      own = sum(emotion >= edge for edge in (20, 40, 60, 80))
      said += 1
      near += abs(BANDS.index(state) - own) < 2
      sums += BANDS.index(state) - own
  found = consistency.consistency(some)
  assert (found.replies, found.said) == (replies, said) and 0 < said < replies
  assert found.coverage == pytest.approx(said / replies)
  assert found.consistent == pytest.approx(near / said)
  assert found.difference == pytest.approx(sums / said)


def test_the_interval_resamples_dialogues():
  """Against a loop that draws whole dialogues, and wider than one that draws replies."""
  some = [one for one in drawn(30, seed=1) if consistency.differences(one)]
  found = consistency.consistency(some)
  rng = np.random.default_rng(7)
  replies = [np.array(consistency.differences(one)) for one in some]

  def bounds(values):
    return np.quantile(values, [0.025, 0.975])

  means, shares = [], []
  for _ in range(4000):
    picked = np.concatenate([replies[i] for i in rng.integers(0, len(some), len(some))])
    means.append(picked.mean())
    shares.append((abs(picked) <= 1).mean())
  np.testing.assert_allclose(found.difference_interval, bounds(means), atol=0.06)
  np.testing.assert_allclose(found.interval, bounds(shares), atol=0.02)
  flat = np.concatenate(replies)
  alone = bounds([rng.choice(flat, len(flat)).mean() for _ in range(4000)])
  clustered = found.difference_interval
  assert clustered[1] - clustered[0] > 1.2 * (alone[1] - alone[0])
  assert consistency.consistency(some) == found  # the same numbers every time
  assert consistency.consistency(some[::-1]) == found  # whatever the order


def test_intervals_of_few_dialogues_are_exact():
  # One dialogue: nothing to resample. Two: with 1/4 each alone, with 1/2 both.
  assert consistency.clustered_interval([3], [4]) == (0.75, 0.75)
  assert consistency.clustered_interval([0, 6], [3, 3]) == (0.0, 2.0)


def test_replies_that_say_nothing_count_in_the_coverage_alone():
  silent = dialogue([NONE, NONE], [10, 90])
  found = consistency.consistency([silent])
  assert (found.coverage, found.consistent, found.difference) == (0, None, None)
  said = dialogue(["unhappy"], [45])
  both = consistency.consistency([silent, said])
  assert both.coverage == 1 / 3 and both.consistent == 1 and both.difference == -1
  (row,) = consistency.board({"a": [silent]})[1:]
  assert row[:4] == ["a", "all", "2", "0%"] and row[4] == "-"


def test_tables_have_files_and_tactics():
  one = dialogue(["happy"], [15], "silence")
  two = dialogue(["miserable", NONE], [15, 20], "baiting")
  rows = consistency.board({"a": [one, two], "b": [dialogue(["happy"], [90])]})
  assert [row[:4] for row in rows[1:]] == [
    ["a", "all", "3", "67%"], ["a", "baiting", "2", "50%"], ["a", "silence", "1", "100%"],
    ["b", "all", "1", "100%"],
    ["all", "all", "4", "75%"], ["all", "baiting", "2", "50%"], ["all", "silence", "1", "100%"],
  ]  # fmt: skip
  assert [row[6] for row in rows[1:4]] == ["+2.00", "+0.00", "+4.00"]
  told = consistency.summary([one, two])
  assert told["difference"] == 2 and told["tactics"]["silence"]["difference"] == 4
  assert list(told["tactics"]) == ["baiting", "silence"]
  assert json.loads(json.dumps(told)) == told


REPLIES = {
  "honest": ("It sounds as if you were crushed by it.", "You seem angry, and it must be lonely."),
  "glossing": ("You must be so happy with how it goes!", "You sound cheerful and proud."),
  "quiet": ("Go on, I'm listening.", "What happened then, on Sunday?"),
}


def played(name, emotion=22, changes=(-6, -4)):
  """A recorded dialogue of a user who feels worse and worse."""
  history = [{"role": "user", "content": "My bike is gone.", "emotion-point": emotion}]
  for reply, change in zip(REPLIES[name], changes, strict=True):
    emotion += change
    history += [
      {"role": "assistant", "content": reply},
      {"role": "user", "content": "...", "emotion-point": emotion, "planning": {"change": change}},
    ]
  return {
    "id": "bike", "emo_point": emotion, "emo_state": f"Emotion-{emotion_lib.state(emotion)}",
    "character": "passive", "player": "Mara, 34.", "scene": "The bike is gone.",
    "task": "You want the helper to truly listen.", "tactic": "silence", "history": history,
  }  # fmt: skip


def test_who_glosses_over_is_less_consistent_than_who_is_honest(tmp_path):
  """The whole task with the scripted judge, on files of three policies."""
  files = [lines(tmp_path / f"{name}.jsonl", played(name)) for name in REPLIES]
  summary, text = play(config(files), tmp_path / "run")
  with open(tmp_path / "run" / "consistency.csv", newline="", encoding="utf-8") as file:
    rows = {(row["dialogues of"], row["tactic"]): row for row in csv.DictReader(file)}
  honest, glossing = rows["honest", "silence"], rows["glossing", "silence"]
  assert (honest["consistent"], glossing["consistent"]) == ("100%", "0%")
  # Emotions 22 and 16: bands 1 and 0. Crushed is 0, angry 1; happy is 4.
  assert (honest["difference"], glossing["difference"]) == ("+0.00", "+3.50")
  assert rows["quiet", "all"]["name a feeling"] == "0%"
  assert rows["all", "all"]["name a feeling"] == "67%"
  assert summary["consistency"]["consistent"] == 0.5 and summary["consistency"]["replies"] == 6
  assert "name a feeling" in text and "+3.50" in text
  found = judged(tmp_path / "run")
  assert [[(r["state"], r["emotion"]) for r in line["replies"]] for line in found] == [
    [("miserable", 22), ("unhappy", 16)], [("happy", 22), ("happy", 16)], [(NONE, 22), (NONE, 16)],
  ]  # fmt: skip


@pytest.mark.slow
def test_a_language_model_says_it_too_and_goes_on(tmp_path, monkeypatch):
  """The embedded model as judge, end to end."""
  files = [lines(tmp_path / f"{name}.jsonl", played(name)) for name in ("honest", "glossing")]
  model = {"judge.kind": "language_model", "judge.max_reason_tokens": 4}
  first, text = play(config(files, **model), tmp_path / "run")
  whole = judged(tmp_path / "run")
  assert all(r["state"] in STATES for line in whole for r in line["replies"])
  assert len(whole) == 2 and first["consistency"]["replies"] == 4
  left = (tmp_path / "run" / "judged.jsonl").read_bytes()
  (tmp_path / "run" / "judged.jsonl").write_bytes(left[: left.index(b"\n") + 9])
  again, same_text = play(config(files, **model), tmp_path / "run")
  assert (again, same_text) == (first, text)
  assert (tmp_path / "run" / "judged.jsonl").read_bytes() == left
