"""Recorded dialogues: what is read of them, and every way in which one can be broken."""

import copy
import json
import re

import builders
import pytest
import subprocesses

from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules
from rlver_jax.errors import UserError
from rlver_jax.evaluation import transcripts
from rlver_jax.evaluation.transcripts import Problem, Transcript

RECORD = {
  "id": "bike",
  "emo_point": 44,
  "emo_state": "Emotion-B",
  "character": "passive",
  "task": "You want the helper to truly listen.",
  "history": [
    {"role": "user", "content": "My bike.", "emotion-point": 40},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "It is gone.", "emotion-point": 36, "planning": {"change": -4}},
    {"role": "assistant", "content": "Tell me."},
    {"role": "user", "content": "Well.", "emotion-point": 44, "planning": {"change": 8}},
  ],
}


def changed(**changes):
  """RECORD with other values; a name like history__2__change leads into it."""
  record = copy.deepcopy(RECORD)
  for name, value in changes.items():
    *way, last = (int(step) if step.isdigit() else step for step in name.split("__"))
    place = record
    for step in way:
      place = place[step]
    place[{"point": "emotion-point"}.get(last, last)] = value
  return record


def lines(path, *values):
  """Writes values as JSON lines, bytes as they are."""
  raw = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]
  path.write_bytes(b"\n".join(raw) + b"\n")
  return path


