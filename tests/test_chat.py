"""A dialogue at the terminal, over a pipe: both roles, commands, what is shown and recorded.

A process takes seconds to begin, so most chats share one, where streams stand for the pipes."""

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
# Holds one chat after the other, each given as its words and lines: code, stdout, stderr of each.
# What is imported before the first may keep hold of stderr: of the process's, not of a chat's.
DRIVER = """
import contextlib, io, json, sys
from absl import flags
from rlver_jax import chat, cli, conversation

def stream(text=""):
  return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", write_through=True)

held = []
for words, lines in json.load(sys.stdin):
  sys.argv, sys.stdin = ["chat", *words], stream("".join(lines))
  out, err, code = stream(), stream(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      cli.run(chat.main)
    except SystemExit as stop:
      code = stop.code
  flags.FLAGS.unparse_flags()  # every flag has its default again
  held.append([code, *(s.buffer.getvalue().decode() for s in (out, err))])
json.dump(held, sys.stdout)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Where the programs of the tests' chats are kept once they are compiled."""
  return os.environ | {"HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the chats that share a process are recorded."""
  return tmp_path_factory.mktemp("chats")


def run(home, command, text):
  return subprocess.run(
    command, cwd=runs.REPOSITORY, env=home, input=text, text=True, capture_output=True,
    check=False, timeout=600,
  )  # fmt: skip


def held(home, chats):
  """Exit code, stdout and stderr of each of these chats by its name; a process holds them all.

  chats: by name the words of the command and the lines that are typed."""
  done = run(home, [sys.executable, "-c", DRIVER], json.dumps(list(chats.values())))
  assert (done.returncode, done.stderr) == (0, "")
  return dict(zip(chats, json.loads(done.stdout), strict=True))


def records(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def said(record):
  return [message["content"] for message in record["history"]]


TALK = ["I lost my job.\n", "\n", "/help\n", "It is hard.\n", "/new\n", "I lost my job.\n"]


@pytest.fixture(scope="module")
def with_models(home, folder):
  """What the chats with a model came to."""
  thinking = ["--mode=think", "--scenario=held-out-00003"]
  chats = {
    "talk": ([], TALK),
    "again": ([], TALK[:4]),
    "other": (["--seed=1"], TALK[:1]),
    "thought": (thinking, ["I lost my job.\n", "/quit\n", "never read\n"]),
  }
  chats = {
    name: (["--path=tiny-policy", f"--out={folder / name}.jsonl", *words], lines)
    for name, (words, lines) in chats.items()
  }
  helper = (["--as=helper"], ["I'm listening, go on.\n", "Take your time.\n"])
  return held(home, chats | {"helper": helper})


@pytest.mark.slow
def test_talking_to_a_policy(with_models, folder):
  code, shown, errors = with_models["talk"]
  assert (code, errors) == (0, "")
  first, second = records(folder / "talk.jsonl")
  assert said(first)[::2] == ["I lost my job.", "It is hard.", ""]
  assert said(second)[::2] == ["I lost my job.", ""]
  told = [line.removeprefix("policy> ") for line in shown.splitlines() if "policy> " in line]
  assert told == [*said(first)[1::2], *said(second)[1::2]] and all(told)
  assert shown.count("/new begins another dialogue, /quit ends.") == 2  # at the start, at /help
  assert first["end"] == "goodbye" and first["emo_point"] == second["emo_point"] == 30
  # The same seed says the same; another one or a second dialogue does not.
  again, other = (records(folder / f"{name}.jsonl")[0] for name in ("again", "other"))
  assert said(again) == said(first)
  replies = {said(record)[1] for record in (first, second, other)}
  assert len(replies) == 3


@pytest.mark.slow
def test_a_thought_is_shown_before_the_reply(with_models, folder):
  code, shown, errors = with_models["thought"]
  assert (code, errors) == (0, "")
  (record,) = records(folder / "thought.jsonl")
  reply = record["history"][1]
  assert reply["thinking"] and f"{reply['thinking']}\npolicy> {reply['content']}\n" in shown
  assert "<think>" not in shown and "</think>" not in shown and "\033" not in shown
  assert record["id"] == "held-out-00003" and f"{record['scene']}\n{record['task']}" in shown


@pytest.mark.slow
def test_helping_a_language_model(with_models):
  code, shown, errors = with_models["helper"]
  assert (code, errors) == (0, "")
  assert shown.count("user> ") == 3 and shown.rstrip().splitlines()[-1].startswith("Left; emotion ")


def test_helping_the_scripted_user_to_the_end(home, tmp_path):
  """In a process of its own: the command line as it is, over a pipe."""
  out = tmp_path / "chat.jsonl"
  words = ["--as=helper", "--simulator=scripted", "--scenario=en-listen-01", f"--out={out}"]
  done = run(home, [*COMMAND, *words], "Get over it, it is your own fault.\n" * 12)
  assert (done.returncode, done.stderr) == (0, "")
  (record,) = records(out)
  found = transcripts.transcript(record)
  assert found.id == "en-listen-01" and record["end"] in ("failure", "goodbye")
  assert f"); final emotion {record['emo_point']}.\n" in done.stdout
  assert record["history"][0]["content"] in done.stdout
  for answer in record["history"][2::2]:
    plan = answer["planning"]
    turn = f"{plan['change']:+d}  {terminal.emotion_bar(answer['emotion-point'])}\n"
    assert f"{turn}  {plan['content']}\n" in done.stdout


def test_control_c_ends_cleanly(home):
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  command = [*COMMAND, "--as=helper", "--simulator=scripted"]
  process = subprocess.Popen(command, cwd=runs.REPOSITORY, env=home, text=True, **pipes)
  while not process.stdout.readline().startswith("user> "):
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (0, "")


# The words of a command that cannot work, by what is said of them.
MISTAKES = {
  "flag --as=fox": ["--as=fox"],
  "--path is missing": [],
  "--simulator is scripted with --as=user": ["--path=tiny-policy", "--simulator=scripted"],
  "--mode is think with --as=helper": ["--as=helper", "--mode=think"],
  "--out is /no/such/file": ["--path=tiny-policy", "--out=/no/such/file"],
  "--step is 3, expected none": ["--path=tiny-policy", "--step=3"],
  "--scenario is x, expected the id": ["--as=helper", "--simulator=scripted", "--scenario=x"],
  "--path is tiny-policy with --as=helper": ["--as=helper", "--path=tiny-policy"],
}


@pytest.fixture(scope="module")
def without_models(home, folder):
  """What the chats without a model came to: one with the scripted user, and each mistake."""
  words = ["--as=helper", "--simulator=scripted", f"--out={folder / 'left.jsonl'}"]
  left = (words, ["I'm listening.\n", "/new\n", "/quit\n"])
  mistakes = {found: (words, []) for found, words in MISTAKES.items()}
  return held(home, {"left": left} | mistakes)


def test_leaving_the_scripted_user(without_models, folder):
  code, shown, errors = without_models["left"]
  assert (code, errors) == (0, "") and not (folder / "left.jsonl").exists()  # none has ended
  assert shown.count("Left; emotion ") == 2 and shown.count("user> ") == 3


@pytest.mark.parametrize("found", MISTAKES)
def test_mistakes_are_one_sentence(without_models, found):
  code, shown, errors = without_models[found]
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
