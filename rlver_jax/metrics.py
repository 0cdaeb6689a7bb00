"""Metrics of a run: what is measured, where it is written, what a user sees of it.

Each step gives one flat dictionary of numbers. It goes as one line to `metrics.jsonl`, the
record that resuming, the summary and the reports read, and through clu to TensorBoard and the
log. Names are `group/name`:

  emotion/*, dialogue/*, tokens/*, format/*, simulator/*, strategies/*
                                  of the dialogues, from `dialogue/statistics.py`
  environment/*   by level of difficulty, from `environment.level_metrics`
  remote/*                        counts of a remote simulated user: requests, tokens, failures
  rows/*, reward/*                what is learned from, from `collect.make_experience`
  advantage/*, kl/*, mismatch/*   from `rl/prepare.py` (advantages before they are whitened)
  update/*, critic/*              from the updates of policy and critic
  sft/*                           losses of supervised training, whose other metrics are as above
  compile/*, sampler/*            programs that were compiled, and what the engines did
  seconds/step, seconds/<stage>   wall time of the whole step, and of stages from `StageTimer`
  reward/mean, tokens/per_second, update/loss, update/clip_fraction
                                  from the loop and the update; `progress_line` shows them
"""

import collections
import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rlver_jax import files
from rlver_jax.errors import UserError

METRICS_FILE, SUMMARY_FILE, CHECKPOINTS = "metrics.jsonl", "summary.json", "checkpoints"


class MetricsWriter:
  """Writes each step's metrics to `metrics.jsonl`, and through clu to TensorBoard and the log.

  `<workdir>/metrics.jsonl` has one JSON object a line: "step", then the names in order; NaN and
  infinities are null. A line is on disk when `write` returns; one that a kill cut short is
  dropped on opening. With `logdir_tensorboard`, event files go to `<workdir>/tensorboard` and
  each step to absl's log at INFO, from a background thread that first imports TensorFlow for
  seconds. Of several processes the first one writes. Raises UserError for any other line.
  """

  def __init__(self, workdir: str | os.PathLike, logdir_tensorboard: bool = True):
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._path = pathlib.Path(workdir) / METRICS_FILE
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      _replace(self._path, "".join(_lines(self._path)))
    self._steps = {record["step"] for record in read_metrics(workdir)}
    self._file = self._path.open("a", encoding="utf-8")
    self._jobs, self._pool = collections.deque(), None
    if logdir_tensorboard:
      self._pool = concurrent.futures.ThreadPoolExecutor(1, "metrics")
      self._clu = self._pool.submit(_clu_writer, str(self._path.parent / "tensorboard"))
      self._jobs.append(self._clu)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes one step; a step whose line is there already is left as it is.

    Values may be Python, NumPy or JAX scalars. What the background thread raised is raised here.
    """
    if not self._writes or step in self._steps:
      return
    values = {name: np.asarray(scalars[name]).item() for name in sorted(scalars)}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._file.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
    self._file.flush()
    os.fsync(self._file.fileno())
    self._steps.add(step)
    if self._pool:
      self._jobs.append(self._pool.submit(lambda: self._clu.result().write_scalars(step, values)))
    while self._jobs and self._jobs[0].done():
      self._jobs.popleft().result()

  def truncate(self, step: int) -> None:
    """Removes the lines of steps after `step`, which a resumed run writes again."""
    if not self._writes:
      return
    self._file.close()
    kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step]
    _replace(self._path, "".join(kept))
    self._steps = {s for s in self._steps if s <= step}
    self._file = self._path.open("a", encoding="utf-8")

  def close(self) -> None:
    """Returns when everything is written, and ends the background thread."""
    if not self._writes:
      return
    self._file.close()
    if self._pool:
      self._jobs.append(self._pool.submit(lambda: self._clu.result().close()))
      self._pool.shutdown()
    while self._jobs:
      self._jobs.popleft().result()


def _clu_writer(logdir: str) -> Any:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow greets on stderr otherwise,
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # and about oneDNN whatever the level
  import tensorflow as tf
  from clu import metric_writers

  tf.config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
  log, tensorboard = metric_writers.LoggingWriter(), metric_writers.SummaryWriter(logdir)
  return metric_writers.MultiWriter([log, tensorboard])


def _lines(path: pathlib.Path) -> list[str]:
  """The complete lines of a file, each with its line break."""
  *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
  return [line + "\n" for line in lines]


def _replace(path: pathlib.Path, text: str) -> None:
  with files.replacing(path) as file:
    file.write(text)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The complete lines of `<workdir>/metrics.jsonl`, in order; none if there is no such file.

  Raises UserError for a line that is not a JSON object with an integer "step".
  """
  path = pathlib.Path(workdir) / METRICS_FILE
  records = []
  for number, line in enumerate(_lines(path) if path.exists() else (), 1):
    try:
      record = json.loads(line)
    except ValueError:
      record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
      raise UserError(
        f'{path} line {number} is {line.strip()[:60]!r}, expected a JSON object with a "step".'
      )
    records.append(record)
  return records


