"""The curves of a run: what is drawn is what was measured, and the file is a whole picture."""

import math
import warnings

import numpy as np
import pytest
from matplotlib import image

from rlver_jax import curves

METRICS = [metric for *_, lines in curves.PANELS for metric, *_ in lines]
FOUND = {"final_emotion": 40.0, "success": 0.5, "failure": 0.1, "matched": 0.2, "distinct_2": 0.7}


def records(steps: int) -> list[dict]:
  """Each metric's value is its place in METRICS and the step's share of all."""
  return [
    {"step": step, **{name: i + step / steps for i, name in enumerate(METRICS)}}
    for step in range(1, steps + 1)
  ]


def drawn(figure) -> list[list[tuple[list, list]]]:
  """The x and y of each line of each panel."""
  return [[(list(x.get_xdata()), list(x.get_ydata())) for x in a.lines] for a in figure.axes]


def test_each_metric_is_drawn_step_by_step_and_a_gap_stays_a_gap():
  lines = records(5)
  lines[2][METRICS[0]] = None
  del lines[3][METRICS[1]]
  panels = drawn(curves.make_figure(lines, {}))
  assert [len(panel) for panel in panels] == [1, 2, 1, 1, 1, 1]
  for i, (x, y) in enumerate(line for panel in panels for line in panel):
    expected = [i + step / 5 for step in range(1, 6)]
    if i < 2:
      expected[2 + i] = math.nan
    np.testing.assert_allclose(y, expected)
    assert x == [1, 2, 3, 4, 5]


def test_held_out_dialogues_are_marks_before_the_first_and_after_the_last_step():
  numbers = {"scripted": {"before": FOUND, "after": FOUND | {"final_emotion": 60.0}}}
  panels = drawn(curves.make_figure(records(5), numbers))
  assert panels[0][1:] == [([0], [40.0]), ([5], [60.0])]
  assert panels[1][1:3] == [([0], [0.5]), ([5], [0.5])]
  assert [len(panel) for panel in panels] == [3, 6, 3, 3, 3, 3]
  assert all(math.isnan(y[0]) for _, y in panels[3][1:])  # nobody measures the entropy there


def test_many_steps_get_a_running_mean():
  (_, faint), (_, smooth) = drawn(curves.make_figure(records(60), {}))[0]
  np.testing.assert_allclose(faint, [step / 60 for step in range(1, 61)])
  np.testing.assert_allclose(smooth[3:-3], faint[3:-3])  # of a straight line
  assert smooth[0] == pytest.approx(np.mean(faint[:4]))


@pytest.mark.parametrize("steps", [0, 1, 50])
def test_the_file_is_a_picture_even_of_little_or_nothing(tmp_path, steps):
  nothing = {"scripted": {"after": dict.fromkeys(FOUND)}}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    curves.draw(records(steps), nothing, tmp_path / "curves.png")
  pixels = image.imread(tmp_path / "curves.png")
  assert pixels.shape[0] > 600 and pixels.shape[1] > 1000 and pixels.std() > 0.01
  assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
  curves.draw(records(3), {}, tmp_path / "curves.png")
  before = (tmp_path / "curves.png").read_bytes()
  blocked = tmp_path / ".curves.png.tmp"
  blocked.mkdir()
  with pytest.raises(OSError):
    curves.draw(records(4), {}, tmp_path / "curves.png")
  assert (tmp_path / "curves.png").read_bytes() == before
