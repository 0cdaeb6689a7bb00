"""Fixtures that several test modules share."""

import os
import pathlib

import pytest
import remote_server
import runs


@pytest.fixture(scope="session")
def qwen_path() -> pathlib.Path:
  """The real Qwen2.5-0.5B checkpoint; tests that ask for it are skipped where there is none."""
  path = os.environ.get("RLVER_QWEN_PATH", "")
  if not path or not pathlib.Path(path, "config.json").exists():
    pytest.skip("RLVER_QWEN_PATH does not name a Qwen2.5-0.5B checkpoint directory")
  return pathlib.Path(path)


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
  """What the runs of a module compile is kept for those that come after, of other modules too."""
  with runs.compilation_cache(tmp_path_factory.getbasetemp() / "xla"):
    yield


@pytest.fixture
def server(monkeypatch):
  """A server for remote simulated users, whose key is in the environment."""
  monkeypatch.setenv(remote_server.VARIABLE, remote_server.KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  server = remote_server.Server()
  yield server
  server.close()
