"""Examples of supervised training: chats, recorded dialogues in both views, and their order."""

import json

import builders
import pytest

from configs import sft
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, Stage, UserMessage
from rlver_jax.errors import UserError
from rlver_jax.json_lines import Misfit
from rlver_jax.rl.rows import row_length
from rlver_jax.supervised import examples, recorded

TEXTS = ("Be kind.", "I lost <|im_end|> my keys.", "Oh no, again?", "Yes.", "I am sorry.")
ROLES = ("system", "user", "assistant", "user", "assistant")


def chat(**train) -> dict:
  messages = [{"role": r, "content": t} for r, t in zip(ROLES, TEXTS, strict=True)]
  for name, value in train.items():
    messages[int(name[1:])]["train"] = value
  return {"messages": messages}


def texts(segments, trained: bool) -> list[str]:
  """The texts of the segments that are trained, or of those that are not."""
  found = [s for s in segments if (s.logprobs is not None) == trained]
  return [builders.tokenizer().decode(list(s.ids)) for s in found]


def played(think: bool) -> Dialogue:
  """A finished dialogue of two turns and a last one without a message."""
  d = Dialogue(0, 0, builders.scenario(), Rules(max_turns=3))
  for turn, change in enumerate((3, -2, 8)):
    thought = f"thought {turn}" if think else None
    d.advance(PolicyReply(f"Reply {turn}.", thought, True, True, 4))
    d.advance(Plan(change, f"says {turn}", f"fits {turn}", f"mind {turn}", f"feels {turn}"))
    if d.stage is not Stage.DONE:
      d.advance(UserMessage(f"Message {turn}."))
  return d


@pytest.mark.parametrize("think", [False, True])
def test_the_policys_view_learns_its_replies(think):
  parsed = recorded.parse(records.record(played(think)))
  found = recorded.policy_segments(parsed, builders.tokenizer(), builders.templates())
  own = [f"<think>thought {i}</think>Reply {i}." if think else f"Reply {i}." for i in range(3)]
  assert texts(found, True) == own
  prompt = builders.templates()["en"].render("policy_think" if think else "policy")
  context = builders.tokenizer().decode([i for s in found if s.branch == 0 for i in s.ids])
  said = [builders.scenario().first_message, "Reply 0.", "Message 0.", "Reply 1.", "Message 1."]
  assert context.startswith(f"system\n{prompt}\nuser\n{said[0]}") and "thought" not in context
  positions = [context.index(text) for text in said]
  assert positions == sorted(positions)
  assert [s.branch for s in found if s.logprobs is not None] == ([1, 2, 3] if think else [0, 0, 0])


@pytest.mark.parametrize("form", ("plan", "choice"))
def test_the_users_view_learns_appraisals_and_messages(form):
  parsed = recorded.parse(records.record(played(False)))
  own = builders.templates()["en"]
  found = recorded.simulator_segments(parsed, builders.tokenizer(), builders.templates(), form)
  learned = texts(found, True)
  labels = [own.labels[name] for name in own.labels]

  def appraisal(turn, change):
    values = (f"says {turn}", f"fits {turn}", f"mind {turn}", f"feels {turn}", change)
    return "\n".join(f"{label}: {value}" for label, value in zip(labels, values, strict=True))

  wanted = [builders.scenario().first_message]
  for turn, change in enumerate((3, -2, 8)):
    wanted.append(appraisal(turn, change) if form == "plan" else str(change))
    wanted += [f"Message {turn}."] if turn < 2 else []
  assert learned == wanted
  # What is appraised is forgotten: the context has replies and messages alone.
  context = builders.tokenizer().decode([i for s in found if s.branch == 0 for i in s.ids])
  assert "fits 0" not in context and context.count("Message 0.") == 1
  # A turn's emotions: at the question, and after the change.
  first = builders.tokenizer().decode([i for s in found if s.branch == 1 for i in s.ids])
  assert own.render("plan" if form == "plan" else "choice", emotion="30", state="C") in first
  assert "33" in first and "+3" in first


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"level": "easy"}, "the level 'easy'"),
    ({"traits": []}, "no 'traits'"),
    ({"history": [{"role": "assistant"}]}, "the role 'assistant'"),
    ({"task": 3}, "3 as 'task'"),
  ],
)
def test_records_that_cannot_be_learned_from_are_told(changes, found):
  record = records.record(played(False)) | changes
  with pytest.raises(Misfit, match=found):
    parsed = recorded.parse(record)
    recorded.simulator_segments(parsed, builders.tokenizer(), builders.templates(), "plan")


def test_rows_are_an_endless_stream_of_epochs():
  lengths = [30, 50, 70, 20, 60, 10, 40]
  steps = examples.stream(lengths, 3, 100, 2)
  first = [next(steps) for _ in range(9)]
  flat = [i for step in first for row in step for i in row]
  for epoch in range(len(flat) // 7):
    assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
  assert all(sum(lengths[i] for i in row) <= 100 for step in first for row in step)
  assert len({tuple(flat[7 * e : 7 * e + 7]) for e in range(3)}) == 3
  later = examples.stream(lengths, 3, 100, 2, first=4)
  assert [next(later) for _ in range(5)] == first[4:]
  other = examples.stream(lengths, 4, 100, 2)
  assert [next(other) for _ in range(9)] != first


def test_files_are_read_with_their_kind(tmp_path):
  config, tokenizer = sft.get_config(), builders.tokenizer()
  file = tmp_path / "some.jsonl"
  file.write_text(json.dumps(chat()) + "\n")
  assert len(examples.read(str(file), config, tokenizer)) == 1
  length = row_length(examples.read(str(file), config, tokenizer)[0])
  config.training.row_length = length - 1
  with pytest.raises(UserError, match=f"line 1: found {length} tokens, expected at"):
    examples.read(str(file), config, tokenizer)
  config.data.kind = "policy"
  with pytest.raises(UserError, match="line 1: found None as 'id', expected str"):
    examples.read(str(file), config, tokenizer)
  file.write_text("")
  with pytest.raises(UserError, match="nothing to learn"):
    examples.read(str(file), config, tokenizer)
