"""How the scripted user judges a reply: features from word lists, weighed by hidden intention.

    reply -> sentences -> features (what it does, and whether it is about this story)
          -> change in -10..10 -> the five fields of a Plan

A pure function of the reply, the scenario and what was said before; no model, no randomness.
Nothing the reply says of itself (a score, a label, a role) earns anything.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from rlver_jax.dialogue.dialogue import Plan
from rlver_jax.dialogue.emotion import MAX_CHANGE, MIN_CHANGE
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators import lexicon as lexicon_lib

STRATEGIES = (
  "invite", "feeling", "validate", "praise", "side", "advice", "guide", "balance", "motives"
)  # fmt: skip
# Per intention, in the order of STRATEGIES: points for doing it in general, and for doing it
# about this story. What the intention asks for is in NEEDS.
WEIGHTS = {
  "listen": ((5, 9), (3, 5), (2, 3), (0, 1), (1, 2), (-6, -6), (-1, 0), (-5, -5), (-4, -4)),
  "empathy": ((1, 2), (4, 10), (3, 4), (0, 1), (1, 1), (-5, -5), (-1, -1), (-4, -4), (-3, -3)),
  "praise": ((0, 1), (1, 2), (1, 2), (4, 10), (1, 2), (-4, -4), (-2, -2), (-4, -4), (-3, -3)),
  "agree": ((0, 1), (1, 2), (2, 3), (1, 2), (5, 10), (-4, -4), (-4, -4), (-7, -7), (-5, -5)),
  "advice": ((-1, 0), (1, 2), (0, 1), (0, 1), (-1, 0), (5, 10), (0, 1), (0, 1), (-1, 0)),
  "reflect": ((0, 1), (1, 2), (0, 1), (-1, 0), (-4, -4), (-4, -3), (5, 10), (1, 2), (0, 1)),
  "balance": ((-1, 0), (1, 2), (0, 1), (-1, 0), (-5, -5), (-2, 0), (1, 2), (5, 10), (2, 3)),
  "motives": ((-1, 0), (1, 2), (0, 1), (-2, -1), (-3, -3), (-3, -2), (0, 1), (1, 2), (5, 10)),
}
NEEDS = {
  "listen": "invite", "empathy": "feeling", "praise": "praise", "agree": "side",
  "advice": "advice", "reflect": "guide", "balance": "balance", "motives": "motives",
}  # fmt: skip
POOR = {"dismissive": -8, "lecture": -6, "cliche": -1, "off_topic": -4, "repeated": -4}
VOID = {"empty": -8, "gibberish": -8}  # such a reply has no other feature
BASE = -2  # a reply that does nothing for the user
OTHER_GAIN = 5  # at most, from what is kind but not what the intention asks for ...
EXTRA_GAIN = 2  # ... and on top of what it does ask for
FOCUS = 4  # strategies that one reply may hold; each one more is as good as a shopping list
LONG = {"en": (150, 260), "zh": (400, 700)}  # words or characters: -2 and -4
LEVELS = {"met": 5, "partly": 1, "missed": -3, "hurt": MIN_CHANGE}  # the least change of each
CURT = {"en": 4, "zh": 6}  # with fewer, no great gain

_ARTIFACT = re.compile(
  r"<\||\|>|</?think|\[/?inst\]|<<<|>>>|\{\s*\""
  r"|^[ \t*#>]{0,8}(assistant|system|user|helper|用户|助手|系统)\s*:"
  r"|(change|emotion|score|reward|变化|情绪|分数)[ *_]{0,3}[:=][ *_]{0,3}[+\-−]?[ ]?\d",
  re.MULTILINE,
)
# Padding, behind which a reader would not find the rest of the reply.
_PADDING = re.compile(r"(.)\1{99}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Features:
  """What a reply does. strategies: name -> whether it is tied to the user's story."""

  strategies: dict[str, bool]
  poor: frozenset[str]  # of POOR, VOID, "artifact", "long", "very_long", "curt"


