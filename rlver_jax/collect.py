"""A step's experience: dialogues are played, rewarded and laid out as rows."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from rlver_jax.build import Run
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.environment import Environment
from rlver_jax.dialogue.reward import turn_rewards
from rlver_jax.dialogue.rollout import rollout
from rlver_jax.dialogue.scenario import batch_indices
from rlver_jax.permutation import permutation
from rlver_jax.rl import rows as rows_lib
from rlver_jax.rl.advantages import ESTIMATORS, SAME
from rlver_jax.rl.prepare import Experience
from rlver_jax.sources import Sources


@dataclasses.dataclass
class Played:
  """The dialogues of a step: `groups` are trained on, each a list of `group_size`; `baselines` are
  their greedy dialogues, where the estimator wants one; `dropped` are groups without signal that
  others took the place of."""

  groups: list[list[Dialogue]]
  baselines: list[Dialogue | None]
  dropped: list[list[Dialogue]]

  @property
  def trained(self) -> list[Dialogue]:
    """The dialogues of all groups, in batch order."""
    return [dialogue for group in self.groups for dialogue in group]

  @property
  def sampled(self) -> list[Dialogue]:
    """The dialogues of all groups, those that were dropped too: what the policy is measured by, as
    groups in which every user was content are among the dropped."""
    return [*self.trained, *(dialogue for group in self.dropped for dialogue in group)]

  @property
  def all(self) -> list[Dialogue]:
    """Every dialogue that was played."""
    greedy = [dialogue for dialogue in self.baselines if dialogue is not None]
    return [*self.trained, *greedy, *(d for group in self.dropped for d in group)]


def play(
  config: ConfigDict,
  sources: Sources,
  run: Run,
  environment: Environment,
  step: int,
  on_round: Callable[[], None],
) -> Played:
  """Plays the dialogues of one step (0-based), at the levels of difficulty that are its turn.

  With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), groups whose rewards are all equal
  are replaced by groups of the same level on scenarios drawn anew, for so many rounds; those that
  are then left stay.
  """
  number, length = config.dialogue.scenarios_per_step, len(sources.scenarios)
  chosen = batch_indices(length, step, number, config.seed)
  levels = environment.levels(step, number)
  played = _play_groups(config, sources, run, step, chosen, levels, 0, on_round)
  for again in range(1, config.algorithm.dynamic_sampling_rounds + 1):
    idle = [i for i, group in enumerate(played.groups) if not _has_signal(run, group)]
    if not idle:
      break
    # A permutation of its own for each step and round, none of them one of an epoch's.
    order = permutation(length, config.seed, 2**32 + 2**16 * step + again)
    others = [int(order[i % length]) for i in range(len(idle))]
    same = [levels[i] for i in idle]
    further = _play_groups(config, sources, run, step, others, same, again * number, on_round)
    for i, group in zip(idle, further.groups, strict=True):
      better, worse = (group, played.groups[i])
      if not _has_signal(run, group):
        better, worse = worse, better
      played.groups[i] = better
      played.dropped.append(worse)
  return played


def _play_groups(config, sources, run, step, chosen, levels, first_group, on_round) -> Played:
  size, greedy = config.dialogue.group_size, ESTIMATORS[config.algorithm.advantage] == "greedy"
  dialogues = rollout(
    run.policy,
    run.simulator,
    [sources.scenarios[i] for i in chosen],
    group_size=size,
    rules=run.rules,
    slots=run.slots,
    step=step,
    levels=levels,
    first_group=first_group,
    baselines=greedy,
    on_round=on_round,
  )
  stride = size + greedy
  groups = [dialogues[i : i + size] for i in range(0, len(dialogues), stride)]
  baselines = dialogues[size::stride] if greedy else [None] * len(groups)
  return Played(groups, baselines, [])


def _has_signal(run: Run, group: list[Dialogue]) -> bool:
  rewards = [total_reward(run, dialogue) for dialogue in group if not dialogue.failed]
  return bool(rewards) and max(rewards) - min(rewards) >= SAME


def total_reward(run: Run, dialogue: Dialogue) -> float:
  """What a dialogue earned in all: 0 where the policy said nothing, NaN where the user failed."""
  return math.nan if dialogue.failed else float(sum(turn_rewards(dialogue, run.reward)))


def make_experience(run: Run, played: Played) -> tuple[Experience, dict[str, float]]:
  """The step's rows with their rewards, and metrics of both.

  A dialogue whose user failed becomes a row of padding: it is absent from its group.
  """
  dialogues = played.trained
  segments = [[] if d.failed else d.segments for d in dialogues]
  longest = max(rows_lib.row_length(s) for s in segments)
  length = next(n for n in run.row_lengths if n >= longest)
  rows = rows_lib.make_rows(segments, length)
  rewards = [turn_rewards(d, run.reward) for d in dialogues]
  size = len(played.groups[0])
  baselines = [0.0 if d is None else total_reward(run, d) for d in played.baselines]
  experience = Experience(
    rows,
    rows_lib.place_rewards(segments, rewards, length),
    np.repeat(np.arange(len(played.groups), dtype=np.int32), size),
    np.repeat(np.float32(baselines), size),
  )
  totals = np.array([total_reward(run, d) for d in played.sampled if not d.failed] or [math.nan])
  metrics = {
    "rows/length": length,
    "rows/longest": longest,
    "rows/trained_tokens": int(rows.mask.sum()),
    "reward/mean": float(totals.mean()),
    "reward/std": float(totals.std()),
  }
  if ESTIMATORS[run.learner.settings.estimator] == "group":
    idle = [not _has_signal(run, group) for group in played.groups]
    metrics["reward/groups_without_signal"] = float(np.mean(idle))
    metrics["reward/groups_replaced"] = len(played.dropped)
  return experience, metrics
