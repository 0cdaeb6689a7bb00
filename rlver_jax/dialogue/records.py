"""Finished dialogues as JSON lines, in the format of recorded Sentient-benchmark dialogues.

A record holds the profile's fields, the final emotion and its state, and `history`: a list of
messages, the user's with `emotion-point` and the `planning` that led to it. Added here: the
place in the batch, the user's level, why the dialogue ended, token counts, the policy's thoughts,
the user's traits, the tactic of a difficult one, the token ids that a language-model user sampled,
from which its chat can be read again, and of what was cut off by a token limit `stopped`: false.
"""

import os
from collections.abc import Sequence
from typing import Any

from rlver_jax import json_lines
from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.dialogue import (
  SILENCE,
  Dialogue,
  Plan,
  PolicyReply,
  Rules,
  Stage,
  Turn,
  UserMessage,
)
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.json_lines import Misfit, field
from rlver_jax.tokenizer import Tokenizer


def record(dialogue: Dialogue) -> dict[str, Any]:
  """One finished dialogue as a JSON object."""
  s = dialogue.scenario
  tactic = {"tactic": s.tactic} if s.tactic else {}
  history = []
  if dialogue.opening is not None:
    history.append(_user(dialogue.opening, dialogue.rules.initial_emotion, None))
  for turn in dialogue.turns:
    history += [_assistant(turn.reply), _user(turn.message, turn.emotion, turn.plan)]
  if dialogue.pending:  # a last reply that the user had no room to appraise
    history.append(_assistant(dialogue.last_reply))
  return {
    "id": s.id,
    "emo_point": dialogue.emotion,
    "emo_state": f"Emotion-{emotion_lib.state(dialogue.emotion)}",
    "target": "eq",
    "player": s.persona,
    "scene": s.background,
    "character": s.character,
    "traits": list(s.traits),
    "topic": s.topic,
    "task": s.task,
    **tactic,
    "history": history,
    "dialogue": dialogue.index,
    "group": dialogue.group,
    "level": dialogue.rules.level.name,
    "end": dialogue.end,
    "greedy": dialogue.greedy,
    "tokens": {
      "policy": sum(reply.sampled_tokens for reply in dialogue.replies),
      "simulator": simulator_tokens(dialogue),
    },
  }


def simulator_tokens(dialogue: Dialogue) -> int:
  """Tokens that the simulator sampled in a dialogue."""
  said = [dialogue.opening, *(t.message for t in dialogue.turns)]
  plans = sum(t.plan.tokens for t in dialogue.turns)
  return plans + sum(m.tokens for m in said if m is not None)


def _user(message: UserMessage | None, emotion: int, plan: Plan | None) -> dict[str, Any]:
  """The user's side of a turn; a dialogue that ended before its message has empty content."""
  entry: dict[str, Any] = {
    "role": "user",
    "content": message.text if message else "",
    "emotion-point": emotion,
    "tokens": message.tokens if message else 0,
  }
  if message and message.ids is not None:
    entry["ids"] = list(message.ids)
  if message and not message.stopped:
    entry["stopped"] = False
  if plan is not None:
    entry["planning"] = {
      "content": plan.content,
      "TargetCompletion": plan.completion,
      "activity": plan.activity,
      "analyse": plan.feeling,
      "change": plan.change,
      "parsed": plan.parsed,
      "retries": plan.retries,
      "tokens": plan.tokens,
    }
  return entry


def _assistant(reply: PolicyReply) -> dict[str, Any]:
  entry: dict[str, Any] = {
    "role": "assistant",
    "content": reply.text,
    "tokens": reply.sampled_tokens,
  }
  if reply.thought is not None:
    entry |= {"thinking": reply.thought, "well_formed": reply.well_formed}
  if not reply.stopped:
    entry["stopped"] = False
  return entry


def exchange(record: Any) -> tuple[UserMessage | None, int | None, tuple[Turn, ...]]:
  """What was said in a record: the opening, the emotion at it, and the turns that were appraised.

  Opening and emotion are None in a record without history. A thought is None where the record
  has none; of an appraisal only the change has to be there, and no number of tokens.

  Raises Misfit for a history that is not of the format.
  """
  history = field(record, "history", list)
  opening = _read_user(history[0]) if history else None
  # A last reply that the user had no room to appraise stands alone.
  pairs = zip(history[1::2], history[2::2], strict=False)
  turns = tuple(_read_turn(reply, user) for reply, user in pairs)
  if turns and (opening is None or any(turn.message is None for turn in turns[:-1])):
    raise Misfit("a turn after the user has left, expected a message before it")
  return opening, field(history[0], "emotion-point", int) if history else None, turns


