"""Runs with a remote simulated user: what they leave, how they end, and that the key is nowhere."""

import json
import pathlib
import re
import socket
import sys
import textwrap

import numpy as np
import pytest
import runs
import subprocesses
from remote_server import KEY, MODEL, VARIABLE, Answer, usual

from rlver_jax.errors import BudgetSpent
from rlver_jax.interrupt import Interrupted

REMOTE = {
  "simulator.kind": "openai",
  "simulator.remote.model": MODEL,
  "simulator.remote.api_key_env": VARIABLE,
  "simulator.remote.first_wait": 0.01,
  "simulator.remote.retries": 1,
  "simulator.score": "generate",
}

pytestmark = pytest.mark.slow


def changes(server, **more):
  return REMOTE | {"simulator.remote.base_url": server.url} | more


def everything(workdir: pathlib.Path) -> bytes:
  """The content of all files below a folder, and their names."""
  files = [path for path in workdir.rglob("*") if path.is_file()]
  assert files
  return b"\n".join(str(path).encode() + path.read_bytes() for path in files)


def dialogues(workdir, step):
  text = (workdir / "dialogues" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


def test_a_run_drops_the_dialogues_whose_user_fails(server, tmp_path):
  """In its first step dialogue 1 fails, in the second all do, in the third none."""
  from rlver_jax.dialogue.remote.player import seed_of

  doomed = {seed_of(0, 0, 1, turn, 2, 0) for turn in range(2)}
  doomed |= {seed_of(0, 1, i, 0, 2, 0) for i in range(4)}
  bad = Answer(status=400, body=b"{}")
  server.decide = lambda c: bad if c.body["seed"] in doomed else usual(c)
  config = runs.config(**changes(server, steps=3))
  summary = runs.play(config, tmp_path / "run")
  first, second, third = runs.metrics(tmp_path / "run")

  ends = [d["end"] for d in dialogues(tmp_path / "run", 1)]
  assert ends == ["turns", "failed", "turns", "turns"]
  assert first["dialogue/end_failed"] == 0.25 and first["remote/failures"] == 1
  kept = [d for d in dialogues(tmp_path / "run", 1) if d["end"] != "failed"]
  assert first["emotion/final_mean"] == np.mean([d["emo_point"] for d in kept]) == 34
  assert first["reward/mean"] == pytest.approx(0.34)
  assert first["rows/trained_tokens"] == sum(d["tokens"]["policy"] for d in kept)
  assert first["update/skipped"] == 0

  assert [d["end"] for d in dialogues(tmp_path / "run", 2)] == ["failed"] * 4
  assert second["emotion/final_mean"] is second["reward/mean"] is second["reward/std"] is None
  assert second["rows/trained_tokens"] == second["update/loss"] == second["update/skipped"] == 0
  assert (third["remote/failures"], third["remote/requests"]) == (0, 4 * 3)
  state, _ = runs.restored(tmp_path / "run", config)
  assert int(state.policy.updates) == 2  # of three steps
  assert summary["steps"] == 3
  spent = json.loads((tmp_path / "run" / "spent.json").read_text())
  assert spent == {
    name: sum(r[f"remote/{name}"] for r in (first, second, third))
    for name in ("prompt_tokens", "completion_tokens", "failures")
  }


def test_the_key_is_in_nothing_that_a_run_leaves_or_prints(server, tmp_path):
  """With every log on, through faults, a refused key that the server quotes, and a failed end."""
  server.decide = lambda c: usual(c) if c.number else Answer(status=500, body=KEY.encode())
  process = subprocesses.start(
    [*runs.command(tmp_path / "run", **changes(server, steps=2)), "--verbosity=1"]
  )
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "step 2/2" in out
  assert "openai._base_client" in err or "HTTP Request" in err, err[:3000]
  server.decide = lambda c: Answer(status=403, body=KEY.encode())
  more = changes(server, steps=4) | {"simulator.remote.failure_budget": 2}
  process = subprocesses.start([*runs.command(tmp_path / "run", **more), "--verbosity=1"])
  out_2, err_2 = process.communicate(timeout=300)
  assert process.returncode == 1, err_2
  left = everything(tmp_path / "run")
  assert b"simulator.remote.model" in left
  for text in (out, err, out_2, err_2, left.decode("latin-1")):
    assert KEY not in text and KEY[3:] not in text and KEY[-10:] not in text


def test_a_run_goes_on_after_a_silent_server_and_after_a_spent_budget(server, tmp_path):
  workdir, config = tmp_path / "run", runs.config(**changes(server, steps=1))
  # Ctrl-C is heard while the server is silent (for longer than this test, so that no late answer
  # is counted below), and the run goes on from there as if nothing had been.
  server.decide = lambda c: Answer("late", delay=600)
  with pytest.raises(Interrupted):
    runs.play(config, workdir, lambda: runs.StopAt(5))
  server.decide = usual
  assert runs.play(config, workdir)["steps"] == 1
  # A spent budget saves, and a larger one goes on.
  spent = json.loads((workdir / "spent.json").read_text())
  used = spent["prompt_tokens"] + spent["completion_tokens"]
  budget = {"simulator.remote.token_budget": int(1.5 * used)}
  config = runs.config(**changes(server, steps=3) | budget)
  with pytest.raises(BudgetSpent, match=r"^simulator\.remote\.token_budget is "):
    runs.play(config, workdir)
  _, metadata = runs.restored(workdir, config)
  assert metadata["step"] == 1 and len(runs.metrics(workdir)) == 1
  requests = server.settled()
  with pytest.raises(BudgetSpent):  # it remembers
    runs.play(config, workdir)
  assert server.settled() == requests
  config = runs.config(**changes(server, steps=3) | {"simulator.remote.token_budget": 100 * used})
  assert runs.play(config, workdir)["steps"] == 3


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_mistakes_end_before_anything_is_loaded(server, tmp_path, command, monkeypatch, caplog):
  def refusal(**more):
    words = runs.command(tmp_path / "run", **changes(server) | more)[3:]
    code, out, err = command(*words)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("rlver_jax: ") and KEY not in err
    assert not caplog.text  # which a process of its own would write to stderr
    assert not (tmp_path / "run").exists()
    return err

  assert "does not serve" in refusal(**{"simulator.remote.model": "nobody"})
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  url = f"http://127.0.0.1:{port}/v1"
  assert "no server answers" in refusal(**{"simulator.remote.base_url": url})
  monkeypatch.delenv(VARIABLE)
  assert "is not set" in refusal()


ONE_OF_TWO = """
  import sys, jax

  address, process = sys.argv[1:3]
  jax.distributed.initialize(address, 2, int(process))
  del sys.argv[1:3]
  from rlver_jax import cli, main

  cli.run(main.main, main._parse_flags)
"""


def test_two_processes_play_the_same_dialogues(server, tmp_path):
  """The first one alone asks the server; both train on the same, as does one process."""
  server.decide = lambda c: Answer(usual(c).text, delay=0.01 * (c.body["seed"] % 7))
  more = {"steps": 2, "checkpoint.keep": 1, "evaluation.path": str(runs.held_out(tmp_path, 1))}
  runs.play(runs.config(**changes(server) | more), tmp_path / "one")
  server.calls.clear()
  with socket.create_server(("127.0.0.1", 0)) as free:
    address = f"127.0.0.1:{free.getsockname()[1]}"
  program = [sys.executable, "-c", textwrap.dedent(ONE_OF_TWO), address]
  command = runs.command(tmp_path / "two", **changes(server) | more)[3:]
  processes = [subprocesses.start([*program, str(i), *command]) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], outputs
  losses = [re.findall(r"step \d/2 .*?(emotion.*?)  \S+ tok/s", out) for out, _ in outputs]
  assert losses[0] == losses[1] and len(losses[0]) == 2
  assert len(server.calls) == (2 * 4 + 2) * 3  # nothing was asked twice
  # One of them shows how the run ended; the held-out dialogue was played before and after.
  shown = ["before -> after training" in out and "BEFORE:" in out for out, _ in outputs]
  assert shown == [True, False] and "before -> after" not in outputs[1][0]
  for name in ("before", "after", "before_scripted", "after_scripted"):
    pair = [tmp_path / folder / "evaluation" / f"{name}.jsonl" for folder in ("one", "two")]
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in pair)
    assert (a["id"], a["end"], a["tokens"]) == (b["id"], b["end"], b["tokens"])
  one, two = (runs.metrics(tmp_path / name) for name in ("one", "two"))
  for a, b in zip(map(runs.reproducible, one), map(runs.reproducible, two), strict=True):
    assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
  for step in (1, 2):
    pair = (dialogues(tmp_path / name, step) for name in ("one", "two"))
    for a, b in zip(*pair, strict=True):
      assert (a["end"], a["emo_point"], a["tokens"]) == (b["end"], b["emo_point"], b["tokens"])
      assert step > 1 or a["history"] == b["history"]
