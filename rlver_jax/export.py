"""Writes the policy of a run as a Hugging Face directory, for transformers, vLLM and others.

    python -m rlver_jax.export --workdir=RUN --out=DIR [--step=N | --best]

The newest checkpoint by default. The directory gets config.json, the tokenizer's files and
safetensors in bfloat16 (or float32); it must not exist yet, or be empty.
"""

import json
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from rlver_jax import cli
from rlver_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
OUT = flags.DEFINE_string("out", None, "Directory to write.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
BEST = flags.DEFINE_bool("best", False, "Take the checkpoint with the highest reward.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the written tensors.")


def main(argv: list[str]) -> None:
  del argv
  if not WORKDIR.value or not OUT.value:
    raise UserError("--workdir or --out is missing, expected the run's folder and where to write.")
  if BEST.value and STEP.value is not None:
    raise UserError(f"--best is given with --step={STEP.value}, expected one of them.")
  out = pathlib.Path(OUT.value).expanduser()
  step = export(pathlib.Path(WORKDIR.value).expanduser(), out, STEP.value, BEST.value, DTYPE.value)
  print(f"Wrote the policy of step {step} to {out}.")


def export(
  workdir: pathlib.Path, out: pathlib.Path, step: int | None, best: bool, dtype: str
) -> int:
  """Writes the policy of a checkpoint of the run in `workdir` to `out`; returns its step.

  Raises UserError when there is no such run or checkpoint, or when `out` is taken.
  """
  import jax
  import optax

  from rlver_jax import build, partitioning
  from rlver_jax.checkpoint import Checkpoints
  from rlver_jax.models import hub, source, weights
  from rlver_jax.rl.update import TrainState

  config = _run_config(workdir)
  if out.exists() and not hub.is_empty_directory(out):
    raise UserError(f"--out is {out}, which holds files, expected a new or empty directory.")
  policy = config.policy
  opened = source.open_source(
    policy.path, "policy.path", dtype=policy.dtype, param_dtype=policy.param_dtype
  )
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=None)
  step = checkpoints.best() if best else checkpoints.latest() if step is None else step
  mesh = partitioning.make_mesh(1, -1, 1)
  optimizer: optax.GradientTransformation = build.make_optimizer(
    config, build.make_schedule(config)
  )

  def state(model):
    return TrainState(model, optimizer.init(model), jax.numpy.int32(0))

  abstract = jax.eval_shape(state, weights.abstract_model(opened.config))
  shardings = partitioning.model_shardings(mesh, abstract)
  restored, _ = checkpoints.restore(partitioning.abstract(abstract, shardings), step)
  weights.save(restored.model, out, source=opened.directory, dtype=dtype)
  return step


def _run_config(workdir: pathlib.Path) -> ConfigDict:
  """The configuration that the run was started with."""
  file = workdir / "config.json"
  try:
    flat = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{file} cannot be read ({error}), expected the folder of a run.") from error
  nested: dict[str, Any] = {}
  for field, value in flat.items():
    *sections, name = field.split(".")
    node = nested
    for section in sections:
      node = node.setdefault(section, {})
    node[name] = value
  return ConfigDict(nested)


if __name__ == "__main__":
  cli.run(main)
