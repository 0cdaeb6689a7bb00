"""The policy's side of a dialogue: what it is shown, and its replies as token ids.

The policy's view grows by segments (`dialogue.Segment`) that are never re-encoded: a training
row is made from the very ids that were read and sampled here.
"""

import dataclasses

from rlver_jax.dialogue.dialogue import Answer, Dialogue, NoRoom, PolicyReply, Segment
from rlver_jax.dialogue.templates import Templates
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import Request, Sample
from rlver_jax.tokenizer import Tokenizer

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
POLICY_CALL = 0  # the last of the numbers that make a row's key


@dataclasses.dataclass(frozen=True)
class PolicySettings:
  """think: think-then-say instead of a direct reply. The token limits are for one reply, for
  the first prompt, and for all that follows it."""

  think: bool
  max_new_tokens: int
  max_prompt_tokens: int
  max_response_tokens: int


class Policy:
  """Answers every dialogue whose stage is POLICY, through an engine's slots."""

  far = False  # see `rollout.play`

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    templates: dict[str, Templates],
    settings: PolicySettings,
  ):
    self.engine, self.settings = engine, settings
    self._tokenizer, self._chat, self._templates = tokenizer, tokenizer.chat, templates
    self._dialogues: dict[int, Dialogue] = {}
    self._answers: dict[int, Answer] = {}
    self._step = 0

  def start(self, step: int) -> None:
    """A new batch of dialogues begins; `step` enters the randomness.

    The slots start out empty: what an earlier batch left there, had it been read in other
    pieces, would differ in the last bits from what a run that is resumed here reads.
    """
    self._step = step
    self._dialogues.clear()
    self._answers.clear()
    self.engine.clear()

  def open(self, placed: dict[int, Dialogue]) -> None:
    """These dialogues begin, in these slots. A prompt that no slot can hold is left to `submit`."""
    section = "policy_think" if self.settings.think else "policy"
    for slot, dialogue in placed.items():
      self._dialogues[slot] = dialogue
      prompt = self._templates[dialogue.scenario.language].render(section)
      dialogue.segments = [Segment(tuple(self._chat.system(prompt)))]
    prompts = {slot: dialogue.segments[0].ids for slot, dialogue in placed.items()}
    self.engine.prefill({s: ids for s, ids in prompts.items() if self.engine.fits(ids, 0)})

  def submit(self, slot: int, dialogue: Dialogue) -> None:
    """The dialogue in `slot` has a user message that waits for a reply."""
    message = self._chat.user(dialogue.user_messages[-1])
    dialogue.segments.append(Segment((*message, *self._chat.assistant_start)))
    context = tuple(i for s in dialogue.segments if s.branch == 0 for i in s.ids)
    prompt = sum(len(s.ids) for s in dialogue.segments[:2])  # the system message and the opening
    room = self.settings.max_response_tokens - (len(context) - prompt)
    if prompt > self.settings.max_prompt_tokens:
      room = 0
    budget = min(self.settings.max_new_tokens, room)
    if budget < 1 or not self.engine.fits(context, budget):
      self._answers[slot] = NoRoom()
      return
    numbers = (self._step, dialogue.index, dialogue.turn, POLICY_CALL)
    self.engine.submit(slot, Request(context, numbers, budget, dialogue.greedy))

  def poll(self, wait: bool = False) -> dict[int, Answer]:
    """The replies that are complete, by slot; `wait` is for a policy that is far away."""
    del wait
    ready, self._answers = self._answers, {}
    for slot, sample in self.engine.step().items():
      ready[slot] = self._reply(self._dialogues[slot], sample)
    return ready

  def _reply(self, dialogue: Dialogue, sample: Sample) -> PolicyReply:
    """Keeps the sample's segments and makes the reply that the user sees."""
    ids, end = sample.ids, self._chat.assistant_end
    said = ids[:-1] if sample.stopped else ids
    sampled = Segment(tuple(ids), 0, tuple(sample.logprobs))
    if not self.settings.think:
      closed = end[1:] if sample.stopped and ids[-1] == end[0] else end
      dialogue.segments += [sampled, Segment(tuple(closed))]
      text = self._tokenizer.decode(said).strip()
      return PolicyReply(text, None, True, sample.stopped, len(ids))
    thought, text, reply_ids, well_formed = split_thought(self._tokenizer, said)
    sampled = dataclasses.replace(sampled, branch=dialogue.turn + 1)
    dialogue.segments += [sampled, Segment((*reply_ids, *end))]
    return PolicyReply(text, thought, well_formed, sample.stopped, len(ids))


def split_text(text: str) -> tuple[str, str, bool]:
  """Cuts an answer into thought and reply, without the white space around them.

  The thought is all up to the last closing mark; without one, all that follows an opening
  mark, or nothing. So no part of a thought is ever in the reply.

  Returns:
    (thought, reply, well-formed): well-formed is `<think>thought</think>reply` with both parts
    given and no further marks.
  """
  before, close, after = text.rpartition(THINK_CLOSE)
  if not close:
    reply, _, thought = text.partition(THINK_OPEN)
    return thought.strip(), reply.strip(), False
  thought = before.strip().removeprefix(THINK_OPEN).strip()
  reply = after.partition(THINK_OPEN)[0].strip()
  marks = text.count(THINK_OPEN), text.count(THINK_CLOSE)
  begins = text.lstrip().startswith(THINK_OPEN)
  return thought, reply, begins and marks == (1, 1) and bool(thought) and bool(reply)


def split_thought(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str, list[int], bool]:
  """Cuts a sampled answer as `split_text` does.

  Returns:
    (thought, reply, the reply's ids, well-formed): the ids are those that were sampled, where the
    reply is one piece of the answer.
  """
  text = tokenizer.decode(ids)
  thought, reply, well_formed = split_text(text)
  if THINK_CLOSE not in text:
    whole = THINK_OPEN not in text
    return thought, reply, list(ids) if whole else tokenizer.encode(reply), well_formed
  if text.count(THINK_CLOSE) > 1 or THINK_OPEN in text.rpartition(THINK_CLOSE)[2]:
    return thought, reply, tokenizer.encode(reply), well_formed
  return thought, reply, _ids_after(tokenizer, ids, reply), well_formed


def _ids_after(tokenizer: Tokenizer, ids: list[int], reply: str) -> list[int]:
  """The sampled ids behind the closing mark; the mark's last token may hold more than the mark."""
  cut = tokenizer.split_at(ids, THINK_CLOSE)
  rest = tokenizer.decode(ids[:cut]).rpartition(THINK_CLOSE)[2].lstrip()
  kept = tokenizer.encode(rest) + list(ids[cut:])
  while kept and not tokenizer.decode(kept[:1]).strip():
    kept.pop(0)
  # A character whose first byte is in the mark's token can't be put together from pieces.
  return kept if tokenizer.decode(kept).strip() == reply else tokenizer.encode(reply)
