"""The end of a run: what it leaves beside its metrics, and what it shows of itself.

`write` draws the curves and compares the held-out dialogues before and after; `describe` is the
text that the terminal gets: a table of that comparison, and one scenario's two dialogues.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlver_jax import curves, files, heldout, metrics, side_by_side
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.dialogue.statistics import STRATEGIES, USED
from rlver_jax.sources import Sources

CURVES_FILE, NUMBERS_FILE = "curves.png", "evaluation.json"

# Columns of the table: its head, the number, and how it is written.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
  "emotion": ("final_emotion", "{:.1f}".format),
  "success": ("success", "{:.0%}".format),
  "failure": ("failure", "{:.0%}".format),
  "turns": ("turns", "{:.1f}".format),
  "tokens": ("reply_tokens", "{:.0f}".format),
  "distinct-1": ("distinct_1", "{:.2f}".format),
  "distinct-2": ("distinct_2", "{:.2f}".format),
  "strategies": ("strategies", "{:.0f}".format),
}


def write(config: ConfigDict, sources: Sources, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes the curves, and the numbers of held-out dialogues where there are any, to `workdir`.

  Returns what the summary says of them: paths, and the numbers by user as `heldout.numbers` has
  them. Raises UserError where the folder holds what is damaged, OSError where it cannot be written.
  """
  numbers = heldout.numbers(heldout.read(config, sources, workdir))
  records = metrics.read_metrics(workdir)
  curves.draw(records, numbers, workdir / CURVES_FILE)
  found: dict[str, Any] = {"curves": str(workdir / CURVES_FILE)}
  if numbers:
    found["held_out"] = {
      "path": config.evaluation.path,
      "scenarios": len(sources.heldout),
      "steps": records[-1]["step"] if records else 0,
      "users": numbers,
    }
    found["evaluation"] = str(workdir / NUMBERS_FILE)
    with files.replacing(workdir / NUMBERS_FILE) as file:
      file.write(json.dumps(found["held_out"], indent=2) + "\n")
  return {"report": found}


def describe(
  summary: dict[str, Any], config: ConfigDict, sources: Sources, workdir: pathlib.Path
) -> str:
  """The text for the terminal: the summary with what `write` found, and two dialogues of `workdir`.

  Raises UserError where the folder holds what is damaged.
  """
  parts, user = [], config.simulator.kind
  held_out = summary["report"].get("held_out")
  if held_out:
    parts += ["", *_table(held_out["users"], held_out["scenarios"])]
    both = heldout.read_of(user, config, sources, workdir)
    if len(both) == len(heldout.WHENS):
      parts += ["", *pair_of_dialogues(both["before"], both["after"], user)]
  parts += ["", *([f"dialogues: {workdir / heldout.FOLDER}"] if held_out else [])]
  text = metrics.format_summary(summary)
  return "\n".join([text, *parts, f"curves: {workdir / CURVES_FILE}"])


def _table(numbers: dict[str, Any], scenarios: int) -> list[str]:
  """The comparison as lines; a number that is not there is a dash."""
  rows = [["user", *COLUMNS]]
  for user, found in numbers.items():
    rows.append([heldout.label(user)])
    for name, written in COLUMNS.values():
      pair = [found.get(when, {}).get(name) for when in heldout.WHENS]
      rows[-1].append(" -> ".join("-" if n is None else written(n) for n in pair))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [f"{scenarios} held-out scenarios, before -> after training:"]
  for row in rows:
    first, *rest = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
    lines.append("  ".join([first, *rest]))
  lines.append(
    f"(tokens: those of a reply; strategies: how many of the {len(STRATEGIES)} that meet a need "
    f"are in at least {USED:.0%} of the replies)"
  )
  changes = [
    f"{heldout.label(user)} {gain['mean']:+.1f}"
    + ("" if gain["standard_error"] is None else f" (standard error {gain['standard_error']:.1f})")
    for user, gain in ((user, found.get("gain")) for user, found in numbers.items())
    if gain and gain["mean"] is not None
  ]
  return lines + ([f"change of emotion: {', '.join(changes)}"] if changes else [])


def pair_of_dialogues(
  before: Sequence[Dialogue], after: Sequence[Dialogue], user: str, place: str = "median"
) -> list[str]:
  """Lines with the two dialogues on one scenario, side by side; none where every user failed.

  Args:
    before, after: with the policy as it started and as it ended, on the same scenarios.
    user: the kind of simulated user.
    place: of the scenario's gain among all: lowest, median or highest.
  """
  gains = heldout.gains(before, after)
  order = sorted((gain, i) for i, gain in enumerate(gains) if gain is not None)
  if not order:
    return []
  gain, chosen = order[{"lowest": 0, "median": (len(order) - 1) // 2, "highest": -1}[place]]
  scenario = before[chosen].scenario
  texts = (
    f"Scenario {scenario.id} before and after, judged by {heldout.label(user)}: its change of "
    f"emotion, {gain:+d}, is the {place} of all.",
    f"Hidden intention: {scenario.task}",
  )
  return [
    *(line for text in texts for line in side_by_side.wrap(text, side_by_side.WIDTH)),
    *side_by_side.dialogues(("before", before[chosen]), ("after", after[chosen])),
  ]
