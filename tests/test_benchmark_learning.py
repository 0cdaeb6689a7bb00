"""`benchmarks/learning.py`: its table, from what a finished run has left, and a run of its own."""

import json

import pytest
import runs

from benchmarks import learning
from rlver_jax import closing, heldout


def user(before, after, failure, strategies):
  return {
    "before": {"final_emotion": before, "failure": 0.5, "strategies": 8},
    "after": {"final_emotion": after, "failure": failure, "strategies": strategies},
  }


def test_a_row_has_both_users_and_the_worse_of_what_they_saw(tmp_path):
  users = {"language_model": user(30.04, 80.0, 0.01, 8), heldout.SCRIPTED: user(28, 75.5, 0.04, 6)}
  (tmp_path / closing.NUMBERS_FILE).write_text(json.dumps({"users": users, "steps": 12}))
  (tmp_path / learning.COST_FILE).write_text(json.dumps({"minutes": 9.26, "gib": 2.04}))
  lines = learning.table([learning.row("grpo direct 0", tmp_path)])
  assert lines[0].count("|") == lines[2].count("|") == len(learning.HEAD) + 1
  assert lines[2] == ("| grpo direct 0 | 30.0 -> 80.0 | 28.0 -> 75.5 | 4.0% | 6 | 12 | 9.3 | 2.0 |")


def command(monkeypatch, folder, *flags):
  words = ["--algorithms=grpo", "--modes=direct", "--seeds=0", "--", *flags]
  monkeypatch.setattr("sys.argv", ["learning", f"--workdir={folder}", *words])
  return learning.main()


def test_finished_runs_are_shown_and_those_of_other_flags_refused(tmp_path, monkeypatch, capsys):
  (folder := tmp_path / "grpo-direct-0").mkdir()
  cost = {"minutes": 9.26, "gib": 2.04, "flags": ["--config.steps=9"]}
  (folder / learning.COST_FILE).write_text(json.dumps(cost))
  users = {"language_model": user(30, 80, 0, 8), heldout.SCRIPTED: user(28, 76, 0, 7)}
  (folder / closing.NUMBERS_FILE).write_text(json.dumps({"users": users, "steps": 9}))
  assert command(monkeypatch, tmp_path, "--config.steps=9") == 0
  assert "| grpo direct 0 | 30.0 -> 80.0 | 28.0 -> 76.0 |" in capsys.readouterr().out
  with pytest.raises(SystemExit) as stop:
    command(monkeypatch, tmp_path)
  said = capsys.readouterr().err.splitlines()[-1]
  assert stop.value.code == 2
  assert f"{folder} was made with the flags ['--config.steps=9'], expected them or another" in said


@pytest.mark.parametrize("users", [None, {heldout.SCRIPTED: user(28, 76, 0, 7)}])
def test_a_run_without_both_users_is_named(tmp_path, users):
  (tmp_path / learning.COST_FILE).write_text(json.dumps({"minutes": 1, "gib": 1}))
  if users:
    (tmp_path / closing.NUMBERS_FILE).write_text(json.dumps({"users": users, "steps": 9}))
  with pytest.raises(
    SystemExit, match=r"has held-out dialogues of \[.*\], expected both users'\.$"
  ):
    learning.row("grpo direct 0", tmp_path)


@pytest.mark.slow
def test_a_run_that_broke_off_starts_anew_and_its_cost_is_told(tmp_path):
  folder = tmp_path / "grpo-direct-0"
  folder.mkdir()
  (folder / "left.txt").write_text("by a run that broke off")
  flags = runs.flags(steps=1, **{"evaluation.path": "tiny-held-out", "evaluation.scenarios": 1})
  cost = learning.train(folder, "grpo", "direct", 0, flags)
  assert cost["minutes"] > 0 and 0.1 < cost["gib"] < 16
  assert not (folder / "left.txt").exists()
  assert json.loads((folder / closing.NUMBERS_FILE).read_text())["steps"] == 1
  assert "held out, after" in (tmp_path / "grpo-direct-0.txt").read_text()


def test_a_run_that_fails_is_named_with_its_output(tmp_path):
  with pytest.raises(SystemExit, match=r"failed with 2: see .*grpo-direct-0\.txt\.$"):
    learning.train(tmp_path / "grpo-direct-0", "grpo", "direct", 0, ["--config.steps=0"])
  assert "steps is 0" in (tmp_path / "grpo-direct-0.txt").read_text()
