"""Fixtures that several test modules share, and the programs that all tests compile."""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile

import pytest

from rlver_jax import cli

# Before JAX is imported: what one test compiles, the others and their subprocesses read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _folder = tempfile.mkdtemp(prefix="rlver-tests-xla-")
  atexit.register(shutil.rmtree, _folder, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# What float32 runs set for themselves: elsewhere it would make other programs of the same ones.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# As the package's own programs, and in one piece: a test has one CPU core.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} {cli.XLA_FLAG} --xla_cpu_parallel_codegen_split_count=1"
)

# Servers of tests are on this machine, whatever proxy leads elsewhere.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import jax
import remote_server
import runs

# They take minutes each: begun last, they would keep one process busy when the other has ended.
# The first holds 15 GB, which leaves no room beside another test of the real checkpoint.
LONG_FILES = (
  "test_train_qwen", "test_sharded", "test_quick_start", "test_train", "test_remote_run", "test_sft"
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  order = {name: i for i, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: order.get(item.path.stem, len(LONG_FILES)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
  """Programs of tiny models mostly run for a blink and are not optimised for longer, here and in
  the processes that a test starts."""
  worth_it = item.get_closest_marker("qwen") or item.get_closest_marker("optimised")
  jax.config.update("jax_disable_most_optimizations", not worth_it)
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false" if worth_it else "true"


@pytest.fixture(scope="session")
def qwen_path() -> pathlib.Path:
  """The real Qwen2.5-0.5B checkpoint; tests that ask for it are skipped where there is none."""
  path = os.environ.get("RLVER_QWEN_PATH", "")
  if not path or not pathlib.Path(path, "config.json").exists():
    pytest.skip("RLVER_QWEN_PATH does not name a Qwen2.5-0.5B checkpoint directory")
  return pathlib.Path(path)


@pytest.fixture
def command(monkeypatch, capfd):
  """Runs a program's command line in this process, as `runs.command_in_process` does."""
  with runs.command_settings(monkeypatch):
    yield functools.partial(runs.command_in_process, monkeypatch, capfd)


@pytest.fixture
def server(monkeypatch):
  """A server for remote simulated users, whose key is in the environment."""
  monkeypatch.setenv(remote_server.VARIABLE, remote_server.KEY)
  server = remote_server.Server()
  yield server
  server.close()
