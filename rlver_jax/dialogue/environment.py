"""Which level of difficulty each group of dialogues has: one for all, a mixture, or a curriculum.

    easy, vanilla, challenging   every dialogue of the run
    mixture                      drawn for each group, by weights; a function of (seed, step, group)
    curriculum                   one level a step, moved by the running mean of the final emotion

The dialogues of a group share a level, so that what a group-relative advantage compares was
judged alike. Final emotions of different levels do not compare: the metrics are by level.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlver_jax import draws
from rlver_jax.dialogue import levels as levels_lib
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.levels import Level

KINDS = (*levels_lib.NAMES, "mixture", "curriculum")
METADATA = "environment"  # the key of `Environment.state` in a checkpoint's metadata


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Begins at the level `start`. After `window` steps at one level it moves to the next harder
  one where the mean final emotion of the last `window` of them is at least `raise_at`, and to
  the next easier one where it is at most `lower_at`; then it counts anew."""

  start: str
  window: int
  raise_at: float
  lower_at: float


class Environment:
  """The levels of a run's dialogues, step by step.

  Args:
    kind: one of KINDS.
    levels: the levels by name.
    weights: of a mixture, by name; they need not add up to 1.
    curriculum: of a curriculum.
    seed: of the run.
  """

  def __init__(
    self,
    kind: str,
    levels: dict[str, Level],
    weights: dict[str, float],
    curriculum: Curriculum,
    seed: int,
  ):
    self.kind, self._levels, self._curriculum, self._seed = kind, levels, curriculum, seed
    self._names = played(kind, weights)
    self._shares = list(itertools.accumulate(weights[name] for name in self._names))
    self._at = curriculum.start
    self._recent: collections.deque[float] = collections.deque(maxlen=curriculum.window)

  def levels(self, step: int, groups: int) -> list[Level]:
    """The level of each group of a step (0-based)."""
    if self.kind == "mixture":
      return [self._levels[self._drawn(step, group)] for group in range(groups)]
    name = self._at if self.kind == "curriculum" else self.kind
    return [self._levels[name]] * groups

  def _drawn(self, step: int, group: int) -> str:
    share = draws.share(self._seed, "level", step, group)
    return self._names[bisect.bisect(self._shares, share * self._shares[-1])]

  def observe(self, dialogues: Sequence[Dialogue]) -> None:
    """Takes the finished dialogues of a step, which may move a curriculum. Those whose user failed
    have no final emotion."""
    finals = [d.emotion for d in dialogues if not d.failed]
    if self.kind != "curriculum" or not finals:
      return
    self._recent.append(float(np.mean(finals)))
    if len(self._recent) < self._curriculum.window:
      return
    mean, at = np.mean(self._recent), levels_lib.NAMES.index(self._at)
    move = int(mean >= self._curriculum.raise_at) - int(mean <= self._curriculum.lower_at)
    following = min(max(at + move, 0), len(levels_lib.NAMES) - 1)
    if following != at:
      self._at = levels_lib.NAMES[following]
      self._recent.clear()

  def state(self) -> dict[str, Any]:
    """What a resumed run needs beyond the step, as JSON: metadata of a checkpoint."""
    if self.kind != "curriculum":
      return {}
    return {METADATA: {"level": self._at, "recent": list(self._recent)}}

  def restore(self, metadata: dict[str, Any]) -> None:
    """Goes on from the metadata of a checkpoint that `state` is in."""
    if self.kind == "curriculum":
      self._at = metadata[METADATA]["level"]
      self._recent.clear()
      self._recent.extend(metadata[METADATA]["recent"])


def played(kind: str, weights: dict[str, float]) -> tuple[str, ...]:
  """The names of the levels that a run of this kind may play, the easiest first."""
  match kind:
    case "mixture":
      return tuple(name for name in levels_lib.NAMES if weights[name] > 0)
    case "curriculum":
      return levels_lib.NAMES
  return (kind,)


def level_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
  """Metrics of a batch of finished dialogues for each level that is in it: environment/{level}_*.

  Dialogues whose user failed count nowhere. dialogues: their number; final_mean: their mean final
  emotion; accepted: the share of replies that raised the emotion (NaN without any); spread: the
  mean over groups of the standard deviation of the final emotion in the group, which is all that a
  group-relative advantage sees.
  """
  metrics = {}
  for name in levels_lib.NAMES:
    own = [d for d in dialogues if d.rules.level.name == name and not d.failed]
    if not own:
      continue
    changes = [turn.plan.change for d in own for turn in d.turns]
    groups = collections.defaultdict(list)
    for d in own:
      groups[d.group].append(d.emotion)
    values = {
      "dialogues": len(own),
      "final_mean": np.mean([d.emotion for d in own]),
      "accepted": np.mean([change > 0 for change in changes]) if changes else np.nan,
      "spread": np.mean([np.std(emotions) for emotions in groups.values()]),
    }
    metrics |= {f"environment/{name}_{key}": float(value) for key, value in values.items()}
  return metrics
