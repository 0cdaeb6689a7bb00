"""What the processes of a run must agree on, told by the first of them."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlver_jax.errors import UserError

CHUNK = 16 * 1024  # bytes sent at a time: one program, whatever the length


def is_first() -> bool:
  """Whether this is the process that reads and writes what all share."""
  return jax.process_index() == 0


def from_first(message: bytes) -> bytes:
  """The `message` of the first process, in every process; what the others pass is ignored.

  All processes must call it at the same places. The bytes travel behind their number (8 bytes),
  in chunks of one size.
  """
  if jax.process_count() == 1:
    return message
  sent = np.frombuffer(len(message).to_bytes(8, "big") + message, np.uint8)
  received = _broadcast(sent[:CHUNK])
  length = 8 + int.from_bytes(received[:8].tobytes(), "big")
  while len(received) < length:
    chunk = _broadcast(sent[len(received) : len(received) + CHUNK])
    received = np.concatenate([received, chunk])
  return received[8:length].tobytes()


def ask_first(find: Callable[[], Any]) -> Any:
  """The JSON value that `find` returns in the first process, in all of them; a UserError that it
  raises there is raised in all. All processes must call it at the same places."""
  failure, value = "", None
  if is_first():
    try:
      value = find()
    except UserError as error:
      failure = str(error)
  failure, value = json.loads(from_first(json.dumps([failure, value]).encode()))
  if failure:
    raise UserError(failure)
  return value


def check_in_first(check: Callable[[], object]) -> None:
  """Runs a check in the first process; the UserError that it may raise is raised in all of them."""

  def find() -> None:
    check()

  ask_first(find)


def _broadcast(part: np.ndarray) -> np.ndarray:
  padded = np.zeros(CHUNK, np.uint8)
  padded[: len(part)] = part
  return np.asarray(multihost_utils.broadcast_one_to_all(padded))
