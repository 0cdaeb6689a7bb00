"""Supervised training: rows of examples, updates, metrics, checkpoints.

The data of a step are a function of (seed, step), so a run that is resumed goes on as if it had
not stopped. Metrics are fetched from the device when a line of them is due.
"""

import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import config as config_lib
from rlver_jax import metrics as metrics_lib
from rlver_jax import partitioning, trainables
from rlver_jax import workdir as workdir_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.errors import Diverged, UserError
from rlver_jax.interrupt import Interrupted, Interrupts
from rlver_jax.models import source as model_source
from rlver_jax.models.source import ModelSource
from rlver_jax.rl.prepare import Frozen
from rlver_jax.rl.rows import Rows, make_packed_rows, pack, row_length
from rlver_jax.supervised import examples as examples_lib
from rlver_jax.supervised.examples import Example
from rlver_jax.supervised.learner import SupervisedLearner


@dataclasses.dataclass(frozen=True)
class SupervisedSources:
  """What a run reads from, opened and checked; no weights yet. Named as in `sources.Sources`."""

  mesh: Mesh
  policy: ModelSource
  examples: list[Example]
  held_out: list[Example]
  reference: None = None
  critic: None = None


def open_sources(config: ConfigDict) -> SupervisedSources:
  """Opens and checks everything that costs little; raises UserError for what is wrong."""
  mesh, t, p = partitioning.make_mesh(**config.mesh), config.training, config.policy
  if t.microbatch % partitioning.batch_shards(mesh):
    raise UserError(
      f"training.microbatch is {t.microbatch}, expected a multiple of mesh.data * mesh.fsdp, which "
      f"is {partitioning.batch_shards(mesh)}."
    )
  policy = model_source.open_source(
    p.path,
    "policy.path",
    dtype=p.dtype,
    param_dtype=p.param_dtype,
    remat=p.remat,
    from_scratch=p.from_scratch,
  )
  if t.row_length > (positions := policy.config.max_position_embeddings):
    raise UserError(
      f"training.row_length is {t.row_length}, expected at most the {positions} positions of the "
      "policy model."
    )
  examples = examples_lib.read(config.data.path, config, policy.tokenizer)
  held_out = []
  if config.data.held_out:
    held_out = examples_lib.read(config.data.held_out, config, policy.tokenizer)
  return SupervisedSources(mesh, policy, examples, held_out)


def make_learner(config: ConfigDict, sources: SupervisedSources) -> SupervisedLearner:
  """The learner for this configuration; it knows shapes only."""
  return SupervisedLearner(
    sources.mesh,
    trainables.make_optimizer(config, learning_rate(config)),
    trainables.abstract_policy(config, sources.policy),
    microbatch=config.training.microbatch,
    chunk=config.training.logprob_chunk,
    max_grad_norm=config.optimizer.max_grad_norm,
  )


def learning_rate(config: ConfigDict):
  """The schedule over the run's updates."""
  o = config.optimizer
  return trainables.schedule(config, o.learning_rate, o.warmup_fraction, config.steps)


def held_out_rows(config: ConfigDict, examples: list[Example]) -> Rows:
  """The examples in order, packed, and rows of padding up to a whole number of microbatches."""
  t, lengths = config.training, [row_length(example) for example in examples]
  rows = [[examples[i] for i in row] for row in pack(range(len(examples)), lengths, t.row_length)]
  return make_packed_rows([*rows, *[[]] * (-len(rows) % t.microbatch)], t.row_length)


