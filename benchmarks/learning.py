"""Does the quick start learn? `python -m benchmarks.learning [--seeds 0 1 2] [-- FLAGS]`.

Trains the embedded policy (preset tiny) with both algorithms and both modes, once a seed, each run
in a process of its own as a user would start it, and prints what held-out dialogues came to before
and after: with the frozen language model as simulated user, and with the scripted one. What stands
after `--` goes to every run, as in `-- --config.steps=10`. A run that is finished is not repeated,
and is refused where it had other flags; one that is not starts anew, so that its time is a whole
run's.
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from rlver_jax import closing, heldout
from rlver_jax import workdir as workdir_lib

ALGORITHMS, MODES = ("grpo", "ppo"), ("direct", "think")
COST_FILE = "cost.json"
HEAD = (
  "run", "language model", "scripted user", "failure", "strategies", "steps", "minutes", "GiB"
)  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/learning"))
  parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
  parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
  parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
  parser.add_argument("flags", nargs="*", help="after --: flags for every run")
  args = parser.parse_args()
  rows = []
  for algorithm, mode, seed in itertools.product(args.algorithms, args.modes, args.seeds):
    name = f"{algorithm} {mode} {seed}"
    folder = args.workdir / name.replace(" ", "-")
    if not (folder / COST_FILE).exists():
      print(f"{name} ...", flush=True)
      cost = train(folder, algorithm, mode, seed, args.flags)
      workdir_lib.write_json(folder / COST_FILE, cost | {"flags": args.flags})
    elif (flags := json.loads((folder / COST_FILE).read_text("utf-8"))["flags"]) != args.flags:
      parser.error(f"{folder} was made with the flags {flags}, expected them or another --workdir")
    rows.append(row(name, folder))
  print("\n".join(table(rows)))
  return 0


def train(
  folder: pathlib.Path, algorithm: str, mode: str, seed: int, flags: Sequence[str]
) -> dict[str, float]:
  """A run from the command line; returns its wall time (start and compilation included) and the
  most memory that its process held. Exits where the run fails."""
  command = [
    sys.executable, "-m", "rlver_jax.main", f"--config=configs/{algorithm}.py",
    f"--workdir={folder}", f"--config.dialogue.mode={mode}", f"--config.seed={seed}", *flags,
  ]  # fmt: skip
  shutil.rmtree(folder, ignore_errors=True)
  folder.parent.mkdir(parents=True, exist_ok=True)
  started = time.perf_counter()
  # Beside the folder: a run begins in an empty one.
  with open(folder.with_name(f"{folder.name}.txt"), "w", encoding="utf-8") as output:
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit(f"{' '.join(command)} failed with {process.returncode}: see {output.name}.")
  kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
  return {"minutes": (time.perf_counter() - started) / 60, "gib": kib / 2**20}


def row(name: str, folder: pathlib.Path) -> list[str]:
  """The cells of a finished run, in the order of HEAD; failure and strategies are the worse of
  both users' after training. Exits where it was not compared with both."""
  numbers = folder / closing.NUMBERS_FILE
  found = json.loads(numbers.read_text("utf-8")) if numbers.exists() else {"users": {}}
  cost = json.loads((folder / COST_FILE).read_text("utf-8"))
  if found["users"].keys() != {"language_model", heldout.SCRIPTED}:
    sys.exit(f"{folder} has held-out dialogues of {list(found['users'])}, expected both users'.")
  language_model, scripted = found["users"]["language_model"], found["users"][heldout.SCRIPTED]
  after = [user["after"] for user in (language_model, scripted)]
  return [
    name,
    *(
      f"{user['before']['final_emotion']:.1f} -> {user['after']['final_emotion']:.1f}"
      for user in (language_model, scripted)
    ),
    f"{max(numbers['failure'] for numbers in after):.1%}",
    f"{min(numbers['strategies'] for numbers in after):.0f}",
    f"{found['steps']}",
    f"{cost['minutes']:.1f}",
    f"{cost['gib']:.1f}",
  ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of Markdown."""
  return [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]


if __name__ == "__main__":
  sys.exit(main())
