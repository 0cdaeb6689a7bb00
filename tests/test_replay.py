"""The task `fidelity`: recorded dialogues of any origin, replayed, resumed and told of."""

import json

import pytest
import remote_server
import runs
from test_transcripts import RECORD, changed, lines

from configs import eval as eval_config
from rlver_jax import config as config_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records
from rlver_jax.dialogue.simulators.appraisal import appraise
from rlver_jax.embedded import build, dialogues
from rlver_jax.errors import UserError
from rlver_jax.evaluation import replay
from rlver_jax.interrupt import Interrupted

SMALL = {
  "simulator.kind": "scripted", "simulator.templates": "tiny", "cpu_devices": 1, "mesh.data": 1,
  "mesh.fsdp": -1, "sampling.slots": 2, "sampling.decode_steps": 8,
  "sampling.smallest_window": 1024, "sampling.extend_buckets": (128,), "compilation_cache": "",
}  # fmt: skip
PLAN = dialogues.Plan("held_out", build.HELPERS["policy"], 0.0, turns=(2, 3))
WHOLE = {"player": "Mara, 34.", "scene": "The bike is gone.", "topic": "bike"}


@pytest.fixture
def files(tmp_path):
  """Two files of the scripted user's dialogues, of which the second has one change altered."""
  played = [dialogues.play(PLAN, number, 0) for number in range(5)]
  for name, some in (("first", played[:3]), ("second_result", played[3:])):
    records.write(tmp_path / f"{name}.jsonl", some)
  second = [json.loads(line) for line in (tmp_path / "second_result.jsonl").open()]
  last = second[0]["history"][-1]
  last["planning"]["change"] -= 1
  last["emotion-point"] -= 1
  second[0]["emo_point"] -= 1
  lines(tmp_path / "second_result.jsonl", *second)
  return [tmp_path / "first.jsonl", tmp_path / "second_result.jsonl"]


def config(files, **changes):
  made = eval_config.get_config("fidelity")
  recorded = {"data.recorded": ",".join(map(str, files))}
  made.update_from_flattened_dict(SMALL | recorded | changes)
  return made


def play(settings, workdir, interrupts=None):
  return runs.evaluate(replay, settings, workdir, interrupts)


def untimed(file):
  """The lines by dialogue, whose order is not fixed, without what differs from run to run."""
  found = [json.loads(line) for line in file.read_text().splitlines()]
  return sorted((line | {"seconds": 0} for line in found), key=lambda line: line["id"])


