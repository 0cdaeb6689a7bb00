"""The supervised loop: rows of examples, updates, metrics, checkpoints.

The data of a step are a function of (seed, step), so a run that is resumed goes on as if it had
not stopped.
"""

import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import flat_config, trainables
from rlver_jax import metrics as metrics_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.errors import Diverged, UserError
from rlver_jax.interrupt import Interrupted, Interrupts
from rlver_jax.models import source as model_source
from rlver_jax.models.source import ModelSource
from rlver_jax.rl.prepare import Frozen
from rlver_jax.rl.rows import Rows, make_packed_rows, pack, row_length
from rlver_jax.sources import check_positions, open_mesh
from rlver_jax.supervised import examples as examples_lib
from rlver_jax.supervised.examples import Example
from rlver_jax.supervised.learner import SupervisedLearner
from rlver_jax.supervised.progress import Progress, write_summary


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
  mesh, p = open_mesh(config), config.policy
  policy = model_source.open_source(
    p.path,
    "policy.path",
    dtype=p.dtype,
    param_dtype=p.param_dtype,
    remat=p.remat,
    from_scratch=p.from_scratch,
  )
  check_positions("policy", policy, "training.row_length", config.training.row_length)
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


def learning_rate(config: ConfigDict) -> optax.Schedule:
  """The schedule over the run's updates."""
  o = config.optimizer
  return trainables.schedule(config, o.learning_rate, o.warmup_fraction, config.steps)


def held_out_rows(config: ConfigDict, examples: list[Example]) -> Rows:
  """The examples in order, packed, and rows of padding up to a whole number of microbatches."""
  t, lengths = config.training, [row_length(example) for example in examples]
  rows = [[examples[i] for i in row] for row in pack(range(len(examples)), lengths, t.row_length)]
  return make_packed_rows([*rows, *[[]] * (-len(rows) % t.microbatch)], t.row_length)


def train_supervised(
  config: ConfigDict, sources: SupervisedSources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Runs, or goes on with, the run of `config` in `workdir`; returns the run's summary.

  Raises Interrupted after saving when asked to stop, Diverged when updates stay non-finite,
  UserError when `workdir` cannot be written, or holds what is damaged or was made from other
  examples.
  """
  compiles = metrics_lib.CompileCounter()
  checkpoints = Checkpoints(str(workdir / "checkpoints"), config.checkpoint.keep)
  first, t = checkpoints.latest() or 0, config.training
  if first >= config.steps:
    print(
      f"The run in {workdir} has all its {config.steps} steps; a larger --config.steps goes on."
    )
    checkpoints.close()
    return write_summary(workdir)
  progress = Progress(config, workdir, compiles)
  print("Loading the model and compiling ...", flush=True)
  started, examples = time.perf_counter(), sources.examples
  metadata = {"config": flat_config.digest(config), "examples": examples_lib.digest(examples)}
  base = trainables.load_frozen(config, sources).base
  learner, nonfinite = make_learner(config, sources), 0
  if first:
    state, saved = checkpoints.restore(learner.abstract_state)
    nonfinite = saved["nonfinite"]
    if saved["examples"] != metadata["examples"]:
      raise UserError(
        f"data.path is {config.data.path}, which gives other examples than the run in {workdir} "
        "was made from, expected the same or another --workdir."
      )
    print(f"Going on after step {first}.")
  else:
    state = learner.init(trainables.fresh(config, sources, Frozen(base))[0])
  kept_apart = None
  if sources.held_out:
    kept_apart = learner.place(held_out_rows(config, sources.held_out))
  learner.compile(base, t.rows, t.row_length, kept_apart)
  lengths = [row_length(example) for example in examples]
  print(
    f"Ready after {time.perf_counter() - started:.0f} s, {compiles.count} programs compiled, "
    f"{compiles.cached} from the cache; an epoch of {len(lengths):,} examples is about "
    f"{sum(lengths) / (t.rows * t.row_length):.1f} steps.",
    flush=True,
  )
  progress.start(first, nonfinite)
  timer, done = metrics_lib.StageTimer(), first

  def report(evaluate: bool) -> None:
    """Writes the line of the steps since the last one."""
    extra = {}
    if updates := int(state.policy.updates):
      extra["update/learning_rate"] = float(learning_rate(config)(updates - 1))
    if evaluate and kept_apart is not None:
      with timer("evaluation"):
        extra["sft/held_out_loss"] = float(learner.score(state, base, kept_apart))
    extra |= {f"seconds/{stage}": seconds for stage, seconds in timer.take().items()}
    progress.write(done, extra)

  def save() -> None:
    if checkpoints.latest() != done:
      own = {"step": done, "nonfinite": progress.nonfinite}
      checkpoints.save(done, state, metadata | own, -progress.loss)

  order = examples_lib.stream(lengths, config.seed, t.row_length, t.rows, first)
  try:
    for step in range(first, config.steps):
      packed = [[examples[i] for i in row] for row in next(order)]
      rows = make_packed_rows(packed, t.row_length)
      with interrupts.deferred():
        state, numbers = learner.learn(state, base, learner.place(rows))
        done = step + 1
      progress.add(rows, numbers)
      saves = done == config.steps or done % config.checkpoint.every == 0
      every = config.evaluation.every
      evaluates = done == config.steps or bool(every and done % every == 0)
      if done % config.log.every == 0 or saves or evaluates:
        report(evaluates)
      if saves:
        with timer("checkpoint"):
          save()
      interrupts.check()
  except (Interrupted, Diverged):
    with contextlib.suppress(Diverged):  # the state is saved all the same
      report(evaluate=False)
    save()
    raise
  finally:
    checkpoints.close()
    progress.close()
  return write_summary(workdir)
