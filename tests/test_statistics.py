"""Numbers of dialogues: worked out by hand, and by loops that count in another way."""

import collections
import math
import random

import builders
import pytest

from rlver_jax.dialogue.dialogue import (
  Dialogue,
  NoRoom,
  Plan,
  PolicyReply,
  Rules,
  Stage,
  UserMessage,
)
from rlver_jax.dialogue.statistics import (
  STRATEGIES,
  dialogue_metrics,
  strategy_metrics,
  variety_metrics,
)

SCENARIO = builders.scenario(first_message="")  # the user wants to be listened to


def dialogue(exchanges, goodbye=False, full=False, opening_tokens=0, rules=None) -> Dialogue:
  """A dialogue of `exchanges` (change, sampled, plan tokens, message tokens, flags)."""
  result = Dialogue(0, 0, SCENARIO, rules or Rules())
  result.advance(UserMessage("hello", tokens=opening_tokens))
  for i, (change, sampled, planned, said, flags) in enumerate(exchanges):
    result.advance(PolicyReply("r", None, "m" not in flags, "c" not in flags, sampled))
    parsed = "p" not in flags
    result.advance(Plan(change, parsed=parsed, retries=0 if parsed else 2, tokens=planned))
    if result.stage is not Stage.DONE:
      last = i == len(exchanges) - 1
      result.advance(UserMessage("u", goodbye=goodbye and last, tokens=said))
  if full:
    result.advance(NoRoom())
  assert result.stage is Stage.DONE
  return result


def test_metrics_of_dialogues_worked_out_by_hand():
  easy = Rules(initial_emotion=85)
  dialogues = [
    dialogue([(10, 7, 3, 2, ""), (5, 9, 4, 0, "m")], rules=easy),  # 95, 100: success
    dialogue([(-10, 5, 1, 1, "c"), (-10, 5, 1, 1, ""), (-10, 4, 1, 0, "p")]),  # 20, 10, 0
    dialogue([(4, 20, 6, 5, "")], goodbye=True, opening_tokens=8),  # 34
    dialogue([(1, 10, 2, 2, "mcp")], full=True),  # 31, then no room
    dialogue([(2, 0, 1, 0, "")] * 2, rules=Rules(max_turns=2)),  # 32, 34
  ]
  unappraised = Dialogue(0, 0, SCENARIO, Rules(initial_emotion=50))
  for answer in (UserMessage("hello"), PolicyReply("r", None, True, True, 6), NoRoom()):
    unappraised.advance(answer)
  dialogues.append(unappraised)
  found = dialogue_metrics(dialogues)
  expected = {
    "emotion/final_mean": (100 + 0 + 34 + 31 + 34 + 50) / 6,
    "emotion/final_min": 0,
    "emotion/final_max": 100,
    "emotion/success_rate": 1 / 6,
    "emotion/failure_rate": 1 / 6,
    "emotion/turn_01": (95 + 20 + 34 + 31 + 32) / 5,
    "emotion/turn_02": (100 + 10 + 34) / 3,
    "emotion/turn_03": 0,
    "dialogue/turns_mean": (2 + 3 + 1 + 1 + 2) / 6,
    "dialogue/end_success": 1 / 6,
    "dialogue/end_failure": 1 / 6,
    "dialogue/end_goodbye": 1 / 6,
    "dialogue/end_length": 2 / 6,
    "dialogue/end_turns": 1 / 6,
    "dialogue/end_failed": 0,
    "tokens/policy": 7 + 9 + 5 + 5 + 4 + 20 + 10 + 6,
    "tokens/simulator": (3 + 2 + 4) + (1 + 1 + 1 + 1 + 1) + (8 + 6 + 5) + (2 + 2) + (1 + 1),
    "tokens/reply_mean": (7 + 9 + 5 + 5 + 4 + 20 + 10 + 6) / 10,
    "format/failure_rate": 2 / 10,
    "format/truncated_rate": 2 / 10,
    "simulator/parse_failure_rate": 2 / 9,
    "simulator/retry_rate": 4 / 9,
    "dialogue/distinct_1": 1 / 10,
    "dialogue/distinct_2": math.nan,
    "dialogue/repeated_rate": 1,
    "dialogue/said_again_rate": 4 / 10,
    **{f"strategies/{name}": 0 for name in STRATEGIES},
    "strategies/distinct": 0,
    "strategies/matched": 0,
  }
  assert found == pytest.approx(expected, nan_ok=True)
  assert all(type(value) is float for value in found.values())


