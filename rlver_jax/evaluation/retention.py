"""What a policy keeps of other skills: tasks of lm-evaluation-harness, before and after training.

Of a run's folder the model that the run started from and a checkpoint are measured, of any other
policy that one. What is left in the run's folder:

  before.json, after.json   of each model, as soon as it is measured: the harness's results, and
                            what each question came to
  responses_*.db            what the models answered so far; the same command goes on with the rest
  policy.json               of a run's policy the checkpoint that is measured, to the end
  table.csv, table.md       a row for each task and metric
  summary.json              what the files hold, without the questions
"""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import build, cli, partitioning, processes, run_policy, trainables
from rlver_jax import metrics as metrics_lib
from rlver_jax import sources as sources_lib
from rlver_jax import tokenizer as tokenizer_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.errors import UserError
from rlver_jax.evaluation import scores, tables
from rlver_jax.evaluation.tables import Range
from rlver_jax.interrupt import Interrupts
from rlver_jax.models import source as model_source
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.models.source import ModelSource
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.sampler import Sampling

BEFORE, AFTER = "before", "after"
EVERY = 2.0  # seconds between lines that tell how far it is
RESAMPLES = 1000  # of the harness's own errors, where a metric is no mean

# Of each task and metric ("gsm8k", "exact_match,strict-match") a number, or by question.
Values = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class RetentionSources:
  """What is measured: models of one source, by the names of their files."""

  mesh: Mesh
  opened: ModelSource
  models: tuple[str, ...]
  tasks: tuple[str, ...]


def open_sources(config: ConfigDict) -> RetentionSources:
  """Opens and checks what is read; raises UserError for what is wrong."""
  mesh = partitioning.make_mesh(**config.mesh)
  tasks = tuple(name.strip() for name in config.harness.tasks.split(","))
  opened = run_policy.open_policy(config.policy)
  field, length = "sampling.cache_length", config.sampling.cache_length
  sources_lib.check_positions("policy", opened, field, length)
  names = (BEFORE, AFTER) if run_policy.is_run(config.policy.path) else (AFTER,)
  _check_tasks(config, tasks)
  return RetentionSources(mesh, opened, names, tasks)


