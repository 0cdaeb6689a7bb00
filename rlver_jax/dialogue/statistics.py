"""Numbers of a batch of finished dialogues: how they went, and what the policy's replies are like.

How replies are alike tells a policy that has learned from one that has collapsed: distinct-n (Li et
al., arXiv 1510.03055) falls where phrases come back, the repeated rate rises where a whole reply
is learned by heart. Strategies are those that the scripted user's word lists find
(`simulators/appraisal.py`), whoever the user of the dialogue is.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.reward import said_again
from rlver_jax.dialogue.simulators import lexicon
from rlver_jax.dialogue.simulators.appraisal import NEEDS, features

ENDS = ("goodbye", "success", "failure", "turns", "length", "failed")  # values of `Dialogue.end`
STRATEGIES = tuple(NEEDS.values())  # those that meet a need
USED = 0.02  # the share of replies from which on a strategy counts as one of the policy's


def dialogue_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
  """Metrics of a batch of finished dialogues.

  Emotions are in points (at most 100), rates and `dialogue/end_*` fractions in 0..1, tokens
  sampled counts; `emotion/turn_01` ... are means over the dialogues that got so far, and
  `simulator/retry_rate` is the mean number of further appraisals a turn. A dialogue whose user
  failed has no emotion. A mean or rate over nothing (no reply at all, all users failed)
  is NaN. Raises ValueError for an empty batch.
  """
  longest = max(d.turn for d in dialogues)
  felt = [d for d in dialogues if not d.failed]
  final = np.array([d.emotion for d in felt] or [math.nan])
  turns = [turn for d in dialogues for turn in d.turns]
  replies = [reply for d in dialogues for reply in d.replies]
  answers = [d.opening for d in dialogues] + [a for t in turns for a in (t.plan, t.message)]
  metrics = {
    "emotion/final_mean": final.mean(),
    "emotion/final_min": final.min(),
    "emotion/final_max": final.max(),
    "emotion/success_rate": _mean([d.emotion >= emotion_lib.SUCCESS for d in felt]),
    "emotion/failure_rate": _mean([d.emotion < emotion_lib.FAILURE for d in felt]),
    "dialogue/turns_mean": len(turns) / len(dialogues),
    **{f"dialogue/end_{end}": _mean([d.end == end for d in dialogues]) for end in ENDS},
    "tokens/policy": sum(reply.sampled_tokens for reply in replies),
    "tokens/simulator": sum(answer.tokens for answer in answers if answer),
    "tokens/reply_mean": _mean([reply.sampled_tokens for reply in replies]),
    "format/failure_rate": _mean([not reply.well_formed for reply in replies]),
    "format/truncated_rate": _mean([not reply.stopped for reply in replies]),
    "simulator/parse_failure_rate": _mean([not turn.plan.parsed for turn in turns]),
    "simulator/retry_rate": _mean([turn.plan.retries for turn in turns]),
    **variety_metrics(dialogues),
    **strategy_metrics(dialogues),
  }
  for i in range(longest):
    reached = [d.turns[i].emotion for d in felt if d.turn > i]
    metrics[f"emotion/turn_{i + 1:02d}"] = _mean(reached)
  return {name: float(value) for name, value in metrics.items()}


def variety_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
  """How much the replies of a batch differ, NaN where there is nothing to count.

  dialogue/distinct_n: different n-grams of words (of characters in Chinese) / all n-grams, each
  within one reply, over all replies; it falls with the number of replies, so compare batches of a
  size. dialogue/repeated_rate: the share of replies that are, to the letter, another one's text;
  dialogue/said_again_rate: of those that say for the most part what one before them in the same
  dialogue said.
  """
  texts = [(reply.text, d.scenario.language) for d in dialogues for reply in d.replies]
  units = [lexicon.units(lexicon.plain(text), language) for text, language in texts]
  metrics = {}
  for n in (1, 2):
    grams = [gram for words in units for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    metrics[f"dialogue/distinct_{n}"] = len(set(grams)) / len(grams) if grams else math.nan
  count = Counter(text for text, _ in texts)
  metrics["dialogue/repeated_rate"] = _mean([count[text] > 1 for text, _ in texts])
  metrics["dialogue/said_again_rate"] = _mean([x for d in dialogues for x in said_again(d)])
  return metrics


def strategy_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
  """What the replies of a batch do for the user; shares are NaN where there is no reply.

  strategies/NAME: the share of replies that show this one of the 8 strategies that each meet a
  need. strategies/distinct: how many of them at least USED of the replies show.
  strategies/matched: the share of replies that show the one that their user's intention needs.
  """
  shown, matched = [], []
  for d in dialogues:
    need = NEEDS[d.scenario.intention]
    for reply in d.replies:
      # What was said before ties a strategy to the story; that it is there is in the reply alone.
      found = features(reply.text, d.scenario, [], []).strategies
      shown.append(found.keys())
      matched.append(need in found)
  shares = {name: _mean([name in found for found in shown]) for name in STRATEGIES}
  return {
    **{f"strategies/{name}": share for name, share in shares.items()},
    "strategies/distinct": sum(share >= USED for share in shares.values()),
    "strategies/matched": _mean(matched),
  }


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if values else math.nan