class _Window:
  """What the steps since the last line of metrics gave, some of it still being computed."""

  def __init__(self):
    self.began, self.tokens, self.positions = time.perf_counter(), 0, 0
    self.numbers: list[dict[str, jax.Array]] = []

  def add(self, rows: Rows, numbers: dict[str, jax.Array]) -> None:
    self.tokens += int(np.sum(rows.branch >= 0))
    self.positions += rows.branch.size
    self.numbers.append(numbers)
    # One step at a time is under way: a signal is then heard soon.
    jax.block_until_ready(self.numbers[-2:][0])

  def metrics(self) -> tuple[dict[str, float], list[bool]]:
    """The metrics of a line, and for each step whether its update was skipped."""
    numbers = jax.device_get(self.numbers)
    seconds, steps = time.perf_counter() - self.began, len(numbers)
    trained = np.array([n["tokens"] for n in numbers], np.float64)
    losses = np.array([n["loss"] for n in numbers], np.float64)
    skipped = [bool(n["skipped"]) for n in numbers]
    return {
      "sft/loss": float(np.average(losses, weights=trained)),
      "update/gradient_norm": float(np.mean([n["gradient_norm"] for n in numbers])),
      "update/skipped": float(max(skipped)),
      "rows/trained_tokens": float(trained.mean()),
      "rows/fill": self.tokens / self.positions,
      "tokens/per_second": self.tokens / seconds,
      "seconds/step": seconds / steps,
    }, skipped


