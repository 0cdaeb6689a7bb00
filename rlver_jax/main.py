"""The command line: `python -m rlver_jax.main --config=configs/grpo.py[:preset] --workdir=DIR`.

The config's `task` says what is run: rl (`train.py`), sft (`sft.py`), or one of `evaluation/`:
benchmark, fidelity (`replay.py`), capabilities, retention.
Any field of the config can be overridden: `--config.policy.path=DIR`. Exit codes: 0 done, 1 the
run diverged or spent a budget (after saving a checkpoint), 2 a mistake in the command, the
configuration, the files or the access to a server, 128 + n stopped by signal n (after saving too).
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

# TensorFlow, which clu's TensorBoard writer imports, greets on stderr otherwise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
from ml_collections import ConfigDict, config_flags

from rlver_jax import cli
from rlver_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file with an optional preset, as in configs/grpo.py:tiny.",
  lock_config=True,
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "Start jax.distributed, which finds the other processes in the environment (Cloud TPU, Slurm, "
  "JAX_COORDINATOR_ADDRESS ...). By default: where a Cloud TPU slice has several hosts.",
)


class Program(NamedTuple):
  """What a task does: opens and checks what it reads from, runs, and tells what came of it."""

  open_sources: Callable[..., Any]
  run: Callable[..., dict[str, Any]]
  describe: Callable[..., str]


def main(argv: list[str]) -> int:
  del argv
  config = CONFIG.value
  if config is None:
    raise UserError("--config is missing, expected a file such as configs/grpo.py.")
  if not isinstance(config, ConfigDict):  # what config_flags puts in place of a missing file
    name = flags.FLAGS["config"].config_filename
    raise UserError(f"--config is {name}, which cannot be read, expected a configuration file.")
  # Imported late, so that a wrong flag is answered at once.
  from rlver_jax import config as config_lib

  config_lib.validate(config)
  _prepare_jax(config)
  import jax

  from rlver_jax import workdir
  from rlver_jax.interrupt import Interrupted, Interrupts

  program = _program(config.task)
  sources = program.open_sources(config)
  folder = workdir.claim(cli.WORKDIR.value or default_workdir(), config)
  if jax.process_index() == 0:
    print(
      f"{jax.device_count()} {jax.devices()[0].platform} device(s), workdir {folder}", flush=True
    )
  interrupts = Interrupts()
  try:
    summary = program.run(config, sources, folder, interrupts)
  except Interrupted as stop:
    print(f"{stop}; the same command goes on.", flush=True)
    return 128 + stop.signum
  if jax.process_index() == 0:
    cli.show(program.describe(summary, config, sources, folder))
  return 0


def _program(task: str) -> Program:
  """What a task does at each stage of a run."""
  if task == "sft":
    from rlver_jax import sft
    from rlver_jax.supervised import progress

    return Program(sft.open_sources, sft.train_supervised, progress.describe)
  if task == "benchmark":
    from rlver_jax.evaluation import benchmark

    return Program(benchmark.open_sources, benchmark.run, benchmark.describe)
  if task == "fidelity":
    from rlver_jax.evaluation import replay

    return Program(replay.open_sources, replay.run, replay.describe)
  if task == "capabilities":
    from rlver_jax.evaluation import capabilities

    return Program(capabilities.open_sources, capabilities.run, capabilities.describe)
  if task == "retention":
    from rlver_jax.evaluation import retention

    return Program(retention.open_sources, retention.run, retention.describe)
  from rlver_jax import closing, sources, train

  return Program(sources.open_sources, train.train, closing.describe)


def default_workdir() -> pathlib.Path:
  """runs/NAME-PRESET for --config=configs/NAME.py:PRESET."""
  file, _, preset = flags.FLAGS["config"].config_filename.partition(":")
  return pathlib.Path("runs") / f"{pathlib.Path(file).stem}-{preset or 'tiny'}"


def _prepare_jax(config) -> None:
  """Settings that must come before the first array."""
  import jax

  cli.configure_jax(config)
  hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
  if DISTRIBUTED.value or (DISTRIBUTED.value is None and len(hosts) > 1):
    jax.distributed.initialize()


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags, which runs the config file; a mistake becomes a UserError of one sentence."""
  try:
    return flags.FLAGS(argv)
  except flags.Error:
    raise
  except (OSError, TypeError, ValueError) as error:  # also what the file itself says of a preset
    raise UserError(cli.last_line(str(error))) from error
  except Exception as error:  # an override of no field, or anything that a file of Python raises
    text = str(error).replace("\\n", " ")
    found = re.fullmatch(r"\W*(\w+)\W*(?:Did you mean \W*(\w+).*)?", text)
    if found and any(re.match(rf"--?config[\w.]*\.{found[1]}\b", flag) for flag in argv):
      expected = f"'{found[2]}'" if found[2] else "one of the config file"
      raise UserError(
        f"--config overrides the field '{found[1]}', which does not exist, expected {expected}."
      ) from error
    raise UserError(
      f"--config names a file that fails with {type(error).__name__} ({' '.join(text.split())}), "
      "expected one whose get_config returns the configuration."
    ) from error


if __name__ == "__main__":
  cli.run(main, _parse_flags)
