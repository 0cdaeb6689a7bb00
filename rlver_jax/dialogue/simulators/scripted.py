"""The scripted simulated user: no model, the same dialogue always gets the same answers.

Appraisals come from `appraisal.appraise`. Messages are put together from phrase lists
(`assets/scripted/`): how the last reply went down, then a detail of the story or a hint at the
hidden intention, worded after the emotion's state. The dialogue's level (`levels.py`) says how
often it hints, how plainly, and how lenient the appraisal is. For tests, for debugging, and as
the ground truth that a small language model can be distilled from.
"""

import functools
import re

from rlver_jax import draws
from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import Dialogue, Plan, Stage, UserMessage
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators import lexicon as lexicon_lib
from rlver_jax.dialogue.simulators.appraisal import appraise, level_of
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.templates import Templates

__all__ = ["ScriptedSimulator", "appraise"]

_MOODS = {"S": "good", "A": "good", "B": "middle", "C": "low", "F": "low"}
_SATISFIED_TURNS = 3  # replies before a contented user may leave
_LEAVE_SATISFIED, _LEAVE_FED_UP = 3, 2  # ... which then happens once in so many turns


class ScriptedSimulator(Simulator):
  """A `Simulator` (see `base.py`) that answers at once.

  Args:
    templates_by_language: decides what counts as a goodbye, and gives the phrases for it.
    seed: with the step, the dialogue's index and the turn it chooses among phrases.
  """

  def __init__(self, templates_by_language: dict[str, Templates], seed: int):
    self._templates, self._seed, self._step = templates_by_language, seed, 0
    self._waiting: dict[int, Dialogue] = {}

  def start(self, step: int) -> None:
    self._step = step
    self._waiting.clear()

  def open(self, placed: dict[int, Dialogue]) -> None:
    """Nothing to prepare: all that matters is in the dialogues."""

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    self._waiting[slot] = dialogue

  def poll(self, wait: bool = False) -> dict[int, Plan | UserMessage]:
    answers = {slot: self._answer(dialogue) for slot, dialogue in self._waiting.items()}
    self._waiting.clear()
    return answers

  def _answer(self, dialogue: Dialogue) -> Plan | UserMessage:
    match dialogue.stage:
      case Stage.OPENING:
        return self.opening(dialogue)
      case Stage.PLAN:
        earlier = [turn.reply.text for turn in dialogue.turns]
        reply = dialogue.last_reply.text
        leniency = dialogue.rules.level.leniency
        return appraise(reply, dialogue.scenario, earlier, dialogue.user_messages, leniency)
      case Stage.MESSAGE:
        return self.next_message(dialogue)
      case stage:
        raise ValueError(f"the user has nothing to answer at stage {stage}")

  def opening(self, dialogue: Dialogue) -> UserMessage:
    """The user's first message: a greeting, a detail of the story, a hint."""
    opening = self._phrase(dialogue, "opening", _MOODS[emotion_lib.state(dialogue.emotion)])
    detail = self._detail(dialogue)
    hint = self._hint(dialogue, published=True)
    return self._message(dialogue, [opening, detail, hint], [opening, hint])

  def next_message(self, dialogue: Dialogue) -> UserMessage:
    """The user's next message, given `dialogue.last_plan` and the emotion after it."""
    mood = _MOODS[emotion_lib.state(dialogue.emotion)]
    if self._leaves(dialogue):
      goodbyes = self._templates[dialogue.scenario.language].goodbye
      goodbye = goodbyes[self._hash(dialogue, "goodbye") % len(goodbyes)]
      goodbye = goodbye[0].upper() + goodbye[1:]
      if dialogue.scenario.language == "en" and goodbye[-1].isalnum():
        goodbye += "."
      return self._message(dialogue, [self._phrase(dialogue, "farewell", mood), goodbye])
    reaction = self._phrase(dialogue, "reaction", level_of(dialogue.last_plan.change))
    # At `vanilla` a detail, a hint, or both.
    form = self._hash(dialogue, "form", dialogue.turn) % 3
    hint = self._hint(dialogue, published=form > 0)
    detail = "" if form == 1 and hint else self._detail(dialogue)
    other = self._phrase(dialogue, "hint", dialogue.scenario.intention)
    return self._message(dialogue, [reaction, detail, hint], [reaction, other], [other])

  def _leaves(self, dialogue: Dialogue) -> bool:
    """Whether the user ends the chat: contented after some turns, or fed up."""
    draw = self._hash(dialogue, "leave", dialogue.turn)
    state, change = emotion_lib.state(dialogue.emotion), dialogue.last_plan.change
    if state == "F":
      return draw % _LEAVE_FED_UP == 0
    contented = state in "SA" and change > 0 and dialogue.turn + 1 >= _SATISFIED_TURNS
    return contented and draw % _LEAVE_SATISFIED == 0

  def _message(self, dialogue: Dialogue, *drafts: list[str]) -> UserMessage:
    """The first draft that does not give the intention away; a goodbye is said only on purpose.

    Details come from the user's own story, which could hold either by chance; the last draft
    has no details and is taken as it is.
    """
    scenario = dialogue.scenario
    templates = self._templates[scenario.language]
    glue = " " if scenario.language == "en" else ""
    texts = [glue.join(part for part in draft if part) for draft in drafts]
    for text in texts[:-1]:
      if scenario.task.casefold() not in text.casefold() and not templates.is_goodbye(text):
        return UserMessage(text)
    return UserMessage(texts[-1], goodbye=templates.is_goodbye(texts[-1]))

  def _hint(self, dialogue: Dialogue, published: bool) -> str:
    """A hint at the hidden intention, or "" where the level has none; `vanilla`: as published."""
    level, stage = dialogue.rules.level, dialogue.stage.value
    draw = self._share(dialogue, "hints", stage, dialogue.turn)
    if (draw < -level.hints) if published else (draw >= level.hints):
      return ""
    plain = self._share(dialogue, "plain", stage, dialogue.turn) < level.plain
    return self._phrase(dialogue, "need" if plain else "hint", dialogue.scenario.intention)

  def _phrase(self, dialogue: Dialogue, table: str, name: str) -> str:
    """A phrase of a list; each list is gone through in order from a hashed start."""
    phrases = lexicon_lib.load(dialogue.scenario.language).phrases[table][name]
    return phrases[(self._hash(dialogue, table) + dialogue.turn) % len(phrases)]

  def _detail(self, dialogue: Dialogue) -> str:
    """A sentence about a detail of the story, or "" where the story yields none."""
    scenario = dialogue.scenario
    found = details(scenario)
    if not found:
      return ""
    first = self._hash(dialogue, "snippet")
    # The opening takes the first detail, so the first reply is answered with the second.
    turn = dialogue.turn + (dialogue.opening is not None)
    mood = _MOODS[emotion_lib.state(dialogue.emotion)]
    if mood == "low" and dialogue.stage is Stage.MESSAGE and dialogue.last_plan.change > 0:
      mood = "middle"  # still low, but a bitter word would not follow from a good reply
    text = self._phrase(dialogue, "detail", mood).format(x=found[(first + turn) % len(found)])
    return text[0].upper() + text[1:]

  def _share(self, dialogue: Dialogue, *what) -> float:
    """A number in 0..1, below 1, as `_hash`."""
    return draws.share(*self._place(dialogue), *what)

  def _hash(self, dialogue: Dialogue, *what) -> int:
    """A number from (seed, step, dialogue) and what it is for."""
    return draws.number(*self._place(dialogue), *what)

  def _place(self, dialogue: Dialogue) -> tuple:
    return self._seed, self._step, dialogue.index, dialogue.scenario.id


