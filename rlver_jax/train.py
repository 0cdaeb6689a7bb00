"""The reinforcement-learning loop: dialogues, rows, advantages, update, metrics, checkpoint."""

import contextlib
import pathlib
import time
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from rlver_jax import build as build_lib
from rlver_jax import closing, flat_config, heldout, trainables
from rlver_jax import metrics as metrics_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.collect import make_experience, play
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.environment import level_metrics
from rlver_jax.dialogue.statistics import dialogue_metrics
from rlver_jax.errors import BudgetSpent, Diverged
from rlver_jax.interrupt import Interrupted, Interrupts
from rlver_jax.rl.learner import LearnerState
from rlver_jax.sources import Sources


def train(
  config: ConfigDict, sources: Sources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Runs, or goes on with, the run of `config` in `workdir`, with held-out dialogues before its
  first step and after its last; returns the run's summary.

  Raises Interrupted after saving when asked to stop, BudgetSpent after saving when a budget is,
  Diverged when updates stay non-finite, UserError when `workdir` cannot be written or holds what is
  damaged.
  """
  compiles = metrics_lib.CompileCounter()
  checkpoints = Checkpoints(str(workdir / "checkpoints"), config.checkpoint.keep)
  latest = checkpoints.latest()
  finished = latest is not None and latest >= config.steps
  heldout.check(config, sources, workdir)
  if finished:
    print(
      f"The run in {workdir} has all its {config.steps} steps; a larger --config.steps goes on."
    )
    if not heldout.missing(config, sources, workdir, "after"):
      checkpoints.close()
      return finish(config, sources, workdir)  # a run killed at its very end left none
  else:
    heldout.forget_after(config, workdir)
  writer = metrics_lib.MetricsWriter(workdir, config.log.tensorboard)
  print("Loading models and compiling ...", flush=True)
  started = time.perf_counter()
  first, nonfinite = 0, 0
  environment = build_lib.build_environment(config)

  def restore(abstract_state: LearnerState) -> LearnerState:
    nonlocal first, nonfinite
    state, saved = checkpoints.restore(abstract_state)
    first, nonfinite = saved["step"], saved["nonfinite"]
    environment.restore(saved)
    return state

  spent = workdir_lib.read_spent(workdir)
  resumed = latest is not None
  run = build_lib.build(config, sources, restore if resumed else None)
  run.simulator.resume(spent)
  if resumed:
    print(f"Going on after step {first}.")
  with workdir_lib.writing(workdir):
    writer.truncate(first)
  print(
    f"Ready after {time.perf_counter() - started:.0f} s, "
    f"{compiles.count} programs compiled, {compiles.cached} from the cache.",
    flush=True,
  )

  def save(step: int, reward: float) -> None:
    if checkpoints.latest() != step:
      metadata = {"step": step, "nonfinite": nonfinite, "config": flat_config.digest(config)}
      checkpoints.save(step, run.state, metadata | environment.state(), reward)

  done, reward = first, float("nan")
  timer = metrics_lib.StageTimer()
  try:
    if first == 0:  # later the policy is no longer what it was before
      heldout.play(config, sources, run, workdir, "before", interrupts.check)
    elif heldout.missing(config, sources, workdir, "before"):
      print("evaluation.path was not there at the first step: there will be no comparison with it.")
    for step in range(first, config.steps):
      began = time.perf_counter()
      with timer("rollout"):
        played = play(config, sources, run, environment, step, interrupts.check)
      with timer("prepare"):
        experience, scalars = make_experience(run, played)
      with timer("update"), interrupts.deferred():
        run.state, learned = run.learner.learn(
          run.state, run.frozen, experience, step=step, seed=config.seed
        )
        run.policy.engine.model = build_lib.sampling_policy(
          config, sources.mesh, run.state, run.sampling_base
        )
        done, reward = step + 1, scalars["reward/mean"]
        nonfinite = nonfinite + 1 if learned["update/skipped"] else 0
        environment.observe(played.sampled)
      scalars |= learned | dialogue_metrics(played.sampled)
      scalars |= level_metrics(played.sampled)
      scalars |= learning_rates(config, run)
      with timer("write"), workdir_lib.writing(workdir):
        workdir_lib.write_spent(workdir, run.simulator.spent())
        if config.log.dialogues_every and step % config.log.dialogues_every == 0:
          write_dialogues(workdir, done, played.all)
      seconds = timer.take()
      scalars |= stage_metrics(run, seconds, scalars)
      scalars |= compiles.metrics() | {"seconds/step": time.perf_counter() - began}
      with workdir_lib.writing(workdir):
        writer.write(done, scalars)
      line = metrics_lib.progress_line(done, config.steps, scalars, scalars["seconds/step"])
      print(line, flush=True)
      # After the metrics: a run that is killed in between does the step again, and drops its line.
      with timer("checkpoint"):
        if nonfinite >= config.training.max_nonfinite:
          raise Diverged.after(nonfinite, done)
        if done % config.checkpoint.every == 0 or done == config.steps:
          save(done, reward)
      interrupts.check()
    heldout.play(config, sources, run, workdir, "after", interrupts.check)
  except (Interrupted, Diverged, BudgetSpent):
    save(done, reward)
    raise
  finally:
    with contextlib.suppress(OSError):  # a disk that is full is reported by what it stopped
      workdir_lib.write_spent(workdir, run.simulator.spent())
    run.simulator.close()
    checkpoints.close()
    writer.close()
  return finish(config, sources, workdir)


def finish(config: ConfigDict, sources: Sources, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes what a run leaves at its end, from one process; returns the summary."""
  with workdir_lib.writing(workdir):
    found = closing.write(config, sources, workdir) if jax.process_index() == 0 else {}
    return metrics_lib.write_summary(workdir, found)


def write_dialogues(workdir: pathlib.Path, step: int, dialogues: list[Dialogue]) -> None:
  """Keeps a step's dialogues, from one process."""
  if jax.process_index() == 0:
    records.write(workdir / "dialogues" / f"step_{step:06d}.jsonl", dialogues)


def learning_rates(config: ConfigDict, run: build_lib.Run) -> dict[str, float]:
  """The rate of the last applied update of each model that has had one."""
  trained = {"update": ("policy", run.state.policy), "critic": ("critic", run.state.critic)}
  return {
    f"{group}/learning_rate": float(trainables.make_schedule(config, name)(updates - 1))
    for group, (name, state) in trained.items()
    if state is not None and (updates := int(state.updates))
  }


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
