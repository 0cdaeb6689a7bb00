"""Signals: noted, answered where the state is whole, and in real processes that go on later."""

import random
import signal
import threading
import time

import jax
import numpy as np
import pytest
import runs
import subprocesses
from jax.experimental import multihost_utils

from rlver_jax.checkpoint import Checkpoints
from rlver_jax.interrupt import SIGNALS, Interrupted, Interrupts


@pytest.fixture(autouse=True)
def signals_restored():
  with runs.signals_restored():
    yield


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_answered_at_the_next_question_and_not_before(number):
  interrupts = Interrupts()
  interrupts.check()
  signal.raise_signal(number)
  with pytest.raises(Interrupted, match=f"^stopped by {number.name}$") as stop:
    interrupts.check()
  assert stop.value.signum == number
  with pytest.raises(Interrupted):  # it stays asked for
    interrupts.check()


def test_where_the_state_is_half_changed_a_signal_waits():
  interrupts = Interrupts()
  with interrupts.deferred():
    signal.raise_signal(signal.SIGTERM)
    interrupts.check()
  with pytest.raises(Interrupted):
    interrupts.check()


def test_a_failure_inside_deferred_ends_the_deferral():
  interrupts = Interrupts()
  with pytest.raises(KeyError), interrupts.deferred():
    raise KeyError
  signal.raise_signal(signal.SIGTERM)
  with pytest.raises(Interrupted):
    interrupts.check()


def test_after_the_first_signal_the_system_acts_on_the_second():
  Interrupts()
  assert all(callable(signal.getsignal(number)) for number in SIGNALS)
  signal.raise_signal(signal.SIGTERM)
  assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize(("others", "stops"), [([0, 0], False), ([0, 15], True)])
def test_several_hosts_stop_together_for_a_signal_to_any_of_them(monkeypatch, others, stops):
  interrupts = Interrupts()
  gathered = lambda own: np.array([own, *others])  # noqa: E731
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
  if not stops:
    interrupts.check()
    return
  with pytest.raises(Interrupted) as stop:
    interrupts.check()
  assert stop.value.signum == 15


STEPS = 6


class Process:
  """A run in a process of its own, with the lines of its output as they come."""

  def __init__(self, workdir):
    # A line is written at once, a step takes a while: so a signal falls where it is meant to.
    changes = {
      "steps": STEPS,
      "dialogue.max_turns": 4,
      "sampling.max_new_tokens": 16,
      "checkpoint.every": 2,
    }
    self.process = subprocesses.start(runs.command(workdir, **changes))
    self.lines: list[str] = []
    self._reader = threading.Thread(target=self._read)
    self._reader.start()

  def _read(self):
    for line in self.process.stdout:
      self.lines.append(line.rstrip("\n"))

  def wait_for(self, start: str) -> None:
    """Returns once a line of the output starts so."""
    deadline = time.monotonic() + 300
    while not any(line.startswith(start) for line in self.lines):
      assert self.process.poll() is None, self.end()
      assert time.monotonic() < deadline, self.lines
      time.sleep(0.005)

  def end(self) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    error = self.process.stderr.read()
    code = self.process.wait(timeout=300)
    self._reader.join()
    return code, self.lines, error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The folder of a run that nobody stopped."""
  workdir = tmp_path_factory.mktemp("finished")
  code, lines, error = Process(workdir).end()
  assert (code, error) == (0, "")
  assert [line.split(" ")[1] for line in lines if line.startswith("step ")] == [
    f"{n}/{STEPS}" for n in range(1, STEPS + 1)
  ]
  assert any(line.startswith("emotion") for line in lines)  # of the summary
  return workdir


def newest(workdir):
  return Checkpoints(str(workdir / "checkpoints"), keep=None).latest()


def interrupt_twice(workdir):
  """Starts the run and sends two interrupts while it loads: the process ends at once."""
  process = Process(workdir)
  process.wait_for("Loading models")
  process.process.send_signal(signal.SIGINT)
  # The first one is seen by the kernel at once, by Python between two of its instructions.
  while not default_action(process.process.pid, signal.SIGINT):
    time.sleep(0.01)
  process.process.send_signal(signal.SIGINT)
  sent = time.monotonic()
  code, lines, error = process.end()
  assert (code, error) == (-signal.SIGINT, "")
  assert time.monotonic() - sent < 5
  assert not any(line.startswith("step ") for line in lines)


def stop(workdir, number, code, after):
  """Starts the run and sends a signal after a line that begins so: the run saves its last step.

  Returns that step and the lines of the output."""
  process = Process(workdir)
  process.wait_for(after)
  process.process.send_signal(number)
  found, lines, error = process.end()
  assert (found, error) == (code, "")
  assert lines[-1] == f"stopped by {number.name}; the same command goes on."
  records = runs.metrics(workdir)
  saved = newest(workdir)
  assert saved == (records[-1]["step"] if records else 0)
  assert saved < STEPS
  assert not (workdir / "summary.json").exists()
  return saved, lines


def kill(workdir, after):
  """Starts the run and kills it soon after a line that begins so; returns the lines."""
  process = Process(workdir)
  process.wait_for(after)
  time.sleep(random.Random(after).uniform(0, 0.5))
  process.process.kill()
  code, lines, _ = process.end()
  assert code == -signal.SIGKILL
  return lines


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_stopped_in_every_way_goes_on_to_the_same_end(tmp_path, finished):
  """One run, in whose folder each start goes on with what the one before has left."""
  interrupt_twice(tmp_path)
  # Before the first step there is nothing to save but the state that it begins with.
  saved, lines = stop(tmp_path, signal.SIGINT, 130, "Loading models")
  assert saved == 0 and not any(line.startswith("Going on") for line in lines)
  saved, lines = stop(tmp_path, signal.SIGTERM, 143, "step 1/")
  assert saved > 0 and "Going on after step 0." in lines
  lines = kill(tmp_path, f"step {saved + 1}/")
  assert f"Going on after step {saved}." in lines
  # From the last checkpoint of the killed one.
  code, lines, error = Process(tmp_path).end()
  assert (code, error) == (0, "")
  assert not any(line.startswith("Traceback") for line in lines)
  pairs = zip(runs.metrics(tmp_path), runs.metrics(finished), strict=True)
  for ours, theirs in (map(runs.reproducible, pair) for pair in pairs):
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
  assert runs.dialogue_files(tmp_path) == runs.dialogue_files(finished)
  assert newest(tmp_path) == STEPS


def default_action(pid: int, number: int) -> bool:
  """Whether the process leaves this signal to the system, as Linux's /proc says."""
  with open(f"/proc/{pid}/status", encoding="ascii") as file:
    caught = next(line.split()[1] for line in file if line.startswith("SigCgt:"))
  return not int(caught, 16) >> (number - 1) & 1
