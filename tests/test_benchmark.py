"""The Sentient benchmark as a task: what it leaves, that it goes on, and what it is played with."""

import dataclasses
import json
import shutil

import pytest
import remote_server
import runs

from configs import eval as eval_config
from rlver_jax import config as config_lib
from rlver_jax.dialogue import records, scenario
from rlver_jax.errors import BudgetSpent, UserError
from rlver_jax.evaluation import benchmark, scores, transcripts
from rlver_jax.interrupt import Interrupted

SMALL = {
  "policy.path": "tiny", "policy.dtype": "float32", "simulator.kind": "scripted",
  "simulator.templates": "", "cpu_devices": 1, "mesh.data": 1, "mesh.fsdp": -1,
  "data.path": "en", "data.scenarios": 5, "dialogue.max_turns": 2, "sampling.temperature": 1.0,
  "sampling.slots": 3, "sampling.max_new_tokens": 8, "sampling.max_prompt_tokens": 384,
  "sampling.max_response_tokens": 256, "sampling.decode_steps": 8, "sampling.smallest_window": 1024,
  "sampling.extend_buckets": (128,), "compilation_cache": "",
}  # fmt: skip


def config(**changes):
  made = eval_config.get_config()
  made.update_from_flattened_dict(SMALL | changes)
  return made


def play(settings, workdir, interrupts=None):
  """Runs the task as `main` does; returns its summary and its text."""
  return runs.evaluate(benchmark, settings, workdir, interrupts)


def read(workdir):
  return [
    json.loads(line) for line in (workdir / "dialogues.jsonl").read_text("utf-8").splitlines()
  ]


