"""What a dialogue earns, against sums worked out by hand and a loop over its turns."""

import random

import builders
import pytest

from rlver_jax.dialogue.dialogue import Dialogue, NoRoom, Plan, PolicyReply, Rules, UserMessage
from rlver_jax.dialogue.reward import RewardSettings, said_again, turn_rewards

RULES = Rules(initial_emotion=30, max_turns=99, failure_at=-1000, success_at=1000)


def dialogue(changes, well_formed=None, unanswered=False, rules=RULES):
  """A dialogue in which the replies change the emotion so; with a last one that nobody appraised
  if `unanswered`. `well_formed`: of each reply."""
  number = len(changes) + unanswered
  d = Dialogue(0, 0, builders.scenario(), rules)
  for i, good in enumerate(well_formed or [True] * number):
    d.advance(PolicyReply("Go on.", "hm", good, True, 3))
    d.advance(Plan(changes[i]) if i < len(changes) else NoRoom())
    if not d.end:
      d.advance(UserMessage("Well."))
  return d


def rewards(d, kind, final=1.0, change=1.0, penalty=0.0, repeated=0.0):
  return turn_rewards(d, RewardSettings(kind, final, change, penalty, repeated))


@pytest.mark.parametrize(
  ("kind", "expected"),
  [("final", [0, 0, 0.33]), ("change", [0.05, -0.1, 0.08]), ("both", [0.05, -0.1, 0.41])],
)
def test_the_end_is_rewarded_or_each_change_or_both(kind, expected):
  assert rewards(dialogue([5, -10, 8]), kind) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [("final", [0, 0.7]), ("change", [-0.15, 0.3]), ("both", [-0.15, 1.0])],
)
def test_weights_multiply_their_own_part(kind, expected):
  assert rewards(dialogue([-5, 10]), kind, final=2.0, change=3.0) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("start", "change", "expected"),
  [
    (95, 10, {"final": 1.0, "change": 0.05, "both": 1.05}),  # what the cap cuts off earns nothing
    (3, -10, {"final": 0.0, "change": -0.1, "both": -0.1}),  # below zero only changes count
  ],
)
def test_the_emotion_is_capped_at_100_and_the_end_counts_from_zero(start, change, expected):
  d = dialogue([change], rules=Rules(start, 9, -1000, 1000))
  assert {kind: rewards(d, kind)[0] for kind in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [("final", [0, 0, 0.34]), ("change", [0.1, -0.06, 0]), ("both", [0.1, -0.06, 0.34])],
)
def test_a_last_reply_that_nobody_appraised_earns_the_end_but_no_change(kind, expected):
  d = dialogue([10, -6], unanswered=True)
  assert d.end == "length" and len(d.pending) == 1
  assert rewards(d, kind) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [("final", [0, 0, 0, 0.34]), ("change", [0.1, -0.06, 0, 0]), ("both", [0.1, -0.06, 0, 0.34])],
)
def test_thoughts_that_are_not_well_formed_are_taken_from_the_last_reply(kind, expected):
  """The penalty times their share: three of four, the reply that nobody appraised among them."""
  d = dialogue([10, -6, 0], [True, False, False, False], unanswered=True)
  found = rewards(d, kind, penalty=0.4)
  assert found == pytest.approx([*expected[:-1], expected[-1] - 0.3])
  assert rewards(d, kind, penalty=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["final", "change", "both"])
def test_what_is_said_again_is_taken_from_the_reply_that_says_it(kind):
  """All but the first of four are the same words; unless they are not."""
  d = dialogue([10, -6, 0, 5])
  plain, found = rewards(d, kind), rewards(d, kind, repeated=0.8)
  assert found == pytest.approx([plain[0], *(reward - 0.2 for reward in plain[1:])])
  other = Dialogue(0, 0, builders.scenario(), RULES)
  for text in ("Tell me more about the red ladder.", "I admire how you cared for her.", "Go on."):
    for answer in (PolicyReply(text, "hm", True, True, 3), Plan(1), UserMessage("Well.")):
      other.advance(answer)
  other.advance(PolicyReply("You know, tell me more about the red ladder.", "hm", True, True, 3))
  assert said_again(other) == [False, False, False, True]
  other.advance(NoRoom())
  plain, found = rewards(other, kind), rewards(other, kind, repeated=0.8)
  assert found == pytest.approx([*plain[:-1], plain[-1] - 0.2])


@pytest.mark.parametrize("kind", ["final", "change", "both"])
def test_a_dialogue_without_replies_earns_nothing(kind):
  d = Dialogue(0, 0, builders.scenario(), RULES)
  d.advance(NoRoom())
  assert rewards(d, kind, penalty=1.0) == []


@pytest.mark.parametrize("seed", range(30))
def test_random_dialogues_against_a_loop_over_their_turns(seed):
  draw = random.Random(seed)
  changes = [draw.randint(-10, 10) for _ in range(draw.randint(1, 12))]
  unanswered = draw.random() < 0.5
  forms = [draw.random() < 0.6 for _ in range(len(changes) + unanswered)]
  start, final, change, penalty = draw.randint(20, 99), 1.5, 0.5, 0.25
  d = dialogue(changes, forms, unanswered, Rules(start, 99, -1000, 1000))
  expected, emotion = [0.0] * len(forms), start
  for i, step in enumerate(changes):
    before, emotion = emotion, min(100, emotion + step)
    expected[i] = change * (emotion - before) / 100
  expected[-1] += final * max(emotion, 0) / 100 - penalty * forms.count(False) / len(forms)
  found = rewards(d, "both", final, change, penalty)
  assert found == pytest.approx(expected)
