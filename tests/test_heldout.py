"""Dialogues on held-out scenarios: played before and after, whatever happens to the run between."""

import itertools
import json
import pathlib
import re
import shutil
import statistics

import pytest
import runs

from rlver_jax import build, closing, heldout
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.errors import UserError
from rlver_jax.interrupt import Interrupted, Interrupts
from rlver_jax.metrics import CompileCounter
from rlver_jax.sources import open_sources

CHANGES = {"checkpoint.every": 2, "evaluation.scenarios": 3}


@pytest.fixture(scope="module")
def changes(tmp_path_factory):
  path = runs.held_out(tmp_path_factory.mktemp("scenarios"), 5)
  return CHANGES | {"evaluation.path": str(path)}


class Counting(Interrupts):
  """Counts how often the run asks whether it shall stop."""

  asked = 0

  def check(self):
    Counting.asked += 1
    super().check()


@pytest.fixture(scope="module")
def run(tmp_path_factory, changes):
  """The folder of a run with a scripted user, how often it asked whether it shall stop, and how
  many programs were compiled while held-out dialogues were played."""
  workdir, compiles, grown = tmp_path_factory.mktemp("run"), CompileCounter(), []

  def play(*args):
    before = compiles.count + compiles.cached
    heldout_play(*args)
    grown.append(compiles.count + compiles.cached - before)

  heldout_play = heldout.play
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(heldout, "play", play)
    runs.play(runs.config(**changes), workdir, Counting)
  return workdir, Counting.asked, grown


@pytest.fixture
def copied(run, tmp_path):
  """A copy of that run's folder, to be changed."""
  return pathlib.Path(shutil.copytree(run[0], tmp_path / "run"))


def files(workdir) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in sorted((workdir / "evaluation").iterdir())}


def records(workdir, name) -> list[dict]:
  text = (workdir / "evaluation" / f"{name}.jsonl").read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


def test_a_scripted_user_judges_once_before_and_once_after(run):
  workdir, *_ = run
  assert list(files(workdir)) == ["after.jsonl", "before.jsonl"]
  before, after = records(workdir, "before"), records(workdir, "after")
  names = ["held-en-listen-01", "held-en-listen-02", "held-en-listen-03"]
  for played in (before, after):
    assert [d["id"] for d in played] == names
    assert [(d["dialogue"], d["level"], d["greedy"]) for d in played] == [
      (i, "vanilla", False) for i in range(3)
    ]
  # The user begins alike, the policy has learned to say something else.
  assert [d["history"][0] for d in before] == [d["history"][0] for d in after]
  assert [d["history"][1] for d in before] != [d["history"][1] for d in after]


def test_they_compile_no_program(run):
  assert run[2] == [0, 0]


@pytest.mark.slow
def test_training_is_the_same_without_them(run, changes, tmp_path):
  runs.play(runs.config(**changes | {"evaluation.path": ""}), tmp_path)
  assert not (tmp_path / "evaluation").exists() and not (tmp_path / "evaluation.json").exists()
  assert (tmp_path / "curves.png").exists()
  assert runs.dialogue_files(tmp_path) == runs.dialogue_files(run[0])
  for ours, theirs in zip(runs.metrics(run[0]), runs.metrics(tmp_path), strict=True):
    assert runs.reproducible(ours) == runs.reproducible(theirs)


def test_a_policy_that_does_not_change_gives_the_same_dialogues(run, changes, tmp_path):
  """Also in fewer slots than there are scenarios."""
  settings = runs.config(**changes | {"sampling.slots": 2})
  sources = open_sources(settings)
  fresh = build.build(settings, sources)
  for when in heldout.WHENS:
    heldout.play(settings, sources, fresh, tmp_path, when, lambda: None)
  before = files(run[0])["before.jsonl"]
  assert files(tmp_path) == {"after.jsonl": before, "before.jsonl": before}