def test_emotion_bounds_of_success_and_failure():
  def rates(initial, change):
    rules = Rules(initial_emotion=initial, max_turns=1)
    found = dialogue_metrics([dialogue([(change, 1, 1, 1, "")], rules=rules)])
    return found["emotion/success_rate"], found["emotion/failure_rate"]

  assert [rates(95, 4), rates(95, 5), rates(95, 9)] == [(0, 0), (1, 0), (1, 0)]
  assert [rates(15, -5), rates(15, -6), rates(5, -10)] == [(0, 0), (0, 1), (0, 1)]


def test_dialogues_without_a_reply_have_no_rates():
  found = dialogue_metrics([dialogue([], full=True)])
  assert math.isnan(found["format/failure_rate"])
  assert math.isnan(found["tokens/reply_mean"])
  assert math.isnan(found["dialogue/distinct_1"])
  assert math.isnan(found["dialogue/repeated_rate"])
  assert math.isnan(found["dialogue/said_again_rate"])
  assert math.isnan(found["strategies/matched"])
  assert found["strategies/distinct"] == 0
  assert found["emotion/final_mean"] == 30
  assert not [name for name in found if name.startswith("emotion/turn")]


def said(*replies: str, scenario=SCENARIO) -> Dialogue:
  """A finished dialogue with these replies of the policy, the last one without an answer."""
  result = Dialogue(0, 0, scenario, Rules(max_turns=len(replies) + 1))
  if not result.opening:
    result.advance(UserMessage("Hello."))
  for i, text in enumerate(replies):
    result.advance(PolicyReply(text, None, True, True, 1))
    if i < len(replies) - 1:
      result.advance(Plan(1))
      result.advance(UserMessage("And then?"))
  result.advance(NoRoom())
  return result


def test_distinct_n_counts_words_and_chinese_characters_within_replies():
  """By hand: 5 + 3 words with i, hear, you, do, and 6 characters with 我, 听, 你, 说."""
  english = said("I hear you, I do.", "I hear YOU…")
  chinese = said("我听你说，我听。", scenario=builders.scenario("zh"))
  found = variety_metrics([english, chinese])
  assert found["dialogue/distinct_1"] == 8 / 14
  # i hear, hear you, you i, i do; i hear, hear you; 我听 听你 你说 说我 我听
  assert found["dialogue/distinct_2"] == 8 / 11
  assert found["dialogue/repeated_rate"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_distinct_n_is_that_of_a_counter(seed):
  draw = random.Random(seed)
  texts = [" ".join(draw.choices("abcdefgh", k=draw.randrange(12))) for _ in range(40)]
  found = variety_metrics([said(*texts[i : i + 4]) for i in range(0, 40, 4)])
  for n in (1, 2):
    counter = collections.Counter()
    for text in texts:
      letters = text.replace(" ", "")
      for i in range(len(letters) - n + 1):
        counter[letters[i : i + n]] += 1
    assert found[f"dialogue/distinct_{n}"] == len(counter) / sum(counter.values())


def test_a_reply_is_repeated_where_another_one_is_equal_in_any_dialogue():
  batch = [said("I see.", "Tell me."), said("I see. ", "I see."), said("tell me.")]
  assert variety_metrics(batch)["dialogue/repeated_rate"] == 2 / 5
  # Said again within a dialogue: by the same words, whatever the spaces.
  assert variety_metrics(batch)["dialogue/said_again_rate"] == 1 / 5


LISTEN = "I'm listening, take your time. What happened then?"
ADVISE = "You could ask him for the money this week."
PRAISE = "I admire how you kept your shop going."
NOTHING = "Well, so it goes with a bike."


def test_strategies_are_counted_by_reply_and_matched_with_the_intention():
  wants_advice = builders.scenario(task="You want advice on what to do.")
  batch = [
    said(LISTEN, ADVISE, NOTHING),  # the first one is what this user wants
    said(LISTEN + " " + PRAISE, ADVISE, scenario=wants_advice),  # here it is the second
  ]
  found = strategy_metrics(batch)
  shares = {"invite": 2 / 5, "advice": 2 / 5, "praise": 1 / 5}
  for name in STRATEGIES:
    assert found[f"strategies/{name}"] == shares.get(name, 0), name
  assert found["strategies/distinct"] == 3
  assert found["strategies/matched"] == 2 / 5
  assert len(STRATEGIES) == len(set(STRATEGIES)) == 8


@pytest.mark.parametrize(("replies", "used"), [(50, 2), (51, 1)])
def test_a_strategy_is_used_from_two_in_a_hundred_replies_on(replies, used):
  batch = [said(ADVISE)] + [said(LISTEN) for _ in range(replies - 1)]
  assert strategy_metrics(batch)["strategies/distinct"] == used
