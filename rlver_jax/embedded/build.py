"""Makes models of the embedded world from seeds: `python -m rlver_jax.embedded.build`.

    --model=policy      a policy warm-started on a mixture of good and poor replies
    --model=simulator   a simulated user distilled from the scripted one, both of its calls
    --model=scenarios   the package's scenario files `tiny` and `tiny-held-out`

A model is made in four steps, each of which is what a user would do with data of their own:
dialogues of the embedded world are written as records, `sft.py` trains on them from scratch
(`configs/sft.py:tiny-policy`, `tiny-simulator`), `export.py` writes a Hugging Face directory, and
its files are listed with their SHA-256 in a manifest. An interrupted build goes on where it was.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

from absl import flags

from rlver_jax import cli
from rlver_jax.embedded import dialogues as dialogues_lib
from rlver_jax.embedded import scenarios as scenarios_lib
from rlver_jax.embedded.dialogues import Plan
from rlver_jax.embedded.fidelity import Fidelity, fidelity
from rlver_jax.embedded.helper import Habits
from rlver_jax.errors import UserError

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
MANIFEST = "manifest.json"
SEED = 0  # of the shipped scenarios; the dialogues of training have scenarios of other seeds
SCENARIOS = {"train": ("tiny", 256), "held_out": ("tiny-held-out", 64)}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One supervised run: `count` dialogues of `plan`, packed into rows of `row_length` tokens."""

  plan: Plan
  count: int
  steps: int
  rows: int
  row_length: int
  learning_rate: float


# Short dialogues first, which cost least a token, then whole ones, for what is far into a dialogue.
_POLICY = Plan("train", Habits(0.5, 0.2), thinking=0.5, turns=(1, 4), coined=0.4)
_SIMULATOR = Plan(
  "train",
  Habits(0.3, 0.25, foreign=0.03, repeated=0.08, long=0.04),
  thinking=0.0,
  emotions=(5, 90),
  turns=(1, 4),
  unopened=0.1,
  coined=0.4,
)
STAGES = {
  "policy": (
    Stage(_POLICY, 9000, 600, 4, 1024, 3e-3),
    Stage(dataclasses.replace(_POLICY, turns=(5, 10)), 2000, 120, 2, 1792, 1e-3),
  ),
  "simulator": (
    Stage(_SIMULATOR, 12000, 1400, 3, 1216, 3e-3),
    Stage(dataclasses.replace(_SIMULATOR, turns=(5, 10)), 2000, 150, 2, 2304, 1e-3),
  ),
}
HELD_OUT = 100  # dialogues that a stage is measured on
SEEDS = {"policy": 1, "simulator": 2}

MODEL = flags.DEFINE_enum("model", None, [*STAGES, "scenarios"], "What to make.")


def main(argv: list[str]) -> None:
  del argv
  if MODEL.value is None:
    raise UserError("--model is missing, expected one of: policy, simulator, scenarios.")
  if MODEL.value == "scenarios":
    for split, (name, count) in SCENARIOS.items():
      scenarios_lib.write(ASSETS / "scenarios" / f"{name}.jsonl", split, count, SEED)
      print(f"Wrote {count} scenarios to {name}.jsonl.")
    return
  workdir = pathlib.Path(cli.WORKDIR.value or f"runs/embedded-{MODEL.value}").expanduser()
  made = train(MODEL.value, workdir)
  install(made, ASSETS / f"tiny-{MODEL.value}")
  print(f"Wrote {ASSETS / f'tiny-{MODEL.value}'}.")


