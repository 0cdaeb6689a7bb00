"""Does the quick start learn? Every algorithm, mode and seed, on held-out scenarios.

    python -m benchmarks.learning [--workdir DIR] [--seeds 0 1 2] [--only ppo-think ...]

Each run is the README's own command in a process of its own, from the start to its report:

    python -m rlver_jax.main --config=configs/ALGORITHM.py --config.dialogue.mode=MODE \\
      --config.seed=SEED --workdir=DIR/ALGORITHM-MODE-SEED

Runs whose summary is there are not made again. The table has, for the policy before and after
training, the mean final emotion by the frozen language model and by the scripted user, the share
of failures, how many of the eight good strategies are in use, and time and peak memory of the
process.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ALGORITHMS, MODES = ("grpo", "ppo"), ("direct", "think")
COST = "cost.json"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/learning"))
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--only", nargs="+", help="of the form ALGORITHM-MODE; by default all")
  args = parser.parse_args()
  print("| run | language model | scripted user | failures | strategies | minutes | GiB |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for algorithm in ALGORITHMS:
    for mode in MODES:
      if args.only and f"{algorithm}-{mode}" not in args.only:
        continue
      for seed in args.seeds:
        workdir = args.workdir / f"{algorithm}-{mode}-{seed}"
        if not (workdir / "summary.json").exists():
          run(algorithm, mode, seed, workdir)
        print(row(f"{algorithm} {mode}, seed {seed}", workdir), flush=True)


def run(algorithm: str, mode: str, seed: int, workdir: pathlib.Path) -> None:
  """Trains in a process of its own; its output goes to the folder, with its time and memory."""
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "rlver_jax.main", f"--config=configs/{algorithm}.py"]
  command += [f"--workdir={workdir}", f"--config.seed={seed}", f"--config.dialogue.mode={mode}"]
  began = time.perf_counter()
  log = workdir.with_suffix(".log")
  with log.open("w", encoding="utf-8") as out:
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)
  if status:
    sys.exit(f"{' '.join(command)} failed, see {log}")
  cost = {"seconds": time.perf_counter() - began, "peak_kib": usage.ru_maxrss}
  (workdir / COST).write_text(json.dumps(cost), encoding="utf-8")


def row(name: str, workdir: pathlib.Path) -> str:
  """A run as a line of the table."""
  users = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))["users"]
  cost = json.loads((workdir / COST).read_text(encoding="utf-8"))

  def change(user: str, number: str, form: str) -> str:
    return " → ".join(form.format(users[user][when][number]) for when in ("before", "after"))

  own = "language_model"
  cells = [
    name,
    change(own, "final_emotion", "{:.1f}"),
    change("scripted", "final_emotion", "{:.1f}"),
    change(own, "failure", "{:.0%}"),
    change(own, "strategies", "{:.0f}"),
    f"{cost['seconds'] / 60:.1f}",
    f"{cost['peak_kib'] / 2**20:.1f}",
  ]
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  main()
