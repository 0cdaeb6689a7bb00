"""The judge as a model behind an OpenAI-compatible server.

It reads what the judge of `language_model.py` reads, each question in a call of its own: few
servers score continuations, so a reason comes with its number, and an answer that is not as it was
asked for is asked for again with other seeds.
"""

import asyncio
import functools
import re
import unicodedata
from collections.abc import Callable, Collection
from typing import TypeVar

from ml_collections import ConfigDict

from rlver_jax.dialogue.dialogue import HELD_OUT_STEP
from rlver_jax.dialogue.remote import player
from rlver_jax.dialogue.remote.connection import (
  Connection,
  RemoteSampling,
  RemoteSettings,
  Unreadable,
)
from rlver_jax.dialogue.remote.player import RemotePlayer, plain_text, seed_of, system, user
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.evaluation.judges.base import (
  AXES,
  CAPABILITIES,
  LEAST,
  MOST,
  NAMES,
  NONE,
  STATES,
  Judge,
  Judgement,
)
from rlver_jax.evaluation.judges.rubrics import Rubrics, read_aloud

Found = TypeVar("Found")
STRATEGY_CALL, CAPABILITY_CALL, AXIS_CALL, STATE_CALL = 1, 2, 3, 4
SHORT = 16  # tokens of an answer that is a number or a name
_AROUND = "*_`~\"'“”.。 \t\r\n"  # what may stand around a number or a name


def _settings(c: ConfigDict) -> tuple[RemoteSettings, RemoteSampling]:
  return RemoteSettings("judge", **c.remote), RemoteSampling(c.temperature, c.top_k, c.top_p)


def check(c: ConfigDict) -> None:
  """Checks the access to the server of the section `judge` before anything is loaded.

  Raises UserError in all processes for what the first one finds.
  """
  player.check(*_settings(c))


def build(c: ConfigDict, rubrics: dict[str, Rubrics], seed: int) -> "RemoteJudge":
  """The judge of the section `judge`, connected in the first process."""
  connection = player.connect(*_settings(c))
  return RemoteJudge(connection, rubrics, c.max_reason_tokens, c.reparse, seed)


class RemoteJudge(RemotePlayer, Judge):
  """Implements `base.Judge` with calls that run beside one another.

  reparse: most further calls for an answer that cannot be read.
  """

  who = ("judge", "judges")
  kinds = player.ANSWERS | {"Judgement": Judgement}

  def __init__(
    self,
    connection: Connection | None,
    rubrics: dict[str, Rubrics],
    max_reason_tokens: int,
    reparse: int,
    seed: int,
  ):
    super().__init__(connection)
    self.start(HELD_OUT_STEP)
    self._rubrics, self._reparse, self._seed = rubrics, reparse, seed
    self._reason_tokens = max_reason_tokens + SHORT
    self._dialogues: dict[int, Recorded] = {}

  def open(self, placed: dict[int, Recorded]) -> None:
    self._dialogues |= placed
    for slot, recorded in placed.items():
      self.submit(slot, recorded.start)

  async def answer(self, slot: int) -> Judgement:
    recorded = self._dialogues[slot]
    rubrics = self._rubrics[recorded.start.scenario.language]
    shown, read = [], ""
    for new in read_aloud(rubrics, recorded, plain_text):
      read += "".join(new)
      shown.append(read)

    def ask(at: int, question: str, call: int, number: int, parse: Callable[[str], Found | None]):
      budget = self._reason_tokens if call == CAPABILITY_CALL else SHORT
      text = f"{shown[at]}\n\n{question}"
      return self._ask(recorded, rubrics.system, text, (number, call), budget, parse)

    replies, calls = range(len(recorded.turns)), []
    for section, call, names in (
      ("strategy", STRATEGY_CALL, NAMES),
      ("state", STATE_CALL, STATES),
    ):
      parse = functools.partial(parse_name, names=names)
      calls += [ask(at, rubrics.render(section), call, at, parse) for at in replies]
    for number, capability in enumerate(CAPABILITIES):
      question = rubrics.question("reason_and_number", capability)
      calls.append(ask(-1, question, CAPABILITY_CALL, number, parse_reason))
    for number, axis in enumerate(AXES):
      calls.append(ask(-1, rubrics.question("axis", axis), AXIS_CALL, number, parse_number))
    found = await asyncio.gather(*calls, return_exceptions=True)
    if failures := [answer for answer in found if isinstance(answer, BaseException)]:
      # A fault of the server's rather than what it made of one question.
      raise min(failures, key=lambda failure: isinstance(failure, Unreadable))
    names, states = found[: len(replies)], found[len(replies) : 2 * len(replies)]
    found = found[2 * len(replies) :]
    marks, places = found[: len(CAPABILITIES)], found[len(CAPABILITIES) :]
    return Judgement(
      {name: number for name, (_, number) in zip(CAPABILITIES, marks, strict=True)},
      {name: reason for name, (reason, _) in zip(CAPABILITIES, marks, strict=True)},
      dict(zip(AXES, places, strict=True)),
      tuple(() if name == NONE else (name,) for name in names),
      tuple(states),
    )

  async def _ask(
    self,
    recorded: Recorded,
    instructions: str,
    text: str,
    numbers: tuple[int, int],
    budget: int,
    parse: Callable[[str], Found | None],
  ) -> Found:
    """What `parse` finds in the server's answer; raises CallFailed where it never finds any."""
    chat = [system(instructions), user(text)]
    for attempt in range(self._reparse + 1):
      seed = seed_of(self._seed, self.step, recorded.start.index, *numbers, attempt)
      done = await self.connection.chat(chat, budget, seed)
      if not done.cut and (found := parse(done.text)) is not None:
        return found
      self.connection.counts["parse_failures"] += 1
    raise Unreadable("no answer that holds what was asked for")


def parse_number(text: str) -> int | None:
  """The integer in LEAST..MOST that is all of a text, or None."""
  text = unicodedata.normalize("NFKC", text).strip(_AROUND)
  return int(text) if re.fullmatch(rf"[{LEAST}-{MOST}]", text) else None


def parse_reason(text: str) -> tuple[str, int] | None:
  """The reason and the number that is all of the last line, or None."""
  reason, _, last = text.strip().rpartition("\n")
  number = parse_number(last)
  return (reason.strip(), number) if number is not None and reason.strip() else None


def parse_name(text: str, names: Collection[str]) -> str | None:
  """The one of the names that is all of a text, or None."""
  name = unicodedata.normalize("NFKC", text).casefold().strip(_AROUND)
  return name if name in names else None
