"""The reinforcement-learning loop: dialogues, rows, advantages, update, metrics, checkpoint."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rlver_jax import build as build_lib
from rlver_jax import config as config_lib
from rlver_jax import metrics as metrics_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.rollout import rollout
from rlver_jax.dialogue.scenario import batch_indices
from rlver_jax.errors import BudgetSpent, UserError
from rlver_jax.interrupt import Interrupted, Interrupts
from rlver_jax.rl import advantages as advantages_lib
from rlver_jax.rl import rows as rows_lib
from rlver_jax.rl.update import TrainState, sampling_copy
from rlver_jax.sources import Sources


class Diverged(Exception):
  """Too many updates in a row were not finite; the last finite state has been saved."""


def train(
  config: ConfigDict, sources: Sources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Runs, or goes on with, the run of `config` in `workdir`; returns the run's summary.

  Raises Interrupted after saving when asked to stop, BudgetSpent after saving when a budget is,
  Diverged when updates stay non-finite, UserError when `workdir` cannot be written or holds what is
  damaged.
  """
  compiles = metrics_lib.CompileCounter()
  checkpoints = Checkpoints(str(workdir / "checkpoints"), config.checkpoint.keep)
  if checkpoints.latest() is not None and checkpoints.latest() >= config.steps:
    print(
      f"The run in {workdir} has all its {config.steps} steps; a larger --config.steps goes on."
    )
    checkpoints.close()
    return metrics_lib.write_summary(workdir, {})  # a run killed at its very end left none
  writer = metrics_lib.MetricsWriter(workdir, config.log.tensorboard)
  print("Loading models and compiling ...", flush=True)
  started = time.perf_counter()
  first, nonfinite = 0, 0

  def restore(abstract_state: TrainState) -> TrainState:
    nonlocal first, nonfinite
    state, saved = checkpoints.restore(abstract_state)
    first, nonfinite = saved["step"], saved["nonfinite"]
    return state

  resumed = checkpoints.latest() is not None
  run = build_lib.build(config, sources, restore if resumed else None)
  run.simulator.resume(workdir_lib.read_spent(workdir))
  if resumed:
    print(f"Going on after step {first}.")
  writer.truncate(first)
  print(
    f"Ready after {time.perf_counter() - started:.0f} s, "
    f"{compiles.count} programs compiled, {compiles.cached} from the cache.",
    flush=True,
  )

  def save(step: int, reward: float) -> None:
    if checkpoints.latest() != step:
      metadata = {"step": step, "nonfinite": nonfinite, "config": config_lib.digest(config)}
      checkpoints.save(step, run.state, metadata, reward)

  done, reward = first, float("nan")
  timer = metrics_lib.StageTimer()
  try:
    for step in range(first, config.steps):
      began = time.perf_counter()
      with timer("rollout"):
        dialogues = play(config, sources, run, step, interrupts)
      with timer("prepare"):
        rewards = np.array([dialogue_reward(d, config) for d in dialogues])
        batch, row_metrics = make_batch(config, run, dialogues, rewards)
      with timer("update"), interrupts.deferred():
        for _ in range(config.algorithm.epochs):
          run.state, update_metrics = run.updater.update(run.state, batch)
        run.policy.engine.model = sampling_copy(run.state.model)
        scalars = {k: float(v) for k, v in jax.device_get(update_metrics).items()}
        done, reward = step + 1, present(np.mean, rewards)
        nonfinite = nonfinite + 1 if scalars["update/skipped"] else 0
      scalars |= metrics_lib.dialogue_metrics(dialogues) | row_metrics
      scalars["reward/mean"] = reward
      updates = int(run.state.updates)
      scalars["update/learning_rate"] = float(run.schedule(max(updates - 1, 0)))
      with timer("write"), writing(workdir):
        workdir_lib.write_spent(workdir, run.simulator.spent())
        if config.log.dialogues_every and step % config.log.dialogues_every == 0:
          write_dialogues(workdir, done, dialogues)
      seconds = timer.take()
      scalars |= stage_metrics(run, seconds, scalars)
      scalars |= {
        "compile/programs": compiles.count,
        "compile/from_cache": compiles.cached,
        "compile/seconds": compiles.seconds,
        "seconds/step": time.perf_counter() - began,
      }
      with writing(workdir):
        writer.write(done, scalars)
      line = metrics_lib.progress_line(done, config.steps, scalars, scalars["seconds/step"])
      print(line, flush=True)
      # After the metrics: a run that is killed in between does the step again, and drops its line.
      with timer("checkpoint"):
        if nonfinite >= config.training.max_nonfinite:
          raise Diverged(
            f"{nonfinite} updates in a row had a loss or gradient that is not finite "
            f"(training.max_nonfinite); the state before them is saved as step {done}."
          )
        if done % config.checkpoint.every == 0 or done == config.steps:
          save(done, reward)
      interrupts.check()
  except (Interrupted, Diverged, BudgetSpent):
    save(done, reward)
    with writing(workdir):
      workdir_lib.write_spent(workdir, run.simulator.spent())
    raise
  finally:
    run.simulator.close()
    checkpoints.close()
    writer.close()
  return metrics_lib.write_summary(workdir, {})


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
  """Around what writes to the folder: a full or read-only disk is the user's to mend."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"workdir {workdir} cannot be written ({error.strerror or error}), expected a writable disk "
      "with room; the same command goes on from the newest checkpoint."
    ) from error


def play(
  config: ConfigDict,
  sources: Sources,
  run: build_lib.Run,
  step: int,
  interrupts: Interrupts,
) -> list[Dialogue]:
  """The dialogues of one step (0-based)."""
  d = config.dialogue
  chosen = batch_indices(len(sources.scenarios), step, d.scenarios_per_step, config.seed)
  return rollout(
    run.policy,
    run.simulator,
    [sources.scenarios[i] for i in chosen],
    group_size=d.group_size,
    rules=run.rules,
    slots=run.slots,
    step=step,
    on_round=interrupts.check,
  )


def dialogue_reward(dialogue: Dialogue, config: ConfigDict) -> float:
  """max(final emotion, 0) / 100, less the penalty for replies without a well-formed thought.

  NaN for a dialogue whose user failed: it has no final emotion.
  """
  if dialogue.failed:
    return math.nan
  replies = [turn.reply for turn in dialogue.turns]
  malformed = sum(not r.well_formed for r in replies) / max(1, len(replies))
  return emotion_lib.reward(dialogue.emotion) - config.dialogue.malformed_penalty * malformed


def present(function: Callable[[np.ndarray], float], rewards: np.ndarray) -> float:
  """A function of the rewards that are there; NaN where none is."""
  given = rewards[~np.isnan(rewards)]
  return float(function(given)) if given.size else math.nan


def make_batch(config: ConfigDict, run: build_lib.Run, dialogues: list[Dialogue], rewards):
  """The update's batch, and metrics of its rows."""
  segments = [[] if d.failed else d.segments for d in dialogues]
  longest = max(rows_lib.row_length(s) for s in segments)
  length = next(n for n in run.row_lengths if n >= longest)
  rows = rows_lib.make_rows(segments, length)
  advantages = advantages_lib.group_relative(
    rewards, config.dialogue.group_size, scale=config.algorithm.scale_by_std
  )
  metrics = {
    "rows/length": length,
    "rows/longest": longest,
    "rows/trained_tokens": int(rows.mask.sum()),
    "reward/std": present(np.std, rewards),
    "reward/groups_without_signal": float(
      np.mean(np.abs(advantages.reshape(-1, config.dialogue.group_size)).max(1) < 1e-6)
    ),
  }
  return run.updater.batch(rows, advantages, run.reference), metrics