def train(model: str, workdir: pathlib.Path) -> pathlib.Path:
  """Makes a model in `workdir`; returns the directory that it was exported to."""
  from configs import sft as sft_configs
  from rlver_jax import config as config_lib
  from rlver_jax import export, sft
  from rlver_jax import workdir as workdir_lib
  from rlver_jax.interrupt import Interrupts
  from rlver_jax.supervised import progress

  interrupts, last = Interrupts(), len(STAGES[model])
  exported, summary = workdir, {}
  for number, stage in enumerate(STAGES[model], 1):
    config = sft_configs.get_config(f"tiny-{model}")
    config.seed = SEEDS[model] + 100 * number
    config.steps = stage.steps
    config.data.path = str(workdir / f"stage{number}.jsonl")
    config.data.held_out = str(workdir / f"stage{number}-held-out.jsonl")
    config.training.update(rows=stage.rows, microbatch=stage.rows, row_length=stage.row_length)
    config.optimizer.learning_rate = stage.learning_rate
    if number > 1:
      config.policy.update(path=str(exported), from_scratch=False)
    write_dialogues(stage, config)
    config_lib.validate(config)
    cli.configure_jax(config)
    sources = sft.open_sources(config)
    run = workdir_lib.claim(str(workdir / f"stage{number}"), config)
    summary = sft.train_supervised(config, sources, run, interrupts)
    print(progress.describe(summary))
    exported = workdir / f"exported{number}"
    shutil.rmtree(exported, ignore_errors=True)
    dtype = "bfloat16" if number == last else "float32"
    export.export(run, exported, step=None, best=False, dtype=dtype)
  held_out = {"loss": round(summary["held_out_loss"], 4)}
  if model == "simulator":
    held_out |= {k: round(v, 4) for k, v in dataclasses.asdict(measure(str(exported))).items()}
  manifest = {
    "command": f"python -m rlver_jax.embedded.build --model={model}",
    "seed": SEEDS[model],
    "stages": [dataclasses.asdict(stage) for stage in STAGES[model]],
    "held_out": held_out,
    "files": digests(exported),
  }
  print(json.dumps(held_out))
  workdir_lib.write_json(exported / MANIFEST, manifest)
  return exported


def write_dialogues(stage: Stage, config) -> None:
  """Writes the dialogues of a stage, and some to measure on, where they are not there yet."""
  other = dataclasses.replace(stage.plan, split="held_out", coined=0.0)
  wanted = ((config.data.path, stage.plan, stage.count), (config.data.held_out, other, HELD_OUT))
  for path, plan, count in wanted:
    if not pathlib.Path(path).exists():
      print(f"Writing {count:,} dialogues to {path} ...", flush=True)
      dialogues_lib.write(pathlib.Path(path), plan, count, config.seed)


def measure(path: str) -> Fidelity:
  """How the simulated user in this directory (or of this name) appraises held-out dialogues."""
  from configs import grpo
  from rlver_jax import build
  from rlver_jax.sources import open_sources

  config = grpo.get_config("tiny")
  config.simulator.update(
    path=path, templates="tiny", score="generate", temperature=0.0, top_p=1.0, max_plan_tokens=64,
    max_message_tokens=64, cache_length=1024,
  )  # fmt: skip
  config.data.path = SCENARIOS["held_out"][0]
  config.sampling.update(extend_buckets=(32, 96), smallest_window=256, decode_steps=64)
  plan = Plan("held_out", _POLICY.habits, 0.0, turns=(10, 10))
  dialogues = [dialogues_lib.play(plan, number, SEED) for number in range(SCENARIOS["held_out"][1])]
  sources = open_sources(config)
  slots = build.slots(config, sources.mesh)
  return fidelity(build.build_simulator(config, sources), dialogues, slots=slots)


def digests(directory: pathlib.Path) -> dict[str, str]:
  """The SHA-256 of every file of a model directory but its manifest, by name."""
  paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def install(made: pathlib.Path, directory: pathlib.Path) -> None:
  """Puts the files of `made` in place of those of `directory`, the manifest last."""
  directory.mkdir(parents=True, exist_ok=True)
  for path in sorted(made.iterdir(), key=lambda path: path.name == MANIFEST):
    temporary = directory / f".{path.name}.tmp"
    shutil.copyfile(path, temporary)
    os.replace(temporary, directory / path.name)


if __name__ == "__main__":
  cli.run(main)