def test_files_and_all_of_them_are_compared(files, tmp_path):
  summary, text = play(config(files), tmp_path / "run")
  turns = sum(len(json.loads(line)["history"]) // 2 for file in files for line in file.open())
  assert summary["turns"] == turns and summary["dialogues"] == 5
  assert summary["error"] == pytest.approx(1 / turns)
  assert summary["final_error"] == pytest.approx(1 / 5)
  assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
  rows = [line.split(",") for line in (tmp_path / "run" / "table.csv").read_text().splitlines()]
  assert [row[0] for row in rows] == ["dialogues of", "first", "second", "all"]
  assert [row[1] for row in rows[1:]] == ["3", "2", "5"] and rows[1][3] == "0.00"
  assert all(name in text for name in ("first", "second", "all"))
  assert (tmp_path / "run" / "table.md").read_text().count("\n") == 5


def test_a_folder_is_read_without_its_dialogues(files, tmp_path):
  folder = tmp_path / "run"
  summary, _ = play(config(files), folder)
  for file in files:
    file.unlink()
  found = replay.read(folder)
  assert {name: len(replayed) for name, replayed in found.items()} == {"first": 3, "second": 2}
  whole = replay.compare([r for replayed in found.values() for r in replayed])
  assert (whole.turns, whole.error) == (summary["turns"], summary["error"])
  head, first, second = replay.finals(found)
  assert head[:5] == ["dialogues of", "dialogues", "recorded", "found", "found − recorded"]
  assert first[:2] == ["first", "3"] and first[2] == first[3] and first[4] == "+0.0"
  assert second[4:] == ["+0.5", ("+0.0", "+1.0", "")]
  nothing = replay.finals({"nobody": [replay.Replayed((3,), (None,), 0, 0, 33, 30)]})
  assert nothing[1][:3] == ["nobody", "0", "-"]


def test_a_folder_of_no_replay_is_named(files, tmp_path):
  folder = tmp_path / "run"
  play(config(files), folder)
  line = json.loads((folder / "replayed.jsonl").read_text().splitlines()[0])
  for broken in ({"found": [99] * len(line["found"])}, {"recorded": []}, {"tokens": "9"}):
    (folder / "replayed.jsonl").write_text(json.dumps(line | broken) + "\n")
    with pytest.raises(UserError, match=r"replayed\.jsonl, line 1: found "):
      replay.read(folder)
  (folder / "replayed.jsonl").write_text("")
  with pytest.raises(UserError, match=r"has no dialogue of data\.recorded"):
    replay.read(folder)
  (folder / "replayed.jsonl").unlink()
  with pytest.raises(UserError, match=r"replayed\.jsonl cannot be read"):
    replay.read(folder)
  workdir_lib.claim(str(tmp_path / "benchmark"), eval_config.get_config())
  with pytest.raises(UserError, match="holds a run of task 'benchmark', expected fidelity"):
    replay.read(tmp_path / "benchmark")


def test_a_replay_that_is_stopped_goes_on(files, tmp_path):
  whole, _ = play(config(files), tmp_path / "whole")
  with pytest.raises(Interrupted):
    play(config(files), tmp_path / "run", runs.Quiet(4))
  file = tmp_path / "run" / "replayed.jsonl"
  assert 0 < len(file.read_text().splitlines()) < 5
  with file.open("a") as out:
    out.write('{"file": "fi')
  again, _ = play(config(files), tmp_path / "run")
  assert again | {"seconds": 0} == whole | {"seconds": 0}
  assert untimed(file) == untimed(tmp_path / "whole" / "replayed.jsonl")


def test_a_language_model_appraises_in_both_ways(files, tmp_path):
  model = {
    "simulator.kind": "language_model", "simulator.path": "tiny-simulator",
    "simulator.temperature": 0.0, "data.dialogues": 1, "sampling.slots": 2,
  }  # fmt: skip
  written, _ = play(config(files, **model), tmp_path / "generate")
  choice = {"simulator.score": "choice", "simulator.appraise": False}
  chosen, _ = play(config(files, **model, **choice), tmp_path / "choice")
  assert written["dialogues"] == chosen["dialogues"] == 2
  assert written["tokens"] > 10 > chosen["tokens"]
  assert written["sign"] > 0.5 and written["unread"] == 0


def test_records_of_others_need_no_more_than_the_published_fields(tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD | WHOLE, changed(id="other") | WHOLE)
  summary, _ = play(config([path]), tmp_path / "run")
  scenario = records.scenario_of(RECORD | WHOLE)
  changes = [
    appraise(reply, scenario, before, said).change
    for reply, before, said in (
      ("Yes?", [], ["My bike."]), ("Tell me.", ["Yes?"], ["My bike.", "It is gone."]),
    )
  ]  # fmt: skip
  error = (abs(changes[0] + 4) + abs(changes[1] - 8)) / 2
  assert summary["turns"] == 4 and summary["error"] == error > 0


def remotely(server, path):
  """The simulated user at a server, with patience for tests."""
  fields = {
    "kind": "openai", "templates": "", "remote.base_url": server.url,
    "remote.model": remote_server.MODEL, "remote.api_key_env": remote_server.VARIABLE,
    "remote.retries": 0, "remote.first_wait": 0.01, "reparse": 0,
  }  # fmt: skip
  return config([path], **{f"simulator.{name}": value for name, value in fields.items()})


def test_a_user_at_a_server_is_asked_after_all_that_was_said(server, tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD | WHOLE)
  summary, _ = play(remotely(server, path), tmp_path / "run")
  first, second = [call.messages for call in server.calls if call.kind == "plan"]
  assert [m["role"] for m in second] == ["system", *["user", "assistant"] * 2, "user"]
  assert second[:3] == first[:3] and "Yes?" in second[3]["content"]
  assert second[4] == {"role": "assistant", "content": "It is gone."}
  assert "Tell me." in second[5]["content"] and "Tell me." not in first[-1]["content"]
  # It always answers +2.
  assert summary["error"] == (6 + 6) / 2 and summary["final_error"] == 0
  assert summary["prompt_tokens"] > summary["completion_tokens"] > 0


def test_where_the_server_fails_is_asked_again_and_nonsense_counts_as_unread(server, tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD | WHOLE, changed(id="other") | WHOLE)
  settings, broken = remotely(server, path), {"status": 503}
  server.decide = lambda call: remote_server.Answer("Hm.", status=broken["status"])
  with pytest.raises(UserError, match="failed in every dialogue"):
    play(settings, tmp_path / "run")
  broken["status"] = 200
  summary, text = play(settings, tmp_path / "run")
  assert summary["failed"] == 0 and summary["unread"] == 1 and summary["error"] is None
  assert "missing" not in text


def test_broken_records_are_left_out_when_asked(tmp_path, capsys):
  good, idle = RECORD | WHOLE, changed(id="idle", emo_point=40) | WHOLE
  idle["history"] = idle["history"][:2]
  path = lines(tmp_path / "a.jsonl", changed(emo_point=3) | WHOLE, b"", good, b"?", idle)
  with pytest.raises(UserError, match=r"records that are broken \(.*a\.jsonl: 2\)"):
    play(config([path]), tmp_path / "run")
  said = capsys.readouterr().err
  assert "a.jsonl, line 1: found 3 as 'emo_point'" in said and "line 4: found no JSON" in said
  summary, _ = play(config([path], **{"data.skip_broken": True}), tmp_path / "run")
  assert summary["dialogues"] == 1
  assert "left out 2 broken records and 1 without an appraised reply" in capsys.readouterr().out


def test_scenarios_can_be_those_of_a_file(files, tmp_path, capsys):
  play(config(files, **{"data.path": "tiny-held-out"}), tmp_path / "run")
  path = lines(tmp_path / "a.jsonl", RECORD | WHOLE)
  with pytest.raises(UserError):
    play(config([path], **{"data.path": "en"}), tmp_path / "other")
  assert "line 1: found the id 'bike', expected one of data.path" in capsys.readouterr().err
  altered = [json.loads(line) | {"scene": "Elsewhere."} for line in files[0].open()]
  path = lines(tmp_path / "b.jsonl", *altered)
  with pytest.raises(UserError):
    play(config([path], **{"data.path": "tiny-held-out"}), tmp_path / "third")
  assert "line 1: found another background than that of scenario" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("records_of", "found"),
  [
    ([RECORD], "line 1: found no 'player'"),
    ([WHOLE | changed(emo_point=3)], "line 1: found 3 as 'emo_point'"),
    ([WHOLE | RECORD, WHOLE | RECORD], "line 2: found the id 'bike' as in line 1"),
    ([WHOLE | RECORD | {"level": "easy"}], "the level 'easy', expected vanilla"),
    ([WHOLE | changed(history__0__content="")], "a turn after the user has left"),
    ([WHOLE | changed(history__1__content=None)], "None as 'content'"),
  ],
)
def test_a_broken_record_is_named(tmp_path, capsys, records_of, found):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records_of))
  with pytest.raises(UserError, match="has records that are broken"):
    play(config([path]), tmp_path / "run")
  assert f"{path}, line " in (said := capsys.readouterr().err) and found in said


