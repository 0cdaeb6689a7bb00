"""The state machine of a dialogue: every stage, every end, and answers that do not fit."""

import builders
import pytest

from rlver_jax.dialogue.dialogue import (
  Dialogue,
  Failed,
  NoRoom,
  Plan,
  PolicyReply,
  Rules,
  Stage,
  UserMessage,
)

REPLY, PLAN, MESSAGE = PolicyReply("Go on.", None, True, True, 4), Plan(3), UserMessage("Well.")
ANSWERS = (REPLY, PLAN, MESSAGE, NoRoom(), Failed())
TAKES = {
  Stage.OPENING: (UserMessage, NoRoom, Failed),
  Stage.POLICY: (PolicyReply, NoRoom, Failed),
  Stage.PLAN: (Plan, NoRoom, Failed),
  Stage.MESSAGE: (UserMessage, NoRoom, Failed),
  Stage.DONE: (),
}
WAY = {
  Stage.OPENING: (),
  Stage.POLICY: (MESSAGE,),
  Stage.PLAN: (MESSAGE, REPLY),
  Stage.MESSAGE: (MESSAGE, REPLY, PLAN),
  Stage.DONE: (MESSAGE, NoRoom()),
}


def dialogue(*answers, first_message="", **rules):
  new = Dialogue(0, 0, builders.scenario(first_message=first_message), Rules(**rules))
  for answer in answers:
    new.advance(answer)
  return new


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: type(a).__name__)
def test_each_stage_takes_its_own_answers_and_no_others(stage, answer):
  d = dialogue(*WAY[stage])
  assert d.stage is stage
  if isinstance(answer, TAKES[stage]):
    d.advance(answer)
    assert d.stage is not stage
    return
  before = (d.turn, d.emotion, d.user_messages, d.end, d.pending)
  with pytest.raises(TypeError, match=type(answer).__name__):
    d.advance(answer)
  assert d.stage is stage
  assert (d.turn, d.emotion, d.user_messages, d.end, d.pending) == before


def test_a_turn_from_reply_to_message():
  d = dialogue(MESSAGE, initial_emotion=30)
  assert (d.stage, d.turn, d.emotion, d.user_messages, d.last_reply) == (
    Stage.POLICY, 0, 30, ["Well."], None,
  )  # fmt: skip
  d.advance(REPLY)
  assert (d.stage, d.turn, d.last_reply) == (Stage.PLAN, 0, REPLY)
  d.advance(PLAN)
  assert (d.stage, d.turn, d.emotion, d.last_reply, d.last_plan) == (
    Stage.MESSAGE, 0, 33, REPLY, PLAN,
  )  # fmt: skip
  d.advance(UserMessage("So."))
  assert (d.stage, d.turn, d.user_messages, d.last_reply) == (
    Stage.POLICY, 1, ["Well.", "So."], REPLY,
  )  # fmt: skip
  turn = d.turns[0]
  assert (turn.reply, turn.plan, turn.emotion, turn.message.text) == (REPLY, PLAN, 33, "So.")
  later = PolicyReply("I see.", "hm", True, True, 9)
  d.advance(later)
  assert d.last_reply is later


def test_a_given_first_message_opens_the_dialogue():
  d = dialogue(first_message="Hello?")
  assert (d.stage, d.opening, d.user_messages) == (Stage.POLICY, UserMessage("Hello?"), ["Hello?"])


@pytest.mark.parametrize(
  ("rules", "changes", "end", "emotion"),
  (
    ({}, [10] * 7, "success", 100),
    ({"success_at": 50}, [10, 9, 1], "success", 50),
    ({"success_at": 50}, [10, 9, -1], "", 48),
    ({}, [-10, -10, -10], "failure", 0),
    ({}, [-10, -10, -9], "", 1),
    ({"failure_at": 9}, [-10, -10, -1], "failure", 9),
    ({"initial_emotion": 5}, [-10], "failure", -5),
    ({"max_turns": 2}, [1, 1], "turns", 32),
    ({"max_turns": 1}, [0], "turns", 30),
    ({"max_turns": 1, "success_at": 40}, [10], "success", 40),
    ({"max_turns": 1, "failure_at": 20}, [-10], "failure", 20),
    ({"max_turns": 3}, [1, 1], "", 32),
    ({"initial_emotion": 95, "success_at": 101, "max_turns": 3}, [10, 10, -1], "turns", 99),
  ),
)
def test_a_dialogue_ends_after_the_appraisal_by_emotion_or_turns(rules, changes, end, emotion):
  d = dialogue(MESSAGE, **rules)
  for i, change in enumerate(changes):
    d.advance(REPLY)
    d.advance(Plan(change))
    last = i + 1 == len(changes)
    assert (d.stage is Stage.DONE) == (last and bool(end))
    if not d.end:
      d.advance(MESSAGE)
  assert (d.end, d.emotion, d.turn) == (end, emotion, len(changes))
  if end:
    assert d.turns[-1].message is None
    assert len(d.user_messages) == len(changes)


def test_a_goodbye_ends_it_with_the_message_kept():
  d = dialogue(MESSAGE, REPLY, PLAN, UserMessage("Bye for now.", goodbye=True))
  assert (d.stage, d.end, d.turn) == (Stage.DONE, "goodbye", 1)
  assert d.turns[0].message.text == "Bye for now."


@pytest.mark.parametrize(
  ("stage", "turns", "emotion"),
  ((Stage.OPENING, 0, 30), (Stage.POLICY, 0, 30), (Stage.PLAN, 0, 30), (Stage.MESSAGE, 1, 33)),
)
def test_no_room_ends_it_and_keeps_what_was_appraised(stage, turns, emotion):
  d = dialogue(*WAY[stage], NoRoom())
  assert (d.stage, d.end, d.turn, d.emotion) == (Stage.DONE, "length", turns, emotion)
  assert not d.failed
  if stage is not Stage.POLICY:  # so does a user who fails
    other = dialogue(*WAY[stage], Failed())
    assert (other.stage, other.end, other.turn) == (Stage.DONE, "failed", turns) and other.failed
  if stage is Stage.PLAN:  # said, but never appraised
    assert d.last_reply == REPLY
