"""Runs and benchmarks as one HTML page, to look at without a server or a network.

    python -m rlver_jax.report WORKDIR... [--out=FILE] [--dialogues=200] [--step=N]

Curves with 95% intervals, the path of emotion from turn to turn, tables, and the dialogues, which
can be filtered and searched: of training at most --dialogues of each run, evenly chosen (with
--step of this step alone), those on held-out scenarios and of benchmarks all. By default the page
is report.html in the first folder. A run that still goes on is shown as far as it has come. Exit
codes: 0, or 2 for a mistake in the command or the files.
"""

import pathlib

from absl import flags

from rlver_jax import cli
from rlver_jax.errors import UserError
from rlver_jax.result_flags import OUT, STEP

DIALOGUES = flags.DEFINE_integer(
  "dialogues", 200, "Most dialogues of training that are shown of each run.", lower_bound=0
)
PAGE_FILE = "report.html"


def main(paths: list[str]) -> int:
  if not paths:
    raise UserError("the command line names no folder, expected folders of runs.")
  # Imported late, so that a wrong flag is answered at once.
  from rlver_jax.page import content, reading, writing

  runs = reading.read(paths)
  if STEP.value is not None and all(STEP.value not in run.training for run in runs):
    raise UserError(f"--step is {STEP.value}, expected one whose dialogues a run has kept.")
  found = content.content(runs, DIALOGUES.value, STEP.value)
  out = pathlib.Path(OUT.value).expanduser() if OUT.value else runs[0].folder / PAGE_FILE
  try:
    writing.write(out, found)
  except OSError as error:
    raise UserError(
      f"--out is {out}, which cannot be written ({error.strerror}), expected a file to write."
    ) from error
  cli.show(f"Wrote {out}: {len(runs)} run(s), {len(found['dialogues'])} dialogues.")
  return 0


if __name__ == "__main__":
  cli.run(main, operands=True)
