"""Evaluations of what a run left.

    python -m rlver_jax.evaluate --mode=rescore --workdir=RUN [--step=N] [--out=FILE]

rescore: asks the run's simulated user once more how each recorded reply changes its emotion, and
compares. Exit codes: 0 all equal, 1 not all, 2 a mistake in the command or the files.
"""

import pathlib

from absl import flags

from rlver_jax import cli
from rlver_jax.errors import UserError
from rlver_jax.result_flags import OUT, STEP

MODE = flags.DEFINE_enum("mode", None, ["rescore"], "What to do.")


def main(argv: list[str]) -> int:
  del argv
  if MODE.value is None or not cli.WORKDIR.value:
    raise UserError("--mode or --workdir is missing, expected --mode=rescore and a run's folder.")
  workdir = pathlib.Path(cli.WORKDIR.value).expanduser()
  out = pathlib.Path(OUT.value).expanduser() if OUT.value else workdir / "rescored.jsonl"
  summary, equal = rescore(workdir, STEP.value, out)
  for name, value in summary.items():
    print(f"{name:<26}{value}")
  print(f"Wrote {out}.")
  return 0 if equal else 1


def rescore(workdir: pathlib.Path, step: int | None, out: pathlib.Path) -> tuple[dict, bool]:
  """Appraises the dialogues of a run once more and writes what came out; one step's or all.

  Returns the rows of a table, and whether everything is as recorded. Raises UserError for a run
  that cannot be rescored, and for files that are not its own.
  """
  from rlver_jax import build
  from rlver_jax import config as config_lib
  from rlver_jax import workdir as workdir_lib
  from rlver_jax.dialogue import rescore as rescore_lib
  from rlver_jax.dialogue.environment import played
  from rlver_jax.sources import open_sources

  config = workdir_lib.read_config(workdir)
  config_lib.validate(config)
  if config.task != "rl":
    raise UserError(f"{workdir} holds a run of task '{config.task}', expected one with dialogues.")
  if config.simulator.kind == "openai":
    raise UserError(
      "simulator.kind is 'openai', whose server need not answer alike twice, expected a run with "
      "language_model or scripted."
    )
  files = _files(workdir, step)
  cli.configure_jax(config)
  sources = open_sources(config)
  tokenizer = sources.simulator.tokenizer if sources.simulator else None
  scenarios = {scenario.id: scenario for scenario in sources.scenarios}
  rules, e = build.build_rules(config), config.environment
  every_level = build.build_levels(config)
  levels = {name: every_level[name] for name in played(e.level, e.weights)}
  recorded = {
    number: rescore_lib.read(path, scenarios, rules, levels, tokenizer)
    for number, path in files.items()
  }
  simulator, slots = build.build_simulator(config, sources), build.slots(config, sources.mesh)
  found = {
    number: rescore_lib.rescore(simulator, dialogues, step=number - 1, slots=slots)
    for number, dialogues in recorded.items()
  }
  try:
    rescore_lib.write(out, found)
  except OSError as error:
    raise UserError(
      f"--out is {out}, which cannot be written ({error.strerror}), expected a file to write."
    ) from error
  every = [dialogue for of_step in found.values() for dialogue in of_step]
  return rescore_lib.summary(every), all(dialogue.equal for dialogue in every)


def _files(workdir: pathlib.Path, step: int | None) -> dict[int, pathlib.Path]:
  """The files of dialogues by step, in order."""
  from rlver_jax import workdir as workdir_lib

  files = workdir_lib.dialogue_files(workdir)
  if not files or (step is not None and step not in files):
    wanted = "step_*.jsonl" if step is None else f"step_{step:06d}.jsonl"
    raise UserError(f"{workdir / 'dialogues'} has no {wanted}, expected the dialogues of a run.")
  return files if step is None else {step: files[step]}


if __name__ == "__main__":
  cli.run(main)
