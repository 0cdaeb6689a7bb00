"""The policy that a run left in its checkpoints."""

import json
import pathlib

from ml_collections import ConfigDict

from rlver_jax import partitioning, processes, trainables
from rlver_jax import workdir as workdir_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.errors import UserError
from rlver_jax.models import lora
from rlver_jax.models import source as model_source
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.models.source import ModelSource

PINNED = "policy.json"  # in the folder of an evaluation


def open_source(workdir: pathlib.Path, dtype: str = "") -> ModelSource:
  """Where the policy of the run in `workdir` comes from: its configuration and tokenizer.

  dtype: of activations and products, by default the run's.

  Raises UserError when there is no such run, or its model is no longer there.
  """
  config = workdir_lib.read_config(workdir)
  if config.task not in ("rl", "sft"):
    raise UserError(f"{workdir} holds a run of task '{config.task}', expected one that trains.")
  p = config.policy
  return model_source.open_source(
    p.path,
    "policy.path",
    dtype=dtype or p.dtype,
    param_dtype=p.param_dtype,
    from_scratch=config.task == "sft" and p.from_scratch,
  )


def open_policy(policy: ConfigDict) -> ModelSource:
  """Where an evaluation's policy comes from: a run, or a model as in configs/recipe.py.

  policy: the section of configs/eval.py. Raises UserError for what is missing or broken.
  """
  if is_run(policy.path):
    return open_source(pathlib.Path(policy.path).expanduser(), policy.dtype)
  if policy.step:
    raise UserError(
      f"policy.step is {policy.step}, expected 0 where policy.path, '{policy.path}', is no folder "
      "of a run."
    )
  dtype = policy.dtype
  return model_source.open_source(policy.path, "policy.path", dtype=dtype, param_dtype=dtype)


def is_run(path: str) -> bool:
  """Whether this is the folder of a run, which has dotted field names, and not that of a model."""
  try:
    found = json.loads((pathlib.Path(path).expanduser() / "config.json").read_text("utf-8"))
  except (OSError, ValueError):
    return False
  return isinstance(found, dict) and "task" in found and "model_type" not in found


def pinned(workdir: pathlib.Path, folder: pathlib.Path, step: int) -> int:
  """The checkpoint of the run in `folder` that an evaluation in `workdir` is of: that of `step`, 0
  for the newest, -1 for the best by reward, or the one that it began with, however that was chosen.

  The same in all processes. Raises UserError when there is no such checkpoint.
  """

  def look() -> int:
    file = workdir / PINNED
    with workdir_lib.writing(workdir):
      if not file.exists():
        chosen = find(folder, step if step > 0 else None, best=step < 0)
        workdir_lib.write_json(file, {"step": chosen})
    try:
      return int(json.loads(file.read_text("utf-8"))["step"])
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"{file} cannot be read, expected the step of a checkpoint.") from error

  return processes.ask_first(look)


def find(workdir: pathlib.Path, step: int | None = None, *, best: bool = False) -> int:
  """The step of a checkpoint of the run: `step` itself, the newest, or the best by reward.

  Raises UserError when there is no such checkpoint.
  """
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=None)
  found = checkpoints.best() if best else checkpoints.latest() if step is None else step
  if found is None:
    raise UserError(f"{workdir} holds checkpoints of steps: none; expected a checkpoint.")
  return found


def load(workdir: pathlib.Path, opened: ModelSource, step: int) -> Qwen2:
  """The weights of a checkpoint of the run, adapters merged, in the run's param_dtype.

  opened: the policy's source, as `open_source` gives it. Raises UserError when there is no such
  checkpoint.
  """
  config = workdir_lib.read_config(workdir)
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=None)
  mesh = partitioning.make_mesh(1, -1, 1)
  wanted = {"policy": {"model": trainables.abstract_policy(config, opened)}}
  wanted = partitioning.abstract(wanted, partitioning.model_shardings(mesh, wanted))
  restored, _ = checkpoints.restore(wanted, step, partial=True)
  model = restored["policy"]["model"]
  if config.lora.policy_rank:
    base = model_source.load_model(opened, mesh, config.seed + trainables.POLICY_WEIGHTS)
    model = lora.merge(lora.Adapted(base, model))
  return model