def write_dialogues(workdir: pathlib.Path, step: int, dialogues: list[Dialogue]) -> None:
  """Keeps a step's dialogues, from one process."""
  if jax.process_index() == 0:
    records.write(workdir / "dialogues" / f"step_{step:06d}.jsonl", dialogues)


def stage_metrics(run: build_lib.Run, seconds: dict[str, float], scalars: dict) -> dict[str, float]:
  """Seconds of each stage and tokens a second of rollout and update."""
  out = {f"seconds/{stage}": value for stage, value in seconds.items()}
  out |= run.simulator.take_metrics()
  drawn = 0
  for name, engine in run.engines():
    stats = engine.take_stats()
    drawn += stats.drawn
    out |= {
      f"sampler/{name}_prefilled": stats.prefilled,
      f"sampler/{name}_extended": stats.extended,
      f"sampler/{name}_drawn": stats.drawn,
      f"sampler/{name}_seconds": stats.seconds,
      f"sampler/{name}_tokens_per_second": stats.drawn / max(stats.seconds, 1e-9),
    }
  out["tokens/per_second"] = drawn / max(seconds["rollout"], 1e-9)
  trained = scalars["rows/trained_tokens"]
  out["update/tokens_per_second"] = trained / max(seconds["update"], 1e-9)
  logging.debug("stages: %s", out)
  return out
