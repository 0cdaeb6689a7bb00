"""How hard a simulated user is: where it starts, how openly it shows its need, what it accepts.

RLVER (arXiv 2507.03112) trains with users of two kinds, one of which accepts less and shows less,
and finds that the moderate one can be the better teacher. Here a level is a set of numbers and
template texts of its own (`prompts/{level}/`, see `templates.py`), so that each of the things
that make a user hard can be changed by itself. `vanilla` is the published set-up and changes
nothing. `environment.py` says which level a dialogue has.
"""

import dataclasses
import math

from rlver_jax.dialogue.emotion import MAX_CHANGE

NAMES = ("easy", "vanilla", "challenging")  # in the order of a curriculum


@dataclasses.dataclass(frozen=True)
class Level:
  """A level's numbers; the defaults are those of `vanilla`.

  For every simulated user:
    emotion_offset: added to the initial emotion.
    gain, loss: a change above or below zero is multiplied by this, see `felt`.
  For the scripted user (a language model reads the level's templates instead):
    leniency: points on top for a reply that does not meet the need about the user's own story;
      below zero, points less. A reply that does is judged alike, so that no level is beyond reach.
    hints: the share of its messages without a hint at the hidden intention that get one; below
      zero, the share of those with a hint that lose it. In -1..1.
    plain: the share of its hints that say plainly what it needs. In 0..1.
  """

  name: str
  emotion_offset: int = 0
  gain: float = 1.0
  loss: float = 1.0
  leniency: int = 0
  hints: float = 0.0
  plain: float = 0.0

  def felt(self, change: int) -> int:
    """The change of emotion that an appraisal's change comes to: an integer in -10..10.

    Halves are rounded away from zero, and a change keeps its sign: whether a reply is accepted
    is up to the appraisal.
    """
    scale = self.gain if change > 0 else self.loss
    size = min(MAX_CHANGE, max(1, math.floor(abs(change) * scale + 0.5)))
    return 0 if change == 0 else int(math.copysign(size, change))


VANILLA = Level("vanilla")
