"""Makes models of the embedded world from seeds: `python -m rlver_jax.embedded.build`.

    --model=policy      a policy warm-started on a mixture of good and poor replies
    --model=simulator   a simulated user distilled from the scripted one, both of its calls
    --model=scenarios   the package's scenario files `tiny` and `tiny-held-out`

A model starts from the weights of `start.py` and is trained in stages, each in steps that a user
would take with data of their own: exercises (`drill.py`) or dialogues of the embedded world are
written as chats or records, `sft.py` trains on them (`configs/sft.py:tiny-policy`,
`tiny-simulator`), and `export.py` writes a Hugging Face directory. The files of the last are listed
with their SHA-256 in a manifest. An interrupted build goes on where it was. All runs in one thread,
so that CPUs of a kind make the same files, however many of their cores are free.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

from absl import flags

from rlver_jax import cli, files
from rlver_jax.embedded import dialogues as dialogues_lib
from rlver_jax.embedded import drill, helper
from rlver_jax.embedded import scenarios as scenarios_lib
from rlver_jax.embedded.dialogues import Plan
from rlver_jax.embedded.helper import Habits
from rlver_jax.errors import UserError

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
MANIFEST = "manifest.json"
SEED = 0  # of the shipped scenarios; the dialogues of training have scenarios of other seeds
SCENARIOS = {"train": ("tiny", 256), "held_out": ("tiny-held-out", 64)}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One supervised run on `count` dialogues of a plan, or on chats of an exercise of `drill.py`.

  plan: of the dialogues, or the exercise's name. They are packed into `rows` rows of `row_length`
  tokens for each of `steps` updates. answers: of the simulated user those that are learned.
  """

  plan: Plan | str
  count: int
  steps: int
  rows: int
  row_length: int
  learning_rate: float
  answers: tuple[str, ...] = ("change", "message")

  def recipe(self) -> dict:
    """The fields as JSON values, as they are read back from a file."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


# A helper that mostly does what is needed comes first, which teaches what depends on what; then one
# that never says a thing twice, which shows in long dialogues alone; then mixtures of good and poor
# replies, of which the last is what the policy is to start with. Some of their dialogues are still
# those of the able helper, or what it can do would be forgotten; fewer and fewer, beside more poor
# replies, or training would have little to add. Short dialogues cost least a token.
_WORDS = {"coined": 0.7, "strange": 0.6}
_HELPFUL = Plan("train", Habits(0.85, 0.1, long=0.03), thinking=0.5, turns=(1, 4), **_WORDS)
_VARIED = Plan("train", helper.ABLE, thinking=0.5, turns=(12, 16), patient=True, **_WORDS)


def _mixed(matched: float, poor: float, able: float) -> Plan:
  habits = Habits(matched, poor, long=0.03, repeated=0.0, in_turn=0.9)
  return Plan("train", habits, thinking=0.5, turns=(5, 10), able=able, **_WORDS)


_POLICY = _mixed(0.1, 0.65, 0.12)
# A simulated user meets more of what is rare and of what a policy in training comes up with.
_SIMULATOR = Plan(
  "train",
  Habits(
    0.5, 0.2, long=0.03, repeated=0.3, tied=0.7, foreign=0.12, mixed=0.12, stuck=0.5, garbled=0.15
  ),
  thinking=0.0,
  emotions=(5, 95),
  turns=(1, 3),
  unopened=0.1,
  coined=0.7,
)  # fmt: skip
_WHOLE = dataclasses.replace(_SIMULATOR, turns=(2, 10))
_REPEAT = Stage("repeat", 6000, 500, 2, 512, 3e-3)
STAGES = {
  "policy": (
    _REPEAT,
    Stage(_HELPFUL, 12000, 500, 4, 1152, 3e-3),
    Stage(_HELPFUL, 12000, 600, 4, 1152, 3e-3),
    Stage(_VARIED, 3000, 400, 3, 1664, 3e-3),
    Stage(_VARIED, 6000, 1200, 3, 1792, 3e-3),
    Stage(_mixed(0.22, 0.35, 0.3), 2500, 300, 3, 1664, 2e-3),
    Stage(_mixed(0.22, 0.35, 0.22), 4500, 500, 3, 1664, 2e-3),
    Stage(_mixed(0.15, 0.5, 0.18), 3600, 400, 3, 1664, 2e-3),
    Stage(_POLICY, 3600, 400, 3, 1664, 2e-3),
  ),
  "simulator": (
    _REPEAT,
    Stage(_SIMULATOR, 10000, 700, 4, 1152, 3e-3),
    Stage("recognise", 6500, 1000, 3, 1472, 3e-3),
    Stage(_WHOLE, 5000, 900, 2, 2304, 3e-3),
    Stage(_WHOLE, 5000, 600, 3, 1920, 3e-3, ("change",)),
    Stage("weigh", 3000, 400, 3, 1472, 3e-3),
    Stage(_WHOLE, 4000, 300, 3, 1920, 3e-3, ("change",)),
    Stage("appraise", 2200, 500, 2, 1984, 3e-3),
    Stage(_WHOLE, 5000, 600, 2, 2304, 2e-3),
  ),
}
# Whose replies the simulated user is measured on: helpers with the habits that the policy is made
# from last, and with worse ones.
HELPERS = {"policy": _POLICY.habits, "in disarray": _SIMULATOR.habits}
MEASURED = ("turns", "good", "matched", "sign", "error", "unread")
HELD_OUT = 100  # dialogues that a stage is measured on
DRILL_SEED = 7  # of the first weights and the exercise `repeat`, which both models begin with
SEEDS = {"policy": 1, "simulator": 2}

MODEL = flags.DEFINE_enum("model", None, [*STAGES, "scenarios"], "What to make.")


def main(argv: list[str]) -> int:
  del argv
  if MODEL.value is None:
    raise UserError("--model is missing, expected one of: policy, simulator, scenarios.")
  if MODEL.value == "scenarios":
    for split, (name, count) in SCENARIOS.items():
      scenarios_lib.write(ASSETS / "scenarios" / f"{name}.jsonl", split, count, SEED)
      print(f"Wrote {count} scenarios to {name}.jsonl.")
    return 0
  from rlver_jax.interrupt import Interrupted  # late, so that a wrong flag is answered at once

  # A sum depends on how many threads it is split over, and with it what is made. XLA reads this
  # with the first array.
  os.environ["PJRT_NPROC"] = "1"
  workdir = pathlib.Path(cli.WORKDIR.value or f"runs/embedded-{MODEL.value}").expanduser()
  try:
    made = train(MODEL.value, workdir)
  except Interrupted as stop:
    print(f"{stop}; the same command goes on.", flush=True)
    return 128 + stop.signum
  install(made, ASSETS / f"tiny-{MODEL.value}")
  print(f"Wrote {ASSETS / f'tiny-{MODEL.value}'}.")
  return 0


def train(model: str, workdir: pathlib.Path) -> pathlib.Path:
  """Makes a model in `workdir`; returns the directory that it was exported to."""
  from configs import sft as sft_configs
  from rlver_jax import config as config_lib
  from rlver_jax import export, sft
  from rlver_jax import workdir as workdir_lib
  from rlver_jax.interrupt import Interrupts
  from rlver_jax.supervised import progress

  cli.configure_jax(sft_configs.get_config(f"tiny-{model}"))  # before `begin` makes arrays
  interrupts, last = Interrupts(), len(STAGES[model])
  exported, summary = begin(model, workdir), {}
  for number, stage in enumerate(STAGES[model], 1):
    config = sft_configs.get_config(f"tiny-{model}")
    config.seed = DRILL_SEED if stage.plan == "repeat" else SEEDS[model] + 100 * number
    config.steps = stage.steps
    config.evaluation.every = 200  # a look that takes as long as about ten steps
    check_stage(workdir / f"stage{number}.json", stage)
    config.data.path = str(workdir / f"stage{number}.jsonl")
    config.data.held_out = str(workdir / f"stage{number}-held-out.jsonl")
    config.training.update(rows=stage.rows, microbatch=stage.rows, row_length=stage.row_length)
    config.optimizer.learning_rate = stage.learning_rate
    config.data.answers = stage.answers
    config.policy.update(path=str(exported), from_scratch=False)
    if isinstance(stage.plan, str):
      config.data.kind = "chat"
    write_examples(stage, config)
    config_lib.validate(config)
    sources = sft.open_sources(config)
    run = workdir_lib.claim(str(workdir / f"stage{number}"), config)
    summary = sft.train_supervised(config, sources, run, interrupts)
    print(progress.describe(summary))
    exported = workdir / f"exported{number}"
    shutil.rmtree(exported, ignore_errors=True)
    dtype = "bfloat16" if number == last else "float32"
    export.export(run, exported, step=None, best=False, dtype=dtype)
  held_out = {"loss": round(summary["held_out_loss"], 4)} | measure(model, str(exported))
  manifest = {
    "command": f"python -m rlver_jax.embedded.build --model={model}",
    "seed": SEEDS[model],
    "stages": [stage.recipe() for stage in STAGES[model]],
    "held_out": held_out,
    "files": digests(exported),
  }
  print(json.dumps(held_out))
  workdir_lib.write_json(exported / MANIFEST, manifest)
  return exported


def begin(model: str, workdir: pathlib.Path) -> pathlib.Path:
  """Writes the weights that the first stage starts from; returns their directory."""
  from rlver_jax import partitioning
  from rlver_jax.embedded import start
  from rlver_jax.models import source

  opened = source.open_source(
    f"tiny-{model}", "--model", dtype="float32", param_dtype="float32", from_scratch=True
  )
  directory = workdir / "exported0"
  shutil.rmtree(directory, ignore_errors=True)
  start.write(opened, partitioning.make_mesh(1, -1, 1), DRILL_SEED, directory)
  return directory


def check_stage(path: pathlib.Path, stage: Stage) -> None:
  """Notes the recipe of a stage beside its run; UserError where another one's is noted there."""
  recipe = stage.recipe()
  if path.exists() and json.loads(path.read_text("utf-8")) != recipe:
    raise UserError(
      f"{path} holds another recipe than the stage has now, expected the same or another --workdir."
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as file:
    json.dump(recipe, file, indent=1)


def write_examples(stage: Stage, config) -> None:
  """Writes the examples of a stage, and some to measure on, where they are not there yet."""
  for path, split, count in (
    (config.data.path, "train", stage.count),
    (config.data.held_out, "held_out", HELD_OUT),
  ):
    if pathlib.Path(path).exists():
      continue
    print(f"Writing {count:,} examples to {path} ...", flush=True)
    if isinstance(stage.plan, str):
      drill.write(pathlib.Path(path), stage.plan, split, count, config.seed)
    else:
      coined = stage.plan.coined if split == "train" else 0.0
      plan = dataclasses.replace(stage.plan, split=split, coined=coined)
      dialogues_lib.write(pathlib.Path(path), plan, count, config.seed)


def measure(model: str, path: str) -> dict[str, dict]:
  """What the model in this directory (or of this name) does on held-out users, for its manifest:
  of a policy what it says in each mode, of a simulated user how it takes what each helper says."""
  from rlver_jax.embedded import measure

  if model == "policy":
    found = {mode: measure.replies(path, mode) for mode in ("direct", "think")}
  else:
    found = {name: measure.appraisals(path, habits) for name, habits in HELPERS.items()}
  return {
    name: {field: round(value, 4) for field, value in numbers.items() if field in MEASURED}
    for name, numbers in ((name, dataclasses.asdict(n)) for name, n in found.items())
  }


def digests(directory: pathlib.Path) -> dict[str, str]:
  """The SHA-256 of every file of a model directory but its manifest, by name."""
  paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def install(made: pathlib.Path, directory: pathlib.Path) -> None:
  """Puts the files of `made` in place of those of `directory`, the manifest last."""
  directory.mkdir(parents=True, exist_ok=True)
  for path in sorted(made.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
    temporary = directory / f".{path.name}.tmp"
    shutil.copyfile(path, temporary)
    os.replace(temporary, directory / path.name)


if __name__ == "__main__":
  cli.run(main)
