"""The simulated user as a model behind an OpenAI-compatible server (SAGE's procedure).

The same chat as that of `language_model.py`, as messages instead of token ids: it only grows,
each question last, and what was asked and appraised is forgotten once the user has spoken. An
appraisal whose change cannot be read is asked for again with other seeds, then the change alone.
"""

import dataclasses

from ml_collections import ConfigDict

from rlver_jax.dialogue.answers import PLAN_FIELDS, parse_change
from rlver_jax.dialogue.dialogue import (
  SILENCE,
  Answer,
  Dialogue,
  Plan,
  PolicyReply,
  Stage,
  UserMessage,
)
from rlver_jax.dialogue.remote import player
from rlver_jax.dialogue.remote.connection import (
  Completion,
  Connection,
  Message,
  RemoteSampling,
  RemoteSettings,
  Unreadable,
)
from rlver_jax.dialogue.remote.player import (
  RemotePlayer,
  assistant,
  plain_text,
  seed_of,
  system,
  user,
)
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.chat import persona_text, question_text
from rlver_jax.dialogue.simulators.language_model import SimulatorSettings
from rlver_jax.dialogue.templates import Templates

OPENING_CALL, PLAN_CALL, MESSAGE_CALL, CHOICE_CALL = 1, 2, 3, 4
CHOICE_TOKENS = 8  # enough for any integer in -10..10


@dataclasses.dataclass
class _Chat:
  """One dialogue as the simulator's chat: `kept` stays, `scratch` is forgotten with the turn.

  said: how many of the user's messages are in `kept`, the opening included.
  """

  dialogue: Dialogue
  kept: list[Message]
  said: int = 0
  scratch: list[Message] = dataclasses.field(default_factory=list)


def _settings(c: ConfigDict) -> tuple[RemoteSettings, RemoteSampling]:
  sampling = RemoteSampling(c.temperature, c.top_k, c.top_p)
  return RemoteSettings("simulator", **c.remote), sampling


def check(c: ConfigDict) -> None:
  """Checks the access to the server of the section `simulator` before anything is loaded.

  Raises UserError in all processes for what the first one finds.
  """
  player.check(*_settings(c))


def build(
  c: ConfigDict, settings: SimulatorSettings, templates: dict[str, Templates], seed: int
) -> "RemoteSimulator":
  """The simulated user of the section `simulator`, connected in the first process."""
  return RemoteSimulator(player.connect(*_settings(c)), templates, settings, seed)


class RemoteSimulator(RemotePlayer, Simulator):
  """Implements `base.Simulator` with calls that run while others decode."""

  who = ("simulated user", "simulated users")

  def __init__(
    self,
    connection: Connection | None,
    templates: dict[str, Templates],
    settings: SimulatorSettings,
    seed: int,
  ):
    super().__init__(connection)
    self._templates, self._settings, self._seed = templates, settings, seed
    self._chats: dict[int, _Chat] = {}

  def start(self, step: int) -> None:
    super().start(step)
    self._chats.clear()

  def open(self, placed: dict[int, Dialogue]) -> None:
    for slot, dialogue in placed.items():
      persona = persona_text(self._template(dialogue), dialogue.scenario)
      self._chats[slot] = _Chat(dialogue, [system(persona)])

  async def answer(self, slot: int) -> Answer:
    chat = self._chats[slot]
    match chat.dialogue.stage:
      case Stage.OPENING:
        return await self._opening(chat)
      case Stage.PLAN:
        return await self._appraise(chat)
      case _:
        return await self._speak(chat)

  async def _opening(self, chat: _Chat) -> UserMessage:
    question = user(self._render(chat, "opening"))
    s = self._settings
    done = await self._call(chat, [question], OPENING_CALL, s.max_message_tokens)
    said = done.text or SILENCE
    chat.kept += [question, assistant(said)]
    chat.said = 1
    return UserMessage(said, tokens=done.tokens, stopped=not done.cut)

  async def _appraise(self, chat: _Chat) -> Plan:
    s = self._settings
    self._catch_up(chat)
    quoted, fields, tokens = self._quoted(chat, chat.dialogue.last_reply), {}, 0
    reads = s.score == "generate"
    chat.scratch = [user(f"{quoted}\n\n{self._render(chat, 'choice')}")]
    if s.appraise:
      question = user(f"{quoted}\n\n{self._render(chat, 'plan')}")
      for attempt in range(s.reparse + 1 if reads else 1):
        done = await self._call(chat, [question], PLAN_CALL, s.max_plan_tokens, attempt)
        tokens += done.tokens
        fields, change = self._template(chat.dialogue).parse_plan(done.text, done.cut)
        chat.scratch = [question, assistant(done.text or SILENCE)]
        if reads and change is not None:
          return Plan(change, retries=attempt, tokens=tokens, **fields)
        self.connection.counts["parse_failures"] += reads
      chat.scratch.append(user(self._render(chat, "choice")))
    for attempt in range(s.reparse + 1):
      done = await self._call(chat, chat.scratch, CHOICE_CALL, CHOICE_TOKENS, attempt)
      tokens += done.tokens
      if (change := parse_change(done.text)) is not None:
        chat.scratch.append(assistant(str(change)))
        retries = attempt + (s.reparse if reads else 0)
        return Plan(change, parsed=not reads, retries=retries, tokens=tokens, **fields)
      self.connection.counts["parse_failures"] += 1
    raise Unreadable("no answer that holds a change of emotion")

  async def _speak(self, chat: _Chat) -> UserMessage:
    d = chat.dialogue
    plan = d.last_plan
    fields = {name: getattr(plan, name) for name in PLAN_FIELDS}
    question = user(self._render(chat, "message", change=f"{plan.change:+d}", **fields))
    s, asked = self._settings, [*chat.scratch, question]
    done = await self._call(chat, asked, MESSAGE_CALL, s.max_message_tokens)
    said = done.text or SILENCE
    chat.kept += [user(self._quoted(chat, d.last_reply)), assistant(said)]
    chat.said += 1
    goodbye = self._template(chat.dialogue).is_goodbye(said)
    return UserMessage(said, goodbye, done.tokens, stopped=not done.cut)

  async def _call(
    self, chat: _Chat, asked: list[Message], call: int, budget: int, attempt: int = 0
  ) -> Completion:
    d = chat.dialogue
    numbers = (self._seed, self.step, d.index, d.turn, call, attempt)
    return await self.connection.chat([*chat.kept, *asked], budget, seed_of(*numbers))

  def _template(self, dialogue: Dialogue) -> Templates:
    return self._templates[dialogue.scenario.language].at(dialogue.rules.level.name)

  def _render(self, chat: _Chat, section: str, **fields: str) -> str:
    d = chat.dialogue
    return question_text(self._template(d), section, d.emotion, **fields)

  def _catch_up(self, chat: _Chat) -> None:
    """Makes what the dialogue holds part of the chat, as if the model had written it: an opening
    that was given, turns that were played elsewhere."""
    d = chat.dialogue
    if not chat.said:
      question = user(question_text(self._template(d), "opening", d.rules.initial_emotion))
      chat.kept += [question, assistant(d.opening.text)]
      chat.said = 1
    for turn in d.turns[chat.said - 1 :]:
      chat.kept += [user(self._quoted(chat, turn.reply)), assistant(turn.message.text)]
      chat.said += 1

  def _quoted(self, chat: _Chat, reply: PolicyReply) -> str:
    """A reply of the helper as quoted material."""
    return "".join(self._template(chat.dialogue).quote(plain_text(reply.text)))