def test_a_file_without_dialogues_is_named(tmp_path):
  path = lines(tmp_path / "a.jsonl", b"")
  with pytest.raises(UserError, match=r"a\.jsonl has no dialogue with an appraised reply"):
    play(config([path]), tmp_path / "run")


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    ({"found": [1]}, r"found \[1\] as 'found', expected a change for each"),
    ({"recorded": [9], "found": [9]}, "found other turns of"),
  ],
)
def test_a_damaged_replay_is_named(files, tmp_path, damage, named):
  play(config(files), tmp_path / "run")
  file = tmp_path / "run" / "replayed.jsonl"
  first, *rest = file.read_text().splitlines()
  file.write_text("\n".join([json.dumps(json.loads(first) | damage), *rest]) + "\n")
  with pytest.raises(UserError, match=rf"line 1: {named}"):
    play(config(files), tmp_path / "run")


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"data.recorded": ""}, "data.recorded is empty"),
    ({"data.dialogues": -1}, "data.dialogues is -1"),
    ({"simulator.appraise": False}, "simulator.appraise is False"),
    ({"sampling.extend_buckets": ()}, "sampling.extend_buckets is ()"),
  ],
)
def test_values_that_cannot_work_are_named(files, changes, found):
  with pytest.raises(UserError) as error:
    config_lib.validate(config(files, **changes))
  assert found in str(error.value)


def test_a_file_named_twice_is_a_mistake(files, tmp_path):
  with pytest.raises(UserError, match="expected files, each once"):
    play(config([files[0], files[0]]), tmp_path / "run")
  with pytest.raises(UserError, match="expected files, each once"):
    play(config([files[0], ""]), tmp_path / "run")
