"""Recorded dialogues as examples: as the policy saw them, or as the simulated user did.

The records are what a run writes to dialogues/ (`dialogue/records.py`). In both views an example
has the ids that the engine of whoever is imitated reads and draws: for the policy those of
`dialogue/policy.py`, for the user those of `dialogue/simulators/language_model.py`. What was cut
off by a token limit is learned without an end, which is context.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from rlver_jax.dialogue import policy as policy_lib
from rlver_jax.dialogue import records
from rlver_jax.dialogue.answers import PLAN_FIELDS
from rlver_jax.dialogue.dialogue import Plan, PolicyReply, Segment, Turn, UserMessage
from rlver_jax.dialogue.emotion import MAX_CHANGE, MIN_CHANGE
from rlver_jax.dialogue.levels import VANILLA
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators.chat import UserChat, appraisal_text, persona_ids
from rlver_jax.dialogue.templates import Templates
from rlver_jax.json_lines import Misfit, field
from rlver_jax.supervised.chats import trained
from rlver_jax.tokenizer import Tokenizer

ANSWERS = ("change", "message")  # of the simulated user; its opening is a message too


@dataclasses.dataclass(frozen=True)
class Recorded:
  """What an example is made from; emotion: at the opening."""

  scenario: Scenario
  level: str
  opening: UserMessage | None
  emotion: int | None
  turns: tuple[Turn, ...]


def parse(record: Any) -> Recorded:
  """A record read; Misfit where it is not of the format.

  Records without traits or a level (of other programs) have none, and are `vanilla`.
  """
  texts = {"id": "id", "persona": "player", "background": "scene", "character": "character"}
  fields = {name: field(record, key, str) for name, key in (texts | {"task": "task"}).items()}
  traits = field(record, "traits", list) if "traits" in record else []
  if not all(isinstance(trait, str) for trait in traits):
    raise Misfit(f"{traits!r:.60} as 'traits', expected texts")
  level = field(record, "level", str) if "level" in record else VANILLA.name
  opening, emotion, turns = records.exchange(record)
  for turn in turns:
    if not MIN_CHANGE <= turn.plan.change <= MAX_CHANGE and level == VANILLA.name:
      raise Misfit(
        f"{turn.plan.change} as 'change', expected an integer in {MIN_CHANGE}..{MAX_CHANGE}"
      )
  return Recorded(Scenario(traits=tuple(traits), **fields), level, opening, emotion, turns)


def policy_segments(
  recorded: Recorded, tokenizer: Tokenizer, templates: dict[str, Templates]
) -> list[Segment]:
  """The policy's view: its replies are learned, with their thoughts where the record has them.

  A thought with its reply is a branch, the reply alone the context after it. A reply that did not
  keep to that form is context only. Raises Misfit where some replies have thoughts and some not.
  """
  replies = [turn.reply for turn in recorded.turns]
  if recorded.opening is None:
    return []
  thinks = {reply.thought is not None for reply in replies}
  if len(thinks) > 1:
    raise Misfit("replies with and without 'thinking', expected it in all or none")
  chat, think = tokenizer.chat, True in thinks
  section = "policy_think" if think else "policy"
  prompt = templates[recorded.scenario.language].render(section)
  found = [Segment(tuple(chat.system(prompt)))]
  messages = [recorded.opening, *(turn.message for turn in recorded.turns)]
  for number, (message, reply) in enumerate(zip(messages, replies, strict=False), 1):
    found.append(Segment((*chat.user(message.text), *chat.assistant_start)))
    found += _thought(tokenizer, reply, number) if think else _direct(tokenizer, reply)
  return found


def _direct(tokenizer: Tokenizer, reply: PolicyReply) -> list[Segment]:
  drawn, rest = _end(tokenizer, reply.stopped)
  return [trained([*tokenizer.encode(reply.text), *drawn]), Segment(rest)]


def _thought(tokenizer: Tokenizer, reply: PolicyReply, branch: int) -> list[Segment]:
  end, reply_ids, found = tokenizer.chat.assistant_end, tokenizer.encode(reply.text), []
  if reply.well_formed:
    text = f"{policy_lib.THINK_OPEN}{reply.thought}{policy_lib.THINK_CLOSE}{reply.text}"
    ids = tokenizer.encode(text)
    found.append(trained([*ids, *_end(tokenizer, reply.stopped)[0]], branch))
    reply_ids = policy_lib.split_thought(tokenizer, ids)[2]  # as after a sample of these ids
  return [*found, Segment((*reply_ids, *end))]


def _end(tokenizer: Tokenizer, stopped: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The end of an answer: what of it was drawn, and what follows."""
  first, *rest = tokenizer.chat.assistant_end
  return ((first,), tuple(rest)) if stopped else ((), (first, *rest))


