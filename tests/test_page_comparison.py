"""Runs against one another: differences, the course of training and marks, by hand."""

import pytest
import runs
from test_closing import played
from test_page import SCENARIOS, training_run

from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records
from rlver_jax.errors import UserError
from rlver_jax.evaluation.fidelity import recorded
from rlver_jax.evaluation.judges import base, rubrics, scripted
from rlver_jax.page import comparison, reading, tables


def held_out_run(folder, **changes):
  """A run with held-out dialogues of the scripted user: by when, the changes on each scenario."""
  workdir_lib.claim(str(folder), runs.config(**{"evaluation.path": "en"}))
  for when, of_when in changes.items():
    dialogues = [played(SCENARIOS[i], i, *of_when[i]) for i in sorted(of_when)]
    records.write(folder / "evaluation" / f"{when}.jsonl", dialogues)
  return folder


def test_differences_are_of_the_scenarios_that_both_have(tmp_path):
  found = reading.read_named({
    "one": held_out_run(tmp_path / "a", before={0: (1,), 1: (1,)}, after={0: (9,), 1: (8,)}),
    "other": held_out_run(tmp_path / "b", after={1: (3,), 0: (-1,), 2: (9,)}),
    "failed": held_out_run(tmp_path / "c", after={0: (), 1: (2,)}),
  })  # fmt: skip
  assert [run.name for run in found.values()] == ["one", "other", "failed"]
  (d,) = comparison.differences(found, [("one", "other")])
  assert (d.user, d.when, d.scenarios) == ("scripted", "after", 2)
  assert d.found.value == (10 + 5) / 2 and 5 <= d.found.low < 7.5 < d.found.high <= 10
  (d,) = comparison.differences(found, [("failed", "one")])
  assert (d.scenarios, d.found.value, d.found.low) == (1, -6, None)
  table = comparison.differences_table(comparison.differences(found, [("one", "other")]))
  assert table["rows"] == [["one − other", "scripted user", "2", tables.NONE, "+7.5 [+5.0, +10.0]"]]
  with pytest.raises(UserError, match="no run is called 'two', expected one of: one, other"):
    comparison.differences(found, [("one", "two")])
  with pytest.raises(UserError, match="'one' and 'empty' have no held-out scenario in common"):
    empty = reading.read_named({"empty": held_out_run(tmp_path / "d")})
    comparison.differences(found | empty, [("one", "empty")])
  assert comparison.names([("b", "a"), ("c", "a")]) == ["a", "b", "c"]


def test_the_course_of_training(tmp_path):
  folder = training_run(tmp_path / "run", steps=3)
  values = (40.0, 52.0, 46.0)
  text = "".join(f'{{"step": {i}, "emotion/final_mean": {v}}}\n' for i, v in enumerate(values, 1))
  (folder / "metrics.jsonl").write_text(text)
  found = reading.read_named({"mine": folder})
  course = comparison.course(found["mine"])
  assert course == comparison.Course(3, 52.0, 2, 46.0, 6.0, 9.0)
  (row,) = comparison.course_table(found)["rows"]
  assert row == ["mine", "3", "52.0 (2)", "46.0", "6.0", "9.0"]
  (folder / "metrics.jsonl").write_text('{"step": 1, "emotion/final_mean": 40.0}\n')
  assert comparison.course(reading.read_named({"mine": folder})["mine"]).wobble is None
  (folder / "metrics.jsonl").write_text("")
  assert comparison.course_table(reading.read_named({"mine": folder}))["rows"] == []


def test_marks_are_the_means_of_the_scripted_judges():
  dialogues = [played(s, i, 1, 2, reply="I'm listening, take your time, {} of {}.")
               for i, s in enumerate(SCENARIOS[:4])]  # fmt: skip
  failed = played(SCENARIOS[4], 4)
  found = comparison.capabilities([*dialogues, failed])
  marks = [scripted.judge(recorded(d), rubrics.load("en")).scores for d in dialogues]
  assert {n: e.value for n, e in found.items()} == {
    name: sum(mark[name] for mark in marks) / 4 for name in base.CAPABILITIES
  }
  assert found["dialogue_guidance"].value > 1
  assert comparison.capabilities([failed]) == dict.fromkeys(base.CAPABILITIES)
  shares = comparison.strategies(dialogues)
  assert shares["invite"] == 1 and shares["advice"] == 0 and len(shares) == 8


def test_dialogues_that_are_not_there_are_asked_for(tmp_path):
  found = reading.read_named({
    "run": held_out_run(tmp_path / "a", after={0: (9,)}),
    "failed": held_out_run(tmp_path / "b", after={0: ()}),
  })  # fmt: skip
  assert [d.emotion for d in comparison.own_dialogues(found["run"])] == [39]
  for name, when in (("run", "before"), ("failed", "after")):
    with pytest.raises(UserError, match=f"'{name}' has no held-out dialogues from {when} training"):
      comparison.own_dialogues(found[name], when)
