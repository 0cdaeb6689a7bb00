"""The figures of notebooks: what is drawn is what was counted, and each is a whole picture."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_closing import played
from test_page import SCENARIOS, benchmark_run, made, training_run

from rlver_jax.curves import BLUE, COLOURS, GREY, RED
from rlver_jax.errors import UserError
from rlver_jax.evaluation.fidelity import Replayed
from rlver_jax.page import agreement, comparison, figures
from rlver_jax.page.statistics import Estimate

REPLAYED = {
  "first": [Replayed((3, -4), (3, -1), 0, 9, 60, 65), Replayed((3,), (5,), 0, 9, 33, 35)],
  "a$b$": [Replayed((8, 1), (8, None), 0, 9, 70, 70)],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  return made(training_run(folder / "_a$x$"), training_run(folder / "other", steps=2))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  return made(training_run(tmp_path_factory.mktemp("runs") / "mine"))


def drawn(figure):
  """It is a picture without a warning; the x and y of the lines of each chart."""
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    figure.savefig(file := io.BytesIO(), format="png")
  assert len(file.getvalue()) > 5000
  return [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]


def colours(axis):
  return [to_hex(line.get_color()) for line in axis.lines]


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_have_a_line_for_each_run_in_its_colour(page):
  figure = figures.curves(page, ["Final emotion", "Success"])
  emotion, success = drawn(figure)
  for line, run in zip(emotion, page["runs"], strict=True):
    assert line == [point[:2] for point in run["curves"]["emotion/final_mean"]]
  assert [y for line in success for _, y in line] == [0.0] * 5
  assert legend(figure) == [r"_a\$x\$", "other"]
  assert colours(figure.axes[0]) == [BLUE, RED]
  alone = figures.curves(page, ["Final emotion"], ["other"])
  assert len(drawn(alone)[0]) == 1 + 4 and colours(alone.axes[0])[0] == RED
  with pytest.raises(UserError, match="have no such curve"):
    figures.curves(page, ["Loss"])


def test_curves_of_one_run_have_the_held_out_dialogues_as_marks(single):
  figure = figures.curves(single)
  panels = drawn(figure)
  assert len(panels) == len(single["panels"])
  assert panels[0][1:] == [
    [[mark["step"], mark["value"]]] for mark in single["runs"][0]["marks"]["emotion/final_mean"]
  ]
  bands = figure.axes[0].collections[0].get_paths()[0].vertices
  lows = [low for _, _, low, _ in single["runs"][0]["curves"]["emotion/final_mean"]]
  assert bands[:, 1].min() == pytest.approx(min(lows))


def test_trajectories_of_before_and_after(single, page):
  figure = figures.trajectories(single)
  own, scripted = drawn(figure)
  before, after = single["trajectories"][0]["lines"]
  assert own == [[[i, p[0]] for i, p in enumerate(x["points"])] for x in (before, after)]
  assert len(scripted) == 2 and colours(figure.axes[0]) == [GREY, BLUE]
  assert [axis.get_title(loc="left") for axis in figure.axes] == [
    "Judged by language model", "Judged by scripted user"
  ]  # fmt: skip
  assert colours(figures.trajectories(page).axes[0]) == [BLUE, BLUE, RED, RED]


def test_held_out_means_stand_in_the_rows_of_their_runs(page):
  figure = figures.held_out(page)
  own, scripted = drawn(figure)
  marks = [line[0] for line in own if len(line) == 1]
  assert marks == [[30, 0], [53, 0], [30, 1], [53, 1]]
  assert len(scripted) == len(own)
  assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [r"_a\$x\$", "other"]
  assert figure.axes[0].yaxis_inverted()


def test_figures_of_dialogues_ask_for_them(tmp_path):
  benchmark = made(benchmark_run(tmp_path / "run"))
  for call in (figures.trajectories, figures.held_out, figures.differences, figures.strategies):
    with pytest.raises(UserError, match="there is nothing to draw"):
      call(benchmark if call in (figures.trajectories, figures.held_out) else {})
  failed = [played(SCENARIOS[0], 0)]
  with pytest.raises(UserError, match="there is nothing to draw"):
    figures.gains(failed, failed)


def test_scenarios_in_the_order_of_their_gains():
  sides = [[(5,), (-9,), (2,), ()], [(9,), (-10,), (2,), (3,)]]
  before, after = (
    [played(s, i, *c) for i, (s, c) in enumerate(zip(SCENARIOS, side, strict=False))]
    for side in sides
  )
  figure = figures.gains(before, after)
  (lines,) = drawn(figure)
  assert [line[0][1] for line in lines[1::3]] == [21, 32, 35]
  assert [line[0][1] for line in lines[2::3]] == [20, 32, 39]


def test_a_final_emotion_below_zero_is_within_the_axis():
  before, after = [played(SCENARIOS[0], 0, -10, -10, -9, -10)], [played(SCENARIOS[0], 0, 5)]
  assert before[0].emotion == -9
  (axis,) = figures.gains(before, after).axes
  assert axis.get_ylim()[0] < -9 - 1


def test_differences_are_drawn_with_their_intervals():
  found = [
    comparison.Difference("one", "two", "scripted", when, 3, Estimate(value, value - 1, value + 2))
    for when, value in (("before", 0.5), ("after", 7.0))
  ]
  (lines,) = drawn(figures.differences(found))
  marks = [line[0] for line in lines if len(line) == 1]
  assert [x for x, _ in marks] == [0.5, 7.0] and -0.5 < marks[0][1] < 0 < marks[1][1] < 0.5
  assert [x for x, _ in lines[1]] == [-0.5, 2.5]


def test_marks_and_shares_of_policies():
  found = {"one": {"depth": Estimate(3.5, 3, 4), "style": None}}
  (lines,) = drawn(figures.capabilities(found | {"two": found["one"]}))
  assert [line[0][0] for line in lines if len(line) == 1] == [3.5, 3.5]
  shares = {f"{i}": {"invite": i / 20, "advice": 0.1} for i in range(10)}
  figure = figures.strategies(shares)
  drawn(figure)
  assert [bar.get_width() for bar in figure.axes[0].patches[::2]] == [i / 20 for i in range(10)]
  assert len(legend(figure)) == 10
  assert to_hex(figure.axes[0].patches[16].get_facecolor()) == COLOURS[0]


def test_agreement_of_changes():
  figure = agreement.changes(REPLAYED)
  drawn(figure)
  first = np.ma.filled(figure.axes[0].images[0].get_array(), 0)
  assert first.sum() == 3 and first[13, 13] == first[9, 6] == first[15, 13] == 1  # found, recorded
  assert figure.axes[1].get_title(loc="left") == r"a\$b\$"


def test_agreement_by_recorded_change_and_of_final_emotions():
  first, second = drawn(agreement.by_recorded(REPLAYED))
  assert [line[0] for line in first if len(line) == 1] == [[-4, -1], [3, 4]]
  assert [line[0] for line in second if len(line) == 1] == [[8, 8]]
  (lines,) = drawn(agreement.finals(REPLAYED))
  assert lines[1] == [[60, 65], [33, 35]] and lines[2] == [[46.5, 50]] and lines[3] == []
