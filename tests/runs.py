"""Runs small enough to be made many times in a test: their configuration, and what they leave."""

import contextlib
import json
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict
from subprocesses import REPOSITORY

from configs import grpo
from rlver_jax import cli, flat_config, interrupt, main, sft, train, trainables
from rlver_jax import config as config_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.dialogue import scenario
from rlver_jax.models import source, weights
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.partitioning import make_mesh
from rlver_jax.rl.learner import LearnerState
from rlver_jax.sources import open_sources
from rlver_jax.workdir import claim

# One attention window, one bucket and one row length: few programs to compile. (The schedule is
# part of the update's program.)
SMALL = {
  "steps": 4,
  "cpu_devices": 1,
  "mesh.data": 1,
  "mesh.fsdp": -1,
  "policy.path": "tiny",
  "simulator.kind": "scripted",
  "simulator.path": "tiny",
  "simulator.templates": "",
  "simulator.score": "choice",
  "simulator.temperature": 0.7,
  "simulator.top_p": 0.9,
  "simulator.max_plan_tokens": 48,
  "simulator.max_message_tokens": 32,
  "simulator.cache_length": 3072,
  "data.path": "en",
  "evaluation.path": "",
  "dialogue.scenarios_per_step": 2,
  "dialogue.group_size": 2,
  "dialogue.max_turns": 2,
  "dialogue.repeated_penalty": 0.0,
  "sampling.temperature": 1.0,
  "sampling.max_new_tokens": 8,
  "sampling.max_prompt_tokens": 384,
  "sampling.max_response_tokens": 256,
  "sampling.decode_steps": 8,
  "sampling.smallest_window": 1024,
  "sampling.extend_buckets": (128,),
  "reward.kind": "final",
  "algorithm.advantage": "grpo",
  "algorithm.gamma": 1.0,
  "algorithm.kl_coef": 0.0,
  "algorithm.minibatches": 1,
  "optimizer.learning_rate": 0.01,
  "optimizer.schedule": "constant",
  "optimizer.warmup_fraction": 0.5,
  "training.microbatch": 2,
  "training.smallest_row": 1024,
  "training.logprob_chunk": 64,
  "checkpoint.every": 1,
  "log.tensorboard": False,
  "compilation_cache": "",
}
# What a frozen model as simulated user needs besides.
LANGUAGE_MODEL = {
  "simulator.kind": "language_model",
  "simulator.max_plan_tokens": 8,
  "simulator.max_message_tokens": 8,
  "simulator.cache_length": 2048,
  "sampling.smallest_window": 2048,
}
# Metrics that differ from one run of the same numbers to the next.
TIMED = ("seconds/", "compile/")
TIMED_ENDS = ("_seconds", "per_second")


def config(preset: str = "tiny", **changes: Any) -> ConfigDict:
  """The small configuration with these dotted fields changed."""
  result = grpo.get_config(preset)
  result.update_from_flattened_dict(SMALL | changes)
  return result


def play(
  config: ConfigDict, workdir: pathlib.Path, interrupts=interrupt.Interrupts
) -> dict[str, Any]:
  """A run in this process, from the configuration's files to the summary."""
  with signals_restored():
    sources = open_sources(config)
    return train.train(config, sources, claim(str(workdir), config), interrupts())


class StopAt(interrupt.Interrupts):
  """Is sent SIGTERM at the n-th time that the run asks whether it shall stop."""

  def __init__(self, n: int):
    super().__init__()
    self.left = n

  def check(self):
    self.left -= 1
    if self.left == 0:
      signal.raise_signal(signal.SIGTERM)
    super().check()


def play_supervised(
  config: ConfigDict, workdir: pathlib.Path, interrupts=interrupt.Interrupts
) -> dict[str, Any]:
  """A supervised run in this process, from the configuration's files to the summary."""
  with signals_restored():
    sources = sft.open_sources(config)
    return sft.train_supervised(config, sources, claim(str(workdir), config), interrupts())


def fields_read(config: ConfigDict, workdir: pathlib.Path, play: Callable[..., Any]) -> set[str]:
  """Plays a run with `play`; returns the fields of its configuration that it read."""
  names = {}

  def enter(section, prefix):
    names[id(section)] = prefix
    for name in section:
      if isinstance(section[name], ConfigDict):
        enter(section[name], f"{prefix}{name}.")

  enter(config, "")
  read, getitem = set(), ConfigDict.__getitem__

  def recorded(section, name):
    if id(section) in names:
      read.add(names[id(section)] + name)
    return getitem(section, name)

  with pytest.MonkeyPatch.context() as patch:
    # These two read every field, to keep it or to compare.
    patch.setattr(flat_config, "digest", lambda _: "")
    patch.setitem(globals(), "claim", lambda folder, _: pathlib.Path(folder))
    patch.setattr(ConfigDict, "__getitem__", recorded)
    play(config, workdir)
  return read


