"""A dialogue at the terminal: with a policy, or as the helper of a simulated user.

    python -m rlver_jax.chat --path=MODEL_OR_RUN [--step=N] [--mode=direct|think]
    python -m rlver_jax.chat --as=helper [--simulator=MODEL|scripted] [--path=RUN]

As user (the default) you talk to the policy: a Hugging Face directory, an embedded model such as
tiny-policy, or the checkpoint of a run; replies appear as they are drawn. As helper you reply to a
simulated user (tiny-simulator by default; with --path=RUN that run's) and see after each reply how
its emotion changes, and why. --scenario=ID says who the user is, --seed what is drawn. /new begins
another dialogue; /quit, Ctrl-D and Ctrl-C end. --out=FILE takes each dialogue that has ended, in
the format of recorded ones. Exit codes: 0, 1 when a budget of a run's remote user is spent, 2 for a
mistake in the command or the files.
"""

import pathlib
import sys

from absl import flags

from rlver_jax import cli
from rlver_jax.errors import UserError
from rlver_jax.result_flags import OUT, STEP

USER, HELPER, SCRIPTED = "user", "helper", "scripted"
PATH = flags.DEFINE_string("path", None, "The policy: a model, or the folder of a run.")
SIMULATOR = flags.DEFINE_string("simulator", None, f"The simulated user: a model, or {SCRIPTED}.")
AS = flags.DEFINE_enum("as", USER, [USER, HELPER], "Who you are.")
SCENARIO = flags.DEFINE_string("scenario", None, "The id of the scenario; by default the first.")
MODE = flags.DEFINE_enum("mode", None, ["direct", "think"], "How the policy replies.")
SEED = flags.DEFINE_integer("seed", 0, "Determines what is drawn.")


def main(argv: list[str]) -> int:
  del argv
  _check_flags()
  sys.stdin.reconfigure(errors="replace")
  try:
    # Imported late, so that a wrong flag is answered at once.
    from rlver_jax import conversation

    out = pathlib.Path(OUT.value).expanduser() if OUT.value else None
    if out is not None and not out.parent.is_dir():
      raise UserError(f"--out is {out}, expected a file in a folder that exists.")
    choice = conversation.Choice(
      PATH.value, STEP.value, SIMULATOR.value, SCENARIO.value, MODE.value, SEED.value
    )
    if AS.value == USER:
      conversation.with_policy(choice, out)
    else:
      conversation.with_simulator(choice, out)
  except KeyboardInterrupt:
    cli.show("")
  return 0


def _check_flags() -> None:
  """Raises UserError for what does not go with who you are."""
  if AS.value == USER:
    if not PATH.value:
      raise UserError("--path is missing, expected a model or the folder of a run to talk to.")
    if SIMULATOR.value:
      raise UserError(f"--simulator is {SIMULATOR.value} with --as=user, expected --as=helper.")
    return
  for flag in (STEP, MODE):
    if flag.value is not None:
      raise UserError(f"--{flag.name} is {flag.value} with --as=helper, expected --as=user.")


if __name__ == "__main__":
  cli.run(main)
