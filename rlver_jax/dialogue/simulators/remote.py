"""The simulated user as a model behind an OpenAI-compatible server (SAGE's procedure).

The same chat as that of `language_model.py`, as messages instead of token ids: it only grows,
each question last, and what was asked and appraised is forgotten once the user has spoken. An
appraisal whose change cannot be read is asked for again with other seeds, then the change alone.

Of several processes the first one makes the calls; the answers that are ready are told to the
others once a round, so that all of them go on with the same dialogues.
"""

import collections
import dataclasses
import json
import queue
import re
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rlver_jax import processes
from rlver_jax.dialogue.answers import PLAN_FIELDS, parse_change
from rlver_jax.dialogue.dialogue import (
  HELD_OUT_STEP,
  Answer,
  Dialogue,
  Failed,
  Plan,
  Stage,
  UserMessage,
)
from rlver_jax.dialogue.simulators import connection as connection_lib
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.chat import SILENCE, persona_text, question_text
from rlver_jax.dialogue.simulators.connection import (
  CallFailed,
  Completion,
  Connection,
  Message,
  OutOfTokens,
  RemoteSampling,
  RemoteSettings,
)
from rlver_jax.dialogue.simulators.language_model import SimulatorSettings
from rlver_jax.dialogue.templates import Templates
from rlver_jax.errors import BudgetSpent

OPENING_CALL, PLAN_CALL, MESSAGE_CALL, CHOICE_CALL = 1, 2, 3, 4
CHOICE_TOKENS = 8  # enough for any integer in -10..10
WAIT = 0.2  # most seconds that `poll` waits, so that Ctrl-C is heard
SPENT = ("prompt_tokens", "completion_tokens", "failures")  # against the run's budgets
# failures: dialogues; parse_failures: answers without a readable change. See also `Connection`.
COUNTS = (*SPENT, "requests", "retries", "parse_failures", "without_usage")
ANSWERS = {kind.__name__: kind for kind in (Failed, Plan, UserMessage)}
# Where the special tokens of published chat formats begin: <|, <｜, <s>, </s>, <think>, [INST] ...
_MARKS = re.compile(r"<(?=[|｜/!A-Za-z_])|\[(?=/?[A-Z_]+\])")


@dataclasses.dataclass
class _Chat:
  """One dialogue as the simulator's chat: `kept` stays, `scratch` is forgotten with the turn."""

  dialogue: Dialogue
  kept: list[Message]
  scratch: list[Message] = dataclasses.field(default_factory=list)


def _settings(c: ConfigDict) -> tuple[RemoteSettings, RemoteSampling]:
  return RemoteSettings(**c.remote), RemoteSampling(c.temperature, c.top_k, c.top_p)


def check(c: ConfigDict) -> None:
  """Checks the access to the server of the section `simulator` before anything is loaded.

  Raises UserError in all processes for what the first one finds.
  """
  processes.check_in_first(lambda: connection_lib.check(*_settings(c)))


def build(
  c: ConfigDict, settings: SimulatorSettings, templates: dict[str, Templates], seed: int
) -> "RemoteSimulator":
  """The simulated user of the section `simulator`, connected in the first process."""
  connection = None
  if jax.process_index() == 0:
    remote, sampling = _settings(c)
    connection = Connection(remote, sampling, connection_lib.read_key(remote))
  return RemoteSimulator(connection, templates, settings, seed)