def appraise(
  reply: str,
  scenario: Scenario,
  earlier_replies: list[str],
  user_messages: list[str],
  leniency: int = 0,
) -> Plan:
  """The user's appraisal of `reply`, in the scenario's language.

  Args:
    reply: what the policy said; any text at all.
    earlier_replies: its replies before that one.
    user_messages: what the user has said so far, which a reply may refer to.
    leniency: points on top for a reply of sense that does not meet the need in full, as
      `levels.Level` has it.
  """
  found = features(reply, scenario, earlier_replies, user_messages)
  intention = scenario.intention
  character = character_type(scenario.character, scenario.language)
  change = _change(found, intention, character, leniency)
  level = level_of(change)
  phrases = lexicon_lib.load(scenario.language).phrases
  feelings = phrases["feeling"][level]
  return Plan(
    change=change,
    content=" ".join(phrases["content"][name] for name in _salient(found, intention)),
    completion=phrases["completion"][level],
    activity=phrases["activity"][intention][list(LEVELS).index(level)],
    feeling=feelings[abs(change) % len(feelings)],
  )


def character_type(character: str, language: str) -> str:
  """The type's English name, or "" for one that the language's lists do not know."""
  types = lexicon_lib.load(language).phrases["characters"]
  return next((name for name, word in types.items() if word in character.casefold()), "")


def level_of(change: int) -> str:
  """How a reply with this change went down: met, partly, missed or hurt."""
  return next(name for name, least in LEVELS.items() if change >= least)


def features(
  reply: str, scenario: Scenario, earlier_replies: list[str], user_messages: list[str]
) -> Features:
  """What the reply does, well or badly."""
  language = scenario.language
  lexicon = lexicon_lib.load(language)
  text = lexicon_lib.plain(reply)
  units = lexicon_lib.units(text, language)
  artifact = {"artifact"} if _ARTIFACT.search(text) else set()
  if not units:
    return Features({}, frozenset({"empty"} | artifact))
  if _PADDING.search(reply) or _is_gibberish(text, units, lexicon):
    return Features({}, frozenset({"gibberish"} | artifact))

  told = lexicon_lib.content_of(lexicon_lib.story(scenario.background, language), language)
  for other in (scenario.topic, *user_messages):
    told = told | lexicon_lib.content_of(other, language)
  sentences = lexicon_lib.sentences(text, language)
  words = [lexicon_lib.content(s, lexicon) for s in sentences]
  strategies = _strategies(sentences, [w & told for w in words], lexicon)

  poor = set(artifact)
  for name in ("dismissive", "lecture", "cliche"):
    if any(lexicon_lib.has_cue(s, lexicon.cues[name], lexicon) for s in sentences):
      poor.add(name)
  if _repeats(units, [*earlier_replies, *user_messages], language):
    poor.add("repeated")
  elif _is_off_topic(frozenset().union(*words), told, scenario, strategies):
    poor.add("off_topic")
  # The whole reply counts here, also what nobody reads.
  length = len(units) + max(0, len(reply) - lexicon_lib.MAX_CHARS) // (5 if language == "en" else 1)
  if length > LONG[language][0]:
    poor.add("very_long" if length > LONG[language][1] else "long")
  if length < CURT[language]:
    poor.add("curt")
  return Features(strategies, frozenset(poor))


def _strategies(sentences, ties, lexicon) -> dict[str, bool]:
  """The strategies found; True where a sentence with the cue is about the story.

  ties: per sentence, the content words that it shares with what the user told.
  """
  own_need, near_need = (1, 2) if lexicon.language == "en" else (2, 3)
  found: dict[str, bool] = {}
  for i, sentence in enumerate(sentences):
    near = frozenset().union(*ties[max(0, i - 1) : i + 2])
    for name in STRATEGIES:
      if found.get(name) or not lexicon_lib.has_cue(sentence, lexicon.cues[name], lexicon):
        continue
      if name == "guide" and not sentence.question:
        continue
      if name == "feeling" and not lexicon_lib.has_word(sentence, lexicon.feelings):
        continue
      tied = len(near) >= near_need
      if name != "praise":  # praise has to name an act, which takes more than one word
        tied = tied or len(ties[i]) >= own_need
      found[name] = tied
  return found


def _is_gibberish(text: str, units: list[str], lexicon: lexicon_lib.Lexicon) -> bool:
  """Another language, hardly any common word, or the same few words over and over."""
  if lexicon_lib.foreign_share(text, lexicon.language) > 0.5 or max(map(len, units)) > 40:
    return True
  if len(units) < 8:
    return False
  common = sum(u in lexicon.common for u in units)
  if common < len(units) * (0.15 if lexicon.language == "en" else 0.06):
    return True
  return _variety(units) < 0.2


