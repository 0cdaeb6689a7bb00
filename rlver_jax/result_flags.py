"""Flags of the programs that look at what a run left."""

from absl import flags

OUT = flags.DEFINE_string(
  "out", None, "The directory of an export, or the file to write (by default one in WORKDIR)."
)
STEP = flags.DEFINE_integer(
  "step", None, "Which step: by default the newest checkpoint, or the dialogues of all steps."
)
