"""What a dialogue earns, and when: the emotion it ended with, or each change of emotion."""

import dataclasses

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.simulators.appraisal import repeats


@dataclasses.dataclass(frozen=True)
class RewardSettings:
  """Fields as in configs/recipe.py, section `reward`, and `dialogue.*_penalty`."""

  kind: str
  final_weight: float
  change_weight: float
  malformed_penalty: float
  repeated_penalty: float


def turn_rewards(dialogue: Dialogue, settings: RewardSettings) -> list[float]:
  """The reward of each of the policy's replies, in order; their sum is the dialogue's.

  The last reply earns max(final emotion, 0) / 100 (`final`, `both`), less the penalty times the
  share of replies without a well-formed thought; each reply earns the change of emotion that
  followed / 100 (`change`, `both`; a last reply that was not appraised earns none). A reply of
  which most was said before (`said_again`) loses the penalty for that, over the number of replies.
  Empty for a dialogue without replies, and for one whose user failed: it has no final
  emotion.
  """
  if dialogue.failed:
    return []
  replies = dialogue.replies
  if not replies:
    return []
  rewards = [0.0] * len(replies)
  if settings.kind != "final":
    emotions = [dialogue.rules.initial_emotion, *(turn.emotion for turn in dialogue.turns)]
    for i in range(len(dialogue.turns)):
      change = emotions[i + 1] - emotions[i]
      rewards[i] += settings.change_weight * change / emotion_lib.MAX_EMOTION
  if settings.kind != "change":
    rewards[-1] += settings.final_weight * emotion_lib.reward(dialogue.emotion)
  malformed = sum(not reply.well_formed for reply in replies) / len(replies)
  rewards[-1] -= settings.malformed_penalty * malformed
  if settings.repeated_penalty:
    for i, again in enumerate(said_again(dialogue)):
      rewards[i] -= settings.repeated_penalty * again / len(replies)
  return rewards


def said_again(dialogue: Dialogue) -> list[bool]:
  """For each reply whether most of it was said before: in an earlier one, or in itself."""
  texts = [reply.text for reply in dialogue.replies]
  language = dialogue.scenario.language
  return [repeats(text, texts[:i], language) for i, text in enumerate(texts)]
