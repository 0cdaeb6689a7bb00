"""The scripted helper: replies that do one thing each, well or badly, and the thoughts before them.

It is what the tiny policy is warm-started from and whose replies the tiny simulated user has
seen. What a reply is called here is its author's purpose; what it is worth is decided by the
scripted user's appraisal alone.
"""

import dataclasses
import random
import re
from collections.abc import Callable

from rlver_jax.dialogue.simulators.appraisal import NEEDS
from rlver_jax.embedded.scenarios import INTENTIONS, between, coin, pick, words

GOOD = tuple(NEEDS.values())
LONG_WORDS = 155  # more than the scripted user reads with pleasure
POOR = ("dismissive", "generic", "lecture", "off_topic", "long", "repeated")


@dataclasses.dataclass(frozen=True)
class Habits:
  """How a helper chooses; shares in 0..1.

  matched: of replies that do what the user needs; poor: of those of `POOR`; the rest does one of
  the other good things. long, repeated: shares of the poor ones, the other four are alike (a second
  long one is a reply said again). tied: of good replies that take up a detail of the user's;
  foreign: that bring in one that the user never told; the rest stays vague. second: of replies with
  a second sentence; kind: of those whose second sentence is kind in general. mixed: of good replies
  that do two things. stuck: of their sentences that are as one before, if with another detail.
  in_turn: of the others, those that come next in the list of what can be said. garbled: of replies
  that come out as those of a policy in disarray do.
  """

  matched: float
  poor: float
  long: float = 0.06
  repeated: float = 0.1
  tied: float = 0.8
  foreign: float = 0.05
  second: float = 0.7
  kind: float = 0.35
  mixed: float = 0.08
  stuck: float = 0.0
  in_turn: float = 0.0
  garbled: float = 0.0


# Does what is needed in every reply, and never says a thing twice.
ABLE = Habits(1.0, 0.0, tied=0.95, foreign=0.0, mixed=0.0, in_turn=0.9)


@dataclasses.dataclass(frozen=True)
class Reply:
  """purpose: one of GOOD or POOR; thought: what a think-then-say helper thinks before it."""

  text: str
  purpose: str
  thought: str


def reply(
  habits: Habits,
  intention: str,
  told: list[str],
  earlier: list[str],
  untold: Callable[[random.Random], str],
  rng: random.Random,
) -> Reply:
  """The helper's next reply to a user of this hidden intention.

  told: details that the user has mentioned, at least one; earlier: the helper's replies so far;
  untold: gives a detail that the user has not told.
  """
  purpose = _purpose(habits, intention, earlier, rng)
  if purpose == "repeated":
    text = pick(
      rng, [text for text in earlier if not _is_long(text)] or [words()["poor"]["generic"][0]]
    )
  elif purpose == "long":
    text = _rambling(told, rng)
  elif purpose in POOR:
    text = _poor(habits, purpose, told, untold, rng)
  else:
    text = _good(habits, purpose, told, earlier, untold, rng)
  if habits.garbled and rng.random() < habits.garbled:
    text = _garbled(text, told, rng)
  return Reply(text, purpose, _thought(purpose, rng))


def _purpose(habits: Habits, intention: str, earlier: list[str], rng: random.Random) -> str:
  need, draw = NEEDS[intention], rng.random()
  if draw < habits.matched:
    return need
  if draw < habits.matched + habits.poor:
    draw = rng.random()
    if draw < habits.long and not any(map(_is_long, earlier)):
      return "long"  # once a dialogue is enough
    if draw < habits.long + habits.repeated and earlier:
      return "repeated"
    return pick(rng, ("dismissive", "generic", "lecture", "off_topic"))
  return pick(rng, [name for name in GOOD if name != need])


def _is_long(text: str) -> bool:
  return len(text.split()) > LONG_WORDS


def _thought(purpose: str, rng: random.Random) -> str:
  """What the reply answers to (anything, for a poor one), and what it is going to do."""
  by_need = {need: intention for intention, need in NEEDS.items()}
  felt = by_need.get(purpose) or pick(rng, INTENTIONS)
  return f"{pick(rng, words()['need'][felt])} {words()['intent'][purpose]}"


