"""Processes of their own, which run in the repository; their output is kept."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

REPOSITORY = pathlib.Path(__file__).parents[1]


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen:
  """Starts a command, its output in pipes."""
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)


def finished(*arguments: object) -> subprocess.CompletedProcess:
  """Runs Python with these arguments to its end."""
  command = [sys.executable, *map(str, arguments)]
  return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def emulating(devices: int, *arguments: object) -> subprocess.Popen:
  """Starts Python with these arguments, in which JAX sees so many emulated CPU devices."""
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)
  }  # fmt: skip
  return start([sys.executable, *map(str, arguments)], environment)


def emulated(devices: int, *arguments: object) -> str:
  """What such a process prints; fails with its last errors where it fails."""
  process = emulating(devices, *arguments)
  out, err = process.communicate(timeout=1200)
  assert process.returncode == 0, err[-4000:]
  return out
