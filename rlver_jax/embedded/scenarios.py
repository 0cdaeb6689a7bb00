"""Scenarios of the embedded world: short stories without number, from the package's own.

A scenario takes name, occupation, traits and task from one of the package's English scenarios,
and tells three events around three details ("the red ladder") put together from word lists
(`assets/embedded/world.toml`). The hidden intention has nothing to do with the story: only the
user's wording gives it away. Training and held-out scenarios are made from different package
scenarios and different words; they share no text beyond templates.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import pathlib
import random
import re
import string
import tomllib
from collections.abc import Sequence
from typing import Any

from rlver_jax import draws, json_lines
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue import templates
from rlver_jax.dialogue.dialogue import Dialogue, Rules
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators import lexicon
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator

SPLITS = ("train", "held_out")
INTENTIONS = (*scenario_lib.EMOTIONAL, *scenario_lib.RATIONAL)
CHARACTERS = ("negative", "passive", "avoidant")
DETAILS = 3  # of a story
LETTERS = (5, 9)  # of a coined word of any letters: the fewest and the most
_HELD_OUT_FROM = 7  # of the eight package scenarios of an intention, the 7th and 8th


@functools.cache
def words() -> dict[str, Any]:
  """The tables of world.toml."""
  file = importlib.resources.files("rlver_jax") / "assets" / "embedded" / "world.toml"
  return tomllib.loads(file.read_text(encoding="utf-8"))


def generator(*what) -> random.Random:
  """Random numbers that are a function of what they are for, on any machine."""
  return random.Random(draws.number(*what))


def pick(rng: random.Random, values: Sequence[Any]) -> Any:
  """One of the values; only `random()` is drawn, whose numbers no version of Python changes."""
  return values[int(rng.random() * len(values))]


def between(rng: random.Random, bounds: tuple[int, int]) -> int:
  """A whole number from the lowest to the highest, both included; drawn as by `pick`."""
  lowest, highest = bounds
  return lowest + int(rng.random() * (highest - lowest + 1))


@functools.cache
def package_scenarios(split: str) -> tuple[Scenario, ...]:
  """The package's English scenarios that the split is made from."""
  scenarios, _ = scenario_lib.read(scenario_lib.resolve("en"))
  held_out = split == "held_out"
  return tuple(s for s in scenarios if (int(s.id[-2:]) >= _HELD_OUT_FROM) == held_out)


@functools.cache
def _lists(split: str) -> tuple[list[str], list[str]]:
  prefix = "held_out_" if split == "held_out" else ""
  return words()[f"{prefix}adjectives"].split(), words()[f"{prefix}nouns"].split()


@functools.cache
def word_lists(split: str) -> tuple[str, ...]:
  """The words that details of a split are made of."""
  return tuple(itertools.chain(*_lists(split)))


def detail(split: str, rng: random.Random, coined: float = 0.0, strange: float = 0.0) -> str:
  """A detail such as "the red ladder".

  coined: share of its words that mean nothing; strange: of these, the share that `coin` makes so.
  """
  lists = _lists(split)
  pair = (
    coin(rng, words, strange) if rng.random() < coined else pick(rng, words) for words in lists
  )
  return f"the {' '.join(pair)}"


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """The words of the package's scenarios that training is made from, in order."""
  told = (f"{s.persona} {s.background}" for s in package_scenarios("train"))
  return tuple(sorted({word for text in told for word in re.findall(r"\b[a-z]{4,}\b", text)}))


def coin(rng: random.Random, like: Sequence[str], strange: float = 0.0) -> str:
  """A word that means nothing: syllables that can be said, or parts of two of these words.

  strange: share of the words that are put together from any letters, or from parts of any words.
    Who is to copy what it never met has to meet every piece of a word beside every other one.
  """
  if strange and rng.random() < strange:
    word = _any_letters(rng) if rng.random() < 0.25 else _parts(rng, vocabulary())
  elif rng.random() < 0.5:
    tables = words()["coined"]
    syllables = [
      pick(rng, tables["onsets"]) + pick(rng, tables["vowels"]) + pick(rng, tables["codas"])
      for _ in range(1 + (rng.random() < 0.5))
    ]
    word = "".join(syllables) + pick(rng, tables["endings"])
  else:
    word = _parts(rng, like)
  # It is no word of a held-out detail, and counts as one word of a detail for the scripted user.
  endings = tuple(lexicon.load("en").phrases["snippet"]["endings"])
  fits = len(word) > 4 and not word.endswith(endings) and lexicon.content_of(word, "en")
  return word if fits and word not in word_lists("held_out") else coin(rng, like, strange)


def _any_letters(rng: random.Random) -> str:
  return "".join(pick(rng, string.ascii_lowercase) for _ in range(between(rng, LETTERS)))


def _parts(rng: random.Random, of: Sequence[str]) -> str:
  """The beginning of one of these words and the end of another."""
  first, last = (pick(rng, of) for _ in range(2))
  return first[: _within(rng, first)] + last[_within(rng, last) :]


def _within(rng: random.Random, word: str) -> int:
  """A place between two letters of the word."""
  return between(rng, (1, len(word) - 1))


def scenario(
  split: str,
  number: int,
  seed: int,
  opened: bool = True,
  coined: float = 0.0,
  strange: float = 0.0,
) -> Scenario:
  """Scenario `number` of a split; the intentions take turns.

  opened: with a first message. coined, strange: as `detail` has them.
  """
  rng = generator("scenario", seed, split, number)
  intention = INTENTIONS[number % len(INTENTIONS)]
  origin = pick(rng, [s for s in package_scenarios(split) if s.intention == intention])
  teller = pick(rng, package_scenarios(split))
  name, occupation = (_entry(teller.persona, key) for key in ("Name", "Occupation"))
  details: list[str] = []
  while len(details) < DETAILS:
    another = detail(split, rng, coined, strange)
    if not set(another.split()[1:]) & {w for d in details for w in d.split()}:
      details.append(another)
  who = pick(rng, words()["people"])
  fields = {"name": name, "Who": who[0].upper() + who[1:]} | dict(zip("abc", details, strict=True))
  lines = [pick(rng, table["lines"]).format(**fields) for table in words()["stories"]]
  made = Scenario(
    id=f"{split.replace('_', '-')}-{number:05d}",
    persona=f"* Name: {name}\n* Occupation: {occupation}",
    background=" ".join(line[0].upper() + line[1:] for line in lines),
    character=pick(rng, CHARACTERS),
    traits=(pick(rng, teller.traits),),
    task=origin.task,
    topic=details[0],
  )
  if not opened:
    return made
  opening = scripted_user(seed).opening(Dialogue(number, 0, made, Rules()))
  return dataclasses.replace(made, first_message=opening.text)


def _entry(persona: str, key: str) -> str:
  """An entry of a persona in short: what stands before a comma or a preposition."""
  value = re.search(rf"{key}: ([^\n,;(]+)", persona)[1]
  return re.split(r" (?:in|at|on|of|for|with|and|who|to|from) ", f"{value} ")[0].strip()


@functools.cache
def scripted_user(seed: int) -> ScriptedSimulator:
  """The user whose words and judgement the embedded world has."""
  return ScriptedSimulator({"en": templates.load("en")}, seed)


def write(path: pathlib.Path, split: str, count: int, seed: int) -> None:
  """Writes the first `count` scenarios of a split as JSON lines, all or nothing."""
  made = (scenario(split, number, seed) for number in range(count))
  json_lines.write(path, map(scenario_lib.as_record, made))
