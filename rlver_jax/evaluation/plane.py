"""The social-cognition plane as a picture: where files of judged dialogues stand on it."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlver_jax import curves
from rlver_jax.evaluation.judged import Judged, place
from rlver_jax.evaluation.judges.base import AXES, LEAST, MOST

MARKS = "osD^vPX*"
ENDS = (("solution-oriented", "empathy-oriented"), ("structured", "creative"))
SPREAD = 0.3  # most by which a dialogue is moved, so that those in one place are all seen


def draw(by_file: dict[str, Sequence[Judged]], path: str | os.PathLike) -> None:
  """Draws the picture to a PNG file, all or nothing; OSError where it cannot be written."""
  curves.save(make_figure(by_file), path)


def make_figure(by_file: dict[str, Sequence[Judged]]) -> Any:
  """Each file's mean place as a mark, its dialogues faint behind, as a Figure of matplotlib."""
  from matplotlib.figure import Figure  # late: it is needed once, at the end of a run

  figure = Figure(figsize=(7.6, 7.2), dpi=110, layout="constrained")
  axes = figure.subplots()
  middle = (LEAST + MOST) / 2
  axes.axhline(middle, color=curves.GREY, linewidth=0.8, alpha=0.6)
  axes.axvline(middle, color=curves.GREY, linewidth=0.8, alpha=0.6)
  random = np.random.default_rng(0)
  for number, (name, judged) in enumerate(by_file.items()):
    colour, mark = curves.COLOURS[number % len(curves.COLOURS)], MARKS[number % len(MARKS)]
    places = np.array([[one.judgement.plane[axis] for axis in AXES] for one in judged], float)
    x, y = (places + random.uniform(-SPREAD, SPREAD, places.shape)).T
    axes.plot(x, y, mark, color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
    x, y = place(judged).values()
    axes.plot(x, y, mark, color=colour, markersize=12, markeredgecolor="white", zorder=5,
              label=curves.plain(f"{len(judged)} of {name}"))  # fmt: skip
  for (low, high), set_label in zip(ENDS, (axes.set_xlabel, axes.set_ylabel), strict=True):
    set_label(f"←  {low}{' ' * 24}{high}  →")
  axes.set_title("Social-cognition plane", loc="left")
  for limit, set_ticks in ((axes.set_xlim, axes.set_xticks), (axes.set_ylim, axes.set_yticks)):
    limit(LEAST - 0.5, MOST + 0.5)
    set_ticks(range(LEAST, MOST + 1))
  axes.set_aspect("equal")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False,
                title="Means of dialogues")  # fmt: skip
  return figure
