"""The scripted user's messages: the same for the same dialogue, hinting, seldom a goodbye."""

import dataclasses
import functools
import importlib.resources
import random

import pytest

from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, Stage, UserMessage
from rlver_jax.dialogue.expression import expression
from rlver_jax.dialogue.levels import VANILLA, Level
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator, appraise, details

LANGUAGES = ("en", "zh")
INTENTIONS = scenario_lib.EMOTIONAL + scenario_lib.RATIONAL
CASES = [(language, intention) for language in LANGUAGES for intention in INTENTIONS]


@functools.cache
def _scenario(language, intention):
  """A scenario of the package, without its own opening line."""
  scenarios, _ = scenario_lib.read(scenario_lib.resolve(language))
  scenario = next(s for s in scenarios if s.intention == intention)
  return dataclasses.replace(scenario, first_message="")


def _templates():
  return {language: templates_lib.load(language) for language in LANGUAGES}


def _play(simulator, dialogue, changes):
  """Plays a dialogue with given changes; the messages."""
  messages = []
  for change in [None, *changes]:
    if change is not None:
      dialogue.advance(PolicyReply("Yes?", None, True, True, 1))
      dialogue.advance(Plan(change))
      if dialogue.stage is Stage.DONE:
        break
    simulator.submit(0, dialogue)
    answer = simulator.poll()[0]
    messages.append(answer)
    dialogue.advance(answer)
    if dialogue.stage is Stage.DONE:
      break
  return messages


def _dialogue(language="en", intention="listen", index=0, emotion=30):
  return Dialogue(index, 0, _scenario(language, intention), Rules(initial_emotion=emotion))


def test_the_same_dialogue_gets_the_same_messages_whatever_the_slot_or_company():
  def messages(seed, step, index, others):
    simulator = ScriptedSimulator(_templates(), seed)
    simulator.start(step)
    dialogue, reply = _dialogue(index=index), "I'm listening. Tell me more about the shed."
    for slot in range(others):
      simulator.submit(slot, _dialogue(index=100 + slot))
    simulator.submit(7, dialogue)
    answers = simulator.poll()
    assert len(answers) == others + 1 and simulator.poll() == {}
    dialogue.advance(answers[7])
    dialogue.advance(PolicyReply(reply, None, True, True, 9))
    simulator.submit(2, dialogue)
    plan = simulator.poll()[2]
    assert plan == appraise(reply, dialogue.scenario, [], dialogue.user_messages)
    dialogue.advance(plan)
    simulator.submit(2, dialogue)
    return answers[7].text, simulator.poll()[2].text

  first = messages(0, 3, 5, others=0)
  assert messages(0, 3, 5, others=4) == first
  others = {messages(*key, others=0) for key in ((1, 3, 5), (0, 4, 5), (0, 3, 6))}
  assert len(others | {first}) >= 3


