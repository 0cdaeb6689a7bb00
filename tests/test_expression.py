"""The degree of expression: what asks for a need, what hints at it, and what does neither."""

import functools

import pytest

from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.expression import expression, names_feeling
from rlver_jax.dialogue.simulators import lexicon

LANGUAGES = ("en", "zh")
INTENTIONS = scenario_lib.EMOTIONAL + scenario_lib.RATIONAL


@functools.cache
def scenario(language, intention):
  scenarios, _ = scenario_lib.read(scenario_lib.resolve(language))
  return next(s for s in scenarios if s.intention == intention)


# Written for this test: what users of any kind may say.
MESSAGES = {
  "en": [
    ("advice", "Could you give me some ADVICE on this?", 1.0),
    ("advice", "I’m stuck. The form is due on Friday.", 0.5),
    ("advice", "The form is due on Friday.", 0.0),
    ("listen", "Please, hear me out.", 1.0),
    ("listen", "Nobody asks how it went.", 0.5),
    ("listen", "Could you give me some advice?", 0.0),  # another's need
    ("agree", "Be honest, was I wrong?", 0.5),
    ("motives", "I want to understand why he left the room.", 1.0),
    ("praise", "", 0.0),
  ],
  "zh": [
    ("advice", "你能不能给我一些建议？", 1.0),
    ("advice", "周五就要交表了，我该怎么办。", 0.5),
    ("advice", "周五就要交表了。", 0.0),
    ("listen", "就想找人聊聊，没别的。", 1.0),
    ("listen", "这些话一直憋着。", 0.5),
    ("listen", "你能不能给我一些建议？", 0.0),
    ("agree", "你说，难道是我不对吗？", 0.5),
    ("motives", "我想知道他为什么走了。", 1.0),
    ("praise", "", 0.0),
  ],
}
CASES = [(language, *case) for language, cases in MESSAGES.items() for case in cases]


@pytest.mark.parametrize("language, intention, message, degree", CASES)
def test_the_degree_of_a_message(language, intention, message, degree):
  assert expression(message, scenario(language, intention)) == degree


@pytest.mark.parametrize("intention", INTENTIONS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_scripted_users_phrases_are_told_apart(language, intention):
  phrases, own = lexicon.load(language).phrases, scenario(language, intention)
  assert {expression(text, own) for text in phrases["hint"][intention]} == {0.5}
  assert {expression(text, own) for text in phrases["need"][intention]} == {1.0}
  for table in ("opening", "reaction", "detail", "farewell"):
    for text in (text for texts in phrases[table].values() for text in texts):
      assert expression(text, own) == 0, text


def test_feelings_by_name():
  assert names_feeling("I was so ASHAMED.", "en") and not names_feeling("I was late.", "en")
  assert names_feeling("我很委屈。", "zh") and not names_feeling("我迟到了。", "zh")