def run(
  config: ConfigDict, sources: RetentionSources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Measures the models that are not measured yet and returns the summary.

  Raises Interrupted when asked to stop, UserError where `workdir` cannot be written or holds what
  is damaged.
  """
  for name in sources.models:
    if not processes.ask_first(lambda name=name: (workdir / f"{name}.json").exists()):
      _measure(config, sources, workdir, name, interrupts)
  if not processes.is_first():
    return {}
  found = _found(workdir, sources)
  with workdir_lib.writing(workdir):
    tables.write(board(found), workdir)
    return metrics_lib.save_summary(workdir, {name: f["results"] for name, f in found.items()})


def describe(
  summary: dict[str, Any], config: ConfigDict, sources: RetentionSources, workdir: pathlib.Path
) -> str:
  """The text for the terminal."""
  del summary, config
  return f"\n{tables.text(board(_found(workdir, sources)))}\n\nresults: {workdir}"


def board(found: dict[str, dict]) -> tables.Rows:
  """A row for each task and metric: the value with its standard error before and after, and of
  those that questions have one by one the mean difference, with its bootstrap interval."""
  interval = Range("95% low", "95% high", "95% interval")
  both = len(found) > 1
  rows: list[list] = [["task", "metric", "questions", *found]]
  rows[0] += ["difference", interval] if both else []
  last = found[AFTER]
  for task, values in last["results"].items():
    for metric in values["metrics"]:
      cells = [_with_error(f["results"].get(task, {}), metric) for f in found.values()]
      row = [task, metric.removesuffix(",none"), str(values["questions"]), *cells]
      rows.append(row + (_difference(found, task, metric) if both else []))
  return rows


def _with_error(values: dict, metric: str) -> str:
  value, error = values.get("metrics", {}).get(metric), values.get("errors", {}).get(metric)
  if value is None:
    return "-"
  return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _difference(found: dict[str, dict], task: str, metric: str) -> list[str | Range]:
  before, after = (found[name]["questions"].get(task, {}).get(metric, {}) for name in found)
  shared = [after[key] - before[key] for key in after if key in before]
  if not shared:
    return ["-", Range("-", "-", "-")]
  low, high = scores.interval(np.array(shared))
  return [f"{np.mean(shared):+.4f}", Range(f"{low:+.4f}", f"{high:+.4f}")]


def _measure(
  config: ConfigDict,
  sources: RetentionSources,
  workdir: pathlib.Path,
  name: str,
  interrupts: Interrupts,
) -> None:
  """Runs the harness on one model and writes what came out."""
  from lm_eval import simple_evaluate  # late: an extra

  from rlver_jax.evaluation.harness import HarnessModel

  if processes.is_first():
    print(f"{name}: loading the model ...", flush=True)
  opened, h, s = sources.opened, config.harness, config.sampling
  weights = partitioning.for_sampling(
    sources.mesh, _weights(config, sources, workdir, name), config.policy.dtype
  )
  model = HarnessModel(
    functools.partial(_engine, config, sources, weights),
    tokenizer_lib.read_files(opened.directory),
    opened.tokenizer.chat.stop_ids,
    s.max_new_tokens,
    _progress(name, interrupts),
  )
  # What is kept of one process would make its calls differ from those of the others.
  cache = str(workdir / f"responses_{name}") if jax.process_count() == 1 else None
  with workdir_lib.writing(workdir):
    found = simple_evaluate(
      model,
      tasks=list(sources.tasks),
      task_manager=_manager(h.folder),
      num_fewshot=None if h.few_shot < 0 else h.few_shot,
      limit=h.limit or None,
      apply_chat_template=h.chat,
      use_cache=cache,
      confirm_run_unsafe_code=h.unsafe_code,
      bootstrap_iters=RESAMPLES,
      random_seed=config.seed,
      numpy_random_seed=config.seed,
      torch_random_seed=None,
      fewshot_random_seed=config.seed,
    )
    if processes.is_first():
      workdir_lib.write_json(workdir / f"{name}.json", told(found))


def _weights(
  config: ConfigDict, sources: RetentionSources, workdir: pathlib.Path, name: str
) -> Qwen2:
  opened = sources.opened
  seed = config.seed + trainables.POLICY_WEIGHTS
  folder = pathlib.Path(config.policy.path).expanduser()
  if name == BEFORE:
    seed = workdir_lib.read_config(folder).seed + trainables.POLICY_WEIGHTS
  elif run_policy.is_run(config.policy.path):
    step = run_policy.pinned(workdir, folder, config.policy.step)
    return run_policy.load(folder, opened, step)
  return model_source.load_model(opened, sources.mesh, seed)


def _engine(
  config: ConfigDict, sources: RetentionSources, weights: Qwen2, sampling: Sampling
) -> Engine:
  s = config.sampling
  settings = build.engine_settings(config, sources.mesh, s.cache_length, s.decode_steps)
  stop_ids = sources.opened.tokenizer.chat.stop_ids
  return Engine(weights, sources.mesh, settings, sampling, stop_ids, config.seed)


def _progress(name: str, interrupts: Interrupts) -> Callable[[int, int], None]:
  last = time.monotonic()

  def on_round(done: int, total: int) -> None:
    nonlocal last
    interrupts.check()
    if processes.is_first() and (done == total or time.monotonic() - last > EVERY):
      last = time.monotonic()
      cli.show(f"{name}: {done}/{total} answers")

  return on_round


def told(found: dict[str, Any]) -> dict[str, Any]:
  """The numbers among what the harness found: of each task its metrics with their errors, how many
  questions it has, and what each question came to."""
  results: dict[str, dict] = {}
  for task, values in found["results"].items():
    numbers = {k: float(v) for k, v in values.items() if "," in k and _is_number(v)}
    errors = {k.replace("_stderr,", ","): v for k, v in numbers.items() if "_stderr," in k}
    metrics = {k: v for k, v in numbers.items() if "_stderr," not in k}
    count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
    results[task] = {"metrics": metrics, "errors": errors, "questions": count}
  questions: dict[str, Values] = {}
  for task, asked in found["samples"].items():
    of_task = questions.setdefault(task, {})
    for question in asked:
      for metric in question["metrics"]:
        if _is_number(value := question[metric]):
          of_metric = of_task.setdefault(f"{metric},{question['filter']}", {})
          of_metric[str(question["doc_id"])] = float(value)
  return {"results": results, "questions": questions}


def _is_number(value: Any) -> bool:
  return isinstance(value, bool | int | float | np.number) and math.isfinite(value)


def _found(workdir: pathlib.Path, sources: RetentionSources) -> dict[str, dict]:
  """What the folder holds of each model; UserError where it is damaged."""
  found = {}
  for name in sources.models:
    path = workdir / f"{name}.json"
    try:
      read = json.loads(path.read_text("utf-8"))
      found[name] = {"results": dict(read["results"]), "questions": dict(read["questions"])}
    except (OSError, KeyError, TypeError, ValueError) as error:
      raise UserError(f"{path} cannot be read, expected what this evaluation wrote.") from error
  return found


def _check_tasks(config: ConfigDict, names: tuple[str, ...]) -> None:
  """Raises UserError where the harness is missing, or cannot or may not load one of its tasks."""
  try:
    import lm_eval  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"task 'retention' needs lm-eval, which cannot be imported ({error}), expected it to be "
      "installed: pip install -e .[retention]."
    ) from error
  logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of each default of each task
  folder = config.harness.folder
  if folder and not pathlib.Path(folder).expanduser().is_dir():
    raise UserError(f"harness.folder is '{folder}', expected a folder of task files.")
  manager = _manager(folder)
  for name in names:
    if name not in manager.all_tasks:
      raise UserError(f"harness.tasks names '{name}', expected tasks that lm-eval knows.")
    try:
      loaded = manager.load([name])
    except Exception as error:  # a task is a program, and reads data from wherever it wants
      raise UserError(
        f"harness.tasks names '{name}', which lm-eval cannot load "
        f"({type(error).__name__}: {cli.last_line(str(error))}), expected a task whose data is "
        "here or can be downloaded."
      ) from error
    for task_name, task in loaded["tasks"].items():
      if getattr(task, "UNSAFE_CODE", False) and not config.harness.unsafe_code:
        raise UserError(
          f"harness.tasks names '{task_name}', which runs what the model writes, expected "
          "harness.unsafe_code=True (in a container) or another task."
        )


@functools.cache
def _manager(folder: str):
  """The harness's list of its tasks and of a folder's: thousands of files, which are read once."""
  from lm_eval.tasks import TaskManager  # late: an extra

  return TaskManager(include_path=str(pathlib.Path(folder).expanduser()) if folder else None)
