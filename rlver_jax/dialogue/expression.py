"""How openly a user's message shows what the user needs: a measure for any simulated user.

RLVER compares its environments by how much of the need a user expresses. Here a message counts

  1    where it asks for what the hidden intention is (a cue of the list `said`),
  0.5  where it only lets that be guessed (a cue of `hinted`),
  0    otherwise,

by word lists of the intention in the message's language (`assets/scripted/`). The lists know
nothing of who wrote the message; a negation does not count, as "nobody listens" shows the need
for a listener. The degree of expression of a set of messages is the mean.
"""

from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators import lexicon as lexicon_lib

SAID, HINTED = 1.0, 0.5


def expression(message: str, scenario: Scenario) -> float:
  """The degree to which a message of the scenario's user shows the hidden intention: 0, 0.5, 1."""
  lexicon = lexicon_lib.load(scenario.language)
  for degree, cues in ((SAID, lexicon.said), (HINTED, lexicon.hinted)):
    if _has(message, cues[scenario.intention], scenario.language):
      return degree
  return 0.0


def names_feeling(message: str, language: str) -> bool:
  """Whether a message has a word for a feeling."""
  return _has(message, lexicon_lib.load(language).feelings, language)


def _has(message: str, phrases: tuple[str, ...], language: str) -> bool:
  found = lexicon_lib.sentences(lexicon_lib.plain(message), language)
  return any(lexicon_lib.has_word(sentence, phrases) for sentence in found)
