"""The simulated user as a frozen language model (SAGE's procedure, arXiv 2505.02847).

The user is the assistant of the simulator's own chat, which only grows: instructions and
persona, then the dialogue, each question last. A turn is one appraisal (a plan), read either
from its text or by scoring the integers, and one message. What was asked and appraised is
forgotten once the user has spoken; the engine finds what it still holds.
"""

import dataclasses

import numpy as np

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import (
  Answer,
  Dialogue,
  NoRoom,
  Plan,
  Stage,
  UserMessage,
)
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.dialogue.simulators.chat import UserChat, persona_ids
from rlver_jax.dialogue.templates import PLAN_FIELDS, Templates
from rlver_jax.errors import UserError
from rlver_jax.sampling.choices import Choices
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import Request, Sample
from rlver_jax.tokenizer import Tokenizer

OPENING_CALL, PLAN_CALL, MESSAGE_CALL = 1, 2, 3  # see policy.POLICY_CALL
RETRY_CALL = 16  # of the first further appraisal of a turn; those after it count on
CHANGES = range(emotion_lib.MIN_CHANGE, emotion_lib.MAX_CHANGE + 1)


@dataclasses.dataclass(frozen=True)
class SimulatorSettings:
  """score: 'generate' reads the change from the appraisal's text, `choice` scores the integers.
  appraise: whether an appraisal is written at all (it must be to `generate`).
  reparse: most further appraisals, with other seeds, where the change cannot be read."""

  score: str
  appraise: bool
  max_plan_tokens: int
  max_message_tokens: int
  reparse: int


def change_choices(tokenizer: Tokenizer) -> Choices:
  """The integers -10..10, each ended as a message is ended, so that none begins another."""
  end = tokenizer.chat.assistant_end[0]
  return Choices.of([[*tokenizer.encode(str(change)), end] for change in CHANGES])


def check_room(
  tokenizer: Tokenizer,
  templates: dict[str, Templates],
  scenarios: list[Scenario],
  settings: SimulatorSettings,
  cache_length: int,
) -> None:
  """Raises UserError for a scenario whose persona leaves no room for a single turn."""
  turn = settings.max_plan_tokens + settings.max_message_tokens
  for scenario in scenarios:
    own = templates[scenario.language]
    persona = max(len(persona_ids(tokenizer, t, scenario)) for t in (own, *own.levels.values()))
    if persona + turn > cache_length:
      raise UserError(
        f"simulator.cache_length is {cache_length} tokens, but the persona of scenario "
        f"{scenario.id} takes {persona} and a turn may take {turn} more, expected a cache "
        f"that holds both."
      )


@dataclasses.dataclass
class _Chat:
  """One dialogue as the simulator's chat: `kept` stays, `scratch` is forgotten with the turn.

  pieces: what it is put together from.
  said: how many of the user's messages are in `kept`, the opening included.
  appraisal, retries, tokens: of the turn's appraisal, the last one's text and what it took."""

  dialogue: Dialogue
  pieces: UserChat
  kept: list[int]
  scratch: list[int] = dataclasses.field(default_factory=list)
  said: int = 0
  appraisal: str = ""
  retries: int = 0
  tokens: int = 0


