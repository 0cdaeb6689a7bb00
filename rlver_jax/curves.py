"""The metrics of a run as curves in a PNG file, with the held-out dialogues as marks."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rlver_jax.heldout import label

BLUE, GREEN, RED, GREY = "#1f6fb4", "#2a8f4f", "#c23b3b", "#555555"
COLOURS = (BLUE, RED, GREEN, "#8a5fb0", "#c98a1b", "#3a9aa0", "#8c5a3c", GREY)  # of several
POINTS, SHARE, FROM_ZERO = "points", "share", "from zero"  # what bounds an axis
# A panel: title, what its axis measures, what bounds it, and its lines: metric, name, colour, and
# the number of held-out dialogues that belongs to it.
Line = tuple[str, str, str, str | None]
PANELS: tuple[tuple[str, str, str, tuple[Line, ...]], ...] = (
  (
    "Final emotion",
    "points, mean of a step",
    POINTS,
    (("emotion/final_mean", "", BLUE, "final_emotion"),),
  ),
  (
    "Success and failure",
    "share of dialogues",
    SHARE,
    (
      ("emotion/success_rate", "success", GREEN, "success"),
      ("emotion/failure_rate", "failure", RED, "failure"),
    ),
  ),
  (
    "Replies that meet the user's need",
    "share of replies",
    SHARE,
    (("strategies/matched", "", BLUE, "matched"),),
  ),
  ("Entropy of the policy", "nats a token", FROM_ZERO, (("update/entropy", "", BLUE, None),)),
  (
    "Length of a reply",
    "tokens, mean of a step",
    FROM_ZERO,
    (("tokens/reply_mean", "", BLUE, "reply_tokens"),),
  ),
  (
    "Distinct-2 of the replies",
    "different pairs of words / all pairs",
    SHARE,
    (("dialogue/distinct_2", "", BLUE, "distinct_2"),),
  ),
)
SMOOTHED = 40  # from so many steps on a running mean is drawn over the steps
MARKS = ("o", "s")  # of the run's own user and of the scripted one
HOLLOW = {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.6, "zorder": 5}
HOLLOW |= {"clip_on": False}


def draw(
  records: Sequence[dict[str, Any]], numbers: dict[str, Any], path: str | os.PathLike
) -> None:
  """Draws the figure of a run to a PNG file, all or nothing; arguments as `make_figure`.

  Raises OSError where it cannot be written.
  """
  save(make_figure(records, numbers), path)


def save(figure: Any, path: str | os.PathLike) -> None:
  """Draws a Figure of matplotlib to a PNG file, all or nothing; OSError where that fails."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  figure.savefig(temporary, format="png")
  os.replace(temporary, path)


def plain(text: str) -> str:
  """A text in which matplotlib finds no formula."""
  return text.replace("$", r"\$")


def make_figure(records: Sequence[dict[str, Any]], numbers: dict[str, Any]) -> Any:
  """The curves of a run, as a Figure of matplotlib.

  Args:
    records: the lines of metrics.jsonl; a metric may be missing or None in any of them.
    numbers: by kind of user, as `heldout.numbers` gives them; empty without held-out dialogues.
  """
  from matplotlib.figure import Figure  # late: it is needed once, at the end of a run

  figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")  # draws with Agg
  steps = [record["step"] for record in records]
  last = max(steps, default=1)
  for axis, (title, unit, bound, lines) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
    axis.margins(y=0.1)
    for metric, name, colour, number in lines:
      _curve(axis, steps, [_number(record.get(metric)) for record in records], name, colour)
      for mark, found in zip(MARKS, numbers.values(), strict=False):
        for step, when in ((0, "before"), (last, "after")):
          value = _number(found.get(when, {}).get(number))
          axis.plot(step, value, mark, color=colour, **HOLLOW)
    axis.set_title(title, loc="left")
    axis.set_ylabel(unit)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(-0.04 * last, 1.04 * last)
    if bound == SHARE:
      axis.set_ylim(-0.04, 1.04)
    elif bound == FROM_ZERO:
      axis.set_ylim(0, 1.1 * max(axis.dataLim.y1, 1e-9))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
      axis.legend(loc="best", frameon=False)
  _legend(figure, numbers)
  return figure


def _curve(axis, steps, values, name, colour) -> None:
  many = len(steps) >= SMOOTHED
  if many:
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    values = _running_mean(values, len(values) // 20)
  mark = None if many else "."
  axis.plot(steps, values, color=colour, linewidth=1.8, marker=mark, label=name or None)


def _running_mean(values: Sequence[float], size: int) -> list[float]:
  """The mean of each value and those up to `size` places from it, of what is a number."""
  means = []
  for i in range(len(values)):
    near = [v for v in values[max(0, i - size) : i + size + 1] if not math.isnan(v)]
    means.append(sum(near) / len(near) if near else math.nan)
  return means


def _legend(figure, numbers) -> None:
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], color=GREY, marker=mark, linestyle="", label=f"judged by {label(user)}",
           **HOLLOW)
    for mark, user in zip(MARKS, numbers, strict=False)
  ]  # fmt: skip
  if handles:
    figure.legend(
      handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
      title="Held-out dialogues: at 0 before the first step, at the right after the last",
    )  # fmt: skip


def _number(value: float | None) -> float:
  return math.nan if value is None else value
