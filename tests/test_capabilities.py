"""The task `capabilities`: recorded dialogues judged, kept, resumed and told of."""

import csv
import json

import pytest
import remote_server
import runs
from matplotlib import image
from test_transcripts import RECORD, changed, lines

from configs import eval as eval_config
from rlver_jax import config as config_lib
from rlver_jax import flat_config
from rlver_jax.dialogue import records
from rlver_jax.embedded import build, dialogues
from rlver_jax.errors import UserError
from rlver_jax.evaluation import capabilities
from rlver_jax.evaluation.judges.base import CAPABILITIES, NAMES, NONE
from rlver_jax.interrupt import Interrupted

SMALL = {
  "cpu_devices": 1, "mesh.data": 1, "mesh.fsdp": -1, "sampling.slots": 2,
  "sampling.decode_steps": 8, "sampling.smallest_window": 4096, "sampling.extend_buckets": (128,),
  "compilation_cache": "",
}  # fmt: skip
PLAN = dialogues.Plan("held_out", build.HELPERS["policy"], 0.0, turns=(2, 3))
WHOLE = {"player": "Mara, 34.", "scene": "The bike is gone.", "topic": "bike"}
LEFT = ("judged.jsonl", "table.csv", "table.md", "strategies.csv", "strategies.md",
        "consistency.csv", "consistency.md", "summary.json", "plane.png")  # fmt: skip


@pytest.fixture
def files(tmp_path):
  """Two files of dialogues of the embedded world."""
  played = [dialogues.play(PLAN, number, 0) for number in range(5)]
  for name, some in (("first", played[:3]), ("second_result", played[3:])):
    records.write(tmp_path / f"{name}.jsonl", some)
  return [tmp_path / "first.jsonl", tmp_path / "second_result.jsonl"]


def config(files, **changes):
  made = eval_config.get_config("capabilities")
  recorded = {"data.recorded": ",".join(map(str, files))}
  made.update_from_flattened_dict(SMALL | recorded | changes)
  return made


def play(settings, workdir, interrupts=None):
  return runs.evaluate(capabilities, settings, workdir, interrupts)


def judged(workdir):
  return [json.loads(line) for line in (workdir / "judged.jsonl").read_text().splitlines()]


