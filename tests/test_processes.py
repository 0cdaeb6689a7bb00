"""What the first of two processes tells the other: bytes of any length, refusals, ends of runs."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import runs
from remote_server import VARIABLE

from rlver_jax import processes

ONE_OF_TWO = """
  import sys, jax

  address, process, url = sys.argv[1:]
  jax.distributed.initialize(address, 2, int(process))
  import builders
  import remote_server
  from configs import grpo
  from rlver_jax.dialogue.dialogue import Dialogue, Rules
  from rlver_jax.dialogue.remote import simulator as remote
  from rlver_jax.errors import BudgetSpent, UserError
  from rlver_jax.processes import CHUNK, from_first

  first = jax.process_index() == 0
  for length in (0, 1, CHUNK - 8, CHUNK - 7, CHUNK, 3 * CHUNK + 5):
    told = bytes(i % 251 for i in range(length))
    assert from_first(told if first else b"mine" * (length % 7)) == told

  c = grpo.get_config().simulator
  c.kind = "openai"
  c.remote.update(base_url=url, model="nobody", api_key_env=remote_server.VARIABLE)
  c.remote.failure_budget = 0
  try:
    remote.check(c)
  except UserError as error:
    assert "does not serve" in str(error)
  else:
    sys.exit(3)

  settings = remote.SimulatorSettings("generate", True, 9, 9, 0)
  simulator = remote.build(c, settings, builders.templates(), 0)
  dialogue = Dialogue(0, 0, builders.scenario(first_message=""), Rules())
  simulator.start(0)
  simulator.open({0: dialogue})
  simulator.submit(0, dialogue)
  try:
    while not simulator.poll(wait=True):
      pass
  except BudgetSpent as error:
    assert "failure_budget is 0" in str(error)
    simulator.close()
    sys.exit(7)
"""


def test_one_process_tells_itself():
  assert processes.from_first(b"abc") == b"abc"


@pytest.mark.slow
def test_two_processes_hear_what_the_first_one_finds(server):
  with socket.create_server(("127.0.0.1", 0)) as free:
    address = f"127.0.0.1:{free.getsockname()[1]}"
  program = textwrap.dedent(ONE_OF_TWO)
  paths = os.pathsep.join(map(str, (runs.REPOSITORY, runs.REPOSITORY / "tests")))
  started = []
  for i in range(2):
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    if i:  # only the first one needs the key
      del environment[VARIABLE]
    command = [sys.executable, "-c", program, address, str(i), server.url]
    started.append(subprocess.Popen(command, env=environment))
  try:
    assert [process.wait(timeout=120) for process in started] == [7, 7]
  finally:
    for process in started:
      process.kill()
