"""A dialogue as a small state machine, and the answers that move it on.

    opening -> policy -> plan -> message -> policy -> ... -> done

A dialogue asks for one thing at a time (its `stage`) and knows nothing of who answers, in
which order dialogues are served, or on which device. `rollout.py` gathers what is asked,
`policy.py` and `simulators/` answer, `advance` takes the answer.
"""

import dataclasses
import enum

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.levels import VANILLA, Level
from rlver_jax.dialogue.scenario import Scenario

# The step of dialogues that belong to none of a run's: the last number that a random key holds.
HELD_OUT_STEP = 2**32 - 1
SILENCE = "…"  # what stands for a message in which the user says nothing, which is an answer too


class Stage(enum.Enum):
  """What a dialogue is waiting for."""

  OPENING = "opening"  # the user's first message
  POLICY = "policy"  # the policy's reply
  PLAN = "plan"  # the user's appraisal of that reply
  MESSAGE = "message"  # the user's next message, given the appraisal
  DONE = "done"


@dataclasses.dataclass(frozen=True)
class Segment:
  """A run of token ids in the policy's view of a dialogue.

  branch: 0 for context, which later turns see; otherwise a number of its own for a thought
    with its reply, which hangs off the context before it and is seen by nothing later.
  logprobs: one per id where the policy sampled them (these are trained), else None.
  """

  ids: tuple[int, ...]
  branch: int = 0
  logprobs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PolicyReply:
  """The policy's answer: `text` is what the user sees; `thought` is None in direct mode."""

  text: str
  thought: str | None
  well_formed: bool  # False: think-then-say was asked for and not kept to
  stopped: bool  # False: cut off by the token limit
  sampled_tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The user's appraisal of the last reply; `change` of emotion is an integer in -10..10.

  What a dialogue keeps has the change as it was felt at the dialogue's level."""

  change: int
  content: str = ""  # what the reply tried to say
  completion: str = ""  # whether it meets the hidden intention
  activity: str = ""  # what goes on inside the user
  feeling: str = ""
  parsed: bool = True  # False: no change could be read from the text, `choice` decided
  tokens: int = 0  # sampled by the simulator for it
  retries: int = 0  # how often it was asked for again, as no change could be read


@dataclasses.dataclass(frozen=True)
class UserMessage:
  """What the user says; `ids` are the simulator's own token ids of it, where it sampled any.

  A text without any character but blanks becomes SILENCE, as chats have no empty messages; that of
  a goodbye stays: in a record an empty message says that the user has left.
  """

  text: str
  goodbye: bool = False
  tokens: int = 0
  ids: tuple[int, ...] | None = None
  stopped: bool = True  # False: cut off by the token limit

  def __post_init__(self):
    if not self.goodbye and not self.text.strip():
      object.__setattr__(self, "text", SILENCE)


@dataclasses.dataclass(frozen=True)
class NoRoom:
  """No answer: the context of whoever was asked has no room for one. It ends the dialogue."""


@dataclasses.dataclass(frozen=True)
class Failed:
  """No answer, now or later: who was asked cannot be reached or cannot be understood.

  It ends the dialogue, whose emotion then says nothing about the policy. answered: it was reached.
  """

  answered: bool = False


Answer = UserMessage | PolicyReply | Plan | NoRoom | Failed


@dataclasses.dataclass(frozen=True)
class Turn:
  """One exchange: the policy's reply and what it did to the user."""

  reply: PolicyReply
  plan: Plan
  emotion: int  # after the change
  message: UserMessage | None = None  # None: the dialogue ended here


@dataclasses.dataclass(frozen=True)
class Rules:
  """When a dialogue ends, where its emotion starts, and how hard its user is."""

  initial_emotion: int = 30
  max_turns: int = 8
  failure_at: int = 0  # the dialogue ends with emotion <= this ...
  success_at: int = 100  # ... or >= this
  level: Level = VANILLA

  def at(self, level: Level) -> "Rules":
    """These rules at a level of difficulty, given those of `vanilla`."""
    initial = self.initial_emotion + level.emotion_offset
    return dataclasses.replace(self, initial_emotion=initial, level=level)