class StageTimer:
  """Adds up wall seconds by stage: `with timer("rollout"): ...`."""

  def __init__(self):
    self._seconds: dict[str, float] = collections.defaultdict(float)

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
      yield
    finally:
      self._seconds[stage] += time.perf_counter() - start

  def take(self) -> dict[str, float]:
    """Seconds by stage since the last call."""
    seconds, self._seconds = self._seconds, collections.defaultdict(float)
    return dict(seconds)


class CompileCounter:
  """Counts the programs that XLA compiles from now on.

  count, seconds: programs compiled, and the time that took.
  cached: programs read from the persistent compilation cache instead.
  """

  def __init__(self):
    self.count, self.seconds, self.cached = 0, 0.0, 0
    self._lock, self._thread = threading.Lock(), threading.local()
    jax.monitoring.register_event_listener(self._on_event)
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)

  def metrics(self) -> dict[str, float]:
    """Its numbers by their names."""
    return {
      "compile/programs": self.count,
      "compile/from_cache": self.cached,
      "compile/seconds": self.seconds,
    }

  def _on_event(self, event: str, **_: Any) -> None:
    # JAX reports a hit from inside the span that it then reports as a compilation.
    if event == "/jax/compilation_cache/cache_hits":
      self._thread.hit = True

  def _on_duration(self, event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      hit, self._thread.hit = getattr(self._thread, "hit", False), False
      with self._lock:
        self.cached += hit
        self.count += not hit
        self.seconds += 0.0 if hit else duration


def progress_line(step: int, steps: int, scalars: dict[str, float], seconds_per_step: float) -> str:
  """One line under 120 columns after `step` of `steps` (from 1), of the `scalars` that exist."""
  shown = {
    "emotion/final_mean": "emotion {:.1f}",
    "reward/mean": "reward {:.2f}",
    "emotion/success_rate": "success {:.0%}",
    "emotion/failure_rate": "failure {:.0%}",
    "update/loss": "loss {:.2g}",
    "sft/loss": "loss {:.4f}",
    "sft/held_out_loss": "held out {:.4f}",
    "update/clip_fraction": "clip {:.2g}",
    "tokens/per_second": "{:,.0f} tok/s",
  }
  parts = [f"step {step}/{steps} ({clock((steps - step) * seconds_per_step)} left)"]
  parts += [text.format(float(scalars[name])) for name, text in shown.items() if name in scalars]
  while len(line := "  ".join(parts)) >= 120:
    parts.pop()
  return line


def summary(workdir: str | os.PathLike) -> dict[str, Any]:
  """What a run came to, from its metrics: JSON values, None where nothing was measured.

  The first and last emotion average the mean final emotion over the first and last tenth of the
  steps (at least one), the best is that of best_step alone; the other numbers are sums.
  """
  records, totals = read_metrics(workdir), collections.Counter()
  for record in records:
    totals.update({name: value or 0 for name, value in record.items()})
  final = "emotion/final_mean"
  scored = [record for record in records if record.get(final) is not None]
  curve = [record[final] for record in scored]
  tenth = -(-len(curve) // 10)
  best = max(scored, key=lambda record: record[final], default={})
  stages = sorted(name for name in totals if name.startswith("seconds/") and name != "seconds/step")
  return {
    "steps": len(records),
    "first_emotion": float(np.mean(curve[:tenth])) if curve else None,
    "last_emotion": float(np.mean(curve[-tenth:])) if curve else None,
    "best_emotion": best.get(final),
    "best_step": best.get("step"),
    "seconds": totals["seconds/step"],
    "tokens": round(totals["tokens/policy"] + totals["tokens/simulator"]),
    "stage_seconds": {name.removeprefix("seconds/"): totals[name] for name in stages},
    "checkpoints": str(pathlib.Path(workdir) / CHECKPOINTS),
  }


def write_summary(workdir: str | os.PathLike, extra: dict[str, Any]) -> dict[str, Any]:
  """Writes the summary with the JSON values `extra` to `<workdir>/summary.json`; returns it."""
  return save_summary(workdir, {**summary(workdir), **extra})


def save_summary(workdir: str | os.PathLike, result: dict[str, Any]) -> dict[str, Any]:
  """Writes a summary of any run to `<workdir>/summary.json`, from one process; returns it."""
  if jax.process_index() == 0:
    _replace(pathlib.Path(workdir) / SUMMARY_FILE, json.dumps(result, indent=2) + "\n")
  return result


def format_summary(result: dict[str, Any]) -> str:
  """A summary as a few lines for the terminal; what `write_summary` added comes last.

  Tables in it are left out: `closing.describe` shows them.
  """
  r, rows = dict(result), {}
  rows["steps"] = f"{r.pop('steps')} in {clock(r.pop('seconds'))}, {r.pop('tokens'):,} tokens"
  emotions = [r.pop(f"{name}_emotion") for name in ("first", "last", "best")]
  first, last, best = ("none" if e is None else f"{e:.1f}" for e in emotions)
  rows["emotion"] = f"first {first}, last {last}, best {best} at step {r.pop('best_step')}"
  rows["time"] = ", ".join(f"{name} {clock(s)}" for name, s in r.pop("stage_seconds").items())
  rows |= {name: value for name, value in r.items() if not isinstance(value, dict)}
  return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def clock(seconds: float) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
