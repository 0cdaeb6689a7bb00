"""The judge as a frozen language model.

Each dialogue is one chat that only grows: the instructions, then in one message what the user
wanted and what both said. Wherever something is asked, that message ends with the question; the
question and its answer are then forgotten, and the engine finds that it holds all before them. So
a dialogue is read once, whatever is asked about it:

  after each reply    its strategy and the state that it ascribes to the user, for each the most
                      probable of the names
  at the end          for each capability a reason, which is written, and after it the most
                      probable of the integers 1..5; for each axis that integer alone
"""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from rlver_jax.dialogue.dialogue import HELD_OUT_STEP, NoRoom
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.evaluation.judges.base import (
  AXES,
  BANDS,
  CAPABILITIES,
  LEAST,
  MOST,
  NAMES,
  NONE,
  STATES,
  Judge,
  Judgement,
  Verdict,
)
from rlver_jax.evaluation.judges.rubrics import Rubrics, read_aloud
from rlver_jax.sampling.choices import Choices
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import Request, Sample
from rlver_jax.tokenizer import Tokenizer

REASON_CALL = 1
NUMBERS = tuple(str(number) for number in range(LEAST, MOST + 1))
ANSWERS = (*NUMBERS, *NAMES, *BANDS)  # none is the same answer to both questions about a reply


def answer_choices(tokenizer: Tokenizer) -> Choices:
  """ANSWERS, each ended as a message is ended, so that none begins another."""
  end = tokenizer.chat.assistant_end[0]
  return Choices.of([[*tokenizer.encode(answer), end] for answer in ANSWERS])


class _Choose(NamedTuple):
  """Asks for the most probable of the answers that are allowed."""

  ids: list[int]
  allowed: tuple[str, ...]


# What a dialogue waits for: a text that is written (the answer is a Sample) or a choice (a str).
_Asking = Generator[Request | _Choose, Sample | str, Judgement]


class LanguageModelJudge(Judge):
  """Implements `base.Judge` with a frozen model behind an engine.

  engine: its `choices` must be `answer_choices`. rubrics: by language. max_reason_tokens: of one
  reason.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    rubrics: dict[str, Rubrics],
    max_reason_tokens: int,
  ):
    self.engine = engine
    self._tokenizer, self._wrap, self._rubrics = tokenizer, tokenizer.chat, rubrics
    self._max_reason_tokens = max_reason_tokens
    self._under_way: dict[int, _Asking] = {}
    self._to_choose: dict[int, _Choose] = {}
    self._verdicts: dict[int, Verdict] = {}

  def open(self, placed: dict[int, Recorded]) -> None:
    systems = {}
    for slot, recorded in placed.items():
      if self.engine.fits(*self._most(recorded)):
        systems[slot] = self._system(self._rubrics_of(recorded))
      else:
        self._verdicts[slot] = NoRoom()
    self.engine.prefill(systems)
    for slot in systems:
      self._under_way[slot] = self._judge(placed[slot])
      self._go_on(slot, None)

  def poll(self, wait: bool = False) -> dict[int, Verdict]:
    if self._to_choose:
      asked, self._to_choose = self._to_choose, {}
      for slot, logprobs in self.engine.score({s: c.ids for s, c in asked.items()}).items():
        self._go_on(slot, _best(logprobs, asked[slot].allowed))
    for slot, sample in self.engine.step().items():
      self._go_on(slot, sample)
    verdicts, self._verdicts = self._verdicts, {}
    return verdicts

  def _go_on(self, slot: int, answer: Sample | str | None) -> None:
    """Gives an answer to the dialogue in a slot (None: it begins) and takes its next question."""
    try:
      asked = self._under_way[slot].send(answer)
    except StopIteration as end:
      del self._under_way[slot]
      self._verdicts[slot] = end.value
    else:
      if isinstance(asked, _Choose):
        self._to_choose[slot] = asked
      else:
        self.engine.submit(slot, asked)

  def _judge(self, recorded: Recorded) -> _Asking:
    """All that is asked about one dialogue, in turn."""
    rubrics = self._rubrics_of(recorded)
    kept, strategies, states = [*self._system(rubrics), *self._wrap.user_start], [], []
    *at_replies, rest = read_aloud(rubrics, recorded)
    for new in at_replies:
      kept += self._encoded(new)
      name = yield _Choose([*kept, *self._below(rubrics.render("strategy"))], NAMES)
      strategies.append(() if name == NONE else (name,))
      states.append((yield _Choose([*kept, *self._below(rubrics.render("state"))], STATES)))
    kept += self._encoded(rest)
    scores, reasons = {}, {}
    for question, name in enumerate(CAPABILITIES):
      asked = [*kept, *self._below(rubrics.question("reason", name))]
      numbers = (HELD_OUT_STEP, recorded.start.index, question, REASON_CALL)
      sample = yield Request(tuple(asked), numbers, self._max_reason_tokens)
      own = [i for i in sample.ids if i not in self._tokenizer.special_ids]
      reasons[name] = self._tokenizer.decode(own).strip()
      number = yield _Choose([*asked, *own, *self._then(rubrics)], NUMBERS)
      scores[name] = int(number)
    plane = {}
    for axis in AXES:
      number = yield _Choose([*kept, *self._below(rubrics.question("axis", axis))], NUMBERS)
      plane[axis] = int(number)
    return Judgement(scores, reasons, plane, tuple(strategies), tuple(states))

  def _most(self, recorded: Recorded) -> tuple[list[int], int]:
    """The longest context that a dialogue needs, and the tokens that are written after it."""
    rubrics = self._rubrics_of(recorded)
    pieces = [piece for new in read_aloud(rubrics, recorded) for piece in new]
    whole = [*self._system(rubrics), *self._wrap.user_start, *self._encoded(pieces)]
    reasons = [self._below(rubrics.question("reason", name)) for name in CAPABILITIES]
    others = [rubrics.question("axis", axis) for axis in AXES]
    others += [rubrics.render(section) for section in ("strategy", "state")]
    written = [*max(reasons, key=len), *self._then(rubrics)]
    chosen = max(map(self._below, others), key=len)
    if len(written) + self._max_reason_tokens >= len(chosen):
      return whole + written, self._max_reason_tokens
    return whole + chosen, 0

  # Pieces of the chat.

  def _rubrics_of(self, recorded: Recorded) -> Rubrics:
    return self._rubrics[recorded.start.scenario.language]

  def _system(self, rubrics: Rubrics) -> list[int]:
    return self._wrap.system(rubrics.system)

  def _encoded(self, pieces: list[str]) -> list[int]:
    """Frames and what they quote, encoded apart, so that no text changes the ids of its frame."""
    return [i for piece in pieces for i in self._tokenizer.encode(piece)]

  def _below(self, question: str) -> list[int]:
    """After what was read: a question in the same message, and the answer's start."""
    ids = self._tokenizer.encode("\n\n" + question)
    return [*ids, *self._wrap.user_end, *self._wrap.assistant_start]

  def _then(self, rubrics: Rubrics) -> list[int]:
    """After a reason: it ends, and the number is asked for."""
    question = self._wrap.user(rubrics.render("number"))
    return [*self._wrap.assistant_end, *question, *self._wrap.assistant_start]


def _best(logprobs: np.ndarray, allowed: tuple[str, ...]) -> str:
  """The most probable of the answers that are allowed, the first of several."""
  return max(allowed, key=lambda answer: logprobs[ANSWERS.index(answer)])
