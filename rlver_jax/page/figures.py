"""What a page shows of runs as figures of matplotlib, for notebooks.

`curves`, `trajectories` and `held_out` draw the page's content (`content.content`), the others what
`comparison.py` finds. Intervals are the 95% ones.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlver_jax import heldout
from rlver_jax.curves import BLUE, COLOURS, FROM_ZERO, GREEN, GREY, HOLLOW, MARKS, RED, SHARE
from rlver_jax.dialogue.dialogue import Dialogue
from rlver_jax.errors import UserError
from rlver_jax.evaluation.judges.base import LEAST, MOST
from rlver_jax.page import drawing
from rlver_jax.page.comparison import FINAL, Difference
from rlver_jax.page.statistics import Estimate

BEFORE = heldout.WHENS[0]
TIMES = (GREY, BLUE)  # colours of before and after
POINTS = "points, 0 to 100"
HALVES = (drawing.hollow(GREY, "before training"), drawing.full(GREY, "after training"))


def curves(
  content: dict[str, Any], titles: Sequence[str] = (), names: Sequence[str] = ()
) -> Figure:
  """A chart for each of the page's panels, with a line for each run, its interval shaded.

  Args:
    content: of a page.
    titles: the charts that are drawn; by default all.
    names: the runs that are drawn; by default all. A run has the same colour in every figure.

  Of a single run the held-out dialogues are marks, as in `curves.png`. UserError where there is no
  curve of these titles.
  """
  panels = [p for p in content["panels"] if p["title"] in titles or not titles]
  if not panels:
    raise UserError("the runs have no such curve, expected runs that have trained.")
  runs = {i: run for i, run in enumerate(content["runs"]) if run["name"] in names or not names}
  columns = min(len(panels), 3 if len(panels) <= 6 else 4)
  rows = -(-len(panels) // columns)
  figure = drawing.figure(12.8 * columns / max(columns, 3), 3 * rows + 0.7)
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axis, panel in zip(axes, panels, strict=False):
    _panel(axis, panel, runs)
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  if len(runs) > 1:
    drawing.legend(figure, _names(runs))
  elif users := _users(content):
    about = "held-out dialogues judged by {}, before the first step and after the last"
    drawing.legend(
      figure, [drawing.hollow(GREY, about.format(user), mark) for user, mark in users.items()]
    )
  return figure


def _panel(axis: Axes, panel: dict[str, Any], runs: Mapping[int, dict[str, Any]]) -> None:
  last = 1.0
  for number, run in runs.items():
    colour = drawing.colour(number)
    for style, (metric, name) in zip(("-", "--"), panel["lines"], strict=False):
      points = np.array(run["curves"].get(metric, []), float).reshape(-1, 4)
      axis.plot(*points[:, :2].T, style, color=colour, marker=".", linewidth=1.6, label=name)
      axis.fill_between(points[:, 0], *points[:, 2:].T, color=colour, **drawing.BAND)
      last = max(last, *points[:, 0], 1.0)
      held_out = run["marks"].get(metric, []) if len(runs) == 1 else []
      shapes = dict(zip(dict.fromkeys(mark["user"] for mark in held_out), MARKS, strict=False))
      for mark in held_out:
        axis.plot(mark["step"], mark["value"], shapes[mark["user"]], color=colour, **HOLLOW)
  drawing.label(axis, panel["title"], "step of training", panel["unit"])
  axis.set_xlim(-0.04 * last, 1.04 * last)
  axis.xaxis.get_major_locator().set_params(integer=True)
  if panel["bound"] == SHARE:
    axis.set_ylim(-0.04, 1.04)
  elif panel["bound"] == FROM_ZERO:
    axis.set_ylim(0, 1.1 * max(axis.dataLim.y1, 1e-9))
  if len(panel["lines"]) > 1 and len(runs) == 1:
    axis.legend(frameon=False)


def trajectories(content: dict[str, Any]) -> Figure:
  """The mean emotion from reply to reply, before training dashed: a chart for each kind of user.

  A dialogue that has ended keeps its emotion. UserError where no run has held-out dialogues.
  """
  users = {
    found["user"]: [line for line in found["lines"] if line["when"] in heldout.WHENS]
    for found in content["trajectories"]
  }
  users = {user: lines for user, lines in users.items() if lines}
  _expect(users)
  names = _names(dict(enumerate(content["runs"]))) if len(content["runs"]) > 1 else []
  figure, axes = drawing.side_by_side(5.3 * len(users), 4, len(users))
  for axis, (user, lines) in zip(axes, users.items(), strict=True):
    for line in lines:
      points, begun = np.array(line["points"], float), line["when"] == BEFORE
      colour = GREY if begun and not names else drawing.colour(line["run"])
      style, turns = "--" if begun else "-", range(len(points))
      axis.plot(turns, points[:, 0], style, color=colour, marker=".", linewidth=1.6)
      axis.fill_between(turns, *points[:, 1:].T, color=colour, **drawing.BAND)
    y = f"mean emotion, {POINTS}" if axis is axes[0] else ""
    drawing.label(axis, f"Judged by {user}", "replies of the policy", y)
    axis.set_ylim(0, 100)
  after = GREY if names else drawing.colour(0)
  when = [drawing.line(GREY, "before training", "--"), drawing.line(after, "after training")]
  drawing.legend(figure, names + when)
  return figure


def held_out(content: dict[str, Any]) -> Figure:
  """The mean final emotion of held-out dialogues before and after: a chart for each kind of user.

  UserError where no run has held-out dialogues.
  """
  users, runs = _users(content), content["runs"]
  _expect(users)
  figure, axes = drawing.side_by_side(10.6, 0.42 * len(runs) + 1.7, len(users))
  for axis, user in zip(axes, users, strict=True):
    for place, run in enumerate(runs):
      marks = [mark for mark in run["marks"].get(FINAL, []) if mark["user"] == user]
      colour = drawing.colour(place)
      axis.plot([m["value"] for m in marks], [place] * len(marks), color=colour, alpha=0.3,
                linewidth=5, solid_capstyle="butt")  # fmt: skip
      for m in marks:
        found = Estimate(m["value"], m["low"], m["high"])
        drawing.estimate(axis, place, found, colour, hollow=m["when"] == BEFORE)
    drawing.label(axis, f"Judged by {user}", f"mean final emotion, {POINTS}", grid="x")
    axis.set_xlim(0, 100)
    drawing.rows(axis, [run["name"] for run in runs])
  drawing.legend(figure, HALVES)
  return figure


def gains(before: Sequence[Dialogue], after: Sequence[Dialogue]) -> Figure:
  """Every held-out scenario's final emotion before and after, in the order of the change.

  Those in which a user failed are left out; UserError where that leaves nothing.
  """
  found = heldout.gains(before, after)
  order = sorted((gain, i) for i, gain in enumerate(found) if gain is not None)
  _expect(order)
  figure, (axis,) = drawing.side_by_side(10, 3.9, 1)
  for place, (gain, i) in enumerate(order):
    ends = before[i].emotion, after[i].emotion
    colour = GREY if gain == 0 else GREEN if gain > 0 else RED
    axis.plot([place, place], ends, color=colour, linewidth=1.6)
    axis.plot(place, ends[0], "o", color=GREY, **HOLLOW | {"markersize": 6})
    axis.plot(place, ends[1], "o", color=colour, markersize=6, zorder=6)
  x = "held-out scenarios, from the largest loss to the largest gain"
  drawing.label(axis, "Final emotion, scenario by scenario", x, POINTS, grid="y")
  axis.set_ylim(*drawing.emotions(axis.dataLim.y0))
  axis.set_xticks([])
  ends = drawing.full(GREEN, "after training, higher"), drawing.full(RED, "after training, lower")
  drawing.legend(figure, [HALVES[0], *ends])
  return figure


def differences(found: Sequence[Difference]) -> Figure:
  """The differences between pairs of runs, before training and after: a chart for each user."""
  _expect(found)
  users = list(dict.fromkeys(d.user for d in found))
  pairs = list(dict.fromkeys((d.one, d.other) for d in found))
  figure, axes = drawing.side_by_side(10.6, 0.5 * len(pairs) + 1.8, len(users))
  for axis, user in zip(axes, users, strict=True):
    axis.axvline(0, color=GREY, linewidth=1)
    for d in (d for d in found if d.user == user):
      before = d.when == BEFORE
      place = pairs.index((d.one, d.other)) + (-0.13 if before else 0.13)
      drawing.estimate(axis, place, d.found, BLUE, hollow=before)
    x = "difference of final emotion, points"
    drawing.label(axis, f"Judged by {heldout.label(user)}", x, grid="x")
    drawing.rows(axis, [f"{one} − {other}" for one, other in pairs])
  names = drawing.hollow(BLUE, "before training"), drawing.full(BLUE, "after training")
  drawing.legend(figure, names)
  return figure


def capabilities(found: Mapping[str, Mapping[str, Estimate | None]]) -> Figure:
  """The marks of each policy, by its name, as `comparison.capabilities` finds them."""
  _expect(found)
  names = list(next(iter(found.values())))
  figure, (axis,) = drawing.side_by_side(9, 0.55 * len(names) + 1.7, 1)
  for number, marks in enumerate(found.values()):
    apart = 0.16 * (number - (len(found) - 1) / 2)
    for place, name in enumerate(names):
      drawing.estimate(axis, place + apart, marks[name], drawing.colour(number))
  x = f"mean mark of a dialogue, {LEAST} to {MOST}"
  drawing.label(axis, "Core capabilities, by word lists", x, grid="x")
  axis.set_xlim(LEAST - 0.1, MOST + 0.1)
  drawing.rows(axis, [name.replace("_", " ") for name in names])
  drawing.legend(figure, drawing.named(list(found)))
  return figure


def strategies(
  found: Mapping[str, Mapping[str, float]], colours: Sequence[str] = COLOURS
) -> Figure:
  """The share of replies with each strategy, by a name, as `comparison.strategies` finds them.

  colours: of the names, for instance `TIMES` for before and after training.
  """
  _expect(found)
  names = list(next(iter(found.values())))
  figure, (axis,) = drawing.side_by_side(9, 0.36 * len(names) + 1.7, 1)
  height = 0.8 / len(found)
  named = dict(zip(found, itertools.cycle(colours), strict=False))
  for number, (name, shares) in enumerate(found.items()):
    places = np.arange(len(names)) + height * (number - (len(found) - 1) / 2)
    values = [shares[strategy] for strategy in names]
    axis.barh(places, values, 0.9 * height, color=named[name])
  drawing.label(axis, "Strategies in the replies, by word lists", "share of replies", grid="x")
  axis.set_xlim(left=0)
  drawing.rows(axis, names)
  drawing.legend(figure, [drawing.full(colour, name) for name, colour in named.items()])
  return figure


def _names(runs: Mapping[int, dict[str, Any]]) -> list[Line2D]:
  return [drawing.line(drawing.colour(number), run["name"]) for number, run in runs.items()]


def _users(content: dict[str, Any]) -> dict[str, str]:
  """The kinds of user that judged held-out dialogues, each with its mark."""
  found = [mark["user"] for run in content["runs"] for mark in run["marks"].get(FINAL, [])]
  return dict(zip(dict.fromkeys(found), MARKS, strict=False))


def _expect(found: Any) -> None:
  if not found:
    raise UserError("there is nothing to draw, expected runs with held-out dialogues.")
