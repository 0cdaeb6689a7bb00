"""The table of `benchmarks/learning.py`, from what a finished run has left."""

import json

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
  assert lines[2] == ("| grpo direct 0 | 30.0 -> 80.0 | 28.0 -> 75.5 | 4% | 6 | 12 | 9.3 | 2.0 |")