class RemoteSimulator(Simulator):
  """Implements `base.Simulator` with calls that run while others decode.

  connection: None in all processes but the first.
  """

  def __init__(
    self,
    connection: Connection | None,
    templates: dict[str, Templates],
    settings: SimulatorSettings,
    seed: int,
  ):
    self._connection, self._templates = connection, templates
    self._settings, self._seed, self._step = settings, seed, 0
    self._chats: dict[int, _Chat] = {}
    self._asked: set[int] = set()
    self._ready: queue.SimpleQueue = queue.SimpleQueue()
    self._last_failure = "a fault before this start"
    self._taken: collections.Counter[str] = collections.Counter()

  def start(self, step: int) -> None:
    self._step = step
    self._chats.clear()
    self._asked.clear()
    self._ready = queue.SimpleQueue()  # an answer to an earlier batch goes nowhere
    if self._connection:
      self._connection.cancel()

  def open(self, placed: dict[int, Dialogue]) -> None:
    for slot, dialogue in placed.items():
      persona = persona_text(self._template(dialogue), dialogue.scenario)
      self._chats[slot] = _Chat(dialogue, [{"role": "system", "content": persona}])

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    self._asked.add(slot)
    if self._connection:
      self._connection.spawn(self._reply(slot, self._chats[slot], self._ready))

  def poll(self, wait: bool = False) -> dict[int, Answer]:
    """See `base.Simulator`; raises BudgetSpent, in all processes, where a budget is."""
    if not self._asked:
      return {}
    answers, over = {}, ""
    if self._connection:
      answers, over = dict(self._collect(wait)), self._over()
    if jax.process_count() > 1:
      answers, over = _unpack(processes.from_first(_pack(answers, over)))
    if over:
      raise BudgetSpent(over)
    self._asked -= answers.keys()
    return answers

  def _collect(self, wait: bool) -> Iterator[tuple[int, Answer]]:
    """The answers that are ready, after a moment for the first where there is time."""
    try:
      while True:
        slot, answer = self._ready.get(wait, WAIT)
        if isinstance(answer, Exception):
          raise answer
        yield slot, answer
        wait = False
    except queue.Empty:
      return

  # What was spent.

  def take_metrics(self) -> dict[str, float]:
    if not self._connection:
      return {}
    total = self._connection.counts.copy()
    taken, self._taken = self._taken, total
    return {f"remote/{name}": float(total[name] - taken[name]) for name in COUNTS}

  def spent(self) -> dict[str, int]:
    return {name: self._connection.counts[name] for name in SPENT} if self._connection else {}

  def resume(self, spent: dict[str, int]) -> None:
    if self._connection:
      self._connection.counts.update(spent)
      self._taken = self._connection.counts.copy()

  def close(self) -> None:
    if self._connection:
      self._connection.close()

  def _over(self) -> str:
    """Which budget is spent, in a sentence for the user; "" where none is."""
    limits, counts = self._connection.settings, self._connection.counts
    goes_on = "; the same command with a larger budget goes on from the checkpoint."
    if counts["failures"] > limits.failure_budget:
      return (
        f"simulator.remote.failure_budget is {limits.failure_budget}, but the simulated users of "
        f"{counts['failures']} dialogues have failed for good, the last one with "
        f"{self._last_failure}{goes_on}"
      )
    if limits.token_budget and (tokens := self._connection.tokens()) >= limits.token_budget:
      return (
        f"simulator.remote.token_budget is {limits.token_budget}, but {tokens} tokens are "
        f"spent{goes_on}"
      )
    return ""

  # Asking, in the connection's thread. A dialogue does not change while it waits for an answer.

  async def _reply(self, slot: int, chat: _Chat, ready: queue.SimpleQueue) -> None:
    """Puts the answer to what the dialogue's stage asks for into `ready`."""
    counts = self._connection.counts
    try:
      match chat.dialogue.stage:
        case Stage.OPENING:
          answer = await self._opening(chat)
        case Stage.PLAN:
          answer = await self._appraise(chat)
        case Stage.MESSAGE:
          answer = await self._speak(chat)
    except OutOfTokens:
      return  # `poll` raises BudgetSpent, as spent tokens never become fewer
    except CallFailed as failure:
      counts["failures"] += 1
      self._last_failure = str(failure)
      held_out = self._step == HELD_OUT_STEP
      batch = "the held-out dialogues" if held_out else f"step {self._step + 1}"
      where = f"{batch}, dialogue {chat.dialogue.index}, turn {chat.dialogue.turn}"
      logging.warning("The simulated user of %s failed: %s.", where, failure)
      answer = Failed()
    except Exception as error:  # a mistake of ours, to be raised where the rollout is
      answer = error
    ready.put((slot, answer))

  async def _opening(self, chat: _Chat) -> UserMessage:
    question = _user(self._render(chat, "opening"))
    s = self._settings
    done = await self._call(chat, [question], OPENING_CALL, s.max_message_tokens)
    said = done.text or SILENCE
    chat.kept += [question, _assistant(said)]
    return UserMessage(said, tokens=done.tokens)

  async def _appraise(self, chat: _Chat) -> Plan:
    s = self._settings
    self._catch_up(chat)
    quoted, fields, tokens = self._quoted(chat), {}, 0
    reads = s.score == "generate"
    chat.scratch = [_user(f"{quoted}\n\n{self._render(chat, 'choice')}")]
    if s.appraise:
      question = _user(f"{quoted}\n\n{self._render(chat, 'plan')}")
      for attempt in range(s.reparse + 1 if reads else 1):
        done = await self._call(chat, [question], PLAN_CALL, s.max_plan_tokens, attempt)
        tokens += done.tokens
        fields, change = self._template(chat.dialogue).parse_plan(done.text, done.cut)
        chat.scratch = [question, _assistant(done.text or SILENCE)]
        if reads and change is not None:
          return Plan(change, retries=attempt, tokens=tokens, **fields)
        self._connection.counts["parse_failures"] += reads
      chat.scratch.append(_user(self._render(chat, "choice")))
    for attempt in range(s.reparse + 1):
      done = await self._call(chat, chat.scratch, CHOICE_CALL, CHOICE_TOKENS, attempt)
      tokens += done.tokens
      if (change := parse_change(done.text)) is not None:
        chat.scratch.append(_assistant(str(change)))
        retries = attempt + (s.reparse if reads else 0)
        return Plan(change, parsed=not reads, retries=retries, tokens=tokens, **fields)
      self._connection.counts["parse_failures"] += 1
    raise CallFailed("no answer that holds a change of emotion")

  async def _speak(self, chat: _Chat) -> UserMessage:
    plan = chat.dialogue.last_plan
    fields = {name: getattr(plan, name) for name in PLAN_FIELDS}
    question = _user(self._render(chat, "message", change=f"{plan.change:+d}", **fields))
    s, asked = self._settings, [*chat.scratch, question]
    done = await self._call(chat, asked, MESSAGE_CALL, s.max_message_tokens)
    said = done.text or SILENCE
    chat.kept += [_user(self._quoted(chat)), _assistant(said)]
    return UserMessage(said, self._template(chat.dialogue).is_goodbye(said), done.tokens)

  async def _call(
    self, chat: _Chat, asked: list[Message], call: int, budget: int, attempt: int = 0
  ) -> Completion:
    d = chat.dialogue
    numbers = (self._seed, self._step, d.index, d.turn, call, attempt)
    return await self._connection.chat([*chat.kept, *asked], budget, seed_of(*numbers))

  def _template(self, dialogue: Dialogue) -> Templates:
    return self._templates[dialogue.scenario.language].at(dialogue.rules.level.name)

  def _render(self, chat: _Chat, section: str, **fields: str) -> str:
    d = chat.dialogue
    return question_text(self._template(d), section, d.emotion, **fields)

  def _catch_up(self, chat: _Chat) -> None:
    """Makes a given opening part of the chat, as if the model had written it."""
    if len(chat.kept) == 1:
      question = _user(self._render(chat, "opening"))
      chat.kept += [question, _assistant(chat.dialogue.opening.text)]

  def _quoted(self, chat: _Chat) -> str:
    """The helper's last reply as quoted material."""
    reply = plain_text(chat.dialogue.last_reply.text)
    return "".join(self._template(chat.dialogue).quote(reply))


def plain_text(text: str) -> str:
  """Text that a server's tokenizer reads as text: its marks of special tokens are broken up.

  Here special tokens cannot be switched off, and `<|im_end|>` in a reply might end a message.
  """
  return _MARKS.sub(lambda mark: mark[0] + " ", text)


def seed_of(*numbers: int) -> int:
  """A seed for the server, in 0..2^31 - 1: a function of (seed, step, dialogue, turn, call, n)."""
  return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & 0x7FFFFFFF


def _user(text: str) -> Message:
  return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
  return {"role": "assistant", "content": text}


def _pack(answers: dict[int, Answer], over: str) -> bytes:
  """Answers by slot, and which budget is spent, as bytes."""
  rows = [[slot, type(a).__name__, dataclasses.asdict(a)] for slot, a in answers.items()]
  return json.dumps([rows, over]).encode()


def _unpack(message: bytes) -> tuple[dict[int, Answer], str]:
  rows, over = json.loads(message)
  return {slot: ANSWERS[kind](**fields) for slot, kind, fields in rows}, over
