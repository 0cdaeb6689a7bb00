"""What tells one run from another: held-out dialogues, how training went, what replies are like.

Held-out dialogues of two runs are on the same scenarios, with the same simulated users at the same
level, so that runs of any mode, algorithm or level of training compare, scenario by scenario.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from rlver_jax import heldout
from rlver_jax import metrics as metrics_lib
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.statistics import STRATEGIES, strategy_metrics
from rlver_jax.errors import UserError
from rlver_jax.evaluation import fidelity
from rlver_jax.evaluation.judges import rubrics, scripted
from rlver_jax.evaluation.judges.base import CAPABILITIES
from rlver_jax.page import statistics, tables
from rlver_jax.page.reading import Run
from rlver_jax.page.statistics import Estimate
from rlver_jax.page.tables import Table

FINAL = "emotion/final_mean"


@dataclasses.dataclass(frozen=True)
class Difference:
  """How much higher the held-out dialogues of `one` end than those of `other`, in points.

  user: the kind of simulated user; when: one of `heldout.WHENS`. scenarios: how many both have
  with a user that did not fail. found: the mean difference with its interval over scenarios.
  """

  one: str
  other: str
  user: str
  when: str
  scenarios: int
  found: Estimate


def differences(
  runs: Mapping[str, Run], pairs: Sequence[tuple[str, str]], whens: Sequence[str] = heldout.WHENS
) -> list[Difference]:
  """For each pair of names, user and time the difference, where both runs have such dialogues.

  Raises UserError for a name that is no run's, and for a pair that has no scenario in common.
  """
  found = []
  for pair in pairs:
    one, other = (of_name(runs, name) for name in pair)
    count = len(found)
    for user, of_one in one.held_out.items():
      of_other = other.held_out.get(user, {})
      for when in whens:
        changes = _changes(of_other.get(when, []), of_one.get(when, []))
        if (mean := statistics.mean(changes)) is not None:
          found.append(Difference(*pair, user, when, len(changes), mean))
    if len(found) == count:
      raise UserError(
        f"the runs '{pair[0]}' and '{pair[1]}' have no held-out scenario in common, expected runs "
        "with the same evaluation.path."
      )
  return found


def names(pairs: Sequence[tuple[str, str]]) -> list[str]:
  """The names in pairs, each once, of a pair the second first."""
  return list(dict.fromkeys(name for pair in pairs for name in reversed(pair)))


def of_name(runs: Mapping[str, Run], name: str) -> Run:
  """The run of this name; UserError where there is none."""
  if name not in runs:
    raise UserError(f"no run is called '{name}', expected one of: {', '.join(runs)}.")
  return runs[name]


def _changes(theirs: Sequence[Dialogue], ours: Sequence[Dialogue]) -> list[int]:
  """By how much ours end above theirs on each scenario that both have."""
  final = {d.scenario.id: d.emotion for d in theirs if not d.failed}
  return [d.emotion - final[d.scenario.id] for d in ours if not d.failed and d.scenario.id in final]


def differences_table(found: Sequence[Difference]) -> Table:
  """A row for each pair and user: the differences before and after training."""
  head = ["runs", "user", "scenarios", *heldout.WHENS]
  note = "Final emotion of the first run less that of the second, in points, on the same held-out "
  note += "scenarios; in brackets the 95% interval of the mean, over scenarios."
  cells: dict[tuple[str, str], dict[str, Difference]] = {}
  for d in found:
    cells.setdefault((f"{d.one} − {d.other}", d.user), {})[d.when] = d
  rows = [
    [
      pair,
      heldout.label(user),
      str(max(d.scenarios for d in whens.values())),
      *(tables.signed(whens[w].found) if w in whens else tables.NONE for w in heldout.WHENS),
    ]
    for (pair, user), whens in cells.items()
  ]
  return tables.make("Difference of final emotion", note, head, rows)


@dataclasses.dataclass(frozen=True)
class Course:
  """How the mean final emotion of a run went from step to step of its training, in points.

  best: the highest of a step, at best_step; last: mean of the last tenth of the steps; lost: how
  far that is below the best. wobble: mean absolute change from one step to the next, None of a
  single step.
  """

  steps: int
  best: float
  best_step: int
  last: float
  lost: float
  wobble: float | None


def course(run: Run) -> Course | None:
  """From the run's metrics; None where no step has a final emotion."""
  told = metrics_lib.summary(run.folder)
  curve = [record[FINAL] for record in run.metrics if record.get(FINAL) is not None]
  if not curve:
    return None
  best, last = told["best_emotion"], told["last_emotion"]
  wobble = float(np.abs(np.diff(curve)).mean()) if len(curve) > 1 else None
  return Course(len(curve), best, told["best_step"], last, best - last, wobble)


def course_table(runs: Mapping[str, Run]) -> Table:
  """A row for each run that has a final emotion."""
  head = ["run", "steps", "best (step)", "last", "lost since the best", "from step to step"]
  note = "Mean final emotion of the dialogues of a step of training, in points: its highest value, "
  note += "its mean over the last tenth of the steps, how far that is below the highest, and the "
  note += "mean size of its change from a step to the next. A part of both is chance."
  rows = []
  for name, run in runs.items():
    if (c := course(run)) is not None:
      wobble = tables.NONE if c.wobble is None else f"{c.wobble:.1f}"
      rows.append([name, f"{c.steps}", f"{c.best:.1f} ({c.best_step})", f"{c.last:.1f}"])
      rows[-1] += [f"{c.lost:.1f}", wobble]
  return tables.make("Ceiling and stability", note, head, rows)


def own_dialogues(run: Run, when: str = "after") -> list[Dialogue]:
  """The held-out dialogues with the run's own simulated user; UserError where there are none."""
  found = run.held_out.get(run.config.simulator.kind, {}).get(when, [])
  if not any(not d.failed for d in found):
    raise UserError(
      f"the run '{run.name}' has no held-out dialogues from {when} training, expected one that has "
      "ended, with evaluation.path."
    )
  return found


def capabilities(dialogues: Sequence[Dialogue]) -> dict[str, Estimate | None]:
  """The five core capabilities, from 1 to 5, as the scripted judge sees them in word lists.

  A look without a model; the task `capabilities` asks a judge. None where no reply was appraised.
  """
  judged = [d for d in dialogues if d.turns and not d.failed]
  texts = {name: rubrics.load(name) for name in {d.scenario.language for d in judged}}
  marks = [scripted.judge(fidelity.recorded(d), texts[d.scenario.language]).scores for d in judged]
  return {name: statistics.mean([mark[name] for mark in marks]) for name in CAPABILITIES}


def strategies(dialogues: Sequence[Dialogue]) -> dict[str, float]:
  """The share of replies that show each of the strategies that meet a need, in 0..1."""
  found = strategy_metrics(dialogues)
  return {name: found[f"strategies/{name}"] for name in STRATEGIES}