def scenario_of(record: Any) -> Scenario:
  """The scenario that a record tells of, without its first message; Misfit where it does not."""
  texts = {"id": "id", "persona": "player", "background": "scene", "character": "character"}
  found = {name: field(record, key, str) for name, key in (texts | {"task": "task"}).items()}
  traits = field(record, "traits", list, [])  # which records of others lack
  if not all(isinstance(trait, str) for trait in traits):
    raise Misfit(f"{traits!r:.60} as 'traits', expected a list of strings")
  topic, tactic = field(record, "topic", str, ""), scenario_lib.tactic_of(record)
  return Scenario(**found, traits=tuple(traits), topic=topic, tactic=tactic)


def dialogue_of(record: Any, scenario: Scenario, rules: Rules) -> Dialogue:
  """The finished dialogue that a record was made of, given its scenario and rules.

  What a record does not hold is lost: the policy's token ids, and which message was a goodbye.
  Raises Misfit where it is no record.
  """
  opening, _, turns = exchange(record)
  index, group = field(record, "dialogue", int), field(record, "group", int)
  d = Dialogue(index, group, scenario, rules, greedy=field(record, "greedy", bool))
  d.opening, d.turns, d.stage = opening, list(turns), Stage.DONE
  if len(record["history"]) == 2 * len(turns) + 2:  # a last reply that was not appraised
    d.pending = (_read_reply(record["history"][-1]),)
  d.emotion, d.end = field(record, "emo_point", int), field(record, "end", str)
  return d


def are_ids(ids: Sequence[Any], tokenizer: Tokenizer) -> bool:
  """Whether these are ids of the tokenizer's ordinary tokens."""
  known = all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
  return known and not tokenizer.special_ids.intersection(ids)


def spells(message: UserMessage, tokenizer: Tokenizer) -> bool:
  """Whether a message's ids, of this tokenizer, are those of its text."""
  return (tokenizer.decode(message.ids).strip() or SILENCE) == message.text


def _read_turn(reply: Any, user: Any) -> Turn:
  said, planning = _read_reply(reply), field(user, "planning", dict)
  plan = Plan(
    field(planning, "change", int), field(planning, "content", str, ""),
    field(planning, "TargetCompletion", str, ""), field(planning, "activity", str, ""),
    field(planning, "analyse", str, ""), field(planning, "parsed", bool, True),
    field(planning, "tokens", int, 0), field(planning, "retries", int, 0),
  )  # fmt: skip
  return Turn(said, plan, field(user, "emotion-point", int), _read_user(user))


def _read_reply(entry: Any) -> PolicyReply:
  if field(entry, "role", str) != "assistant":
    raise Misfit(f"the role {entry['role']!r:.60}, expected user and assistant in turn")
  thought = field(entry, "thinking", str) if "thinking" in entry else None
  well_formed = thought is None or field(entry, "well_formed", bool)
  stopped, tokens = field(entry, "stopped", bool, True), field(entry, "tokens", int, 0)
  return PolicyReply(field(entry, "content", str), thought, well_formed, stopped, tokens)


def _read_user(entry: Any) -> UserMessage | None:
  """The user's message, None where it said nothing more."""
  if field(entry, "role", str) != "user":
    raise Misfit(f"the role {entry['role']!r:.60}, expected user and assistant in turn")
  text, tokens = field(entry, "content", str), field(entry, "tokens", int, 0)
  if not text:
    return None
  ids = tuple(field(entry, "ids", list)) if "ids" in entry else None
  return UserMessage(text, tokens=tokens, ids=ids, stopped=field(entry, "stopped", bool, True))


def write(path: str | os.PathLike, dialogues: Sequence[Dialogue]) -> None:
  """Writes the records of these dialogues to a file, all or nothing."""
  json_lines.write(path, map(record, dialogues))
