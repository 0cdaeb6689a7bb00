"""What a supervised run tells: a line of metrics for the steps since the last one, and a summary.

A step's numbers stay on the device until a line is due, so that the host prepares one step while
the device computes the one before.
"""

import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlver_jax import metrics as metrics_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.errors import Diverged
from rlver_jax.models.attention import PADDING
from rlver_jax.rl.rows import Rows


class Progress:
  """The lines of a run in `workdir`.

  nonfinite: how many of the last updates in a row were skipped, as of the last line. loss: that
  of the last line, on the examples kept apart where there are any; NaN where it was not measured.
  """

  def __init__(
    self, config: ConfigDict, workdir: pathlib.Path, compiles: metrics_lib.CompileCounter
  ):
    self.nonfinite, self.loss = 0, float("nan")
    self._config, self._workdir, self._compiles = config, workdir, compiles
    self._writer = metrics_lib.MetricsWriter(workdir, config.log.tensorboard)
    self._forget()

  def start(self, step: int, nonfinite: int) -> None:
    """The run begins, or goes on, after `step` steps."""
    with workdir_lib.writing(self._workdir):
      self._writer.truncate(step)
    self.nonfinite = nonfinite
    self._forget()

  def _forget(self) -> None:
    self._began, self._tokens, self._positions = time.perf_counter(), 0, 0
    self._numbers: list[dict[str, jax.Array]] = []

  def add(self, rows: Rows, numbers: dict[str, jax.Array]) -> None:
    """Takes a step's rows, and what `SupervisedLearner.learn` gave; waits for the step before."""
    self._tokens += int(np.sum(rows.branch != PADDING))
    self._positions += rows.branch.size
    self._numbers.append(numbers)
    jax.block_until_ready(self._numbers[-2:][0])  # so that a signal is answered soon

  def write(self, step: int, extra: dict[str, float]) -> None:
    """Writes the line at `step`; none where no step was taken.

    extra: more metrics; the seconds of stages beside the steps are not part of their speed.
    Raises Diverged, after the line, where too many updates in a row were not finite.
    """
    if not self._numbers:
      return
    numbers = jax.device_get(self._numbers)
    seconds = time.perf_counter() - self._began
    beside = sum(value for name, value in extra.items() if name.startswith("seconds/"))
    scalars = _means(numbers) | self._compiles.metrics()
    scalars |= {
      "rows/fill": self._tokens / self._positions,
      "tokens/per_second": self._tokens / (seconds - beside),
      "seconds/step": seconds / len(numbers),
    }
    scalars |= extra
    compared = "sft/held_out_loss" if self._config.data.held_out else "sft/loss"
    self.loss = scalars.get(compared, float("nan"))
    with workdir_lib.writing(self._workdir):
      self._writer.write(step, scalars)
    steps = self._config.steps
    line = metrics_lib.progress_line(step, steps, scalars, scalars["seconds/step"])
    print(line, flush=True)
    self._forget()
    self._count(step, [bool(n["skipped"]) for n in numbers])

  def _count(self, step: int, skipped: list[bool]) -> None:
    for skip in skipped:
      self.nonfinite = self.nonfinite + 1 if skip else 0
      if self.nonfinite >= self._config.training.max_nonfinite:
        raise Diverged.after(self.nonfinite, step)

  def close(self) -> None:
    """Returns when everything is written."""
    self._writer.close()


def _means(numbers: list[dict[str, np.ndarray]]) -> dict[str, float]:
  """What the steps of a line gave: the loss is a mean over their tokens, the others over steps."""
  tokens = np.array([n["tokens"] for n in numbers], np.float64)
  losses = np.array([n["loss"] for n in numbers], np.float64)
  return {
    "sft/loss": float(np.average(losses, weights=tokens)),
    "update/gradient_norm": float(np.mean([n["gradient_norm"] for n in numbers])),
    "update/skipped": float(np.mean([n["skipped"] for n in numbers])),
    "rows/trained_tokens": float(tokens.mean()),
  }


def write_summary(workdir: pathlib.Path) -> dict[str, Any]:
  """Writes the summary to `<workdir>/summary.json`; returns it."""
  with workdir_lib.writing(workdir):
    return metrics_lib.save_summary(workdir, summary(workdir))


def summary(workdir: pathlib.Path) -> dict[str, Any]:
  """What a run came to, from its metrics: losses in nats a token, None where none was measured."""
  records = metrics_lib.read_metrics(workdir)
  losses = [r["sft/loss"] for r in records if r.get("sft/loss") is not None]
  kept_apart = [r for r in records if r.get("sft/held_out_loss") is not None]
  best = min(kept_apart, key=lambda r: r["sft/held_out_loss"], default={})
  ends = [r["step"] for r in records]
  seconds = [
    steps * r["seconds/step"] for steps, r in zip(np.diff([0, *ends]), records, strict=True)
  ]
  tokens = sum(s * r["tokens/per_second"] for s, r in zip(seconds, records, strict=True))
  return {
    "steps": ends[-1] if ends else 0,
    "first_loss": losses[0] if losses else None,
    "last_loss": losses[-1] if losses else None,
    "held_out_loss": kept_apart[-1]["sft/held_out_loss"] if kept_apart else None,
    "best_held_out_loss": best.get("sft/held_out_loss"),
    "best_step": best.get("step"),
    "seconds": float(sum(seconds)),
    "tokens": round(tokens),
    "checkpoints": str(workdir / metrics_lib.CHECKPOINTS),
  }


def describe(result: dict[str, Any], *_: Any) -> str:
  """A summary as a few lines for the terminal; what it was made from is not needed."""

  def loss(name: str) -> str:
    return "none" if result[name] is None else f"{result[name]:.4f}"

  rows = {
    "steps": f"{result['steps']} in {result['seconds']:.0f} s, {result['tokens']:,} tokens",
    "loss": f"first {loss('first_loss')}, last {loss('last_loss')}",
  }
  if result["held_out_loss"] is not None:
    best = f"best {loss('best_held_out_loss')} at step {result['best_step']}"
    rows["held out"] = f"last {loss('held_out_loss')}, {best}"
  rows["checkpoints"] = result["checkpoints"]
  return "\n".join(f"{name:<12} {value}" for name, value in rows.items())