@functools.lru_cache(maxsize=1024)
def details(scenario: Scenario) -> tuple[str, ...]:
  """Short details of the user's story that can stand in a message, in the story's order."""
  story = lexicon_lib.story(scenario.background, scenario.language)
  story = "\n".join(line for line in story.splitlines() if not line.lstrip().startswith("#"))
  found = _clauses(story, scenario.persona) if scenario.language == "zh" else _things(story)
  return tuple(dict.fromkeys(found))


def _things(story: str) -> list[str]:
  """English: "the" with one or two plain words, where the words around say it is a noun."""
  rules = lexicon_lib.load("en").phrases["snippet"]
  tokens = re.findall(r"[A-Za-z]+(?:[-'’][A-Za-z]+)*|[^\sA-Za-z]", story)
  found = []
  for i, token in enumerate(tokens):
    if token.lower() not in rules["before"]:
      continue
    words = []
    for word in tokens[i + 1 : i + 4]:
      if word in rules["after"] or not word[0].isalpha():
        break
      words.append(word)
    plain = all(word.islower() and word not in rules["exclude"] for word in words)
    if 1 <= len(words) <= 2 and plain and not words[-1].endswith(tuple(rules["endings"])):
      found.append(f"the {' '.join(words)}")
  return found


def _clauses(story: str, persona: str) -> list[str]:
  """Chinese: short clauses without pronouns, the user's own name turned into "I"."""
  rules = lexicon_lib.load("zh").phrases["snippet"]
  name = re.search(rules["name"], persona)
  found = []
  for clause in re.findall(r"[㐀-䶿一-鿿]{5,18}", story):
    if name:
      clause = clause.replace(name[1], "我")
    if clause[0] not in rules["heads"] and not any(word in clause for word in rules["exclude"]):
      found.append(clause)
  return found