class LanguageModelSimulator(Simulator):
  """Implements `base.Simulator` with a frozen model behind an engine.

  The engine's `choices` must be `change_choices`: they are also the way out when an appraisal
  holds no readable change.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    templates: dict[str, Templates],
    settings: SimulatorSettings,
  ):
    self.engine, self.settings = engine, settings
    self._tokenizer, self._wrap, self._templates = tokenizer, tokenizer.chat, templates
    self._chats: dict[int, _Chat] = {}
    self._to_score: dict[int, list[int]] = {}
    self._answers: dict[int, Answer] = {}
    self._step = 0

  def start(self, step: int) -> None:
    self._step = step
    self._chats.clear()
    self._to_score.clear()
    self._answers.clear()
    self.engine.clear()  # see `Policy.start`

  def open(self, placed: dict[int, Dialogue]) -> None:
    for slot, dialogue in placed.items():
      pieces = UserChat(self._tokenizer, self._template(dialogue))
      persona = persona_ids(self._tokenizer, pieces.templates, dialogue.scenario)
      self._chats[slot] = _Chat(dialogue, pieces, persona)
    personas = {slot: self._chats[slot].kept for slot in placed}
    self.engine.prefill({s: ids for s, ids in personas.items() if self.engine.fits(ids, 0)})

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    chat = self._chats[slot]
    match dialogue.stage:
      case Stage.OPENING:
        self._generate(slot, self._opening(chat), OPENING_CALL, self.settings.max_message_tokens)
      case Stage.PLAN:
        chat.appraisal, chat.retries, chat.tokens = "", 0, 0
        self._catch_up(chat)
        if self.settings.appraise:
          chat.scratch = self._helper(chat, "plan")
          self._generate(slot, chat.scratch, PLAN_CALL, self.settings.max_plan_tokens)
        else:
          chat.scratch = self._helper(chat, "choice")
          self._score(slot, chat.scratch)
      case Stage.MESSAGE:
        plan = dialogue.last_plan
        fields = {f: getattr(plan, f) for f in PLAN_FIELDS}
        chat.scratch += chat.pieces.message_question(dialogue.emotion, plan.change, fields)
        self._generate(slot, chat.scratch, MESSAGE_CALL, self.settings.max_message_tokens)

  def poll(self, wait: bool = False) -> dict[int, Answer]:
    ready, self._answers = self._answers, {}
    if self._to_score:
      contexts, self._to_score = self._to_score, {}
      for slot, logprobs in self.engine.score(contexts).items():
        ready[slot] = self._chosen(self._chats[slot], logprobs)
    for slot, sample in self.engine.step().items():
      answer = self._take(slot, self._chats[slot], sample)
      if answer is not None:
        ready[slot] = answer
    return ready

  # Asking.

  def _template(self, dialogue: Dialogue) -> Templates:
    return self._templates[dialogue.scenario.language].at(dialogue.rules.level.name)

  def _opening(self, chat: _Chat) -> list[int]:
    question = chat.pieces.question("opening", chat.dialogue.rules.initial_emotion)
    return [*chat.kept, *question]

  def _catch_up(self, chat: _Chat) -> None:
    """Makes what the dialogue holds part of the chat: sampled ids, or an opening that was given."""
    d = chat.dialogue
    if not chat.said:
      chat.kept = [*self._opening(chat), *self._spoken(chat, d.opening)]
      chat.said = 1
    for turn in d.turns[chat.said - 1 :]:
      chat.kept += [*chat.pieces.quoted(turn.reply.text), *chat.pieces.nothing_below]
      chat.kept += self._spoken(chat, turn.message)
      chat.said += 1

  def _spoken(self, chat: _Chat, message: UserMessage) -> list[int]:
    return [*chat.pieces.said(message.text, message.ids), *self._wrap.assistant_end]

  def _helper(self, chat: _Chat, section: str) -> list[int]:
    """The chat with the helper's last reply and a question about it."""
    d, pieces = chat.dialogue, chat.pieces
    question = pieces.question_below(section, d.emotion)
    return [*chat.kept, *pieces.quoted(d.last_reply.text), *question]

  def _generate(self, slot: int, ids: list[int], call: int, budget: int) -> None:
    if not self.engine.fits(ids, budget):
      self._answers[slot] = NoRoom()
      return
    dialogue = self._chats[slot].dialogue
    numbers = (self._step, dialogue.index, dialogue.turn, call)
    self.engine.submit(slot, Request(tuple(ids), numbers, budget))

  def _score(self, slot: int, ids: list[int]) -> None:
    if self.engine.fits(ids, 0):
      self._to_score[slot] = ids
    else:
      self._answers[slot] = NoRoom()

  # Taking answers.

  def _take(self, slot: int, chat: _Chat, sample: Sample) -> Answer | None:
    """The answer that a sample is, or None when the change is still to be asked for."""
    own = [i for i in sample.ids if i not in self._tokenizer.special_ids]
    text = self._tokenizer.decode(own).strip()
    chat.tokens += len(sample.ids)
    match chat.dialogue.stage:
      case Stage.OPENING:
        return UserMessage(text, False, len(sample.ids), tuple(own), sample.stopped)
      case Stage.MESSAGE:
        goodbye = self._template(chat.dialogue).is_goodbye(text)
        return UserMessage(text, goodbye, len(sample.ids), tuple(own), sample.stopped)
    chat.appraisal = text
    fields, change = self._template(chat.dialogue).parse_plan(text, cut=not sample.stopped)
    reads = self.settings.score == "generate"
    if reads and change is None and chat.retries < self.settings.reparse:
      call = RETRY_CALL + chat.retries
      chat.retries += 1
      # The same question: the answer is forgotten.
      self._generate(slot, chat.scratch, call, self.settings.max_plan_tokens)
      return None
    chat.scratch += [*own, *self._wrap.assistant_end]
    if reads and change is not None:
      return Plan(change, retries=chat.retries, tokens=chat.tokens, **fields)
    chat.scratch += chat.pieces.question("choice", chat.dialogue.emotion)
    self._score(slot, chat.scratch)
    return None

  def _chosen(self, chat: _Chat, logprobs: np.ndarray) -> Plan:
    change = CHANGES[int(np.argmax(logprobs))]
    chat.scratch += [*self._tokenizer.encode(str(change)), *self._wrap.assistant_end]
    fields, _ = self._template(chat.dialogue).parse_plan(chat.appraisal)
    parsed = self.settings.score == "choice"
    return Plan(change, parsed=parsed, retries=chat.retries, tokens=chat.tokens, **fields)
