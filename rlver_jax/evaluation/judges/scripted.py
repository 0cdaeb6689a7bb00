"""Labels without a model: what the scripted user's word lists find in the replies of a dialogue.

For debugging, and for the embedded world, whose users appraise by the same lists. A capability is
the mean of a mark for each reply, from 0 to 1, taken to 1..5: 1 + 4 * mean, rounded. No reply that
is poor as `appraisal.POOR`, `VOID` or an artifact has a mark, but for style, where other faults
count too. A strategy has the whole mark where it is tied to the user's story, half of it elsewhere.

  empathic depth      the reply names a feeling, validates or invites
  core insight        it does what the hidden intention needs
  solution crafting   rational needs: it advises, guides, weighs or explains motives;
                      emotional ones: it does not advise, which nobody asked for
  dialogue guidance   it invites or guides
  style adaptability  it is neither curt nor long nor a set phrase

  orientation         1 + 4 * the share of strategies that are for feelings; 3 without any
  form                1 + 4 * the share of replies, from the second on, whose strategies are not
                      those of the reply before; 3 with a single reply

The state that a reply ascribes to the user is the band of the feelings that it names where it says
how the user feels, the middle one of several (of two in the middle the worse).
"""

import itertools
import math
from collections.abc import Callable, Sequence

from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.dialogue.scenario import EMOTIONAL
from rlver_jax.dialogue.simulators import lexicon as lexicon_lib
from rlver_jax.dialogue.simulators.appraisal import (
  NEEDS,
  POOR,
  STRATEGIES,
  VOID,
  Features,
  features,
)
from rlver_jax.evaluation.judges.base import (
  BANDS,
  CAPABILITIES,
  LEAST,
  MOST,
  NONE,
  Judge,
  Judgement,
  Verdict,
)
from rlver_jax.evaluation.judges.rubrics import Rubrics

LONGEST = 200  # characters of a reply that are quoted
RATIONAL_STRATEGIES = ("advice", "guide", "balance", "motives")
FAULTS = frozenset({*POOR, *VOID, "artifact"}) - {"cliche"}
FAULTS_OF_STYLE = FAULTS | {"cliche", "long", "very_long", "curt"}


class ScriptedJudge(Judge):
  """A `Judge` that answers at once; rubrics: by language."""

  def __init__(self, rubrics: dict[str, Rubrics]):
    self._rubrics = rubrics
    self._waiting: dict[int, Recorded] = {}

  def open(self, placed: dict[int, Recorded]) -> None:
    self._waiting |= placed

  def poll(self, wait: bool = False) -> dict[int, Verdict]:
    waiting, self._waiting = self._waiting, {}
    return {
      slot: judge(recorded, self._rubrics[recorded.start.scenario.language])
      for slot, recorded in waiting.items()
    }


def judge(recorded: Recorded, rubrics: Rubrics) -> Judgement:
  """The labels of a dialogue with at least one reply; the reasons quote its best or worst one."""
  intention = recorded.start.scenario.intention
  found = _features(recorded)
  replies = [turn.reply.text for turn in recorded.turns]
  scores, reasons = {}, {}
  for name in CAPABILITIES:
    marks = [_MARKS[name](each, intention) for each in found]
    scores[name] = _taken(sum(marks) / len(marks))
    reasons[name] = _reason(rubrics, replies, marks, well=scores[name] > (LEAST + MOST) / 2)
  shown = [tuple(name for name in STRATEGIES if name in each.strategies) for each in found]
  states = tuple(ascribed(reply, rubrics.language) for reply in replies)
  return Judgement(scores, reasons, {"orientation": _orientation(shown), "form": _form(shown)},
                   tuple(shown), states)  # fmt: skip


def ascribed(reply: str, language: str) -> str:
  """The one of `base.STATES` that a reply ascribes to the user.

  A sentence counts where it has a cue of `feeling`, a feeling where no negation stands before it.
  """
  lexicon = lexicon_lib.load(language)
  found = [
    band
    for sentence in lexicon_lib.sentences(lexicon_lib.plain(reply), language)
    if lexicon_lib.has_cue(sentence, lexicon.cues["feeling"], lexicon)
    for band, name in enumerate(BANDS)
    if lexicon_lib.has_cue(sentence, lexicon.bands[name], lexicon)
  ]
  return BANDS[sorted(found)[(len(found) - 1) // 2]] if found else NONE


def _features(recorded: Recorded) -> list[Features]:
  """Of each reply, after what was said before it."""
  scenario, found = recorded.start.scenario, []
  replies: list[str] = []
  said = [recorded.start.opening.text]
  for turn in recorded.turns:
    found.append(features(turn.reply.text, scenario, replies, said))
    replies = [*replies, turn.reply.text]
    said = [*said, turn.message.text] if turn.message else said
  return found


def _any_of(*names: str) -> Callable[[Features, str], float]:
  """The mark of a reply for the best of these strategies that it uses."""

  def mark(found: Features, intention: str) -> float:
    tied = [found.strategies[name] for name in names if name in found.strategies]
    if not tied or found.poor & FAULTS:
      return 0.0
    return 1.0 if any(tied) else 0.5

  return mark


def _insight(found: Features, intention: str) -> float:
  return _any_of(NEEDS[intention])(found, intention)


def _solution(found: Features, intention: str) -> float:
  if intention in EMOTIONAL:
    return float("advice" not in found.strategies and not found.poor & FAULTS)
  return _any_of(*RATIONAL_STRATEGIES)(found, intention)


def _style(found: Features, intention: str) -> float:
  return float(not found.poor & FAULTS_OF_STYLE)


_MARKS: dict[str, Callable[[Features, str], float]] = {
  "empathic_depth": _any_of("feeling", "validate", "invite"),
  "core_insight": _insight,
  "solution_crafting": _solution,
  "dialogue_guidance": _any_of("invite", "guide"),
  "style_adaptability": _style,
}


def _reason(rubrics: Rubrics, replies: Sequence[str], marks: list[float], well: bool) -> str:
  """Names and quotes the first reply with the highest mark, or with the lowest."""
  at = marks.index(max(marks) if well else min(marks))
  # JSON can spell half of a surrogate pair, which no file can hold.
  passage = replies[at][:LONGEST].strip().encode("utf-8", "replace").decode("utf-8")
  return rubrics.render("best" if well else "worst", number=at + 1, passage=passage)


def _orientation(shown: Sequence[tuple[str, ...]]) -> int:
  used = [name for names in shown for name in names]
  if not used:
    return (LEAST + MOST) // 2
  return _taken(sum(name not in RATIONAL_STRATEGIES for name in used) / len(used))


def _form(shown: Sequence[tuple[str, ...]]) -> int:
  pairs = list(itertools.pairwise(shown))
  if not pairs:
    return (LEAST + MOST) // 2
  return _taken(sum(set(one) != set(next_one) for one, next_one in pairs) / len(pairs))


def _taken(share: float) -> int:
  """A share taken to LEAST..MOST, halves upward."""
  return LEAST + math.floor((MOST - LEAST) * share + 0.5)
