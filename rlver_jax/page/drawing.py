"""The parts that the figures of notebooks are put together from, in one look."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlver_jax.curves import COLOURS, HOLLOW, plain
from rlver_jax.dialogue.emotion import MAX_EMOTION
from rlver_jax.page.statistics import Estimate

DPI = 90
BAND = {"alpha": 0.13, "linewidth": 0}  # of an interval along a line


def figure(width: float, height: float) -> Figure:
  """An empty figure of that many inches, light whatever the notebook's theme."""
  return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def side_by_side(width: float, height: float, columns: int) -> tuple[Figure, Sequence[Axes]]:
  """A figure with a row of charts whose y axes are the same."""
  made = figure(width, height)
  return made, list(made.subplots(1, columns, sharey=True, squeeze=False).flat)


def colour(number: int) -> str:
  """The colour of what has this number."""
  return COLOURS[number % len(COLOURS)]


def emotions(lowest: float) -> tuple[float, float]:
  """The limits of an axis of final emotions, which may end below 0 by a last bad turn."""
  return min(lowest, 0) - 4, MAX_EMOTION + 4


def label(axis: Axes, title: str, x: str, y: str = "", grid: str = "both") -> None:
  """Title and names of the axes; grid: both, x or y."""
  axis.set_title(plain(title), loc="left")
  axis.set_xlabel(x)
  axis.set_ylabel(y)
  axis.grid(alpha=0.3, axis=grid)
  axis.set_axisbelow(True)
  axis.spines[["top", "right"]].set_visible(False)


def rows(axis: Axes, names: Sequence[str]) -> None:
  """Names at the left, the first at the top."""
  axis.set_yticks(range(len(names)), [plain(name) for name in names])
  axis.set_ylim(len(names) - 0.4, -0.6)


def estimate(
  axis: Axes, place: float, found: Estimate | None, colour: str, hollow: bool = False
) -> None:
  """A mark in a row with its interval through it; nothing for None."""
  if found is None:
    return
  if found.low is not None:
    axis.plot([found.low, found.high], [place, place], color=colour, linewidth=1.6)
  fill = "white" if hollow else colour
  axis.plot(found.value, place, "o", color=colour, markersize=7, markerfacecolor=fill,
            markeredgewidth=1.6, zorder=5)  # fmt: skip


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
  """Below the charts, what lines and marks are."""
  figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4),
                frameon=False)  # fmt: skip


def line(colour: str, name: str, style: str = "-") -> Line2D:
  """A legend's line."""
  return Line2D([], [], color=colour, linestyle=style, label=plain(name))


def hollow(colour: str, name: str, mark: str = "o") -> Line2D:
  """A legend's hollow mark."""
  return Line2D([], [], color=colour, marker=mark, linestyle="", label=plain(name), **HOLLOW)


def full(colour: str, name: str) -> Line2D:
  """A legend's full mark."""
  return Line2D([], [], color=colour, marker="o", linestyle="", markersize=7, label=plain(name))


def named(names: Sequence[str]) -> list[Line2D]:
  """A legend's full marks, in the order of the colours."""
  return [full(colour(number), name) for number, name in enumerate(names)]
