"""Finished dialogues as JSON lines, in the format of recorded Sentient-benchmark dialogues.

A record holds the profile's fields, the final emotion and its state, and `history`: a list of
messages, the user's with `emotion-point` and the `planning` that led to it. Added here: the
place in the batch, the user's level, why the dialogue ended, token counts, the policy's thoughts,
and the token ids that a language-model user sampled, from which its chat can be read again.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlver_jax import files
from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import (
  Dialogue,
  Plan,
  PolicyReply,
  Rules,
  Stage,
  Turn,
  UserMessage,
)
from rlver_jax.dialogue.scenario import Scenario


def record(dialogue: Dialogue) -> dict[str, Any]:
  """One finished dialogue as a JSON object."""
  s = dialogue.scenario
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
    "topic": s.topic,
    "task": s.task,
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
  return entry


def dialogue_of(record: dict[str, Any], scenario: Scenario, rules: Rules) -> Dialogue:
  """The finished dialogue that a record was made of, given its scenario and rules.

  What a record does not hold is lost: the policy's token ids, whether a reply was cut off, which
  message was a goodbye. What it does hold is not checked: KeyError, IndexError, TypeError or
  AttributeError where it is no record.
  """
  history = record["history"]
  d = Dialogue(record["dialogue"], record["group"], scenario, rules, greedy=record["greedy"])
  d.opening = _message_of(history[0]) if history else None
  for reply, user in zip(history[1::2], history[2::2], strict=False):
    p = user["planning"]
    plan = Plan(
      p["change"], p["content"], p["TargetCompletion"], p["activity"], p["analyse"], p["parsed"],
      p["tokens"], p["retries"],
    )  # fmt: skip
    d.turns.append(Turn(_reply_of(reply), plan, user["emotion-point"], _message_of(user)))
  if history and len(history) % 2 == 0:  # a last reply that the user had no room to appraise
    d.pending = (_reply_of(history[-1]),)
  d.emotion, d.end, d.stage = record["emo_point"], record["end"], Stage.DONE
  return d


def _message_of(entry: dict[str, Any]) -> UserMessage | None:
  if not entry["content"]:
    return None
  ids = tuple(entry["ids"]) if "ids" in entry else None
  return UserMessage(entry["content"], tokens=entry["tokens"], ids=ids)


def _reply_of(entry: dict[str, Any]) -> PolicyReply:
  well_formed = entry.get("well_formed", True)
  return PolicyReply(entry["content"], entry.get("thinking"), well_formed, True, entry["tokens"])


def write(path: str | os.PathLike, dialogues: Sequence[Dialogue]) -> None:
  """Writes the records of these dialogues to a file, all or nothing."""
  write_lines(path, map(record, dialogues))


def write_lines(path: str | os.PathLike, values: Iterable[dict[str, Any]]) -> None:
  """Writes JSON objects to a file, one a line, all or nothing."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as file:
    for value in values:
      file.write(json.dumps(value, ensure_ascii=False) + "\n")
