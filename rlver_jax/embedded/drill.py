"""Exercises before and between dialogues: what tiny models are slow to learn from dialogues alone.

repeat     some words, and the same again. A model that starts with dialogues guesses details
           long before it copies them; one that has done this copies from the start, also words
           that it never met.
recognise  a scenario and replies of all kinds, each followed by what it does, the first line of
           its appraisal. In whole appraisals the few words on which all others hang are lost
           among many that are easy.
weigh      as recognise with replies that are easy to tell apart, each followed by its whole
           appraisal: what is left to learn is what a reply is worth to a user of this character, a
           word said once, far above.
appraise   as weigh with replies of all kinds, more of them as those of a policy in training, which
           look like good ones.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from rlver_jax import json_lines
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.simulators.appraisal import appraise
from rlver_jax.dialogue.simulators.chat import appraisal_text, persona_text, question_text
from rlver_jax.dialogue.simulators.scripted import details
from rlver_jax.embedded import helper
from rlver_jax.embedded.helper import Habits
from rlver_jax.embedded.scenarios import between, detail, generator, scenario

COINED = 0.7  # share of the words of details that mean nothing
WORDS = (1, 6)  # repeat: the fewest details and the most in an example, of two words each
TIMES = 3  # repeat: that they are said again: the sooner a model finds out that they are
REPLIES = 8  # in an example of the others
# recognise: all kinds of replies are about as frequent.
ALL_KINDS = Habits(
  0.3, 0.35, long=0.0, repeated=0.25, tied=0.7, foreign=0.12, mixed=0.12, stuck=0.4, garbled=0.1
)
# appraise: more of the replies that a policy in training gives and that look like good ones.
NEARLY = dataclasses.replace(ALL_KINDS, matched=0.45, poor=0.25, garbled=0.3)
CLEAR = Habits(0.5, 0.2, long=0.0, repeated=0.0, tied=0.85, foreign=0.0, mixed=0.1)  # weigh


def write(path: pathlib.Path, exercise: str, split: str, count: int, seed: int) -> None:
  """Writes `count` chats (see `supervised/chats.py`) of one of `EXERCISES`."""
  make = EXERCISES[exercise]
  json_lines.write(path, ({"messages": make(split, seed, number)} for number in range(count)))


def _repeated(split: str, seed: int, number: int) -> list[dict]:
  rng = generator("repeat", seed, split, number)
  # Without articles and commas: what comes after a word that comes once is easiest to find.
  words = (
    detail(split, rng, _coined(split)).removeprefix("the ") for _ in range(between(rng, WORDS))
  )
  text = " ".join(words)
  said = (("system", "Say it again."), ("user", text), ("assistant", " ".join([text] * TIMES)))
  return [_message(role, content) for role, content in said]


def _judged(
  exercise: str, habits: Habits, whole: bool, split: str, seed: int, number: int
) -> list[dict]:
  """A scenario and replies, each with its appraisal, or with the first line of it."""
  rng = generator(exercise, seed, split, number)
  templates = templates_lib.load("en", "tiny")
  told = scenario(split, number, seed, coined=_coined(split))
  found = [
    _message("system", persona_text(templates, told)),
    _message("user", question_text(templates, "opening", 30)),
    _message("assistant", told.first_message, train=False),
  ]
  earlier: list[str] = []
  for _ in range(REPLIES):
    reply = helper.reply(
      habits, told.intention, list(details(told)), earlier,
      lambda rng: detail(split, rng, _coined(split)), rng,
    )  # fmt: skip
    plan = appraise(reply.text, told, earlier, [told.first_message])
    answer = appraisal_text(templates, plan)
    question = question_text(templates, "plan", 5 + int(rng.random() * 90))
    found.append(_message("user", f"{''.join(templates.quote(reply.text))}\n\n{question}"))
    found.append(_message("assistant", answer if whole else answer.splitlines()[0]))
    earlier.append(reply.text)
  return found


def _coined(split: str) -> float:
  return COINED if split == "train" else 0.0


def _message(role: str, content: str, **more) -> dict:
  return {"role": role, "content": content} | more


EXERCISES: dict[str, Callable[[str, int, int], list[dict]]] = {
  "repeat": _repeated,
  "recognise": functools.partial(_judged, "recognise", ALL_KINDS, False),
  "weigh": functools.partial(_judged, "weigh", CLEAR, True),
  "appraise": functools.partial(_judged, "appraise", NEARLY, True),
}