def simulator_segments(
  recorded: Recorded,
  tokenizer: Tokenizer,
  templates: dict[str, Templates],
  form: str,
  answers: Collection[str] = ANSWERS,
) -> list[Segment]:
  """The simulated user's view: of its `ANSWERS` those in `answers` are learned.

  A turn is a branch: the question about the reply, the answer, the question for a message and the
  message, unless that is not learned; what was said goes on as context. form: `plan`, where the
  answer is the appraisal in its five lines, or `choice`, where it is the change alone and no
  appraisal is known. An appraisal that could not be read, or lacks one of its lines, is left out
  with its branch.

  Raises Misfit for another level than vanilla, whose changes were felt otherwise than written,
  and where the prompts show traits that the record has not.
  """
  own = templates[recorded.scenario.language]
  if recorded.level != VANILLA.name:
    raise Misfit(f"the level {recorded.level!r:.60}, expected vanilla for data.kind simulator")
  if not recorded.scenario.traits and "traits" in {name for _, name in own.sections["system"]}:
    raise Misfit("no 'traits', expected a record with those that the section 'system' shows")
  if recorded.opening is None:
    return []
  chat, (first, *rest) = UserChat(tokenizer, own), tokenizer.chat.assistant_end
  change, message = "change" in answers, "message" in answers
  emotion, said = recorded.emotion, _said(chat, recorded.opening)
  drawn, after = _end(tokenizer, recorded.opening.stopped)
  start = [*persona_ids(tokenizer, own, recorded.scenario), *chat.question("opening", emotion)]
  found = [Segment(tuple(start)), _answer([*said, *drawn], 0, message), Segment(after)]
  for branch, turn in enumerate(recorded.turns, 1):
    found.append(Segment(tuple(chat.quoted(turn.reply.text))))
    answer = _appraisal(turn.plan, own) if form == "plan" else str(turn.plan.change)
    said = [] if turn.message is None else _said(chat, turn.message)
    if answer:
      found.append(Segment(tuple(chat.question_below(form, emotion)), branch))
      found.append(_answer([*tokenizer.encode(answer), first], branch, change))
    if answer and message and turn.message is not None:
      fields = {name: getattr(turn.plan, name) if form == "plan" else "" for name in PLAN_FIELDS}
      question = chat.message_question(turn.emotion, turn.plan.change, fields)
      drawn, _ = _end(tokenizer, turn.message.stopped)
      found += [Segment((*rest, *question), branch), trained([*said, *drawn], branch)]
    if turn.message is not None:
      found.append(Segment((*chat.nothing_below, *said, first, *rest)))
    emotion = turn.emotion
  return found


def _answer(ids: list[int], branch: int, learned: bool) -> Segment:
  return trained(ids, branch) if learned else Segment(tuple(ids), branch)


def _said(chat: UserChat, message: UserMessage) -> list[int]:
  """A message's ids: those that were sampled, where they are this tokenizer's."""
  ids, tokenizer = message.ids, chat.tokenizer
  if ids is None or not records.are_ids(ids, tokenizer) or not records.spells(message, tokenizer):
    ids = None
  return chat.said(message.text, ids)


def _appraisal(plan: Plan, templates: Templates) -> str:
  """The appraisal in its labelled lines, "" where not all of it is known."""
  known = plan.parsed and all(getattr(plan, name) for name in PLAN_FIELDS)
  return appraisal_text(templates, plan) if known else ""
