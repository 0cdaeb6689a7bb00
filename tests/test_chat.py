"""A dialogue at the terminal, over a pipe: both roles, commands, what is shown and recorded."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import runs

from configs import sft
from rlver_jax import cli, conversation, terminal
from rlver_jax.dialogue.dialogue import PolicyReply
from rlver_jax.embedded import build
from rlver_jax.errors import UserError
from rlver_jax.evaluation import transcripts

COMMAND = [sys.executable, "-m", "rlver_jax.chat"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Where the programs of the tests' chats are kept once they are compiled."""
  return os.environ | {"HOME": str(tmp_path_factory.mktemp("home"))}


def chat(home, lines, *words):
  done = subprocess.run(
    [*COMMAND, *map(str, words)], cwd=runs.REPOSITORY, env=home, input="".join(lines), text=True,
    capture_output=True, check=False, timeout=300,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


def records(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def said(record):
  return [message["content"] for message in record["history"]]


@pytest.mark.slow
def test_talking_to_a_policy(home, tmp_path):
  out = tmp_path / "chat.jsonl"
  words = ["--path=tiny-policy", f"--out={out}"]
  lines = ["I lost my job.\n", "\n", "/help\n", "It is hard.\n", "/new\n", "I lost my job.\n"]
  code, shown, errors = chat(home, lines, *words)
  assert (code, errors) == (0, "")
  first, second = records(out)
  assert said(first)[::2] == ["I lost my job.", "It is hard.", ""]
  assert said(second)[::2] == ["I lost my job.", ""]
  told = [line.removeprefix("policy> ") for line in shown.splitlines() if "policy> " in line]
  assert told == [*said(first)[1::2], *said(second)[1::2]] and all(told)
  assert shown.count("/new begins another dialogue, /quit ends.") == 2  # at the start, at /help
  assert first["end"] == "goodbye" and first["emo_point"] == second["emo_point"] == 30
  # The same seed says the same; another one or a second dialogue does not.
  again = tmp_path / "again.jsonl"
  chat(home, lines[:4], words[0], f"--out={again}")
  other = tmp_path / "other.jsonl"
  chat(home, lines[:1], words[0], f"--out={other}", "--seed=1")
  assert said(records(again)[0]) == said(first)
  replies = {said(record)[1] for record in (first, second, records(other)[0])}
  assert len(replies) == 3


@pytest.mark.slow
def test_a_thought_is_shown_before_the_reply(home, tmp_path):
  out = tmp_path / "chat.jsonl"
  words = ["--path=tiny-policy", "--mode=think", f"--out={out}", "--scenario=held-out-00003"]
  code, shown, errors = chat(home, ["I lost my job.\n", "/quit\n", "never read\n"], *words)
  assert (code, errors) == (0, "")
  (record,) = records(out)
  reply = record["history"][1]
  assert reply["thinking"] and f"{reply['thinking']}\npolicy> {reply['content']}\n" in shown
  assert "<think>" not in shown and "</think>" not in shown and "\033" not in shown
  assert record["id"] == "held-out-00003" and f"{record['scene']}\n{record['task']}" in shown


def test_helping_the_scripted_user_to_the_end(home, tmp_path):
  out = tmp_path / "chat.jsonl"
  words = ["--as=helper", "--simulator=scripted", "--scenario=en-listen-01", f"--out={out}"]
  code, shown, errors = chat(home, ["Get over it, it is your own fault.\n"] * 12, *words)
  assert (code, errors) == (0, "")
  (record,) = records(out)
  found = transcripts.transcript(record)
  assert found.id == "en-listen-01" and record["end"] in ("failure", "goodbye")
  assert f"); final emotion {record['emo_point']}.\n" in shown
  assert record["history"][0]["content"] in shown
  for answer in record["history"][2::2]:
    plan = answer["planning"]
    turn = f"{plan['change']:+d}  {terminal.emotion_bar(answer['emotion-point'])}\n"
    assert f"{turn}  {plan['content']}\n" in shown


def test_leaving_the_scripted_user(home, tmp_path):
  out = tmp_path / "chat.jsonl"
  words = ["--as=helper", "--simulator=scripted", f"--out={out}"]
  code, shown, errors = chat(home, ["I'm listening.\n", "/new\n", "/quit\n"], *words)
  assert (code, errors) == (0, "") and not out.exists()  # none has ended
  assert shown.count("Left; emotion ") == 2 and shown.count("user> ") == 3


@pytest.mark.slow
def test_helping_a_language_model(home, tmp_path):
  code, shown, errors = chat(home, ["I'm listening, go on.\n", "Take your time.\n"], "--as=helper")
  assert (code, errors) == (0, "")
  assert shown.count("user> ") == 3 and shown.rstrip().splitlines()[-1].startswith("Left; emotion ")


def test_control_c_ends_cleanly(home):
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  command = [*COMMAND, "--as=helper", "--simulator=scripted"]
  process = subprocess.Popen(command, cwd=runs.REPOSITORY, env=home, text=True, **pipes)
  while not process.stdout.readline().startswith("user> "):
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
  ("words", "found"),
  [
    (["--as=fox"], "flag --as=fox"),
    ([], "--path is missing"),
    (["--path=tiny-policy", "--simulator=scripted"], "--simulator is scripted with --as=user"),
    (["--as=helper", "--mode=think"], "--mode is think with --as=helper"),
    (["--path=tiny-policy", "--out=/no/such/file"], "--out is /no/such/file"),
    (["--path=tiny-policy", "--step=3"], "--step is 3, expected none"),
    (["--as=helper", "--simulator=scripted", "--scenario=x"], "--scenario is x, expected the id"),
    (["--as=helper", "--path=tiny-policy"], "--path is tiny-policy with --as=helper"),
  ],
)
def test_mistakes_are_one_sentence(home, words, found):
  code, shown, errors = chat(home, [], *words)
  assert (code, shown) == (2, "") and len(errors.splitlines()) == 1
  assert errors.startswith(f"rlver_jax: {found}")


def choice(path, simulator=None):
  return conversation.Choice(str(path), None, simulator, None, None, 0)


def test_a_run_without_a_simulated_user_has_none_to_help(tmp_path):
  runs.claim(str(tmp_path), sft.get_config())
  with pytest.raises(UserError, match="which holds a run of task 'sft' and no simulated user, exp"):
    conversation.with_simulator(choice(tmp_path), None)


@pytest.mark.parametrize(("vocabulary", "world"), [(2048, "tiny-held-out"), (5000, "en")])
def test_a_supervised_run_is_in_the_world_of_its_size(tmp_path, monkeypatch, vocabulary, world):
  """Also where its model was drawn from a directory without weights."""
  model = tmp_path / "model"
  shutil.copytree(build.ASSETS / "tiny-policy", model)
  (model / "model.safetensors").unlink()
  fields = json.loads((model / "config.json").read_text("utf-8")) | {"vocab_size": vocabulary}
  (model / "config.json").write_text(json.dumps(fields))
  config = sft.get_config()
  config.policy.update(path=str(model), from_scratch=True)
  run = runs.claim(str(tmp_path / "run"), config)
  monkeypatch.setattr(cli, "configure_jax", lambda _: None)
  _, files = conversation._settings(run, str(run), "--path")
  assert files[0] == world


class Drawing:
  """A policy whose engine has drawn so many bytes of a text, and the tokenizer of bytes."""

  def __init__(self, text):
    self.engine, self.ids = self, text.encode()
    self.so_far = 0

  def drawn(self):
    return {0: self.ids[: self.so_far]}

  def decode(self, ids):
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
  ("text", "thought", "reply", "shown"),
  [
    ("<think>Hm, 嗯。</think> Ça va? ", "Hm, 嗯。", "Ça va?", "Hm, 嗯。\npolicy> Ça va?\n"),
    ("I think < you", None, "I think < you", "policy> I think < you\n"),
    ("<think>Hm.</think>", "Hm.", "", "Hm.\npolicy> (nothing)\n"),
    ("a\033[2Jb\rc\nd", None, "a\033[2Jb\rc\nd", "policy> a[2Jb c\nd\n"),
  ],
)
def test_a_reply_is_printed_as_it_is_drawn(capsys, text, thought, reply, shown):
  drawing = Drawing(text)
  printer = terminal.ReplyPrinter(drawing, drawing, think=thought is not None)
  parts = []
  for count in range(len(drawing.ids)):
    drawing.so_far = count
    printer.look()
    parts.append(capsys.readouterr().out)
  printer.finish(PolicyReply(reply, thought, True, True, 1))
  parts.append(capsys.readouterr().out)
  assert "".join(parts) == shown
  assert sum(map(bool, parts)) > 3  # in pieces


def test_a_reply_without_the_thought_that_was_asked_for_is_shown_as_a_reply(capsys):
  drawing = Drawing("Just words.")
  printer = terminal.ReplyPrinter(drawing, drawing, think=True)
  drawing.so_far = 4
  printer.look()
  printer.finish(PolicyReply("Just words.", "", False, True, 1))
  assert capsys.readouterr().out == "Just\npolicy> Just words.\n"


def test_the_bar_of_emotion():
  assert terminal.emotion_bar(-7) == "[--------------------] -7"
  assert terminal.emotion_bar(50) == "[##########----------] 50"
  assert terminal.emotion_bar(100) == "[####################] 100"
