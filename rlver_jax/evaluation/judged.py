"""What judgements of recorded dialogues come to: means, strategies and their effect, as tables."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from rlver_jax.dialogue.answers import comparable
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.evaluation import scores, tables
from rlver_jax.evaluation.judges.base import AXES, CAPABILITIES, NAMES, NONE, Judgement
from rlver_jax.evaluation.tables import Range

SHORTEST = 4  # characters of a passage without which a quotation proves nothing
_QUOTATION = re.compile(r"“([^”]*)”|\"([^\"]*)\"|「([^」]*)」|『([^』]*)』|«([^»]*)»")
# What columns are called where the whole name is too long.
SHORT = dict(zip(CAPABILITIES, ("depth", "insight", "solutions", "guidance", "style"), strict=True))


@dataclasses.dataclass(frozen=True)
class Judged:
  """A judged dialogue. quoted: whether the reason for each capability quotes a reply to the letter;
  changes: of emotion, in points, that each appraised reply brought; emotions: the user's when each
  was written. tactic: of the scenario, "" for none."""

  judgement: Judgement
  quoted: dict[str, bool]
  changes: tuple[int, ...]
  emotions: tuple[int, ...]
  tactic: str = ""

  @classmethod
  def of(cls, judgement: Judgement, recorded: Recorded) -> "Judged":
    """From a judgement and the dialogue that it is about."""
    replies = [turn.reply.text for turn in recorded.turns]
    quoted = {name: quotes(reason, replies) for name, reason in judgement.reasons.items()}
    start, changes = recorded.start, tuple(turn.plan.change for turn in recorded.turns)
    after = [turn.emotion for turn in recorded.turns]
    emotions = (start.rules.initial_emotion, *after[:-1])
    return cls(judgement, quoted, changes, emotions, start.scenario.tactic)


@dataclasses.dataclass(frozen=True)
class Effect:
  """What came of the replies that use a strategy; a reply may use several.

  replies: how many; share: of all replies. change: the mean change of emotion, in points, interval:
  of it, positive: the share of changes above 0; None where no reply uses it.
  """

  replies: int
  share: float
  change: float | None
  interval: tuple[float, float] | None
  positive: float | None


def quotes(reason: str, replies: Iterable[str]) -> bool:
  """Whether the longest passage in quotation marks in `reason` stands in one of the replies.

  Letters count whatever their case and width, blanks and the punctuation at its ends do not.
  Without such a passage of at least SHORTEST characters the answer is no.
  """
  found = [next(filter(None, groups), "") for groups in _QUOTATION.findall(reason)]
  passage = max(map(_bare, found), key=len, default="")
  return len(passage) >= SHORTEST and any(passage in comparable(reply) for reply in replies)


def _bare(text: str) -> str:
  """Comparable, without punctuation and blanks at the ends."""
  text = comparable(text)
  marks = {c for c in text if unicodedata.category(c)[0] in "PZ"}
  return text.strip("".join(marks))


def effects(judged: Sequence[Judged]) -> dict[str, Effect]:
  """What came of each of the strategies, and of replies that use none."""
  replies = [
    (names or (NONE,), change)
    for one in judged
    for names, change in zip(one.judgement.strategies, one.changes, strict=True)
  ]
  found = {}
  for name in NAMES:
    changes = np.array([change for names, change in replies if name in names])
    if not changes.size:
      found[name] = Effect(0, 0.0, None, None, None)
      continue
    found[name] = Effect(
      replies=len(changes),
      share=len(changes) / len(replies),
      change=float(changes.mean()),
      interval=scores.interval(changes),
      positive=float((changes > 0).mean()),
    )
  return found


def summary(judged: Sequence[Judged]) -> dict:
  """The numbers of at least one dialogue, to be written as JSON."""
  marks = {name: [j.judgement.scores[name] for j in judged] for name in CAPABILITIES}
  strategies = {name: dataclasses.asdict(effect) for name, effect in effects(judged).items()}
  for effect in strategies.values():
    effect["interval"] = effect["interval"] and list(effect["interval"])  # as JSON has it
  return {
    "dialogues": len(judged),
    "replies": sum(len(j.changes) for j in judged),
    "capabilities": {name: float(np.mean(values)) for name, values in marks.items()},
    "intervals": {name: list(scores.interval(np.array(values))) for name, values in marks.items()},
    "plane": place(judged),
    "quoted": quoted_share(judged),
    "strategies": strategies,
  }


def place(judged: Sequence[Judged]) -> dict[str, float]:
  """The mean place of dialogues on the plane."""
  return {axis: float(np.mean([j.judgement.plane[axis] for j in judged])) for axis in AXES}


def quoted_share(judged: Sequence[Judged]) -> float:
  """The share of reasons that quote a reply to the letter."""
  return float(np.mean([found for j in judged for found in j.quoted.values()]))


def board(by_file: dict[str, list[Judged]]) -> tables.Rows:
  """A row for each file, and with several one for all."""
  head: list[str | Range] = ["dialogues of", "dialogues"]
  for name in CAPABILITIES:
    head += [SHORT[name], Range(f"{SHORT[name]} low", f"{SHORT[name]} high", "95%")]
  rows = [[*head, *AXES, "quoted"]]
  for name, judged in with_all(by_file):
    cells: list[str | Range] = [name, str(len(judged))]
    for capability in CAPABILITIES:
      values = np.array([j.judgement.scores[capability] for j in judged])
      cells += [f"{values.mean():.2f}", span(scores.interval(values))]
    places = [f"{value:.2f}" for value in place(judged).values()]
    rows.append([*cells, *places, f"{quoted_share(judged):.0%}"])
  return rows


def strategies_board(by_file: dict[str, list[Judged]]) -> tables.Rows:
  """For each file, and with several for all, a row for each strategy."""
  rows = [["dialogues of", "strategy", "replies", "share", "mean change",
           Range("change low", "change high", "95%"), "positive"]]  # fmt: skip
  for name, judged in with_all(by_file):
    for strategy, e in effects(judged).items():
      row: list[str | Range] = [name, strategy, str(e.replies), f"{e.share:.1%}"]
      if e.change is None:
        rows.append([*row, "-", Range("-", "-", "-"), "-"])
      else:
        rows.append([*row, f"{e.change:+.2f}", span(e.interval, "+"), f"{e.positive:.0%}"])
  return rows


def with_all(by_file: dict[str, list[Judged]]) -> list[tuple[str, list[Judged]]]:
  """The files with their dialogues, and after several all of these."""
  every = [one for some in by_file.values() for one in some]
  return [*by_file.items(), *([("all", every)] if len(by_file) > 1 else [])]


def span(bounds: tuple[float, float], sign: str = "") -> Range:
  """A cell with the bounds of an interval."""
  return Range(*(f"{bound:{sign}.2f}" for bound in bounds))
