"""Writes the policy of a run as a Hugging Face directory, for transformers, vLLM and others.

    python -m rlver_jax.export --workdir=RUN --out=DIR [--step=N | --best]

The newest checkpoint by default. The directory gets config.json, the tokenizer's files and
safetensors in bfloat16 (or float32); it must not exist yet, or be empty.
"""

import pathlib

from absl import flags

from rlver_jax import cli
from rlver_jax.errors import UserError
from rlver_jax.result_flags import OUT, STEP

BEST = flags.DEFINE_bool("best", False, "Take the checkpoint with the highest reward.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the written tensors.")


def main(argv: list[str]) -> None:
  del argv
  workdir = cli.WORKDIR.value
  if not workdir or not OUT.value:
    raise UserError("--workdir or --out is missing, expected the run's folder and where to write.")
  if BEST.value and STEP.value is not None:
    raise UserError(f"--best is given with --step={STEP.value}, expected one of them.")
  out = pathlib.Path(OUT.value).expanduser()
  step = export(pathlib.Path(workdir).expanduser(), out, STEP.value, BEST.value, DTYPE.value)
  print(f"Wrote the policy of step {step} to {out}.")


def export(
  workdir: pathlib.Path, out: pathlib.Path, step: int | None, best: bool, dtype: str
) -> int:
  """Writes the policy of a checkpoint of the run in `workdir` to `out`; returns its step.

  Raises UserError when there is no such run or checkpoint, or when `out` is taken.
  """
  from rlver_jax import run_policy
  from rlver_jax.models import hub, weights

  opened = run_policy.open_source(workdir)
  if out.exists() and not hub.is_empty_directory(out):
    raise UserError(f"--out is {out}, which holds files, expected a new or empty directory.")
  step = run_policy.find(workdir, step, best=best)
  model = run_policy.load(workdir, opened, step)
  weights.save(model, out, source=opened.directory, dtype=dtype)
  return step


if __name__ == "__main__":
  cli.run(main)