def write(workdir, found):
  """Puts these dialogues in place of those of the file."""
  lines = [json.dumps(record) + "\n" for record in found]
  (workdir / "dialogues.jsonl").write_text("".join(lines), "utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("benchmark")
  return workdir, *play(config(), workdir)


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the finished benchmark's folder."""
  return shutil.copytree(finished[0], tmp_path / "copied")


def test_every_scenario_is_played_once_in_order_from_forty(finished):
  found = read(finished[0])
  assert len(found) == 5 and [r["dialogue"] for r in found] == list(range(5))
  assert len({r["id"] for r in found}) == 5
  assert all(r["history"][0]["emotion-point"] == 40 and r["level"] == "vanilla" for r in found)
  assert all(len(r["history"]) <= 5 for r in found)


def test_tables_and_summary_are_those_of_the_transcripts(finished):
  workdir, summary, text = finished
  found = list(transcripts.read(workdir / "dialogues.jsonl"))
  total = scores.score(found)
  mean = sum(r["emo_point"] for r in read(workdir)) / 5
  assert summary["score"] == scores.rounded(total.mean) and summary["mean"] == pytest.approx(mean)
  assert summary == json.loads((workdir / "summary.json").read_text()) and summary["failed"] == 0
  sampled = sum(r["tokens"]["policy"] for r in read(workdir))
  assert summary["tokens"] == sampled / sum(t.replies for t in found)
  rows = (workdir / "table.csv").read_text().splitlines()
  assert rows[0].startswith("dialogues of,dialogues,score") and rows[1].startswith("all,5,")
  assert (workdir / "table.md").read_text().count("\n") == len(rows) + 1
  assert all(row.split(",")[0] in text for row in rows)
  # Each kind of group has all dialogues.
  for kind in scores.GROUPS:
    dialogues = sum(int(row.split(",")[1]) for row in rows if row.startswith(f"{kind}:"))
    assert dialogues == (0 if kind == "tactic" else 5)


@pytest.mark.parametrize("rounds", [0, 5])
def test_a_benchmark_that_is_stopped_goes_on_with_what_is_missing(
  finished, tmp_path, rounds, monkeypatch
):
  with pytest.raises(Interrupted):
    play(config(), tmp_path, runs.Quiet(rounds))
  file = tmp_path / "dialogues.jsonl"
  before = read(tmp_path) if file.exists() else []
  assert len(before) < 5 and (before or not rounds)
  # A kill in the midst of a line loses that line.
  with file.open("ab") as out:
    out.write(json.dumps(read(finished[0])[4]).encode()[:200])
  written = []
  record = records.record
  monkeypatch.setattr(records, "record", lambda d: written.append(d.index) or record(d))
  play(config(), tmp_path)
  assert sorted(written) == sorted(set(range(5)) - {r["dialogue"] for r in before})
  assert read(tmp_path) == read(finished[0])


def test_what_is_there_is_not_played_again(finished, monkeypatch):
  monkeypatch.setattr(benchmark, "_play", None)
  workdir, summary, text = finished
  again, same_text = play(config(), workdir)
  assert same_text == text
  assert again == summary


def test_dialogues_whose_user_failed_are_played_again(finished, copied):
  found = read(copied)
  found[1] |= {"end": "failed"}
  write(copied, found)
  play(config(), copied)
  assert read(copied) == read(finished[0])


@pytest.mark.parametrize(
  ("change", "found"),
  [
    ({"id": "nobody"}, "line 1: found the id 'nobody', expected each scenario of data.path once"),
    ({"scene": "Elsewhere."}, "line 1: found another 'scene' than that of scenario 'en-"),
    ({"emo_point": 99}, "line 1: found 99 as 'emo_point', expected"),
    ({"history": None}, "line 1: found None as 'history'"),
  ],
)
def test_a_damaged_file_is_named(copied, change, found):
  first, *others = read(copied)
  write(copied, [first | change, *others])
  with pytest.raises(UserError) as error:
    play(config(), copied)
  assert found in str(error.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The configuration and the folder of a run of one step, with adapters."""
  settings = runs.config(
    **{"steps": 1, "lora.policy_rank": 4, "optimizer.learning_rate": 1e-2, "checkpoint.keep": 3}
  )
  workdir = tmp_path_factory.mktemp("trained") / "run"
  runs.play(settings, workdir)
  return settings, workdir


@pytest.mark.slow
def test_the_policy_of_a_run_and_its_export_play_alike(trained, tmp_path):
  """Adapters are merged; sampling would show a difference in the weights."""
  from rlver_jax import export

  exported = tmp_path / "exported"
  export.export(trained[1], exported, None, False, "float32")
  few = {"data.scenarios": 2}
  for name, path in (("run", trained[1]), ("exported", exported)):
    play(config(**few, **{"policy.path": str(path)}), tmp_path / f"of_{name}")
  play(config(**few), tmp_path / "of_none")
  assert read(tmp_path / "of_run") == read(tmp_path / "of_exported")
  assert read(tmp_path / "of_run") != read(tmp_path / "of_none")


@pytest.mark.slow
def test_the_checkpoint_stays_the_same_to_the_end(trained, tmp_path):
  settings, run = trained[0].copy_and_resolve_references(), tmp_path / "run"
  shutil.copytree(trained[1], run)
  few = {"data.scenarios": 4, "policy.path": str(run)}
  play(config(**few), tmp_path / "whole")
  with pytest.raises(Interrupted):
    # After two turns of the first three dialogues, amid those of the fourth.
    play(config(**few), tmp_path / "stopped", runs.Quiet(4))
  assert 0 < len(read(tmp_path / "stopped")) < 4
  settings.steps = 2
  runs.play(settings, run)  # trains on in between
  play(config(**few), tmp_path / "stopped")
  assert read(tmp_path / "stopped") == read(tmp_path / "whole")
  play(config(**few), tmp_path / "later")
  assert read(tmp_path / "later") != read(tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there_is_named(trained, tmp_path):
  changes = {"policy.path": str(trained[1]), "policy.step": 7}
  with pytest.raises(UserError, match="7"):
    play(config(**changes), tmp_path / "out")
  with pytest.raises(UserError, match=r"policy\.step is 7, expected 0 where policy\.path"):
    benchmark.open_sources(config(**{"policy.step": 7}))


def test_dialogues_without_room_are_told_of(finished, tmp_path):
  few = {"data.scenarios": 2, "dialogue.max_turns": 4, "sampling.max_response_tokens": 60}
  summary, text = play(config(**few), tmp_path)
  assert [record["end"] for record in read(tmp_path)] == ["length"] * 2
  assert summary["cut_short"] == 2 and "2 dialogues ended for lack of room" in text
  assert finished[1]["cut_short"] == 0 and "room" not in finished[2]
  sources = benchmark.open_sources(config())
  instructions = sources.policy.tokenizer.chat.system(sources.templates["en"].render("policy"))
  narrow = {"sampling.max_prompt_tokens": len(instructions) + 1}
  begins = r"expected room for the \d+ tokens that scenario '.*' begins with"
  with pytest.raises(UserError, match=begins):
    benchmark.open_sources(config(**few | narrow))
  # What a user will say first where the scenario does not tell is not known before.
  record = json.loads(scenario.resolve("en").read_text("utf-8").splitlines()[0])
  path = tmp_path / "untold.jsonl"
  path.write_text(json.dumps(record | {"first_talk": ""}) + "\n", "utf-8")
  with pytest.raises(UserError, match="has no room for a reply, expected a larger"):
    play(config(**few | narrow | {"data.path": str(path)}), tmp_path / "none")


def test_a_greedy_benchmark_says_so(finished, tmp_path):
  play(config(**{"data.scenarios": 1, "sampling.temperature": 0.0}), tmp_path)
  assert read(tmp_path)[0]["greedy"] is True and read(finished[0])[0]["greedy"] is False


def remotely(server, **changes):
  """The policy at a server, with patience for tests."""
  own = {
    "kind": "openai", "remote.base_url": server.url, "remote.model": remote_server.MODEL,
    "remote.api_key_env": remote_server.VARIABLE, "remote.retries": 1, "remote.first_wait": 0.01,
  }  # fmt: skip
  fields = {f"policy.{name}": value for name, value in own.items()}
  return config(**fields | {"data.scenarios": 3} | changes)


def asked(server):
  """What the policy was asked, without the check of the server."""
  return [call for call in server.calls if call.body["messages"][0]["role"] == "system"]


def test_a_policy_at_a_server_sees_the_dialogue_and_nothing_else(server, tmp_path):
  server.decide = lambda call: remote_server.Answer(
    f"<think>Hm.</think>Reply {len(call.messages)}."
  )
  play(remotely(server), tmp_path)
  found = read(tmp_path)
  assert [e["content"] for e in found[0]["history"] if e["role"] == "assistant"] == [
    "Reply 2.", "Reply 4.",
  ]  # fmt: skip
  assert all("thinking" not in e for record in found for e in record["history"])
  calls = [
    c for c in asked(server) if c.messages[1]["content"] == found[0]["history"][0]["content"]
  ]
  first, second = sorted(calls, key=lambda call: len(call.messages))
  assert [m["role"] for m in second.messages] == ["system", "user", "assistant", "user"]
  assert [m["content"] for m in second.messages[1:]] == [
    e["content"] for e in found[0]["history"][:3]
  ]
  assert second.messages[:2] == first.messages and "Reply" not in first.messages[0]["content"]
  assert first.body["temperature"] == 1.0 and first.body["max_tokens"] == 8
  assert len({call.body["seed"] for call in asked(server)}) == 6
  spent = json.loads((tmp_path / "spent.json").read_text())
  assert spent["policy_failures"] == 0 < spent["policy_completion_tokens"]
  assert found[0]["tokens"]["policy"] > 0


def test_a_thought_that_was_asked_for_is_kept_apart(server, tmp_path):
  server.decide = lambda call: remote_server.Answer("<think>Hm.</think>Go on.")
  play(remotely(server, **{"dialogue.mode": "think", "data.scenarios": 1}), tmp_path)
  _, reply, *_ = read(tmp_path)[0]["history"]
  assert (reply["content"], reply["thinking"], reply["well_formed"]) == ("Go on.", "Hm.", True)
  assert all("Hm." not in m["content"] for call in asked(server) for m in call.messages)


def test_what_the_server_failed_in_is_played_again(server, tmp_path):
  broken = {"on": True}

  def decide(call):
    if broken["on"] and len(call.messages) == 4:
      return remote_server.Answer(status=400, body=b"{}")
    return remote_server.Answer("Go on.")

  server.decide = decide
  with pytest.raises(UserError, match="a partner failed in every dialogue"):
    play(remotely(server), tmp_path)
  assert [record["end"] for record in read(tmp_path)] == ["failed"] * 3
  broken["on"] = False
  summary, text = play(remotely(server), tmp_path)
  assert summary["dialogues"] == 3 and summary["failed"] == 0 and "partner" not in text
  assert json.loads((tmp_path / "spent.json").read_text())["policy_failures"] == 3


def test_two_partners_at_a_server_wait_for_it_and_not_in_a_loop(server, tmp_path):
  user = {name: value for name, value in remotely(server).policy.remote.items()}
  fields = {f"simulator.remote.{name}": value for name, value in user.items()}
  rounds = []
  interrupts = runs.Quiet()
  interrupts.check = lambda: rounds.append(1)

  def decide(call):
    answer = remote_server.usual(call) if call.kind else remote_server.Answer("Go on.")
    return dataclasses.replace(answer, delay=0.3 if call.number % 2 else 0.2)

  server.decide = decide
  summary, _ = play(remotely(server, **fields | {"simulator.kind": "openai"}), tmp_path, interrupts)
  assert summary["dialogues"] == 3 and len(rounds) < 200
  spent = json.loads((tmp_path / "spent.json").read_text())
  assert spent["completion_tokens"] > spent["policy_completion_tokens"] > 0


def test_a_spent_budget_ends_it_and_a_larger_one_goes_on(server, tmp_path):
  with pytest.raises(BudgetSpent, match=r"^policy\.remote\.token_budget is 1, but "):
    play(remotely(server, **{"policy.remote.token_budget": 1}), tmp_path)
  assert play(remotely(server), tmp_path)[0]["dialogues"] == 3


def test_a_policys_server_that_is_not_there_is_named(server, tmp_path):
  server.close()
  with pytest.raises(UserError, match=r"^policy\.remote\.base_url is "):
    play(remotely(server), tmp_path)


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"policy.kind": "openai"}, "policy.remote.base_url is ''"),
    ({"policy.remote.timeout": 0}, "policy.remote.timeout is 0"),
    ({"policy.remote.retries": -1}, "policy.remote.retries is -1"),
    ({"sampling.slots": 0}, "sampling.slots is 0, expected at least 1."),
    ({"data.scenarios": -1}, "data.scenarios is -1"),
    ({"environment.level": "mixture"}, "environment.level is 'mixture'"),
    ({"dialogue.initial_emotion": 100}, "dialogue.initial_emotion is 100"),
    ({"dialogue.failure_at": -1}, "dialogue.failure_at is -1"),
    ({"dialogue.success_at": 101}, "dialogue.success_at 101, expected both in 0..100"),
    ({"simulator.appraise": False}, "simulator.appraise is False"),
    ({"policy.step": -2}, "policy.step is -2"),
    ({"sampling.top_p": 0.0}, "sampling.top_p is 0.0"),
  ],
)
def test_values_that_cannot_work_are_named(changes, found):
  with pytest.raises(UserError) as error:
    config_lib.validate(config(**changes))
  assert found in str(error.value)


@pytest.mark.parametrize("preset", ["tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"])
def test_presets_are_valid(preset):
  settings = eval_config.get_config(preset)
  config_lib.validate(settings)
  assert settings.dialogue.initial_emotion == 40 and settings.dialogue.max_turns == 10
