"""What the command-line programs share: what ends one is one line, a user's mistake exit code 2."""

import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from absl import app, flags, logging
from ml_collections import ConfigDict

from rlver_jax.errors import BudgetSpent, Diverged, UserError

WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; to train, by default runs/ and the config's and preset's name.",
)

# A CPU's programs run as fast, and are compiled in two thirds of the time, where XLA does not make
# of every fusion a module that LLVM optimises by itself.
XLA_FLAG = "--xla_cpu_use_fusion_emitters=false"


def run(
  main: Callable[[list[str]], int | None],
  parse_flags: Callable[[list[str]], list[str]] | None = None,
  *,
  operands: bool = False,
) -> None:
  """Parses the flags, runs `main` and exits with what it returns.

  `main` gets the words that are no flags; without `operands` any such word is a mistake.

  A UserError from either ends the program with its message on stderr and exit code 2, BudgetSpent
  and Diverged with theirs and 1. Where nobody reads the output any more it ends as other programs
  do, without a word.
  """

  def checked_main(argv: list[str]) -> int | None:
    words = argv[1:]
    if words and not operands:
      raise UserError(f"the command line has '{words[0]}', expected flags only.")
    return main(words)

  def checked_flags(argv: list[str]) -> list[str]:
    try:
      return (parse_flags or flags.FLAGS)(argv)
    except flags.Error as error:
      raise UserError(f"{last_line(str(error))}") from error

  logging.set_verbosity(logging.WARNING)
  try:
    app.run(checked_main, flags_parser=checked_flags)
  except (UserError, BudgetSpent, Diverged) as error:
    print(f"rlver_jax: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UserError) else 1)
  except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
    sys.exit(128 + signal.SIGPIPE)


def configure_jax(config: ConfigDict) -> None:
  """Settings of JAX that a configuration asks for, before the first array."""
  import jax  # late, so that a wrong flag is answered at once

  given = os.environ.get("XLA_FLAGS", "")
  if XLA_FLAG.partition("=")[0] not in given:
    os.environ["XLA_FLAGS"] = f"{given} {XLA_FLAG}".strip()  # read with the first array
  if config.compilation_cache:
    folder = os.path.expanduser(config.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", folder)
  if config.cpu_devices > 1:
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
  of = next(section for section in ("policy", "simulator", "judge") if section in config)
  if config[of].dtype == "float32":
    # Accelerators would otherwise round float32 products to fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")


def show(text: str, file: TextIO | None = None, end: str = "\n") -> None:
  """Prints what may hold any character, whatever the terminal can show; to stdout by default."""
  out = file or sys.stdout
  encoding = out.encoding or "utf-8"
  print(text.encode(encoding, "replace").decode(encoding), file=out, end=end, flush=True)


def last_line(message: str) -> str:
  """The last line of a library's message, which says what is wrong, without an error's name."""
  line = [line.strip() for line in message.splitlines() if line.strip()][-1]
  name, _, rest = line.partition(": ")
  return rest if name.endswith("Error") and rest else line