def test_numbers_are_those_of_the_files(run):
  workdir, *_ = run
  found = json.loads((workdir / "evaluation.json").read_text())
  assert found["scenarios"] == 3 and found["steps"] == 4
  assert list(found["users"]) == ["scripted"]
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["report"]["held_out"] == found
  final = {}
  for when in ("before", "after"):
    played, numbers = records(workdir, when), found["users"]["scripted"][when]
    final[when] = [d["emo_point"] for d in played]
    said = [m for d in played for m in d["history"] if m["role"] == "assistant"]
    assert numbers["final_emotion"] == pytest.approx(statistics.mean(final[when]))
    assert numbers["success"] == sum(e >= 100 for e in final[when]) / 3
    assert numbers["failure"] == sum(e < 10 for e in final[when]) / 3
    assert numbers["turns"] == len(said) / 3
    assert numbers["reply_tokens"] == pytest.approx(statistics.mean(m["tokens"] for m in said))
    texts = [m["content"] for m in said]
    assert numbers["repeated"] == sum(texts.count(text) > 1 for text in texts) / len(texts)
    words = [re.findall(r"[^\W_]+", text.casefold()) for text in texts]
    pairs = [pair for reply in words for pair in itertools.pairwise(reply)]
    # `lexicon.plain` folds some of the odd characters further that random weights write.
    assert numbers["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs), abs=0.1)
  gain = [a - b for a, b in zip(final["after"], final["before"], strict=True)]
  expected = {"mean": statistics.mean(gain), "standard_error": statistics.stdev(gain) / 3**0.5}
  assert found["users"]["scripted"]["gain"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_run_that_is_stopped_while_they_are_played_goes_on(run, changes, tmp_path):
  """First before the first step, then after the last; each file is whole or not there."""
  workdir, asked, _ = run
  settings, last = runs.config(**changes), None
  for n, done, left in ((2, 0, []), (asked, 4, ["before.jsonl"])):
    with pytest.raises(Interrupted):
      # The second start asks as often as a whole run.
      runs.play(settings, tmp_path, lambda n=n: runs.StopAt(n))
    last = Checkpoints(str(tmp_path / "checkpoints"), keep=None).latest()
    assert last == done
    folder = tmp_path / "evaluation"
    assert [file.name for file in folder.glob("*")] == left
  assert not (tmp_path / "summary.json").exists()
  steps = (tmp_path / "metrics.jsonl").read_bytes()
  assert runs.play(settings, tmp_path)["steps"] == 4
  assert (tmp_path / "metrics.jsonl").read_bytes() == steps
  assert files(tmp_path) == files(workdir)
  assert (tmp_path / "evaluation.json").read_bytes() == (workdir / "evaluation.json").read_bytes()


def test_what_is_there_is_not_played_again(copied, changes, capsys):
  """A kill just before the end took what was played after; a mark in the other file is kept."""
  lines = records(copied, "before")
  lines[0]["history"][1]["content"] = "marked"
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (copied / "evaluation" / "before.jsonl").write_text(text, encoding="utf-8")
  after = files(copied)["after.jsonl"]
  for name in ("evaluation/after.jsonl", "evaluation.json", "summary.json", "curves.png"):
    (copied / name).unlink()
  runs.play(runs.config(**changes), copied)
  assert files(copied) == {"after.jsonl": after, "before.jsonl": text.encode()}
  printed = capsys.readouterr().out
  assert "has all its 4 steps" in printed
  assert re.findall(r"held out, (\w+): 3 dialogues judged by scripted user", printed) == ["after"]
  for name in ("evaluation.json", "summary.json", "curves.png"):
    assert (copied / name).exists()


@pytest.mark.slow
def test_more_steps_play_them_again_at_their_end(copied, changes):
  old = files(copied)
  runs.play(runs.config(**changes | {"steps": 5}), copied)
  new = files(copied)
  assert new["before.jsonl"] == old["before.jsonl"] and new["after.jsonl"] != old["after.jsonl"]
  assert json.loads((copied / "evaluation.json").read_text())["steps"] == 5


@pytest.mark.slow
def test_trained_weights_never_stand_for_those_before(copied, changes, capsys):
  """As where `evaluation.path` is set only when the run goes on."""
  shutil.rmtree(copied / "evaluation")
  settings = runs.config(**changes | {"steps": 5})
  summary = runs.play(settings, copied)
  assert "there will be no comparison with it" in capsys.readouterr().out
  assert list(files(copied)) == ["after.jsonl"]
  found = json.loads((copied / "evaluation.json").read_text())["users"]["scripted"]
  assert list(found) == ["after"]
  text = closing.describe(summary, settings, open_sources(settings), copied)
  emotion = found["after"]["final_emotion"]
  assert re.search(rf"scripted user +- -> {emotion:.1f} ", text)
  assert "USER:" not in text and "change of emotion" not in text


def test_files_of_other_scenarios_or_damaged_ones_are_refused(copied, changes):
  def refusal(**more):
    settings = runs.config(**changes | more)
    with pytest.raises(UserError) as raised:
      heldout.check(settings, open_sources(settings), copied)
    assert "\n" not in str(raised.value)
    return str(raised.value)

  before = copied / "evaluation" / "before.jsonl"
  assert refusal(**{"evaluation.scenarios": 4}) == (
    f"{before} holds 3 dialogues of other scenarios than the first 4 of evaluation.path, expected "
    "those that the run began with."
  )
  for text in ("", "[]\n", '{"id": 1', "{}\n"):
    before.write_text(text)
    assert refusal().startswith(str(before))
  old = files(copied)
  with pytest.raises(UserError):  # a run that is refused has lost nothing
    runs.play(runs.config(**changes | {"steps": 5}), copied)
  assert files(copied) == old
  lines = records(copied, "after")
  del lines[1]["history"][2]["planning"]
  before.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert refusal() == f"{before}, line 2: found no 'planning', expected dict."
