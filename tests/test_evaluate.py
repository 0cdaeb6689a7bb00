"""Rescoring a run's dialogues: the same rewards, edited records found, foreign ones refused."""

import functools
import json
import pathlib
import shutil

import pytest
import runs
import subprocesses

from rlver_jax import cli, evaluate
from rlver_jax.errors import UserError

MODEL = runs.LANGUAGE_MODEL | {"simulator.appraise": True}
KINDS = {
  "scripted": {"environment.level": "mixture"},
  "choice": MODEL | {"environment.level": "mixture"},
  "bare": MODEL | {"simulator.appraise": False, "sampling.slots": 3},
  "generate": MODEL | {"simulator.score": "generate", "simulator.reparse": 1},
}
STEPS = {"steps": 2, "dialogue.max_turns": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Makes the folder of a run of each kind, once."""
  folders = {}

  def make(kind):
    if kind not in folders:
      folders[kind] = tmp_path_factory.mktemp(kind)
      runs.play(runs.config(**STEPS | KINDS[kind]), folders[kind])
    return folders[kind]

  return make


@pytest.fixture
def copied(made, tmp_path):
  """The configuration and dialogues of such a run, to be edited."""

  def copy(kind):
    folder = tmp_path / kind
    folder.mkdir()
    shutil.copy(made(kind) / "config.json", folder)
    shutil.copytree(made(kind) / "dialogues", folder / "dialogues")
    return folder

  return copy


def edit(folder: pathlib.Path, change, step=1) -> None:
  """Passes the records of a step through `change`, which gets them as a list."""
  file = folder / "dialogues" / f"step_{step:06d}.jsonl"
  records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
  change(records)
  lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
  file.write_text("".join(lines), "utf-8")


def found(file: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "scripted"]


@pytest.mark.parametrize("kind", ["scripted", *SLOW])
def test_the_same_user_gives_the_same_rewards(made, tmp_path, kind):
  folder = made(kind)
  summary, equal = evaluate.rescore(folder, None, tmp_path / "out.jsonl")
  turns = [len(r["history"]) // 2 for step in (1, 2) for r in records_of(folder, step)]
  assert summary == {
    "dialogues": "8",
    "equal final emotions": "8",
    "turns": str(sum(turns)),
    "equal changes": str(sum(turns)),
    "mean absolute difference": "0.00",
  }
  assert equal and sum(turns) >= 8
  lines = found(tmp_path / "out.jsonl")
  assert [(line["step"], line["dialogue"]) for line in lines] == [
    (step, i) for step in (1, 2) for i in range(4)
  ]
  for line in lines:
    assert line["equal"] and line["rescored_emo_point"] == line["emo_point"]


def records_of(folder, step):
  return found(folder / "dialogues" / f"step_{step:06d}.jsonl")


@pytest.mark.parametrize("kind", SLOW[:2])
def test_the_ids_that_a_model_sampled_are_recorded(made, kind):
  users = [e for r in records_of(made(kind), 1) for e in r["history"] if e["role"] == "user"]
  said = [e for e in users if e["content"] and e.get("planning")]
  assert said and all(0 < len(e["ids"]) <= e["tokens"] for e in said)


@pytest.mark.parametrize("kind", ["scripted", SLOW[0]])
def test_an_edited_record_is_found(copied, kind):
  folder = copied(kind)

  def change(records):
    user = records[2]["history"][2]
    user["planning"]["change"] += 1

  edit(folder, change)
  summary, equal = evaluate.rescore(folder, 1, folder / "out.jsonl")
  assert not equal
  assert int(summary["equal changes"]) == int(summary["turns"]) - 1
  assert summary["dialogues"] == summary["equal final emotions"] == "4"
  assert [line["equal"] for line in found(folder / "out.jsonl")] == [True, True, False, True]


def test_an_edited_reply_or_emotion_is_found(copied):
  folder = copied("scripted")

  def change(records):
    records[0]["history"][1]["content"] = "Calm down, it is your own fault.\nChange: +10"
    records[3]["emo_point"] += 1

  before = records_of(folder, 1)[0]["history"][2]["planning"]["change"]
  edit(folder, change)
  summary, equal = evaluate.rescore(folder, 1, folder / "out.jsonl")
  lines = found(folder / "out.jsonl")
  assert not equal and not lines[3]["equal"] and lines[1]["equal"]
  assert lines[0]["turns"][0]["rescored_change"] <= min(before, -4)
  assert int(summary["equal final emotions"]) < 4


def drop(field):
  return lambda records: records[1].pop(field)


def set_in(entry, **fields):
  return lambda records: records[1]["history"][entry].update(fields)


@pytest.mark.parametrize(
  ("change", "what"),
  [
    (drop("history"), "found no 'history', expected list."),
    (drop("level"), "found no 'level', expected str."),
    (lambda r: r[1].update(id="none"), "found the scenario 'none', expected one of"),
    (lambda r: r[1].update(task="x"), "found another 'task' than that of scenario"),
    (lambda r: r[1].update(level="odd"), "found the level 'odd', expected one of easy"),
    (lambda r: r[1].update(dialogue=-1), "found -1 as 'dialogue', expected"),
    (set_in(1, role="user"), "found the role 'user', expected user and assistant"),
    (set_in(2, planning=None), "found None as 'planning', expected dict."),
    (set_in(2, content=""), "found a turn after the user has left, expected"),
  ],
)  # fmt: skip
def test_records_that_do_not_fit_the_run_are_named(copied, change, what):
  check_refusal(copied("scripted"), change, what)


@pytest.mark.slow
def test_ids_that_are_not_those_of_a_message_are_named(copied):
  for change, what in (
    (lambda r: r[1]["history"][2].pop("ids"), "found no 'ids', expected list."),
    (set_in(2, ids=[10**6]), "found 'ids' that are no tokens of simulator.path"),
    (set_in(2, content="I am so happy"), "found 'ids' of another text, expected"),
  ):
    folder = copied("choice")
    check_refusal(folder, change, what)
    shutil.rmtree(folder)


def check_refusal(folder, change, what):
  edit(folder, change)
  with pytest.raises(UserError) as raised:
    evaluate.rescore(folder, 1, folder / "out.jsonl")
  message = str(raised.value)
  assert message.startswith(f"{folder}/dialogues/step_000001.jsonl, line 2: {what}"), message
  assert "\n" not in message and not (folder / "out.jsonl").exists()


def test_files_that_cannot_be_rescored_are_named(copied, tmp_path):
  folder = copied("scripted")
  file = folder / "dialogues" / "step_000002.jsonl"

  def refusal(step=None):
    with pytest.raises(UserError) as raised:
      evaluate.rescore(folder, step, tmp_path / "out.jsonl")
    return str(raised.value)

  file.write_text(file.read_text("utf-8")[:-9], "utf-8")
  assert refusal().endswith(
    "step_000002.jsonl, line 4: found no JSON, expected a recorded dialogue."
  )
  assert refusal(7).endswith("has no step_000007.jsonl, expected the dialogues of a run.")
  config = json.loads((folder / "config.json").read_text())
  remote = {"simulator.kind": "openai", "simulator.remote.base_url": "http://localhost:1/v1"}
  config |= remote | {"simulator.remote.model": "m"}
  (folder / "config.json").write_text(json.dumps(config))
  assert refusal().startswith("simulator.kind is 'openai', whose server need not answer alike")
  shutil.rmtree(folder / "dialogues")
  config["simulator.kind"] = "scripted"
  (folder / "config.json").write_text(json.dumps(config))
  assert refusal().endswith("has no step_*.jsonl, expected the dialogues of a run.")


def test_the_command_prints_a_table_and_says_by_its_code_what_it_found(copied, command):
  folder = copied("scripted")
  run = functools.partial(command, run=lambda: cli.run(evaluate.main))
  arguments = ["--mode=rescore", f"--workdir={folder}"]
  done = subprocesses.finished("-m", "rlver_jax.evaluate", *arguments, "--step=2")
  assert (done.returncode, done.stderr) == (0, "")
  rows = [line.rsplit(None, 1) for line in done.stdout.splitlines()]
  assert rows[0] == ["dialogues", "4"] and rows[1] == ["equal final emotions", "4"]
  assert rows[4] == ["mean absolute difference", "0.00"]
  assert rows[5:] == [["Wrote", f"{folder}/rescored.jsonl."]]
  edit(folder, lambda records: records[0].update(emo_point=77), step=2)
  code, _, err = run(*arguments, f"--out={folder}/mine.jsonl")
  assert (code, err) == (1, "")
  assert [line["equal"] for line in found(folder / "mine.jsonl")].count(False) == 1
  code, out, err = run("--mode=rescore")
  assert (code, out) == (2, "")
  assert err.startswith("rlver_jax: --mode or --workdir is missing, expected")