def test_a_record_is_read(tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD, b"", changed(id="other", character="消极型"))
  assert list(transcripts.read(path)) == [
    Transcript("bike", "passive", "listen", (40, 36, 44), 2),
    Transcript("other", "消极型", "listen", (40, 36, 44), 2),
  ]


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path):
  path = tmp_path / "a.jsonl"
  files = (
    b"\xef\xbb\xbf" + json.dumps(record).encode() + b"\r\n"
    for record in (RECORD, changed(id="other"))
  )
  path.write_bytes(b"".join(files))
  assert [t.id for t in transcripts.read(path)] == ["bike", "other"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_a_run_writes_is_read(language, tmp_path):
  """A dialogue that ends below zero, in the words of the package's own records."""
  dialogue = Dialogue(0, 0, builders.scenario(language), Rules(initial_emotion=5, max_turns=3))
  dialogue.advance(PolicyReply("Hm.", None, True, True, 2))
  dialogue.advance(Plan(-9, "a", "b", "c", "d", True, 3))
  assert dialogue.end == "failure"
  records.write(tmp_path / "a.jsonl", [dialogue])
  [found] = transcripts.read(tmp_path / "a.jsonl")
  assert found.emotions == (5, -4) and found.final == 0 and found.intention == "listen"
  assert (found.replies, found.tokens) == (1, 2)


@pytest.mark.parametrize("tokens", [12, {"policy": -1}, {"policy": "7"}, {}, None])
def test_tokens_that_are_told_otherwise_are_not_known(tokens):
  assert transcripts.transcript(changed(tokens=tokens)).tokens is None


def test_a_last_reply_without_an_answer_counts_as_a_reply():
  record = changed()
  record["history"].append({"role": "assistant", "content": "Bye."})
  assert transcripts.transcript(record).replies == 3


@pytest.mark.parametrize(
  ("changes", "emotions"),
  [
    # Capped at 100; some files stop at zero, others go below it.
    ({"history__0__point": 98, "history__2__point": 94, "history__4__point": 100}, (98, 94, 100)),
    ({"history__0__point": 3, "history__2__point": 0, "history__4__point": 8}, (3, 0, 8)),
    ({"history__0__point": 3, "history__2__point": -1, "history__4__point": 7}, (3, -1, 7)),
  ],
)
def test_emotions_stop_at_the_ends_of_the_scale(changes, emotions):
  last = emotions[-1]
  state = "S" if last == 100 else "F"
  record = changed(**changes, emo_point=last, emo_state=f"Emotion-{state}")
  assert transcripts.transcript(record).emotions == emotions


BROKEN = {
  "no id": ({"id": None}, "None as 'id'"),
  "a number as id": ({"id": 7}, "7 as 'id'"),
  "no history": ({"history": None}, "None as 'history'"),
  "an empty history": ({"history": []}, "an empty history"),
  "a fraction": ({"history__2__planning__change": -4.0}, "-4.0 as 'change' of message 3"),
  "a text": ({"history__2__planning__change": "-4"}, "'-4' as 'change' of message 3"),
  "true": ({"history__2__planning__change": True}, "True as 'change' of message 3"),
  "a change too large": ({"history__2__planning__change": 11}, "11 as 'change' of message 3"),
  "no planning": ({"history__4__planning": None}, "None as 'planning' of message 5"),
  "no emotion": ({"history__4__point": None}, "None as 'emotion-point' of message 5"),
  "above the scale": ({"history__0__point": 120}, "120 as 'emotion-point' of the opening"),
  "below it": ({"history__0__point": -1}, "-1 as 'emotion-point' of the opening"),
  "no reply": ({"history": [RECORD["history"][0]]}, "a history of one message"),
  "half a character": ({"character": "\ud800x"}, "as 'character', expected Unicode text"),
  "a failed partner": ({"end": "failed"}, "a dialogue in which a partner failed"),
  "another emotion": (
    {"history__2__point": 37}, "37 as 'emotion-point' of message 3, expected 36 (40 and a change",
  ),
  "another end": ({"emo_point": 45}, "45 as 'emo_point', expected 44"),
  "another state": ({"emo_state": "Emotion-A"}, "'Emotion-A' as 'emo_state', expected 'Emotion-B'"),
  "the wrong role": ({"history__1__role": "user"}, "'user' as the role of message 2"),
  "no text": ({"history__3__content": None}, "None as 'content' of message 4, expected a text"),
  "no message": ({"history__3": "Tell me."}, "'Tell me.' as the role of message 4"),
  "no known wish": ({"task": "You want tea."}, "which names no known intention"),
  "no character": ({"character": None}, "None as 'character'"),
  "an empty character": ({"character": " "}, "' ' as 'character', expected a text"),
  "an empty id": ({"id": ""}, "'' as 'id', expected a text"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "found"), BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_and_the_others_are_read(tmp_path, changes, found):
  path = lines(tmp_path / "a.jsonl", changed(**changes), changed(id="good"))
  problem, good = transcripts.read(path)
  assert isinstance(problem, Problem) and problem.line == 1 and found in problem.found
  assert good.id == "good"


@pytest.mark.parametrize(
  ("raw", "found"),
  [
    (b'{"id": "bi', "no JSON"),
    (b"[1]", "[1], expected a JSON object"),
    (b"[" * 100_000, "no JSON"),
    (b"9" * 10_000, "no JSON"),
    ("自行车".encode("gbk"), "0xd7 as byte 1, expected text in UTF-8"),
    (json.dumps(RECORD).encode("utf-16"), "0xff as byte 1"),
  ],
)
def test_a_line_that_is_no_text_or_no_json_is_named(tmp_path, raw, found):
  path = lines(tmp_path / "a.jsonl", RECORD, raw, changed(id="good"))
  read = list(transcripts.read(path))
  problems = [t for t in read if isinstance(t, Problem)]
  assert problems[0].line == 2 and found in problems[0].found
  assert [t.id for t in read if isinstance(t, Transcript)] == ["bike", "good"]


def test_ids_that_come_twice_or_that_no_scenario_has_are_named(tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD, changed(id="else"), RECORD)
  _, unknown, twice = transcripts.read(path, known={"bike"})
  assert unknown.line == 2 and "'else', expected one of the 1 scenarios" in unknown.found
  assert twice.line == 3 and "'bike' as in line 1" in twice.found


def test_a_broken_record_does_not_stand_in_the_way_of_a_whole_one(tmp_path):
  path = lines(tmp_path / "a.jsonl", changed(emo_point=0), RECORD)
  problem, good = transcripts.read(path)
  assert problem.line == 1 and good.id == "bike"


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
    list(transcripts.read(tmp_path / "none.jsonl"))


def test_a_large_file_is_read_in_little_memory(tmp_path):
  """200 MB of dialogues, and a line of 60 MB that is none: under 500 MB in all."""
  path = tmp_path / "large.jsonl"
  padding = "x" * 40_000
  with path.open("w", encoding="utf-8") as file:
    for i in range(5000):
      file.write(json.dumps(changed(id=f"s{i}", scene=padding)) + "\n")
      if i == 2500:
        file.write("[" + "[]," * 20_000_000 + "\n")
  assert path.stat().st_size > 200e6
  # What a process reports of its own: the kernel's count for a child begins with its parent's.
  program = (
    "import atexit, pathlib, runpy, sys\n"
    "status = pathlib.Path('/proc/self/status')\n"
    "atexit.register(lambda: print(status.read_text(), file=sys.stderr))\n"
    "runpy.run_module('rlver_jax.leaderboard', run_name='__main__', alter_sys=True)"
  )
  done = subprocesses.finished("-c", program, "--skip_broken", path)
  assert done.returncode == 0, done.stderr
  assert "large.jsonl, line 2502: found more than 8 MiB" in done.stderr
  assert "5000   44.0" in done.stdout
  assert int(re.search(r"VmHWM:\s*(\d+) kB", done.stderr)[1]) < 500_000
