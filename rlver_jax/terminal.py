"""A person at a terminal as one side of a dialogue: the user of a policy, or the helper of a
simulated user. Both are asked by `rollout.play`, as models are.

What a model wrote is shown as text: no control character of it is sent.
"""

import sys

from rlver_jax import cli
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Stage, UserMessage
from rlver_jax.dialogue.policy import THINK_CLOSE, THINK_OPEN, Policy
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.side_by_side import ENDS, visible

NEW, QUIT = "/new", "/quit"
COMMANDS = f"{NEW} begins another dialogue, {QUIT} ends."
BAR = 20  # columns of the bar of emotion
DIM, USUAL = "\033[2m", "\033[0m"


class Left(Exception):
  """The person leaves the dialogue; again: for another one."""

  def __init__(self, again: bool = False):
    super().__init__()
    self.again = again


def ask(prompt: str) -> str:
  """A line that is neither empty nor a command; Left where the person leaves, or at the end."""
  while True:
    try:
      line = input(prompt).strip()
      if not sys.stdin.isatty():  # which shows what is typed
        cli.show(visible(line))
    except EOFError:
      cli.show("")
      raise Left from None
    if line in (NEW, QUIT):
      raise Left(again=line == NEW)
    if line.startswith("/"):
      cli.show(COMMANDS)
    elif line:
      return line


def dim(text: str) -> str:
  """The text, dimmed where the output is a terminal."""
  return f"{DIM}{text}{USUAL}" if sys.stdout.isatty() else text


def emotion_bar(emotion: int) -> str:
  """The emotion from 0 to 100 as a bar and a number."""
  full = round(min(max(emotion, 0), 100) / 100 * BAR)
  return f"[{'#' * full}{'-' * (BAR - full)}] {emotion}"


class ReplyPrinter:
  """Prints a policy's reply as it is drawn, its thought dimmed.

  think: replies begin with a thought.
  """

  def __init__(self, policy: Policy, tokenizer, think: bool):
    self._policy, self._tokenizer, self._think = policy, tokenizer, think
    self._thought = self._reply = ""  # what is printed of each

  def look(self) -> None:
    """Prints what has been drawn since the last look. To be called once a round."""
    for ids in self._policy.engine.drawn().values():
      # A character may lack its last bytes, and a mark of a thought its last letters.
      text = _without_beginning(self._tokenizer.decode(ids).rstrip("\ufffd"))
      thought, _, reply = text.partition(THINK_CLOSE) if self._think else ("", "", text)
      self._print(thought.lstrip().removeprefix(THINK_OPEN).lstrip(), reply.lstrip())

  def finish(self, reply: PolicyReply) -> None:
    """Prints the rest of a reply that is complete."""
    if not reply.text.startswith(self._reply.rstrip()):  # malformed: it was shown as something else
      self._reply = ""
    self._print(reply.thought or "", reply.text or "(nothing)")
    cli.show("")
    self._thought = self._reply = ""

  def _print(self, thought: str, reply: str) -> None:
    if len(thought) > len(self._thought):
      _write(dim(visible(thought[len(self._thought) :])))
      self._thought = thought
    if len(reply) > len(self._reply):
      if not self._reply:
        _write("\npolicy> " if self._thought else "policy> ")
      _write(visible(reply[len(self._reply) :]))
      self._reply = reply


def _without_beginning(text: str) -> str:
  """The text without an end that may become a mark of a thought."""
  for mark in (THINK_OPEN, THINK_CLOSE):
    for length in range(len(mark) - 1, 0, -1):
      if text.endswith(mark[:length]):
        return text[:-length]
  return text


def _write(text: str) -> None:
  cli.show(text, end="")


class PersonAsUser(Simulator):
  """Asks the person what the user says; nobody appraises, so the emotion stays as it is."""

  def __init__(self, printer: ReplyPrinter):
    self._printer = printer
    self._waiting: dict[int, Dialogue] = {}
    self.left: Left | None = None  # how the person left the dialogue that has ended

  def start(self, step: int) -> None:
    self._waiting, self.left = {}, None

  def open(self, placed: dict[int, Dialogue]) -> None:
    """Nothing to prepare."""

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    self._waiting[slot] = dialogue
    if dialogue.stage is Stage.PLAN:
      self._printer.finish(dialogue.last_reply)

  def poll(self, wait: bool = False) -> dict[int, Plan | UserMessage]:
    waiting, self._waiting = self._waiting, {}
    return {slot: self._answer(dialogue.stage) for slot, dialogue in waiting.items()}

  def _answer(self, stage: Stage) -> Plan | UserMessage:
    if stage is Stage.PLAN:
      return Plan(0)
    try:
      return UserMessage(ask("you> "))
    except Left as left:
      if stage is Stage.OPENING:
        raise
      self.left = left
      return UserMessage("", goodbye=True)


class PersonAsHelper:
  """Asks the person for the policy's replies, and shows what each did to the simulated user."""

  far = False  # see `rollout.play`

  def __init__(self):
    self._waiting: dict[int, Dialogue] = {}

  def start(self, step: int) -> None:
    self._waiting = {}

  def open(self, placed: dict[int, Dialogue]) -> None:
    """Nothing to prepare."""

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    self._waiting[slot] = dialogue
    show_turn(dialogue)

  def poll(self, wait: bool = False) -> dict[int, PolicyReply]:
    waiting, self._waiting = self._waiting, {}
    return {slot: PolicyReply(ask("you> "), None, True, True, 0) for slot in waiting}


def show_turn(dialogue: Dialogue) -> None:
  """Shows the opening, or what the last reply did to the user and what the user said to it."""
  message, last = dialogue.opening, dialogue.turns[-1] if dialogue.turns else None
  if last:
    plan, message = last.plan, last.message
    cli.show(f"{plan.change:+d}  {emotion_bar(last.emotion)}")
    for thought in (plan.content, plan.completion, plan.activity, plan.feeling):
      if thought:
        cli.show(dim(f"  {visible(thought)}"))
  else:
    cli.show(f"    {emotion_bar(dialogue.emotion)}")
  if message and message.text:
    cli.show(f"user> {visible(message.text)}")


def show_end(dialogue: Dialogue) -> None:
  """Says why a dialogue with a simulated user has ended, and with which emotion."""
  show_turn(dialogue)
  cli.show(f"Ended ({ENDS[dialogue.end]}); final emotion {dialogue.emotion}.")