@pytest.mark.parametrize("language, intention", CASES)
def test_messages_hint_and_never_tell(language, intention):
  templates = _templates()
  simulator = ScriptedSimulator(templates, seed=1)
  texts = []
  for index in range(30):
    dialogue = _dialogue(language, intention, index)
    for message in _play(simulator, dialogue, random.Random(index).choices(range(-9, 10), k=7)):
      assert dialogue.scenario.task.casefold() not in message.text.casefold()
      assert message.goodbye == templates[language].is_goodbye(message.text)
      assert "{" not in message.text and message.text == message.text.strip()
      texts.append(message.text)
  assert len(set(texts)) > len(texts) / 2
  assert any(part in text for text in texts for part in details(_scenario(language, intention)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_task_inside_the_story_is_still_not_told(language):
  # The background spells the task out, as published scenarios may, and in its events too.
  task = {"en": "Praise the blue umbrella", "zh": "希望夸奖蓝色雨伞"}[language]
  story = {"en": f"{task} of the blue umbrella.", "zh": f"{task}。{task}的事。"}[language]
  scenario = dataclasses.replace(_scenario(language, "praise"), task=task, background=story)
  assert scenario.intention == "praise"
  simulator = ScriptedSimulator(_templates(), seed=0)
  for index in range(50):
    dialogue = Dialogue(index, 0, scenario, Rules())
    for message in _play(simulator, dialogue, [3, -2, 4]):
      assert task.casefold() not in message.text.casefold()


@pytest.mark.parametrize("language", LANGUAGES)
def test_goodbyes_come_when_contented_or_fed_up_and_not_always(language):
  simulator = ScriptedSimulator(_templates(), seed=2)

  def last(emotion, changes):
    played = [_dialogue(language, "advice", i, emotion) for i in range(120)]
    messages = [_play(simulator, dialogue, changes) for dialogue in played]
    return sum(m[-1].goodbye for m in messages), messages

  content, messages = last(80, [2, 2, 2])
  assert 20 <= content <= 80
  assert not any(m.goodbye for said in messages for m in said[:3])  # not before the third reply
  fed_up, _ = last(12, [-4])
  assert 30 <= fed_up <= 90
  for emotion, changes in ((80, [2, 2, -1]), (50, [2, 2, 2, 2]), (25, [-3, -3, -3])):
    assert last(emotion, changes)[0] == 0


def test_own_goodbye_phrases_are_used(tmp_path):
  package = templates_lib.load("en")
  text = (importlib.resources.files("rlver_jax.dialogue") / "prompts/en.txt").read_text()
  before, after = text.split("=== goodbye ===")
  own = f"{before}=== goodbye ===\nover and out\n=== policy ==={after.split('=== policy ===')[1]}"
  (tmp_path / "en.txt").write_text(own)
  templates = templates_lib.load("en", str(tmp_path))
  assert templates.goodbye == ("over and out",) and package.goodbye != templates.goodbye
  simulator = ScriptedSimulator({"en": templates}, seed=0)
  said = [_play(simulator, _dialogue(index=i, emotion=12), [-4])[-1] for i in range(40)]
  goodbyes = [m.text for m in said if m.goodbye]
  assert goodbyes and all(text.endswith("Over and out.") for text in goodbyes)


def test_a_dialogue_with_the_scripted_user_runs_to_its_end():
  simulator = ScriptedSimulator(_templates(), seed=0)
  simulator.start(0)
  dialogue = _dialogue("en", "listen")
  simulator.open({0: dialogue})
  replies = iter(
    [
      "I'm listening. What is on the bench in that shed, next to the birdhouse?",
      "Take your time. What was that like, the evening you found it?",
      *["It's only a shed, get over it."] * 6,
    ]
  )
  while dialogue.stage is not Stage.DONE:
    if dialogue.stage is Stage.POLICY:
      dialogue.advance(PolicyReply(next(replies), None, True, True, 5))
    else:
      simulator.submit(0, dialogue)
      dialogue.advance(simulator.poll()[0])
  emotions = [turn.emotion for turn in dialogue.turns]
  assert emotions[1] > emotions[0] > 30
  assert emotions[-1] < emotions[1]
  assert dialogue.end in ("goodbye", "failure", "turns")


def _at(level, language, intention, index=0):
  return Dialogue(index, 0, _scenario(language, intention), Rules().at(level))


@pytest.mark.parametrize("language, intention", CASES)
def test_levels_say_more_or_less_of_the_need_and_never_the_task(language, intention):
  simulator = ScriptedSimulator(_templates(), seed=1)

  def degrees(level):
    found = []
    for index in range(20):
      dialogue = _at(level, language, intention, index)
      for message in _play(simulator, dialogue, random.Random(index).choices(range(-3, 6), k=6)):
        assert dialogue.scenario.task.casefold() not in message.text.casefold()
        assert message.text == message.text.strip() != ""
        found.append(0 if message.goodbye else expression(message.text, dialogue.scenario))
    return found

  silent, shy, vanilla, open_ = (
    degrees(level)
    for level in (Level("x", hints=-1.0), Level("x", hints=-0.75), VANILLA, Level("x", hints=1.0))
  )
  plain = degrees(Level("x", hints=1.0, plain=1.0))
  means = [sum(found) / len(found) for found in (silent, shy, vanilla, open_, plain)]
  assert means == sorted(means) and means[0] < 0.05
  assert set(open_) - {0} == {0.5} and set(plain) - {0} == {1.0}
  hinting = [sum(x > 0 for x in found) / len(found) for found in (vanilla, open_)]
  assert 0.55 < hinting[0] < 0.85 < 0.95 < hinting[1]


def test_the_level_of_a_dialogue_decides_how_lenient_the_user_is():
  simulator = ScriptedSimulator(_templates(), seed=0)
  changes = []
  for leniency in (-3, 0, 2):
    dialogue = _at(Level("x", leniency=leniency), "en", "advice")
    dialogue.advance(UserMessage("It's the shed."))
    dialogue.advance(PolicyReply("Your feelings are understandable.", None, True, True, 1))
    simulator.submit(0, dialogue)
    changes.append(simulator.poll()[0].change)
  assert changes[0] < changes[1] < changes[2]