@dataclasses.dataclass
class Dialogue:
  """One conversation in progress.

  index: its place in the batch; with (seed, step, turn) it determines all its randomness.
  group: dialogues of one group share a scenario and a level.
  segments: the policy's view as token ids, kept by `policy.py`.
  greedy: the policy takes the most probable tokens (the dialogue is a baseline, not trained on).
  """

  index: int
  group: int
  scenario: Scenario
  rules: Rules
  emotion: int = 0
  stage: Stage = Stage.OPENING
  opening: UserMessage | None = None
  turns: list[Turn] = dataclasses.field(default_factory=list)
  segments: list[Segment] = dataclasses.field(default_factory=list)
  end: str = ""  # why it ended: goodbye, success, failure, turns, length, failed
  pending: tuple = ()  # answers of the turn in progress
  greedy: bool = False

  def __post_init__(self):
    self.emotion = self.rules.initial_emotion
    if self.scenario.first_message:
      self.advance(UserMessage(self.scenario.first_message))

  @property
  def turn(self) -> int:
    """Number of finished turns; the turn in progress has this number."""
    return len(self.turns)

  @property
  def user_messages(self) -> list[str]:
    """What the user has said so far, the opening first."""
    said = [self.opening] + [t.message for t in self.turns]
    return [m.text for m in said if m is not None]

  @property
  def replies(self) -> list[PolicyReply]:
    """The policy's replies so far, whether or not the turn of the last one is finished."""
    return [t.reply for t in self.turns] + list(self.pending[:1])

  @property
  def last_reply(self) -> PolicyReply | None:
    """The policy's latest reply, whether or not its turn is finished."""
    return self.replies[-1] if self.replies else None

  @property
  def failed(self) -> bool:
    """Whether a partner failed, so that the dialogue has no final emotion and no reward."""
    return self.end == "failed"

  @property
  def last_plan(self) -> Plan:
    """The appraisal that the message now asked for is conditioned on."""
    return self.pending[1]

  def advance(self, answer: Answer) -> None:
    """Takes the answer to what `stage` asks for and moves to the next stage."""
    match self.stage, answer:
      case Stage.OPENING, UserMessage():
        self.opening, self.stage = answer, Stage.POLICY
      case ((Stage.OPENING | Stage.POLICY | Stage.PLAN | Stage.MESSAGE), NoRoom()):
        if self.stage is Stage.MESSAGE:
          self._close_turn(None)
        self._finish("length")
      case ((Stage.OPENING | Stage.POLICY | Stage.PLAN | Stage.MESSAGE), Failed()):
        if self.stage is Stage.MESSAGE:
          self._close_turn(None)
        self._finish("failed")
      case Stage.POLICY, PolicyReply():
        self.pending, self.stage = (answer,), Stage.PLAN
      case Stage.PLAN, Plan():
        plan = dataclasses.replace(answer, change=self.rules.level.felt(answer.change))
        self.pending += (plan,)
        self.emotion = emotion_lib.update(self.emotion, plan.change)
        self.stage = Stage.MESSAGE
        if end := self._end_by_emotion():
          self._close_turn(None)
          self._finish(end)
      case Stage.MESSAGE, UserMessage():
        self._close_turn(answer)
        self.stage = Stage.POLICY
        if answer.goodbye:
          self._finish("goodbye")
      case _:
        raise TypeError(f"stage {self.stage} does not take a {type(answer).__name__}")

  def _end_by_emotion(self) -> str:
    if self.emotion >= self.rules.success_at:
      return "success"
    if self.emotion <= self.rules.failure_at:
      return "failure"
    return "turns" if self.turn + 1 >= self.rules.max_turns else ""

  def _close_turn(self, message: UserMessage | None) -> None:
    reply, plan = self.pending
    self.turns.append(Turn(reply, plan, self.emotion, message))
    self.pending = ()

  def _finish(self, end: str) -> None:
    self.stage, self.end = Stage.DONE, end
