"""One side of many dialogues, played by a model behind an OpenAI-compatible server.

The calls of a dialogue run in the connection's thread while other dialogues go on here. Of several
processes the first one makes the calls; the answers that are ready are told to the others once a
round, so that all of them go on with the same dialogues.
"""

import abc
import collections
import dataclasses
import json
import queue
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import logging

from rlver_jax import processes
from rlver_jax.dialogue.dialogue import (
  HELD_OUT_STEP,
  Answer,
  Dialogue,
  Failed,
  Plan,
  PolicyReply,
  UserMessage,
)
from rlver_jax.dialogue.remote import connection as connection_lib
from rlver_jax.dialogue.remote.connection import (
  CallFailed,
  Connection,
  Message,
  OutOfTokens,
  RemoteSampling,
  RemoteSettings,
  Unreadable,
)
from rlver_jax.errors import BudgetSpent

WAIT = 0.2  # most seconds that `poll` waits, so that Ctrl-C is heard
SPENT = ("prompt_tokens", "completion_tokens", "failures")  # against the run's budgets
# failures: dialogues; parse_failures: answers that cannot be read. See also `Connection`.
COUNTS = (*SPENT, "requests", "retries", "parse_failures", "without_usage")
ANSWERS: dict[str, type] = {
  kind.__name__: kind for kind in (Failed, Plan, PolicyReply, UserMessage)
}
# Where the special tokens of published chat formats begin: <|, <｜, <s>, </s>, <think>, [INST] ...
_MARKS = re.compile(r"<(?=[|｜/!A-Za-z_])|\[(?=/?[A-Z_]+\])")


class RemotePlayer(abc.ABC):
  """Asks a server for what dialogues wait for; a subclass says what (`answer`).

  connection: None in all processes but the first. who: what failures call it, one and several.
  kinds: the dataclasses that its answers may be, by name.
  """

  who = ("partner", "partners")
  kinds = ANSWERS
  far = True  # see `rollout.play`

  def __init__(self, connection: Connection | None):
    self.connection = connection
    self.step = 0
    self._asked: set[int] = set()
    self._ready: queue.SimpleQueue = queue.SimpleQueue()
    self._last_failure = "a fault before this start"
    self._taken: collections.Counter[str] = collections.Counter()

  @abc.abstractmethod
  async def answer(self, slot: int) -> Answer:
    """What the dialogue in `slot` waits for, asked in the connection's thread.

    A dialogue does not change while it waits. Raises CallFailed where the server fails for good.
    """

  def start(self, step: int) -> None:
    """A new batch of dialogues begins; `step` enters the seeds that are sent."""
    self.step = step
    self._asked.clear()
    self._ready = queue.SimpleQueue()  # an answer to an earlier batch goes nowhere
    if self.connection:
      self.connection.cancel()

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    """The dialogue in `slot` waits for what its stage says."""
    self._asked.add(slot)
    if self.connection:
      self.connection.spawn(self._reply(slot, dialogue, self._ready))

  def poll(self, wait: bool = False) -> dict[int, Answer]:
    """The answers that are ready, by slot, after a moment for the first one where `wait` says so.

    Raises BudgetSpent, in all processes, where a budget is.
    """
    if not self._asked:
      return {}
    answers, over = {}, ""
    if self.connection:
      answers, over = dict(self._collect(wait)), self._over()
    if jax.process_count() > 1:
      answers, over = _unpack(processes.from_first(_pack(answers, over)), self.kinds)
    if over:
      raise BudgetSpent(over)
    self._asked -= answers.keys()
    return answers

  def _collect(self, wait: bool) -> Iterator[tuple[int, Answer]]:
    try:
      while True:
        slot, answer = self._ready.get(wait, WAIT)
        if isinstance(answer, Exception):
          raise answer
        yield slot, answer
        wait = False
    except queue.Empty:
      return

  async def _reply(self, slot: int, dialogue: Dialogue, ready: queue.SimpleQueue) -> None:
    """Puts the answer for a dialogue into `ready`."""
    try:
      answer: Answer | Exception = await self.answer(slot)
    except OutOfTokens:
      return  # `poll` raises BudgetSpent, as spent tokens never become fewer
    except CallFailed as failure:
      self.connection.counts["failures"] += 1
      self._last_failure = str(failure)
      batch = "the held-out dialogues" if self.step == HELD_OUT_STEP else f"step {self.step + 1}"
      where = f"{batch}, dialogue {dialogue.index}, turn {dialogue.turn}"
      logging.warning("The %s of %s failed: %s.", self.who[0], where, failure)
      answer = Failed(answered=isinstance(failure, Unreadable))
    except Exception as error:  # a mistake of ours, to be raised where the rollout is
      answer = error
    ready.put((slot, answer))

  # What was spent.

  def take_metrics(self) -> dict[str, float]:
    """What the calls since the last time came to, by name."""
    if not self.connection:
      return {}
    total = self.connection.counts.copy()
    taken, self._taken = self._taken, total
    return {f"remote/{name}": float(total[name] - taken[name]) for name in COUNTS}

  def spent(self) -> dict[str, int]:
    """What counts against the budgets of a run, so far."""
    return {name: self.connection.counts[name] for name in SPENT} if self.connection else {}

  def resume(self, spent: dict[str, int]) -> None:
    """Goes on from what an earlier start of the run has spent."""
    if self.connection:
      self.connection.counts.update(spent)
      self._taken = self.connection.counts.copy()

  def close(self) -> None:
    """The run is over."""
    if self.connection:
      self.connection.close()

  def _over(self) -> str:
    """Which budget is spent, in a sentence for the user; "" where none is."""
    limits, counts = self.connection.settings, self.connection.counts
    field = f"{limits.section}.remote"
    goes_on = "; the same command with a larger budget goes on."
    if counts["failures"] > limits.failure_budget:
      return (
        f"{field}.failure_budget is {limits.failure_budget}, but the {self.who[1]} of "
        f"{counts['failures']} dialogues have failed for good, the last one with "
        f"{self._last_failure}{goes_on}"
      )
    if limits.token_budget and (tokens := self.connection.tokens()) >= limits.token_budget:
      return (
        f"{field}.token_budget is {limits.token_budget}, but {tokens} tokens are spent{goes_on}"
      )
    return ""


