"""The benchmark's tables: models, groups of dialogues, and how far models differ."""

from collections.abc import Sequence

from rlver_jax.evaluation import scores, tables
from rlver_jax.evaluation.tables import Range
from rlver_jax.evaluation.transcripts import Transcript

INTERVAL = Range("95% low", "95% high", "95% interval")
SUCCESS, FAILURE = (Range(f"{x} low", f"{x} high", "95% interval") for x in ("success", "failure"))
# tokens: of a reply.
HEAD = (
  "dialogues", "score", INTERVAL, "success", SUCCESS, "failure", FAILURE, "replies", "tokens"
)  # fmt: skip


def models(found: dict[str, list[Transcript]], by: str | None) -> tables.Rows:
  """A row for each model, and where `by` is given one for each of its groups."""
  rows = [["model", *([by] if by else []), *HEAD]]
  for name, dialogues in found.items():
    rows.append([name, *(["all"] if by else []), *_cells(dialogues)])
    for group, members in scores.grouped(dialogues, by).items() if by else ():
      rows.append([name, group, *_cells(members)])
  return rows


def groups(dialogues: Sequence[Transcript]) -> tables.Rows:
  """A row for all dialogues of a model, and one for each group of every kind."""
  rows = [["dialogues of", *HEAD], ["all", *_cells(dialogues)]]
  for kind in scores.GROUPS:
    for group, members in scores.grouped(dialogues, kind).items():
      rows.append([f"{kind}: {group}", *_cells(members)])
  return rows


def comparison(found: dict[str, list[Transcript]]) -> tables.Rows:
  """How far the first model is above each of the others on the scenarios that both have."""
  first, *others = found
  rows = [[f"{first} against", "scenarios", "difference", INTERVAL, "p"]]
  for other in others:
    d = scores.difference(found[first], found[other])
    if d is None:
      rows.append([other, "0", "-", Range("-", "-", "-"), "-"])
    else:
      sign = "+" if d.mean >= 0 else ""
      mean = f"{sign}{scores.rounded(d.mean)}"
      rows.append([other, str(d.scenarios), mean, _interval(d.interval, "+"), f"{d.p:.4f}"])
  return rows


def _cells(dialogues: Sequence[Transcript]) -> tables.Row:
  s = scores.score(dialogues)
  return [
    str(s.dialogues),
    scores.rounded(s.mean),
    _interval(s.interval),
    str(s.success),
    _counts(s.success_interval),
    str(s.failure),
    _counts(s.failure_interval),
    f"{s.replies:.1f}",
    "-" if s.tokens is None else f"{s.tokens:.0f}",
  ]


def _counts(bounds: tuple[float, float]) -> Range:
  return Range(*(f"{bound:.0f}" for bound in bounds))


def _interval(bounds: tuple[float, float], sign: str = "") -> Range:
  return Range(*(f"{bound:{sign}.1f}" for bound in bounds))
