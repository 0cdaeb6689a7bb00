"""The page of runs: what it holds against a plain reading of their files, and that it is safe."""

import base64
import functools
import hashlib
import json
import re

import pytest
import runs
import subprocesses
from test_closing import played

from configs import eval as eval_config
from configs import sft
from rlver_jax import cli, report
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records, scenario
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, UserMessage
from rlver_jax.errors import UserError
from rlver_jax.page import content, reading, writing

HOSTILE = '</script><script>window.broken = 1</script><img src="x" onerror="window.broken = 2"> '
HOSTILE += "&lt;b&gt; <!-- \u2028 \u2029 {{script}} \\u003c ']]>"
SCENARIOS = scenario.read(scenario.resolve("en"))[0]
WHENS = {"before": (3, -4), "after": (8, 9, 5)}


def hostile(index):
  """A dialogue with thoughts, in which everything said and thought is hostile."""
  own = scenario.Scenario(
    f"<b>{index}</b>", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), "You want advice. " + HOSTILE,
    HOSTILE, tactic="baiting",
  )  # fmt: skip
  d = Dialogue(index, index, own, Rules(max_turns=2))
  d.advance(UserMessage(HOSTILE))
  d.advance(PolicyReply(HOSTILE, HOSTILE, True, True, 3))
  d.advance(Plan(-7, HOSTILE, HOSTILE, HOSTILE, HOSTILE, parsed=False))
  d.advance(UserMessage(HOSTILE))
  d.advance(PolicyReply("Fine.", "", False, True, 3))
  d.advance(Plan(10))
  return d


def training_run(folder, steps=3):
  """A run of that many steps, each with 4 dialogues, and 3 held-out scenarios."""
  config = runs.config(**runs.LANGUAGE_MODEL | {"evaluation.path": "en"})
  workdir_lib.claim(str(folder), config)
  for user, extra in (("", 0), ("_scripted", 1)):
    for when, changes in WHENS.items():
      dialogues = [played(s, i, *changes, i - extra) for i, s in enumerate(SCENARIOS[:3])]
      records.write(folder / "evaluation" / f"{when}{user}.jsonl", dialogues)
  lines = []
  for step in range(1, steps + 1):
    dialogues = [played(SCENARIOS[i], i, step, i + 1, 2 * step) for i in range(4)]
    records.write(folder / "dialogues" / f"step_{step:06d}.jsonl", dialogues)
    final = [d.emotion for d in dialogues]
    lines.append({"step": step, "emotion/final_mean": sum(final) / 4, "update/entropy": None})
    lines[-1] |= {"emotion/success_rate": 0.0, "tokens/policy": 9, "seconds/step": 2.0}
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return folder


def benchmark_run(folder, dialogues=()):
  workdir_lib.claim(str(folder), eval_config.get_config())
  dialogues = dialogues or [played(s, i, i, 5, 9) for i, s in enumerate(SCENARIOS[:5])]
  records.write(folder / "dialogues.jsonl", dialogues)
  return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return training_run(tmp_path_factory.mktemp("runs") / "mine")


def made(*folders, most=200, step=None):
  return content.content(reading.read([str(folder) for folder in folders]), most, step)


