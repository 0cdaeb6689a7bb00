"""The picture of the plane: each file stands where the mean of its dialogues is."""

import numpy as np
from matplotlib import image

from rlver_jax.evaluation import plane
from rlver_jax.evaluation.judged import Judged
from rlver_jax.evaluation.judges.base import CAPABILITIES, NONE, Judgement


def judged(orientation, form):
  marks = dict.fromkeys(CAPABILITIES, 3)
  places = {"orientation": orientation, "form": form}
  return Judged(Judgement(marks, {}, places, ((),), (NONE,)), {}, (0,), (40,))


def test_files_stand_at_their_means_with_their_dialogues_behind(tmp_path):
  by_file = {"_a$b$": [judged(1, 5), judged(2, 4)], "other": [judged(5, 1)]}
  figure = plane.make_figure(by_file)
  (axes,) = figure.axes
  clouds, marks = axes.lines[2::2], axes.lines[3::2]
  assert [tuple(m.get_xydata()[0]) for m in marks] == [(1.5, 4.5), (5, 1)]
  for cloud, places in zip(clouds, ([(1, 5), (2, 4)], [(5, 1)]), strict=True):
    assert np.abs(cloud.get_xydata() - places).max() <= plane.SPREAD
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [r"2 of _a\$b\$", "1 of other"]
  for text, ends in ((axes.get_xlabel(), plane.ENDS[0]), (axes.get_ylabel(), plane.ENDS[1])):
    assert text.index(ends[0]) < text.index(ends[1])
  plane.draw(by_file, tmp_path / "plane.png")
  assert image.imread(tmp_path / "plane.png").std() > 0.01
  assert [file.name for file in tmp_path.iterdir()] == ["plane.png"]
