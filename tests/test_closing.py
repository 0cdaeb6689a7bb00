"""The end of a run as it is shown: a table and two dialogues, from files written by hand."""

import json

import pytest
import runs

from rlver_jax import closing, metrics
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Failed, Plan, PolicyReply, Rules, UserMessage
from rlver_jax.sources import open_sources

# Of a run without a step.
SUMMARY = {
  "steps": 0,
  "seconds": 0.0,
  "tokens": 0,
  **dict.fromkeys(("first_emotion", "last_emotion", "best_emotion", "best_step")),
  "stage_seconds": {},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  path = runs.held_out(tmp_path_factory.mktemp("scenarios"), 4)
  return runs.config(**runs.LANGUAGE_MODEL | {"evaluation.path": str(path)})


@pytest.fixture(scope="module")
def sources(settings):
  return open_sources(settings)


def played(scenario, index, *changes, tokens=10, reply="I see, {} of {}."):
  """A dialogue whose replies change the emotion so; without a change its user failed."""
  d = Dialogue(index, index, scenario, Rules(max_turns=max(len(changes), 1)))
  if not d.opening:
    d.advance(UserMessage(f"Opening {index}."))
  for i, change in enumerate(changes):
    d.advance(PolicyReply(reply.format(i, index), None, True, True, tokens))
    d.advance(Plan(change))
    if not d.end:
      d.advance(UserMessage(f"Message {i} of {index}."))
  if not changes:
    d.advance(PolicyReply("Hm.", None, True, True, tokens))
    d.advance(Failed())
  return d


def write(workdir, sources, name, *changes, **how):
  dialogues = [
    played(scenario, i, *own, **how)
    for i, (scenario, own) in enumerate(zip(sources.heldout, changes, strict=True))
  ]
  records.write(workdir / "evaluation" / f"{name}.jsonl", dialogues)


def summary(settings, sources, workdir):
  """The summary of a run that has just ended."""
  return SUMMARY | closing.write(settings, sources, workdir)


LISTEN = "I'm listening, take your time, {} of {}."


@pytest.fixture
def workdir(tmp_path, sources):
  """Gains are, in order, 2, -1, none (its user failed after training) and 9: the median is 2."""
  write(tmp_path, sources, "before", (1,), (2,), (3, 4), (-10, -10))
  write(tmp_path, sources, "after", (3,), (1,), (), (-5, -6), tokens=12, reply=LISTEN)
  write(tmp_path, sources, "before_scripted", *[(-10, -10, -10)] * 4)
  write(tmp_path, sources, "after_scripted", *[(10,) * 7] * 4, tokens=8, reply="Tell me.")
  (tmp_path / "metrics.jsonl").write_text('{"step": 7, "emotion/final_mean": 33.0}\n')
  return tmp_path


def test_the_table_and_the_changes(workdir, settings, sources):
  text = closing.describe(summary(settings, sources, workdir), settings, sources, workdir)
  table = text.split("\n\n")[1].splitlines()
  assert table[0] == "4 held-out scenarios, before -> after training:"
  head, model, scripted = (line.split("  ") for line in table[1:4])
  cells = [[cell.strip() for cell in line if cell.strip()] for line in (head, model, scripted)]
  assert cells[0] == [
    "user", "emotion", "success", "failure", "turns", "tokens", "distinct-1", "distinct-2",
    "strategies",
  ]  # fmt: skip
  # 31, 32, 37, 10 before; 33, 31, 19 after. Words: i see 0 of 0: of 6 replies.
  assert cells[1][:6] == [
    "language model", "27.5 -> 27.7", "0% -> 0%", "0% -> 0%", "1.5 -> 1.0", "10 -> 12",
  ]  # fmt: skip
  # Before: i, see, of and 0 to 3 are 7 of 6 * 5 words; i see, see 0, see 1, 0 of, 1 of and of 0 to
  # of 3 are 9 of 6 * 4 pairs.
  assert cells[1][6].startswith("0.23 -> ") and cells[1][7].startswith("0.38 -> ")
  assert cells[1][8] == "0 -> 1"
  assert cells[2] == [
    "scripted user", "0.0 -> 100.0", "0% -> 100%", "100% -> 0%", "3.0 -> 7.0", "10 -> 8",
    cells[2][6], cells[2][7], "0 -> 0",
  ]  # fmt: skip
  assert len({len(line) for line in table[1:4]}) == 1 and len(table[1]) < 120
  # 2, -1 and 9: mean 10/3, deviation sqrt(79/3), over the root of 3.
  assert table[-1] == (
    "change of emotion: language model +3.3 (standard error 3.0), "
    "scripted user +100.0 (standard error 0.0)"
  )


def test_the_dialogues_of_the_median_scenario_stand_side_by_side(workdir, settings, sources):
  text = closing.describe(summary(settings, sources, workdir), settings, sources, workdir)
  shown = text.split("\n\n", 2)[2].splitlines()
  assert shown[0] == (
    "Scenario held-en-listen-01 before and after, judged by language model: its change of emotion, "
    "+2,"
  )
  assert shown[1] == "is the median of all."
  assert shown[2].startswith("Hidden intention: You want the other person to listen")
  assert "BEFORE: emotion 30 -> 31 (the last turn)" in text
  assert "AFTER: emotion 30 -> 33 (the last turn)" in text
  assert all(len(line) <= 100 for line in shown)
  assert text.splitlines()[-3:] == [
    "", f"dialogues: {workdir / 'evaluation'}", f"curves: {workdir / 'curves.png'}",
  ]  # fmt: skip


def test_what_is_written_is_what_the_summary_gets(workdir, settings, sources):
  found = closing.write(settings, sources, workdir)["report"]
  assert found["curves"] == str(workdir / "curves.png")
  assert found["evaluation"] == str(workdir / "evaluation.json")
  assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
  assert json.loads((workdir / "evaluation.json").read_text()) == found["held_out"]
  held_out = found["held_out"]
  assert (held_out["path"], held_out["scenarios"]) == (settings.evaluation.path, 4)
  assert held_out["steps"] == 7
  assert list(held_out["users"]) == ["language_model", "scripted"]
  assert held_out["users"]["language_model"]["before"]["final_emotion"] == 27.5


def test_a_run_without_held_out_scenarios_has_curves_alone(tmp_path):
  settings = runs.config()
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  sources = open_sources(settings)
  assert closing.write(settings, sources, tmp_path) == {
    "report": {"curves": str(tmp_path / "curves.png")}
  }
  found = summary(settings, sources, tmp_path)
  assert closing.describe(found, settings, sources, tmp_path) == (
    f"{metrics.format_summary(SUMMARY)}\n\ncurves: {tmp_path / 'curves.png'}"
  )
