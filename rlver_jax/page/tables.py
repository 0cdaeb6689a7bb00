"""The tables of a page: what runs came to, held-out dialogues before and after, benchmarks.

A table has a title, a note (or ""), a head and rows, all of text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlver_jax import closing, heldout
from rlver_jax import metrics as metrics_lib
from rlver_jax.evaluation import board, scores
from rlver_jax.evaluation import tables as rows_lib
from rlver_jax.page.reading import Run
from rlver_jax.page.statistics import Estimate, mean

Table = dict[str, Any]
NONE = "–"
# Of the last tenth of the steps: the table's head, the metric, and how it is written.
_LAST = {
  "success": ("emotion/success_rate", "{:.0%}".format),
  "failure": ("emotion/failure_rate", "{:.0%}".format),
  "turns": ("dialogue/turns_mean", "{:.1f}".format),
  "tokens of a reply": ("tokens/reply_mean", "{:.0f}".format),
}
_LOSSES = {"loss": "sft/loss", "held-out loss": "sft/held_out_loss"}


def of(runs: Sequence[Run]) -> list[Table]:
  """The tables that there is something for."""
  found = [_training([run for run in runs if run.config.task == "rl"])]
  found += [_held_out(runs), _supervised([run for run in runs if run.config.task == "sft"])]
  found += _benchmarks({run.name: run for run in runs if run.config.task == "benchmark"})
  return [table for table in found if table["rows"]]


def markdown(table: Table) -> str:
  """A table as GitHub's Markdown, its title in bold above it and its note below."""
  rows = rows_lib.markdown([table["head"], *table["rows"]])
  return "\n\n".join(filter(None, (f"**{table['title']}**", rows, table["note"])))


def make(title: str, note: str, head: Sequence[str], rows: list[list[str]]) -> Table:
  return {"title": title, "note": note, "head": list(head), "rows": rows}


def _training(runs: Sequence[Run]) -> Table:
  head = ["run", "policy", "user", "steps", "emotion, first", "last", "best (step)", *_LAST]
  head += ["tokens", "time"]
  note = "Emotion is the mean final emotion of the dialogues of training, of the first and of the "
  note += "last tenth of the steps; success, failure, turns and tokens of a reply are of the last."
  return make("Training", note, head, [_training_row(run) for run in runs])


def _training_row(run: Run) -> list[str]:
  c, s = run.config, metrics_lib.summary(run.folder)
  user = heldout.label(c.simulator.kind)
  tenth = run.metrics[-max(1, (len(run.metrics) + 9) // 10) :]
  last = []
  for metric, written in _LAST.values():
    values = [record[metric] for record in tenth if record.get(metric) is not None]
    last.append(written(float(np.mean(values))) if values else NONE)
  emotions = [
    NONE if s[name] is None else f"{s[name]:.1f}" for name in ("first_emotion", "last_emotion")
  ]
  best = NONE if s["best_emotion"] is None else f"{s['best_emotion']:.1f} ({s['best_step']})"
  steps = f"{s['steps']} of {c.steps}"
  cost = [f"{s['tokens']:,}", metrics_lib.clock(s["seconds"])]
  return [run.name, c.policy.path, user, steps, *emotions, best, *last, *cost]


def _held_out(runs: Sequence[Run]) -> Table:
  head = ["run", "user", "scenarios", *closing.COLUMNS, "change of emotion"]
  note = "Before → after training. In brackets the 95% interval of the change, over scenarios."
  rows = []
  for run in runs:
    numbers = heldout.numbers(run.held_out)
    for user, whens in run.held_out.items():
      cells = []
      for name, written in closing.COLUMNS.values():
        pair = [numbers[user].get(when, {}).get(name) for when in heldout.WHENS]
        cells.append(" → ".join(NONE if n is None else written(n) for n in pair))
      count = str(len(next(iter(whens.values()))))
      rows.append([run.name, heldout.label(user), count, *cells, _gain(whens)])
  return make("Held-out scenarios, before and after", note, head, rows)


def _gain(whens: dict[str, list]) -> str:
  if len(whens) < len(heldout.WHENS):
    return NONE
  return signed(mean([gain for gain in heldout.gains(*whens.values()) if gain is not None]))


def signed(found: Estimate | None) -> str:
  """A difference with its interval in brackets; a dash where there is none."""
  if found is None:
    return NONE
  bounds = "" if found.low is None else f" [{found.low:+.1f}, {found.high:+.1f}]"
  return f"{found.value:+.1f}{bounds}"


def _supervised(runs: Sequence[Run]) -> Table:
  rows = []
  for run in runs:
    last = run.metrics[-1] if run.metrics else {}
    losses = [last.get(metric) for metric in _LOSSES.values()]
    written = [NONE if loss is None else f"{loss:.4f}" for loss in losses]
    rows.append([run.name, run.config.policy.path, f"{last.get('step', 0)} of {run.config.steps}"])
    rows[-1] += written
  return make("Supervised training", "", ["run", "model", "steps", *_LOSSES], rows)


def _benchmarks(runs: dict[str, Run]) -> list[Table]:
  found = {
    name: [scored for _, scored in run.benchmark if scored is not None]
    for name, run in runs.items()
  }
  counted = {name: scored for name, scored in found.items() if scored}
  if not counted:
    return [make("Benchmark", "", [], [])]
  note = "Score is the mean final emotion with its bootstrap interval; tokens are of a reply."
  ordered = dict(sorted(counted.items(), key=lambda item: -scores.score(item[1]).mean))
  tables = [_of_board("Benchmark", note, board.models(ordered, None))]
  if len(ordered) > 1:
    paired = "On the scenarios that both have; p of a paired permutation test."
    tables.append(_of_board("Benchmark, differences", paired, board.comparison(ordered)))
  return tables + [
    _of_board(f"Benchmark of {name}, by groups", "", board.groups(scored))
    for name, scored in counted.items()
  ]


def _of_board(title: str, note: str, rows: rows_lib.Rows) -> Table:
  head, *body = rows_lib.shown(rows)
  return make(title, note, head, body)
