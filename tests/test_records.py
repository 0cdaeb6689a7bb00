"""Records of dialogues: the fields and types of the recorded format, and the sums they hold."""

import json
import pathlib
import random

import builders
import pytest

from rlver_jax.dialogue import emotion, records
from rlver_jax.dialogue.dialogue import (
  Dialogue,
  NoRoom,
  Plan,
  PolicyReply,
  Rules,
  Stage,
  UserMessage,
)
from rlver_jax.dialogue.levels import Level

FIELDS = {
  "id": str, "emo_point": int, "emo_state": str, "target": str, "player": str, "scene": str,
  "character": str, "topic": str, "task": str, "history": list,
}  # fmt: skip
USER_FIELDS = {"role": str, "content": str, "emotion-point": int}
PLANNING = {"content": str, "TargetCompletion": str, "activity": str, "analyse": str, "change": int}
RECORDED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "sage"


def played(seed, think=False, **rules):
  """A dialogue with random answers, and the tokens that policy and user were said to draw."""
  draw = random.Random(seed)
  language = draw.choice(("en", "zh"))
  scenario = builders.scenario(language, topic="bicycles", first_message=draw.choice(("", "Hm.")))
  d = Dialogue(seed, seed // 4, scenario, Rules(**rules))
  tokens = {"policy": 0, "simulator": 0}

  def number(who):
    n = draw.randrange(1, 50)
    tokens[who] += n
    return n

  if not d.opening:
    d.advance(UserMessage("My bike…", tokens=number("simulator")))
  while not d.end:
    if draw.random() < 0.03:
      d.advance(NoRoom())
    elif d.stage is Stage.POLICY:
      thought = f"thought {d.turn} 难" if think else None
      stopped, n = draw.random() < 0.8, number("policy")
      d.advance(PolicyReply(f"reply {d.turn}", thought, d.turn % 3 > 0, stopped, n))
    elif d.stage is Stage.PLAN:
      change, n = draw.randint(-10, 10), number("simulator")
      d.advance(Plan(change, "says", "met", "hm", "fine", draw.random() < 0.5, n))
    else:
      goodbye, stopped = draw.random() < 0.1, draw.random() < 0.8
      d.advance(UserMessage(f"message {d.turn}", goodbye, number("simulator"), stopped=stopped))
  return d, tokens


def replies_of(d):
  """How many replies were given, the last of them perhaps never appraised."""
  return d.turn + len(d.pending)


@pytest.mark.parametrize("think", (False, True))
def test_records_have_the_fields_and_types_of_the_format(think):
  for seed in range(100):
    d, _ = played(seed, think)
    record = json.loads(json.dumps(records.record(d)))
    assert {name: type(record[name]) for name in FIELDS} == FIELDS
    roles = ["user"] + ["assistant", "user"] * d.turn + ["assistant"] * len(d.pending)
    assert [entry["role"] for entry in record["history"]] == roles
    for i, entry in enumerate(record["history"]):
      if entry["role"] == "user":
        assert {name: type(entry[name]) for name in USER_FIELDS} == USER_FIELDS
        assert ("planning" in entry) == (i > 0)
        planning = entry.get("planning", {})
        if planning:
          assert {name: type(planning[name]) for name in PLANNING} == PLANNING
          assert type(planning["parsed"]) is bool and type(planning["retries"]) is int
      else:
        assert type(entry["content"]) is str
    s = d.scenario
    assert [record[name] for name in ("id", "player", "scene", "character", "topic", "task")] == [
      s.id, s.persona, s.background, s.character, s.topic, s.task,
    ]  # fmt: skip
    assert (record["dialogue"], record["group"], record["end"]) == (d.index, d.group, d.end)
    assert record["level"] == "vanilla"


def test_emotions_follow_from_the_changes():
  ends = set()
  for seed in range(200):
    d, _ = played(seed)
    record = records.record(d)
    users = [entry for entry in record["history"] if entry["role"] == "user"]
    value = 30
    assert users[0]["emotion-point"] == value
    for entry in users[1:]:
      value = min(100, value + entry["planning"]["change"])
      assert entry["emotion-point"] == value
    assert record["emo_point"] == value == d.emotion
    assert record["emo_state"] == f"Emotion-{emotion.state(value)}"
    ends.add(d.end)
  assert ends == {"goodbye", "failure", "turns", "length"}


def test_a_level_is_named_and_its_changes_are_those_that_were_felt():
  level = Level("easy", emotion_offset=5, gain=2.0, loss=0.5)
  d = Dialogue(0, 0, builders.scenario(), Rules().at(level))
  for change in (4, -7, 0):
    d.advance(PolicyReply("Go on.", None, True, True, 1))
    d.advance(Plan(change))
    d.advance(UserMessage("Well."))
  users = [entry for entry in records.record(d)["history"] if entry["role"] == "user"]
  assert records.record(d)["level"] == "easy"
  assert [entry["emotion-point"] for entry in users] == [35, 43, 39, 39]
  assert [entry["planning"]["change"] for entry in users[1:]] == [8, -4, 0]


def test_messages_stand_in_order_and_the_last_may_be_empty():
  for seed in range(50):
    d, _ = played(seed)
    record = records.record(d)
    users = [e["content"] for e in record["history"] if e["role"] == "user"]
    replies = [e["content"] for e in record["history"] if e["role"] == "assistant"]
    silent = bool(d.turns) and d.turns[-1].message is None
    assert users == d.user_messages + [""] * silent
    assert replies == [f"reply {i}" for i in range(replies_of(d))]


def test_thoughts_are_kept_apart_from_what_was_said():
  d = max((played(seed, think=True)[0] for seed in range(9)), key=lambda d: d.turn)
  assert d.turn > 3
  for i, entry in enumerate(e for e in records.record(d)["history"] if e["role"] == "assistant"):
    assert entry["thinking"] == f"thought {i} 难"
    assert "thought" not in entry["content"]
    assert entry["well_formed"] == (i % 3 > 0)
  direct, _ = played(3)
  for entry in records.record(direct)["history"]:
    assert not {"thinking", "well_formed"} & entry.keys()


def test_tokens_add_up():
  for seed in range(50):
    d, tokens = played(seed)
    record = records.record(d)
    assert record["tokens"] == tokens
    assert records.simulator_tokens(d) == tokens["simulator"]
    assert (
      sum(e["tokens"] for e in record["history"] if e["role"] == "assistant") == (tokens["policy"])
    )
    users = [e for e in record["history"] if e["role"] == "user"]
    own = sum(e["tokens"] + e.get("planning", {}).get("tokens", 0) for e in users)
    assert own == tokens["simulator"]


def test_a_reply_that_was_never_appraised_is_recorded_too():
  """The user's context was full; the policy did say it, and is trained on it."""
  d = Dialogue(0, 0, builders.scenario(), Rules())
  d.advance(PolicyReply("Go on.", "hm", True, True, 9))
  d.advance(Plan(2))
  d.advance(UserMessage("Well."))
  d.advance(PolicyReply("And then?", "so", True, True, 7))
  d.advance(NoRoom())
  record = records.record(d)
  assert [e["role"] for e in record["history"]] == ["user", "assistant", "user", "assistant"]
  last = record["history"][-1]
  assert (last["content"], last["thinking"], last["tokens"]) == ("And then?", "so", 7)
  assert record["tokens"]["policy"] == 16
  assert (record["emo_point"], record["end"]) == (32, "length")


@pytest.mark.parametrize("greedy", (False, True))
def test_a_greedy_dialogue_is_marked(greedy):
  d = Dialogue(4, 0, builders.scenario(), Rules(), greedy=greedy)
  d.advance(NoRoom())
  assert records.record(d)["greedy"] is greedy


def test_a_dialogue_without_an_opening():
  d = Dialogue(0, 0, builders.scenario(first_message=""), Rules())
  d.advance(NoRoom())
  record = records.record(d)
  assert (record["history"], record["emo_point"], record["end"]) == ([], 30, "length")
  assert record["tokens"] == {"policy": 0, "simulator": 0}


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded dialogues are not here")
def test_recorded_dialogues_have_the_same_fields():
  """The published files, against the same table of fields as our own records."""
  for path in sorted(RECORDED.glob("*.jsonl")):
    with path.open(encoding="utf-8") as file:
      record = json.loads(next(file))
    assert {name: type(value) for name, value in record.items()} == FIELDS
    first, reply, user = record["history"][:3]
    assert {name: type(value) for name, value in first.items()} == USER_FIELDS
    assert reply.keys() == {"role", "content"}
    assert user.keys() == USER_FIELDS.keys() | {"planning", "thinking"}
    assert {name: type(value) for name, value in user["planning"].items()} == PLANNING


def test_a_file_holds_a_line_for_each_dialogue(tmp_path):
  dialogues = [played(seed, think=True)[0] for seed in range(5)]
  path = tmp_path / "new" / "step.jsonl"
  records.write(path, dialogues)
  text = path.read_text(encoding="utf-8")
  assert text.endswith("\n")
  assert [json.loads(line) for line in text.split("\n")[:-1]] == [
    records.record(d) for d in dialogues
  ]
  assert "难" in text  # readable, not escaped
  assert [p.name for p in path.parent.iterdir()] == ["step.jsonl"]
  records.write(path, dialogues[:2])
  assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "step.jsonl"
  good, bad = played(0)[0], Dialogue(1, 0, builders.scenario(first_message="\ud800"), Rules())
  records.write(path, [good])
  before = path.read_bytes()
  with pytest.raises(UnicodeEncodeError):
    records.write(path, [good, good, bad])
  assert path.read_bytes() == before


@pytest.mark.parametrize("think", [False, True])
def test_a_dialogue_that_is_read_back_makes_the_same_record(think):
  for seed in range(60):
    d, _ = played(seed, think, max_turns=4, initial_emotion=20)
    kept = json.loads(json.dumps(records.record(d)))
    again = records.dialogue_of(kept, d.scenario, d.rules)
    assert records.record(again) == kept
    assert again.stage is Stage.DONE and again.user_messages == d.user_messages
    for reply, first in zip(again.replies, d.replies, strict=True):
      assert (reply.text, reply.thought) == (first.text, first.thought)
      assert reply.stopped == first.stopped
      assert reply.well_formed == (first.well_formed or not think)
