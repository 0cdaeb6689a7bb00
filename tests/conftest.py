"""Fixtures that several test modules share."""

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def qwen_path() -> pathlib.Path:
  """The real Qwen2.5-0.5B checkpoint; tests that ask for it are skipped where there is none."""
  path = os.environ.get("RLVER_QWEN_PATH", "")
  if not path or not pathlib.Path(path, "config.json").exists():
    pytest.skip("RLVER_QWEN_PATH does not name a Qwen2.5-0.5B checkpoint directory")
  return pathlib.Path(path)