def train_supervised(
  config: ConfigDict, sources: SupervisedSources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Runs, or goes on with, the run of `config` in `workdir`; returns the run's summary.

  Raises Interrupted after saving when asked to stop, Diverged when updates stay non-finite,
  UserError when `workdir` cannot be written or holds what is damaged.
  """
  compiles = metrics_lib.CompileCounter()
  checkpoints = Checkpoints(str(workdir / "checkpoints"), config.checkpoint.keep)
  first, nonfinite = checkpoints.latest() or 0, 0
  if first >= config.steps:
    print(
      f"The run in {workdir} has all its {config.steps} steps; a larger --config.steps goes on."
    )
    checkpoints.close()
    return write_summary(workdir)
  writer = metrics_lib.MetricsWriter(workdir, config.log.tensorboard)
  print("Loading the model and compiling ...", flush=True)
  started, t = time.perf_counter(), config.training
  base = trainables.load_frozen(config, sources).base
  learner = make_learner(config, sources)
  if first:
    state, saved = checkpoints.restore(learner.abstract_state)
    nonfinite = saved["nonfinite"]
    print(f"Going on after step {first}.")
  else:
    state = learner.init(trainables.fresh(config, sources, Frozen(base))[0])
  writer.truncate(first)
  held_out = held_out_rows(config, sources.held_out) if sources.held_out else None
  learner.compile(
    base, t.row_length, learn=t.rows, score=0 if held_out is None else len(held_out.tokens)
  )
  if held_out is not None:
    held_out = learner.place(held_out)
  lengths = [row_length(example) for example in sources.examples]
  order = examples_lib.stream(lengths, config.seed, t.row_length, t.rows, first)
  tokens = sum(lengths)
  print(
    f"Ready after {time.perf_counter() - started:.0f} s, {compiles.count} programs compiled, "
    f"{compiles.cached} from the cache; {len(lengths):,} examples of {tokens:,} tokens, one epoch "
    f"is about {tokens / (t.rows * t.row_length):.1f} steps.",
    flush=True,
  )

  done, loss, window = first, float("nan"), _Window()

  def report(evaluate: bool) -> None:
    """Writes the line of the steps since the last one."""
    nonlocal loss, nonfinite, window
    if not window.numbers:
      return
    scalars, skipped = window.metrics()
    loss = scalars["sft/loss"] if held_out is None else loss
    if updates := int(state.policy.updates):
      scalars["update/learning_rate"] = float(learning_rate(config)(updates - 1))
    if evaluate and held_out is not None:
      with timer("evaluation"):
        loss = scalars["sft/held_out_loss"] = float(learner.score(state, base, held_out))
    scalars |= {f"seconds/{stage}": value for stage, value in timer.take().items()}
    scalars |= {
      "compile/programs": compiles.count,
      "compile/from_cache": compiles.cached,
      "compile/seconds": compiles.seconds,
    }
    with workdir_lib.writing(workdir):
      writer.write(done, scalars)
    line = metrics_lib.progress_line(done, config.steps, scalars, scalars["seconds/step"])
    print(line, flush=True)
    window = _Window()
    for skip in skipped:
      nonfinite = nonfinite + 1 if skip else 0
      if nonfinite >= t.max_nonfinite:
        raise Diverged(
          f"{nonfinite} updates in a row had a loss or gradient that is not finite "
          f"(training.max_nonfinite); the state before them is saved as step {done}."
        )

  def save() -> None:
    if checkpoints.latest() != done:
      metadata = {"step": done, "nonfinite": nonfinite, "config": config_lib.digest(config)}
      checkpoints.save(done, state, metadata, -loss)

  timer = metrics_lib.StageTimer()
  try:
    for step in range(first, config.steps):
      rows = make_packed_rows(
        [[sources.examples[i] for i in row] for row in next(order)], t.row_length
      )
      with interrupts.deferred():
        state, numbers = learner.learn(state, base, learner.place(rows))
        done = step + 1
      window.add(rows, numbers)
      last, saves = done == config.steps, done % config.checkpoint.every == 0
      every = config.evaluation.every
      evaluates = last or bool(every and done % every == 0)
      if done % config.log.every == 0 or saves or evaluates:
        report(evaluates)
      if saves or last:
        with timer("checkpoint"):
          save()
      interrupts.check()
  except (Interrupted, Diverged):
    with contextlib.suppress(Diverged):  # it is saved all the same
      report(False)
    save()
    raise
  finally:
    checkpoints.close()
    writer.close()
  return write_summary(workdir)


def summary(workdir: pathlib.Path) -> dict[str, Any]:
  """What a run came to, from its metrics: losses in nats a token, None where none was measured."""
  records = metrics_lib.read_metrics(workdir)
  losses = [r["sft/loss"] for r in records if r.get("sft/loss") is not None]
  kept_apart = [r for r in records if r.get("sft/held_out_loss") is not None]
  best = min(kept_apart, key=lambda r: r["sft/held_out_loss"], default={})
  steps = [r["step"] for r in records]
  counts = np.diff([0, *steps])
  seconds = [count * r["seconds/step"] for count, r in zip(counts, records, strict=True)]
  return {
    "steps": steps[-1] if steps else 0,
    "first_loss": losses[0] if losses else None,
    "last_loss": losses[-1] if losses else None,
    "held_out_loss": kept_apart[-1]["sft/held_out_loss"] if kept_apart else None,
    "best_held_out_loss": best.get("sft/held_out_loss"),
    "best_step": best.get("step"),
    "seconds": float(sum(seconds)),
    "tokens": round(sum(s * r["tokens/per_second"] for s, r in zip(seconds, records, strict=True))),
    "checkpoints": str(workdir / metrics_lib.CHECKPOINTS),
  }


def write_summary(workdir: pathlib.Path) -> dict[str, Any]:
  """Writes the summary to `<workdir>/summary.json`; returns it."""
  result = summary(workdir)
  if jax.process_index() == 0:
    workdir_lib.write_json(workdir / metrics_lib.SUMMARY_FILE, result)
  return result


def describe(result: dict[str, Any], *_: Any) -> str:
  """A summary as a few lines for the terminal; what it was made from is not needed."""

  def loss(name: str) -> str:
    return "none" if result[name] is None else f"{result[name]:.4f}"

  rows = {
    "steps": f"{result['steps']} in {result['seconds']:.0f} s, {result['tokens']:,} tokens",
    "loss": f"first {loss('first_loss')}, last {loss('last_loss')}",
    "checkpoints": result["checkpoints"],
  }
  if result["held_out_loss"] is not None:
    best = f"best {loss('best_held_out_loss')} at step {result['best_step']}"
    rows["held out"] = f"last {loss('held_out_loss')}, {best}"
  return "\n".join(f"{name:<12} {value}" for name, value in rows.items())