def check(settings: RemoteSettings, sampling: RemoteSampling) -> None:
  """Checks the access to a server before anything is loaded.

  Raises UserError in all processes for what the first one finds.
  """
  processes.check_in_first(lambda: connection_lib.check(settings, sampling))


def connect(settings: RemoteSettings, sampling: RemoteSampling) -> Connection | None:
  """The connection of the first process, None in the others."""
  if not processes.is_first():
    return None
  return Connection(settings, sampling, connection_lib.read_key(settings))


def plain_text(text: str) -> str:
  """Text that a server's tokenizer reads as text: its marks of special tokens are broken up.

  There special tokens cannot be switched off, and `<|im_end|>` in a message might end it.
  """
  return _MARKS.sub(lambda mark: mark[0] + " ", text)


def seed_of(*numbers: int) -> int:
  """A seed for the server, in 0..2^31 - 1: a function of (seed, step, dialogue, turn, call, n)."""
  return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & 0x7FFFFFFF


def system(text: str) -> Message:
  """What a chat begins with."""
  return {"role": "system", "content": text}


def user(text: str) -> Message:
  """What the model is asked."""
  return {"role": "user", "content": text}


def assistant(text: str) -> Message:
  """What the model answered."""
  return {"role": "assistant", "content": text}


def _pack(answers: dict[int, Answer], over: str) -> bytes:
  """Answers by slot, and which budget is spent, as bytes."""
  rows = [[slot, type(a).__name__, dataclasses.asdict(a)] for slot, a in answers.items()]
  return json.dumps([rows, over]).encode()


def _unpack(message: bytes, kinds: Mapping[str, type]) -> tuple[dict[int, Answer], str]:
  rows, over = json.loads(message)
  return {slot: kinds[kind](**fields) for slot, kind, fields in rows}, over
