"""Python processes of their own that see several emulated CPU devices."""

import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[1]


def start(devices: int, *arguments: object) -> subprocess.Popen:
  """Starts Python with these arguments in the repository, its output in pipes."""
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)
  }  # fmt: skip
  command = [sys.executable, *map(str, arguments)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)


def output(devices: int, *arguments: object) -> str:
  """What such a process prints; fails with its last errors where it fails."""
  process = start(devices, *arguments)
  out, err = process.communicate(timeout=1200)
  assert process.returncode == 0, err[-4000:]
  return out
