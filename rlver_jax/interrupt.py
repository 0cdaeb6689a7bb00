"""Ctrl-C and SIGTERM as a request to save and stop, answered where the state is whole."""

import contextlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """The run was asked to stop; `signum` is the signal that asked."""

  def __init__(self, signum: int):
    super().__init__(f"stopped by {signal.Signals(signum).name}")
    self.signum = signum


class Interrupts:
  """Notes signals; `check` raises Interrupted when one has come.

  A second signal ends the process at once, whatever it is doing.
  """

  def __init__(self):
    self._signum = 0
    self._deferred = False
    for noted in SIGNALS:
      signal.signal(noted, self._note)

  def _note(self, signum: int, frame) -> None:
    self._signum = signum
    # Not Python's handlers: they would wait for a device program, and then for the checkpoint.
    for noted in SIGNALS:
      signal.signal(noted, signal.SIG_DFL)

  def check(self) -> None:
    """Raises Interrupted when a signal has come, unless in `deferred`.

    On several hosts they agree first, so this must be called by all at the same places.
    """
    if self._deferred:
      return
    signum = self._signum
    if jax.process_count() > 1:
      signum = int(np.max(multihost_utils.process_allgather(np.int32(signum))))
    if signum:
      raise Interrupted(signum)

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """No `check` raises inside, where the state is half changed."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False