def table(path):
  with open(path, newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def test_tables_are_what_the_lines_say(files, tmp_path):
  summary, text = play(config(files), tmp_path / "run")
  found = judged(tmp_path / "run")
  assert [line["id"] for line in found] == [
    json.loads(line)["id"] for file in files for line in file.open()
  ]
  rows = table(tmp_path / "run" / "table.csv")
  assert [row["dialogues of"] for row in rows] == ["first", "second", "all"]
  for row, some in zip(rows, (found[:3], found[3:], found), strict=True):
    for name, short in zip(CAPABILITIES, list(row)[2::3], strict=False):
      mean = sum(line["scores"][name] for line in some) / len(some)
      assert row[short] == f"{mean:.2f}"
      assert float(row[f"{short} low"]) <= float(row[short]) <= float(row[f"{short} high"])
    mean = sum(line["plane"]["orientation"] for line in some) / len(some)
    assert row["orientation"] == f"{mean:.2f}" and row["quoted"] == "100%"
  assert summary["dialogues"] == 5 and summary["failed"] == summary["no_room"] == 0
  assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
  assert all(name in text for name in ("first", "second", "all", "validate", "judged.jsonl"))
  assert image.imread(tmp_path / "run" / "plane.png").std() > 0.01


def test_the_effect_of_a_strategy_is_the_mean_change_of_its_replies(files, tmp_path):
  play(config(files), tmp_path / "run")
  recorded = [json.loads(line) for file in files for line in file.open()]
  changes = {name: [] for name in NAMES}
  replies = 0
  for line, record in zip(judged(tmp_path / "run"), recorded, strict=True):
    felt = [m["planning"]["change"] for m in record["history"][2::2]]
    assert felt == [reply["change"] for reply in line["replies"]]
    for reply, change in zip(line["replies"], felt, strict=True):
      replies += 1
      for name in reply["strategies"] or [NONE]:
        changes[name].append(change)
  assert sum(map(bool, changes.values())) >= 4
  rows = table(tmp_path / "run" / "strategies.csv")
  for row in [row for row in rows if row["dialogues of"] == "all"]:
    some = changes[row["strategy"]]
    assert row["replies"] == str(len(some)) and row["share"] == f"{len(some) / replies:.1%}"
    mean = f"{sum(some) / len(some):+.2f}" if some else "-"
    positive = f"{sum(c > 0 for c in some) / len(some):.0%}" if some else "-"
    assert (row["mean change"], row["positive"]) == (mean, positive)
  assert len(rows) == 3 * len(NAMES)


def test_a_run_that_is_stopped_goes_on_to_the_same_files(files, tmp_path):
  play(config(files), tmp_path / "whole")
  with pytest.raises(Interrupted):
    play(config(files), tmp_path / "run", runs.Quiet(1))
  file = tmp_path / "run" / "judged.jsonl"
  assert 0 < len(file.read_text().splitlines()) < 5
  with file.open("a") as out:
    out.write('{"file": "fi')
  play(config(files), tmp_path / "run")
  for name in LEFT:
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_judges_nothing_again(files, tmp_path, monkeypatch):
  first = play(config(files), tmp_path / "run")
  monkeypatch.setattr(capabilities, "_build_judge", lambda *_: pytest.fail("a judge was built"))
  assert play(config(files), tmp_path / "run") == first


def test_chinese_records_are_judged_by_chinese_rubrics(tmp_path):
  record = WHOLE | changed(
    task="你希望对方能够倾听你", character="消极型", scene="弟弟没打招呼就卖掉了她的旧车。",
    history__0__content="我弟把我的旧车卖了。", history__1__content="你接着说，旧车是怎么没的？",
    history__2__content="他卖掉了。", history__3__content="这是“你”的车，我在听。",
    history__4__content="嗯。",
  )  # fmt: skip
  path = lines(tmp_path / "a.jsonl", record)
  play(config([path]), tmp_path / "run")
  (line,) = judged(tmp_path / "run")
  assert "invite" in line["replies"][0]["strategies"]
  assert all("条回复：“" in reason for reason in line["reasons"].values())


def test_broken_records_are_named_and_left_out_when_asked(tmp_path, capsys):
  good, idle = RECORD | WHOLE, changed(id="idle", emo_point=40) | WHOLE
  idle["history"] = idle["history"][:2]
  path = lines(tmp_path / "a.jsonl", changed(emo_point=3) | WHOLE, good, b"?", RECORD, idle)
  with pytest.raises(UserError, match=r"records that are broken \(.*a\.jsonl: 3\)"):
    play(config([path]), tmp_path / "run")
  said = capsys.readouterr().err
  assert "a.jsonl, line 1: found 3 as 'emo_point'" in said and "line 3: found no JSON" in said
  assert "line 4: found the id" in said or "line 4: found no 'player'" in said
  summary, _ = play(config([path], **{"data.skip_broken": True}), tmp_path / "run")
  assert summary["dialogues"] == 1
  assert "left out 3 broken records and 1 without an appraised reply" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("change", "found"),
  [
    (lambda line: line["scores"].update(core_insight=6), "as 'scores', expected 1..5"),
    (lambda line: line["plane"].pop("form"), "as 'plane', expected 1..5"),
    (lambda line: line["replies"].pop(), "found other replies of"),
    (lambda line: line["replies"][0].update(change=9), "found other replies of"),
    (lambda line: line["replies"][0].update(emotion=9), "found other replies of"),
    (lambda line: line["replies"][0].update(state="glum"), "found 'glum' as 'state', expected one"),
    (lambda line: line["replies"][0].pop("state"), "found no 'state', expected str"),
    (lambda line: line["reasons"].clear(), "as 'reasons'"),
    (lambda line: line.update(id="x"), "found the dialogue 'x', expected one of data.recorded"),
  ],
)
def test_a_damaged_line_is_named(files, tmp_path, change, found):
  play(config(files), tmp_path / "run")
  first, *rest = judged(tmp_path / "run")
  change(first)
  lines(tmp_path / "run" / "judged.jsonl", first, *rest)
  with pytest.raises(UserError, match=r"judged\.jsonl, line 1: ") as error:
    play(config(files), tmp_path / "run")
  assert found in str(error.value)


@pytest.mark.slow
def test_a_dialogue_without_room_is_told_of_and_not_asked_for_again(files, tmp_path, monkeypatch):
  """The embedded model as judge, of a short dialogue and of one that is too long for it."""
  long = RECORD | WHOLE | changed(id="long", history__1__content="Go on. " * 2000) | WHOLE
  path = lines(tmp_path / "a.jsonl", RECORD | WHOLE, long)
  model = {"judge.kind": "language_model", "judge.max_reason_tokens": 8, "judge.cache_length": 2048,
           "sampling.smallest_window": 2048}  # fmt: skip
  summary, text = play(config([path], **model), tmp_path / "run")
  assert summary["dialogues"] == 1 and summary["no_room"] == 1
  assert "1 dialogues are left out: they have no room in judge.cache_length, 2048." in text
  assert [line["room"] for line in judged(tmp_path / "run")] == [True, False]
  monkeypatch.setattr(capabilities, "_build_judge", lambda *_: pytest.fail("a judge was built"))
  assert play(config([path], **model), tmp_path / "run")[0] == summary
  only = lines(tmp_path / "b.jsonl", long)
  monkeypatch.undo()
  with pytest.raises(UserError, match=r"1 have no room in judge\.cache_length"):
    play(config([only], **model), tmp_path / "other")


