"""What the benchmarks share: the model they run on, and the PyTorch peer they are compared with."""

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

from rlver_jax import partitioning
from rlver_jax.models import hub, weights
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config

RANDOM = Qwen2Config(
  vocab_size=151_936,
  hidden_size=256,
  intermediate_size=1024,
  num_hidden_layers=4,
  num_attention_heads=8,
  num_key_value_heads=2,
  head_dim=32,
  tie_word_embeddings=True,
)


def arguments(description: str, **defaults: int) -> argparse.Namespace:
  """The command line: a model, the sizes in `defaults`, and where the peer's script is."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument(
    "--model", type=pathlib.Path, help="Hugging Face directory; by default a random 256-wide model"
  )
  parser.add_argument(
    "--peer", type=pathlib.Path, help="script that does the same work in PyTorch, to compare with"
  )
  parser.add_argument("--repeats", type=int, default=3)
  for name, value in defaults.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  return parser.parse_args()


def load(directory: pathlib.Path | None, remat: str) -> tuple[Qwen2, pathlib.Path]:
  """The model in float32 on one device, and a directory that the peer can read it from."""
  mesh = partitioning.make_mesh(1, 1, 1)
  if directory is None:
    directory = pathlib.Path(tempfile.gettempdir()) / "rlver_jax-benchmark-model"
    if not directory.exists():
      weights.save(weights.initialise(RANDOM, 0, mesh), directory, source=None, dtype="float32")
  config = hub.read_config(directory, dtype="float32", param_dtype="float32", remat=remat)
  return weights.load(directory, config, mesh), directory


def tokens_per_second(
  script: pathlib.Path, what: str, model: pathlib.Path, args: argparse.Namespace
) -> float:
  """Runs the peer's script on equal work and reads its median tokens a second."""
  sizes = {k: v for k, v in vars(args).items() if isinstance(v, int)}
  flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
  command = [sys.executable, str(script), what, str(model), *flags]
  output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  return float(re.search(r"([\d.]+) tokens/s", output)[1])


def report(
  what: str, tokens: int, seconds: list[float], args: argparse.Namespace, model: pathlib.Path
) -> None:
  """Prints one line: our median tokens a second, and the ratio to the peer's where there is one."""
  middle = statistics.median(seconds)
  line = (
    f"{what}: {tokens / middle:.1f} tokens/s, median {middle:.2f} s "
    f"[{min(seconds):.2f}, {max(seconds):.2f}]"
  )
  if args.peer:
    theirs = tokens_per_second(args.peer, what, model, args)
    line += f", peer {theirs:.1f} tokens/s, ratio {tokens / middle / theirs:.2f}"
  print(line)