def repeats(reply: str, earlier: Sequence[str], language: str) -> bool:
  """Whether most of the reply was said before: in itself, or in one of the earlier texts."""
  units = lexicon_lib.units(lexicon_lib.plain(reply), language)
  return bool(units) and _repeats(units, earlier, language)


def _repeats(units: list[str], earlier: Sequence[str], language: str) -> bool:
  if _variety(units) < 0.6:
    return True
  grams = set(_grams(units))
  for text in earlier:
    before = lexicon_lib.units(lexicon_lib.plain(text), language)
    if before == units:
      return True
    if len(grams) >= 5 and len(grams.intersection(_grams(before))) > 0.6 * len(grams):
      return True
  return False


def _variety(units: list[str]) -> float:
  """The share of different triples; 1 for a text too short to tell."""
  grams = _grams(units)
  return len(set(grams)) / len(grams) if len(grams) >= 12 else 1.0


def _is_off_topic(words, told, scenario: Scenario, strategies: dict[str, bool]) -> bool:
  """Whether the reply shares too little with what the user told and does not turn to the user."""
  if any(name in strategies for name in ("invite", "feeling", "validate", "side", "praise")):
    return False
  known = told | lexicon_lib.content_of(scenario.persona, scenario.language)
  return len(words & known) < 1 + len(words) // 12


def _change(found: Features, intention: str, character: str, leniency: int) -> int:
  void = [VOID[name] for name in VOID if name in found.poor]
  if void:
    points = min(void)
  else:
    need = NEEDS[intention]
    points_of = dict(zip(STRATEGIES, WEIGHTS[intention], strict=True))
    gains = {name: points_of[name][tied] for name, tied in found.strategies.items()}
    others = [gain for name, gain in gains.items() if name != need]
    kind = sum(gain for gain in others if gain > 0)
    points = BASE + gains.get(need, 0) + min(kind, EXTRA_GAIN if need in gains else OTHER_GAIN)
    # One wrong turn costs in full, further ones half: they are one disappointment.
    wrong = sorted(gain for gain in others if gain < 0)
    points += math.floor(sum(wrong[:1]) + sum(wrong[1:]) / 2)
    points -= 2 * max(0, len(gains) - FOCUS)
    if not found.strategies.get(need):  # what meets the need in full earns the same at any level
      points += leniency
    if found.poor & {"off_topic", "repeated"}:
      points = min(points, BASE)
    points += sum(POOR[name] for name in found.poor & POOR.keys())
    points -= 4 if "very_long" in found.poor else 2 if "long" in found.poor else 0
    if "curt" in found.poor:
      points = min(points, 1)
  if "artifact" in found.poor:
    points = min(points, 0) - 4
  if character == "negative" and points < 0:
    points *= 1.3
  elif character == "avoidant" and points > 0:
    points *= 0.8
  # Halves away from zero, the same for gains and losses.
  rounded = int(math.copysign(math.floor(abs(points) + 0.5), points))
  return max(MIN_CHANGE, min(MAX_CHANGE, rounded))


def _salient(found: Features, intention: str) -> list[str]:
  """At most two features that the user would mention, the worst or the most wanted first.

  With the first strategy among them goes whether it is tied to the story, which its worth hangs on.
  """
  order = ("empty", "gibberish", "artifact", "dismissive", "lecture", "repeated", "off_topic")
  names = [name for name in order if name in found.poor]
  weights = dict(zip(STRATEGIES, WEIGHTS[intention], strict=True))
  names += sorted(found.strategies, key=lambda name: -abs(weights[name][found.strategies[name]]))
  names += ["cliche"] if "cliche" in found.poor else []
  names += ["long"] if found.poor & {"long", "very_long"} else []
  first = next((name for name in names[:2] if name in found.strategies), None)
  ties = [] if first is None else ["tied" if found.strategies[first] else "general"]
  return [*names[:2], *ties] or ["generic"]


def _grams(units: list[str]) -> list[tuple[str, ...]]:
  return list(zip(units, units[1:], units[2:], strict=False))
