"""How a simulated user's appraisals agree with recorded ones, as figures of matplotlib."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from rlver_jax.curves import BLUE, GREY
from rlver_jax.dialogue.emotion import MAX_CHANGE, MIN_CHANGE
from rlver_jax.evaluation import fidelity
from rlver_jax.evaluation.fidelity import Replayed
from rlver_jax.page import drawing, statistics

ByFile = Mapping[str, Sequence[Replayed]]
CHANGE = f"change of emotion, {MIN_CHANGE} to +{MAX_CHANGE} points"
SAME = drawing.line(GREY, "where both are the same", "--")
_CHANGES = (MIN_CHANGE - 0.5, MAX_CHANGE + 0.5)


def changes(by_file: ByFile) -> Figure:
  """How many turns have each pair of recorded and new change: a chart for each file."""
  figure, axes = drawing.side_by_side(4.8 * len(by_file) + 0.9, 4.9, len(by_file))
  tables = [fidelity.counts(replayed) for replayed in by_file.values()]
  most = max(table.max() for table in tables)
  for axis, name, table in zip(axes, by_file, tables, strict=True):
    shown = np.ma.masked_equal(table.T, 0)
    image = axis.imshow(shown, origin="lower", extent=_CHANGES * 2, cmap="viridis_r",
                        vmin=1, vmax=max(most, 2), zorder=2)  # fmt: skip
    axis.plot(_CHANGES, _CHANGES, "--", color=GREY, linewidth=1, zorder=1)
    y = f"found {CHANGE}" if axis is axes[0] else ""
    drawing.label(axis, name, f"recorded {CHANGE}", y)
  figure.colorbar(image, ax=axes, label="turns", shrink=0.8)
  drawing.legend(figure, [SAME])
  return figure


def by_recorded(by_file: ByFile) -> Figure:
  """The mean new change of the turns with each recorded one, with its 95% interval."""
  figure, axes = drawing.side_by_side(4.8 * len(by_file) + 0.9, 4.2, len(by_file))
  for axis, (name, replayed) in zip(axes, by_file.items(), strict=True):
    axis.plot(_CHANGES, _CHANGES, "--", color=GREY, linewidth=1)
    for recorded, found in fidelity.by_recorded(replayed).items():
      e = statistics.mean(found)
      if e.low is not None:
        axis.plot([recorded, recorded], [e.low, e.high], color=BLUE, linewidth=1.6)
      axis.plot(recorded, e.value, "o", color=BLUE, markersize=6)
    y = f"mean found {CHANGE}" if axis is axes[0] else ""
    drawing.label(axis, name, f"recorded {CHANGE}", y)
    axis.set_xlim(*_CHANGES)
    axis.set_ylim(*_CHANGES)
  drawing.legend(figure, [drawing.full(BLUE, "mean over turns, with its 95% interval"), SAME])
  return figure


def finals(by_file: ByFile) -> Figure:
  """The final emotion of each dialogue as recorded and as found, and their means."""
  figure, (axis,) = drawing.side_by_side(6.4, 6.2, 1)
  axis.axline((0, 0), slope=1, linestyle="--", color=GREY, linewidth=1)
  for number, replayed in enumerate(by_file.values()):
    ends, colour = fidelity.finals(replayed), drawing.colour(number)
    axis.plot(*ends.T, "o", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
    if len(ends):
      axis.plot(*ends.mean(axis=0), "o", color=colour, markersize=12, markeredgecolor="white")
  drawing.label(axis, "Final emotion of each dialogue", "recorded, points, 0 to 100",
                "found, points, 0 to 100")  # fmt: skip
  limits = drawing.emotions(min(axis.dataLim.min))
  axis.set_xlim(*limits)
  axis.set_ylim(*limits)
  axis.set_aspect("equal")
  drawing.legend(figure, [*drawing.named(list(by_file)), SAME])
  return figure
