"""Exercises before and between dialogues: what tiny models are slow to learn from dialogues alone.

repeat     some words, and the same again. A model that starts with dialogues guesses details
           long before it copies them; one that has done this copies from the start, also words
           that it never met.
recognise  a scenario and replies of all kinds, each followed by what it does, the first line of
           its appraisal. In whole appraisals the few words on which all others hang are lost
           among many that are easy.
"""

import pathlib
from collections.abc import Callable

from rlver_jax import json_lines
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.simulators.appraisal import appraise
from rlver_jax.dialogue.simulators.chat import persona_text, question_text
from rlver_jax.dialogue.simulators.scripted import details
from rlver_jax.embedded import helper
from rlver_jax.embedded.helper import Habits
from rlver_jax.embedded.scenarios import detail, generator, scenario

COINED = 0.7  # share of the words of details that mean nothing
WORDS = (1, 6)  # repeat: the fewest details and the most in an example, of two words each
TIMES = 3  # repeat: that they are said again: the sooner a model finds out that they are
REPLIES = 8  # recognise: in an example
HABITS = Habits(
  0.3, 0.35, long=0.0, repeated=0.25, tied=0.7, foreign=0.12, mixed=0.12, stuck=0.4, garbled=0.1
)  # recognise: all kinds of replies are about as frequent


def write(path: pathlib.Path, exercise: str, split: str, count: int, seed: int) -> None:
  """Writes `count` chats (see `supervised/chats.py`) of one of `EXERCISES`."""
  make = EXERCISES[exercise]
  json_lines.write(path, ({"messages": make(split, seed, number)} for number in range(count)))


def _repeat(split: str, seed: int, number: int) -> list[dict]:
  rng = generator("repeat", seed, split, number)
  fewest, most = WORDS
  count = fewest + int(rng.random() * (most - fewest + 1))
  # Without articles and commas: what comes after a word that comes once is easiest to find.
  text = " ".join(detail(split, rng, _coined(split)).removeprefix("the ") for _ in range(count))
  said = (("system", "Say it again."), ("user", text), ("assistant", " ".join([text] * TIMES)))
  return [_message(role, content) for role, content in said]


def _recognise(split: str, seed: int, number: int) -> list[dict]:
  rng = generator("recognise", seed, split, number)
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
      HABITS, told.intention, list(details(told)), earlier,
      lambda rng: detail(split, rng, _coined(split)), rng,
    )  # fmt: skip
    does = appraise(reply.text, told, earlier, [told.first_message]).content
    question = question_text(templates, "plan", 5 + int(rng.random() * 90))
    found.append(_message("user", f"{''.join(templates.quote(reply.text))}\n\n{question}"))
    found.append(_message("assistant", f"{templates.labels['content']}: {does}"))
    earlier.append(reply.text)
  return found


def _coined(split: str) -> float:
  return COINED if split == "train" else 0.0


def _message(role: str, content: str, **more) -> dict:
  return {"role": role, "content": content} | more


EXERCISES: dict[str, Callable[[str, int, int], list[dict]]] = {
  "repeat": _repeat,
  "recognise": _recognise,
}