def command_in_process(
  monkeypatch: pytest.MonkeyPatch,
  capfd: pytest.CaptureFixture,
  *arguments: object,
  run: Callable[[], None] = lambda: cli.run(main.main, main._parse_flags),
) -> tuple[int, str, str]:
  """Runs a command line in this process; returns exit code, stdout and stderr.

  run: the program, that of `main` or of another module but `chat`, which has a flag that
  `evaluate` has too.
  """
  monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
  absl_flags.FLAGS.unparse_flags()  # to their defaults, whichever program they are of
  for name in [name for name in absl_flags.FLAGS if name.startswith("config.")]:
    delattr(absl_flags.FLAGS, name)  # what the overrides of an earlier command have defined
  sys.modules.pop("config_config", None)
  capfd.readouterr()
  with pytest.raises(SystemExit) as stop, signals_restored():
    run()
  output = capfd.readouterr()
  return stop.value.code or 0, output.out, output.err  # a program may end with None


@contextlib.contextmanager
def command_settings(monkeypatch: pytest.MonkeyPatch):
  """Commands run in the repository, and what they set of JAX is put back."""
  names = ("jax_compilation_cache_dir", "jax_default_matmul_precision")
  settings = {name: getattr(jax.config, name) for name in names}
  monkeypatch.chdir(REPOSITORY)
  try:
    yield
  finally:
    for name, value in settings.items():
      jax.config.update(name, value)


@contextlib.contextmanager
def signals_restored():
  """Puts the handlers of signals back that `Interrupts` replaces."""
  handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def flags(**changes: Any) -> list[str]:
  """The small configuration with these fields changed, as flags."""
  return [f"--config.{field}={value}" for field, value in (SMALL | changes).items()]


def command(workdir: pathlib.Path, **changes: Any) -> list[str]:
  """The command of a run in a process of its own."""
  program = [sys.executable, "-m", "rlver_jax.main", "--config=configs/grpo.py"]
  return [*program, f"--workdir={workdir}", *flags(**changes)]


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl."""
  with open(workdir / "metrics.jsonl", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def reproducible(record: dict[str, Any]) -> dict[str, Any]:
  """A line of metrics without what is measured with a clock."""
  return {
    name: value
    for name, value in record.items()
    if not name.startswith(TIMED) and not name.endswith(TIMED_ENDS)
  }


def dialogue_files(workdir: pathlib.Path) -> dict[str, bytes]:
  """The files of dialogues with their content."""
  return {file.name: file.read_bytes() for file in sorted((workdir / "dialogues").iterdir())}


def restored(
  workdir: pathlib.Path, config: ConfigDict, step: int | None = None
) -> tuple[LearnerState, dict]:
  """The whole state in a checkpoint of the run, the newest by default, and its metadata."""
  learner = trainables.make_learner(config, open_sources(config))
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=None)
  return checkpoints.restore(learner.abstract_state, step)


def save_model(directory: pathlib.Path, change=lambda model: None) -> pathlib.Path:
  """Writes the embedded model with weights of its own as a Hugging Face directory.

  `change` is called with the model first.
  """
  opened = source.open_source("tiny", "policy.path", dtype="float32", param_dtype="float32")
  model = source.load_model(opened, make_mesh(1, -1, 1), seed=5)
  change(model)
  weights.save(model, directory, source=opened.directory, dtype="float32")
  return directory


def held_out(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Writes a scenario file with the package's first English scenarios, each changed a little."""
  lines = scenario.resolve("en").read_text(encoding="utf-8").splitlines()[:number]
  path = folder / f"held_out_{number}.jsonl"
  with open(path, "w", encoding="utf-8") as file:
    for record in map(json.loads, lines):
      record |= {"id": f"held-{record['id']}", "scene": f"{record['scene']} It was in spring."}
      file.write(json.dumps(record) + "\n")
  return path


def assert_merged(ours: Qwen2, base: Qwen2, adapters: dict[str, Any]) -> None:
  """Holds exported weights against base + alpha / rank * A B, for a rank of 3 and an alpha of 6.

  The axes of a map are flattened to a matrix here; maps without an adapter are as they were.
  """
  for name in ("q", "k", "v", "o", "gate", "up", "down"):
    found, wanted = (np.asarray(getattr(m.layers, name)[...]) for m in (ours, base))
    if name not in adapters:
      np.testing.assert_array_equal(found, wanted)
      continue
    for layer, weight in enumerate(wanted):
      pair = adapters[name].down, adapters[name].up
      a, b = (np.asarray(p[...][layer], np.float64) for p in pair)
      change = 2.0 * a.reshape(-1, 3) @ b.reshape(3, -1)
      assert np.abs(change).max() > 1e-5
      np.testing.assert_allclose(found[layer], weight + change.reshape(weight.shape), atol=1e-6)


class Quiet:
  """Interrupts that never come, or one after so many rounds."""

  def __init__(self, rounds=None):
    self.rounds = rounds

  def check(self):
    if self.rounds is not None:
      self.rounds -= 1
      if self.rounds < 0:
        raise interrupt.Interrupted(signal.SIGINT)


def evaluate(task, settings: ConfigDict, workdir: pathlib.Path, interrupts: Quiet | None = None):
  """Runs a task of configs/eval.py, given by its module, as `main` does: its summary and text."""
  config_lib.validate(settings)
  cli.configure_jax(settings)
  sources = task.open_sources(settings)
  claim(str(workdir), settings)
  summary = task.run(settings, sources, workdir, interrupts or Quiet())
  return summary, task.describe(summary, settings, sources, workdir)