def lines_of(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_dialogues_are_those_of_the_files(run):
  found = made(run)
  expected = []
  for user, suffix in (("language model", ""), ("scripted user", "_scripted")):
    for when in WHENS:
      for record in lines_of(run / "evaluation" / f"{when}{suffix}.jsonl"):
        expected.append((when, None, user, record))
  for step in (1, 2, 3):
    for record in lines_of(run / "dialogues" / f"step_{step:06d}.jsonl"):
      expected.append(("training", step, "language model", record))
  assert len(found["dialogues"]) == len(expected) == 24
  for d, (when, step, user, record) in zip(found["dialogues"], expected, strict=True):
    assert (d["set"], d["step"], d["user"], d["end"]) == (when, step, user, record["end"])
    told = found["scenarios"][d["scenario"]]
    assert [told["id"], told["background"], told["task"], told["tactic"]] == [
      record["id"], record["scene"], record["task"], ""
    ]  # fmt: skip
    history = record["history"]
    assert (d["opening"], d["start"]) == (history[0]["content"], history[0]["emotion-point"])
    assert d["final"] == record["emo_point"] and d["rest"] is None
    for turn, reply, answer in zip(d["turns"], history[1::2], history[2::2], strict=True):
      assert turn["reply"] == reply["content"] and turn["message"] == answer["content"]
      assert (turn["emotion"], turn["change"]) == (
        answer["emotion-point"], answer["planning"]["change"]
      )  # fmt: skip


def test_curves_have_the_files_means_inside_their_intervals(run):
  told = made(run)["runs"][0]
  assert told["name"] == "mine" and not told["ended"]
  points = told["curves"]["emotion/final_mean"]
  for step, value, low, high in points:
    final = [r["emo_point"] for r in lines_of(run / "dialogues" / f"step_{step:06d}.jsonl")]
    assert value == sum(final) / 4 and min(final) <= low < value < high <= max(final)
  assert [point[0] for point in points] == [1, 2, 3]
  # Of 4 dialogues without a success; Wilson: z^2 / (n + z^2).
  assert told["curves"]["emotion/success_rate"][0] == [
    1,
    0.0,
    0.0,
    pytest.approx(0.48990, abs=1e-5),
  ]
  assert "update/entropy" not in told["curves"]
  assert "Entropy of the policy" not in [panel["title"] for panel in made(run)["panels"]]
  marks = told["marks"]["emotion/final_mean"]
  assert [(m["step"], m["when"], m["user"]) for m in marks] == [
    (0, "before", "language model"), (3, "after", "language model"),
    (0, "before", "scripted user"), (3, "after", "scripted user"),
  ]  # fmt: skip
  assert marks[0]["value"] == 30 + 3 - 4 + 1 and marks[0]["low"] < marks[0]["value"]


def test_trajectories_go_from_the_start_to_the_final_emotion(run):
  own, scripted = made(run)["trajectories"]
  assert (own["user"], scripted["user"]) == ("language model", "scripted user")
  before, after = own["lines"]
  assert (before["when"], before["count"], after["when"]) == ("before", 3, "after")
  assert [point[0] for point in before["points"]] == [30, 33, 29, 30]
  assert [point[0] for point in after["points"]] == [30, 38, 47, 52, 53]
  assert before["points"][1] == [33, 33, 33]
  low, high = before["points"][3][1:]
  assert 29 <= low < 30 < high <= 31


def test_tables(run, tmp_path):
  other = benchmark_run(tmp_path / "bench")
  found = {table["title"]: table for table in made(run, other)["tables"]}
  training = dict(zip(found["Training"]["head"], found["Training"]["rows"][0], strict=True))
  assert training["steps"] == "3 of 4" and training["time"] == "0:00:06"
  assert training["tokens"] == "27" and training["failure"] == "–"
  held_out = found["Held-out scenarios, before and after"]
  cells = dict(zip(held_out["head"], held_out["rows"][0], strict=True))
  assert cells["emotion"] == "30.0 → 53.0" and cells["scenarios"] == "3"
  assert cells["change of emotion"] == "+23.0 [+23.0, +23.0]"
  benchmark = found["Benchmark"]
  final = [r["emo_point"] for r in lines_of(other / "dialogues.jsonl")]
  assert benchmark["rows"][0][:3] == ["bench", "5", f"{sum(final) / 5:.1f}"]
  assert "Benchmark of bench, by groups" in found


def test_as_many_dialogues_of_training_as_asked_for_evenly_chosen(tmp_path):
  run = training_run(tmp_path / "run", steps=5)
  found = made(run, most=4)
  shown = [d for d in found["dialogues"] if d["set"] == "training"]
  assert found["runs"][0]["shown"] == [4, 20] and len(found["dialogues"]) == 12 + 4
  assert [d["step"] for d in shown] == [1, 2, 4, 5]  # of 0..19 those at 0, 6, 12 and 19
  # All steps still count in the curves.
  assert len(found["runs"][0]["curves"]["emotion/final_mean"]) == 5
  one = made(run, step=2)
  assert {d["step"] for d in one["dialogues"] if d["set"] == "training"} == {2}
  assert one["runs"][0]["shown"] == [4, 4]
  assert made(run, most=0)["runs"][0]["shown"] == [0, 20]


def test_texts_are_embedded_as_json_that_nothing_ends(tmp_path):
  found = made(benchmark_run(tmp_path / "run", [hostile(0)]))
  page = writing.page(found)
  opened = '<script type="application/json" id="content">'
  text = page.partition(opened)[2].partition("</script>")[0]
  assert json.loads(text) == found
  told = found["dialogues"][0]
  assert told["opening"] == told["turns"][0]["thought"] == told["turns"][0]["plan"][3] == HOSTILE
  assert not set("<>&\u2028\u2029") & set(text)
  assert page.count("</script>") == 2 and page.count("<script") == 2
  assert json.loads(writing.embedded("half \ud83d")) == "half \ud83d"
  writing.embedded("half \ud83d").encode()  # which would fail, were it not escaped
  with pytest.raises(ValueError):
    writing.embedded(float("nan"))


def test_scripts_make_text_of_texts():
  for name in writing.SCRIPTS:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
      assert way not in writing._asset(name)


def test_the_page_asks_nobody_for_anything(run):
  page = writing.page(made(run))
  assert "://" not in page and "url(" not in page and "@import" not in page
  assert not re.search(r"<(link|img|iframe|object|base)\b|\bsrc=|fetch\(|XMLHttpRequest", page)
  policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
  assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
  for kind, element in (("style", "style"), ("script", "script")):
    inside = re.findall(rf"<{element}>(.*?)</{element}>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
    assert len(inside) == 1 and f"{kind}-src 'sha256-{digest}'" in policy


def test_runs_that_still_go_on(tmp_path):
  run = training_run(tmp_path / "run")
  with open(run / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "emotion/fin')
  for file in run.glob("evaluation/after*"):
    file.unlink()
  found = made(run)
  assert len(found["runs"][0]["curves"]["emotion/final_mean"]) == 3
  assert {d["set"] for d in found["dialogues"]} == {"before", "training"}
  assert [len(user["lines"]) for user in found["trajectories"]] == [1, 1]
  cells = next(t for t in found["tables"] if t["title"].startswith("Held-out"))["rows"][0]
  assert "30.0 → –" in cells and cells[-1] == "–"
  other = benchmark_run(tmp_path / "bench")
  with open(other / "dialogues.jsonl", "a") as file:
    file.write('{"id": "en-')
  assert len(made(other)["dialogues"]) == 5
  begun = tmp_path / "begun"
  workdir_lib.claim(str(begun), runs.config())
  found = made(begun)
  assert (found["dialogues"], found["panels"], found["trajectories"]) == ([], [], [])
  writing.page(found)


def test_supervised_runs_have_their_losses(tmp_path):
  workdir_lib.claim(str(tmp_path / "run"), sft.get_config())
  lines = [{"step": s, "sft/loss": 2.0 / s, "sft/held_out_loss": 3.0 / s} for s in (10, 20)]
  (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  found = made(tmp_path / "run")
  assert [panel["title"] for panel in found["panels"]] == ["Loss"]
  assert found["runs"][0]["curves"]["sft/loss"] == [[10, 0.2, None, None], [20, 0.1, None, None]]
  assert found["tables"][0]["rows"][0][-2:] == ["0.1000", "0.1500"]


def test_runs_of_one_name_are_told_apart(run, tmp_path):
  other = training_run(tmp_path / run.name)
  assert [told["name"] for told in made(run, other)["runs"]] == [str(run), str(other)]
  with pytest.raises(UserError, match="names a folder twice, expected each once"):
    made(run, run.parent / "." / run.name)


def test_broken_folders_are_named(tmp_path):
  with pytest.raises(
    UserError, match=r"config\.json cannot be read .*expected the folder of a run"
  ):
    made(tmp_path)
  workdir_lib.claim(str(tmp_path / "fidelity"), eval_config.get_config("fidelity"))
  with pytest.raises(UserError, match="task 'fidelity', expected one of: rl, sft, benchmark"):
    made(tmp_path / "fidelity")
  run = training_run(tmp_path / "run")
  step = run / "dialogues" / "step_000002.jsonl"
  whole = step.read_text("utf-8")
  for text, found in (
    (whole[:-20], "line 4: found no JSON"),
    (whole.replace('"change": 2', '"change": "2"', 1), "line 1: found '2' as 'change'"),
    (re.sub('"task": "[^"]*"', '"task": "Tea."', whole, count=1), "line 1: found field 'task'"),
  ):
    step.write_text(text)
    with pytest.raises(UserError, match=rf"step_000002\.jsonl, {found}"):
      made(run)
  step.write_text(whole)
  after = run / "evaluation" / "after.jsonl"
  after.write_text("".join(line + "\n" for line in after.read_text("utf-8").splitlines()[:2]))
  with pytest.raises(UserError, match=r"after\.jsonl is of other scenarios"):
    made(run)


@pytest.fixture
def run_report(command):
  """Runs the command in this process; returns exit code, stdout and stderr."""
  return functools.partial(command, run=lambda: cli.run(report.main, operands=True))


def test_the_command(run, run_report, tmp_path):
  done = subprocesses.finished("-m", "rlver_jax.report", run, "--dialogues=3")
  page = run / "report.html"
  assert done.returncode == 0 and done.stdout == f"Wrote {page}: 1 run(s), 15 dialogues.\n"
  assert page.read_text("utf-8") == writing.page(made(run, most=3))
  assert not list(run.glob(".*.tmp"))
  code, out, err = run_report(run, f"--out={tmp_path}/no/page.html")
  assert (code, out) == (2, "")
  assert re.fullmatch(r"rlver_jax: --out is .*, which cannot be written .*\n", err)


@pytest.mark.parametrize(
  ("words", "found"),
  [
    ((), "the command line names no folder"), (("--dialogues=-1",), "flag --dialogues=-1"),
    (("no-such-run",), "no-such-run/config.json cannot be read"),
  ],
)  # fmt: skip
def test_mistakes_of_the_command(run_report, words, found):
  code, _, err = run_report(*words)
  assert code == 2 and len(err.splitlines()) == 1
  assert err.startswith("rlver_jax: ") and found in err