def _good(habits: Habits, purpose: str, told, earlier, untold, rng) -> str:
  tables, draw = words()["good"], rng.random()
  if draw < habits.tied:
    x = pick(rng, told)
  elif draw < habits.tied + habits.foreign:
    x = untold(rng)
  else:
    x = pick(rng, ("it", "that", "all this"))
  sentences = [_template(habits, tables[purpose]["first"], earlier, rng).format(x=x)]
  if rng.random() < habits.mixed:
    other = pick(rng, [name for name in GOOD if name != purpose])
    sentences.append(pick(rng, tables[other]["first"]).format(x=pick(rng, told)))
    if rng.random() < 0.5:
      sentences.reverse()
  elif rng.random() < habits.second:
    kind = rng.random() < habits.kind
    table = words()["kind"]["lines"] if kind else tables[purpose]["then"]
    sentences.append(_template(habits, table, earlier, rng))
  return " ".join(s[0].upper() + s[1:] for s in sentences)


def _template(habits: Habits, templates: list[str], earlier: list[str], rng: random.Random) -> str:
  """A template that no earlier reply was made from, if there is one left (with `in_turn` the next
  in the list after the last one used), or on purpose one that was."""
  # Of each template the last reply that was made from it.
  used = {
    template: max(said)
    for template in templates
    if (said := [i for i, text in enumerate(earlier) if _is_from(template, text)])
  }
  if habits.stuck and used and rng.random() < habits.stuck:
    return pick(rng, list(used))
  unused = [template for template in templates if template not in used]
  if habits.in_turn and used and unused and rng.random() < habits.in_turn:
    last = templates.index(max(used, key=used.get))
    return next((t for t in unused if templates.index(t) > last), unused[0])
  return pick(rng, unused or templates)


def _is_from(template: str, text: str) -> bool:
  """Whether a reply has a sentence that is made from this template."""
  return all(piece.casefold() in text.casefold() for piece in template.split("{x}"))


def _poor(habits: Habits, purpose: str, told, untold, rng) -> str:
  lines, count = words()["poor"][purpose], 1 + (rng.random() < habits.second)
  if purpose == "generic":
    count += 1
  chosen: list[str] = []
  while len(chosen) < count:
    if (line := pick(rng, lines)) not in chosen:
      chosen.append(line)
  return " ".join(line.format(x=pick(rng, told), z=untold(rng)) for line in chosen)


def _garbled(text: str, told: list[str], rng: random.Random) -> str:
  """The reply with one to three faults: another begun in its midst, sentences strung together or
  said again, words that mean nothing, a detail half remembered, no end."""
  for _ in range(between(rng, (1, 3))):
    said, draw = text.split(), rng.random()
    cut = int(rng.random() * len(said))
    if draw < 0.25:
      other = _any_good(told, rng).split()
      said[cut:] = other[int(rng.random() * len(other)) :]
    elif draw < 0.4:
      further = words()["kind"]["lines"] + words()["good"][pick(rng, GOOD)]["then"]
      said += [pick(rng, further), pick(rng, further)]
    elif draw < 0.5:
      sentences = re.split(r"(?<=[.?!]) ", text)
      said += [pick(rng, sentences), pick(rng, sentences)]
    elif draw < 0.6:
      said[cut : cut + 1] = [coin(rng, said) for _ in range(between(rng, (1, 3)))]
    elif draw < 0.9:
      said = _half_remembered(text, told, rng).split()
    else:
      said = said[: cut + 1]
    text = " ".join(said)
  return text


def _half_remembered(text: str, told: list[str], rng: random.Random) -> str:
  """The reply with a word or two of its detail, or parts of them, put together anew."""
  for detail in told:
    if detail in text:
      _, *named = detail.split()
      kept = [
        word if rng.random() < 0.3 else word[: int(rng.random() * len(word))] + coin(rng, named)
        for word in named
      ]
      return text.replace(detail, f"the {' '.join(kept)}")
  return text


def _rambling(told, rng) -> str:
  """Everything at once, longer than anyone reads."""
  sentences: list[str] = []
  while sum(len(s.split()) for s in sentences) <= LONG_WORDS:
    sentences.append(_any_good(told, rng))
  return " ".join(sentences)


def _any_good(told: list[str], rng: random.Random) -> str:
  """A sentence of any of the good replies."""
  table = words()["good"][pick(rng, GOOD)]
  return pick(rng, table["first"] + table["then"]).format(x=pick(rng, told))