def remotely(server, path):
  fields = {
    "kind": "openai", "remote.base_url": server.url, "remote.model": remote_server.MODEL,
    "remote.api_key_env": remote_server.VARIABLE, "remote.retries": 0, "remote.first_wait": 0.01,
  }  # fmt: skip
  return config([path], **{f"judge.{name}": value for name, value in fields.items()})


def test_a_judge_at_a_server_that_fails_is_asked_again(server, tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD | WHOLE, changed(id="other") | WHOLE)
  settings, broken = remotely(server, path), {"id": "Yes?"}

  def decide(call):
    text = call.messages[-1]["content"]
    if broken["id"] in text:
      return remote_server.Answer(status=503)
    if "last line" in text:
      return remote_server.Answer('It asks, "Tell me", at last.\n4')
    if "feels at this moment" in text:
      return remote_server.Answer("unhappy")
    return remote_server.Answer("invite" if "that one name" in text else "2")

  server.decide = decide
  with pytest.raises(UserError, match="no dialogue could be judged, expected a judge"):
    play(settings, tmp_path / "run")
  broken["id"] = "nothing of this kind"
  summary, text = play(settings, tmp_path / "run")
  assert set(summary["capabilities"].values()) == {4.0} and summary["quoted"] == 1
  assert summary["plane"] == {"orientation": 2.0, "form": 2.0} and "missing" not in text
  assert summary["strategies"]["invite"]["change"] == 2.0  # of -4 and +8
  # Of emotions 40 and 36: in the third band and in the second.
  assert summary["consistency"]["consistent"] == 1 and summary["consistency"]["difference"] == -0.5
  assert summary["completion_tokens"] > 0


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"data.recorded": ""}, "data.recorded is empty"),
    ({"judge.kind": "oracle"}, "judge.kind is 'oracle'"),
    ({"judge.top_p": 0.0}, "judge.top_p is 0.0"),
    ({"judge.max_reason_tokens": 0}, "judge.max_reason_tokens is 0"),
    ({"judge.cache_length": 0}, "judge.cache_length is 0"),
    ({"judge.reparse": -1}, "judge.reparse is -1"),
    ({"judge.remote.timeout": 0.0}, "judge.remote.timeout is 0.0"),
    ({"judge.remote.retries": -1}, "judge.remote.retries is -1"),
    ({"judge.kind": "openai"}, "judge.remote.base_url is ''"),
    ({"sampling.extend_buckets": ()}, "sampling.extend_buckets is ()"),
    ({"data.dialogues": -1}, "data.dialogues is -1"),
  ],
)
def test_values_that_cannot_work_are_named(files, changes, found):
  with pytest.raises(UserError) as error:
    config_lib.validate(config(files, **changes))
  assert found in str(error.value)


def test_what_cannot_be_read_is_named(files, tmp_path):
  with pytest.raises(UserError, match=r"none/en\.txt cannot be read"):
    play(config(files, **{"judge.rubrics": str(tmp_path / "none")}), tmp_path / "run")
  long = {"judge.kind": "language_model", "judge.cache_length": 10**6}
  with pytest.raises(UserError, match=r"judge\.cache_length is 1000000, expected at most the 8192"):
    play(config(files, **long), tmp_path / "run")


def test_presets_are_valid_and_each_has_its_judge():
  for model, kind in (("tiny", "scripted"), ("qwen2.5-0.5b", "language_model")):
    settings = eval_config.get_config(f"capabilities,{model}")
    settings.data.recorded = "a.jsonl"
    config_lib.validate(settings)
    assert settings.judge.kind == kind


def test_a_run_may_change_where_its_server_is_and_no_more(files):
  old = flat_config.flatten(config(files))
  for field in ("judge.remote.base_url", "judge.remote.retries", "judge.remote.token_budget"):
    assert flat_config.difference(old, old | {field: "another"}) is None
  for field in ("judge.remote.model", "judge.kind", "judge.rubrics", "judge.cache_length"):
    assert flat_config.difference(old, old | {field: "another"}) == field
