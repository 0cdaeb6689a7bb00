"""The lines that a supervised run writes, from numbers made by hand."""

import numpy as np
import pytest
import runs

from configs import sft
from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.errors import Diverged
from rlver_jax.metrics import CompileCounter
from rlver_jax.rl.rows import make_packed_rows
from rlver_jax.supervised.chats import trained
from rlver_jax.supervised.progress import Progress, summary

EXAMPLE = [Segment((1, 2, 3)), trained((4, 5))]
ROWS = make_packed_rows([[EXAMPLE], [EXAMPLE, EXAMPLE]], 10)  # 15 of 20 positions


@pytest.fixture
def start(tmp_path):
  opened = []

  def call(step=0, nonfinite=0, **changes):
    config = sft.get_config()
    changes = {"steps": 9, "log.tensorboard": False, "training.max_nonfinite": 2} | changes
    config.update_from_flattened_dict(changes)
    opened.append(Progress(config, tmp_path, CompileCounter()))
    opened[-1].start(step, nonfinite)
    return opened[-1]

  yield call
  for progress in opened:
    progress.close()


def numbers(loss, tokens=6, norm=1.0, skipped=0.0):
  values = {"loss": loss, "tokens": tokens, "gradient_norm": norm, "skipped": skipped}
  return {name: np.float32(value) for name, value in values.items()}


def test_a_line_is_about_the_steps_since_the_last_one(start, tmp_path, capsys):
  progress = start()
  progress.add(ROWS, numbers(4.0, 10, 1.0))
  progress.add(ROWS, numbers(1.0, 30, 3.0))
  progress.write(2, {"update/learning_rate": 0.25})
  progress.add(ROWS, numbers(0.5, 8, 2.0))
  progress.write(3, {})
  progress.write(3, {})  # no step since: no line
  first, second = runs.metrics(tmp_path)
  assert (first["step"], second["step"]) == (2, 3)
  assert first["sft/loss"] == (4.0 * 10 + 1.0 * 30) / 40
  assert first["rows/trained_tokens"] == 20 and first["update/gradient_norm"] == 2.0
  assert first["rows/fill"] == 15 / 20 and first["update/learning_rate"] == 0.25
  assert first["tokens/per_second"] * 2 * first["seconds/step"] == pytest.approx(30)
  assert second["sft/loss"] == 0.5 and progress.loss == 0.5
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == 2 and printed[0].startswith("step 2/9 (") and "loss 1.7500" in printed[0]


def test_time_beside_the_steps_does_not_slow_them(start, tmp_path):
  progress = start()
  progress.add(ROWS, numbers(1.0))
  progress.write(1, {"seconds/evaluation": -1000.0})
  (line,) = runs.metrics(tmp_path)
  assert line["tokens/per_second"] == pytest.approx(15 / (line["seconds/step"] + 1000))


def test_updates_that_are_not_finite_are_counted_in_a_row_and_through_lines(start, tmp_path):
  progress = start()
  nan = numbers(float("nan"), norm=float("inf"), skipped=1.0)
  for n in (nan, numbers(1.0), nan):
    progress.add(ROWS, n)
  progress.write(3, {})
  assert progress.nonfinite == 1
  progress.add(ROWS, nan)
  expected = r"^2 updates in a row .* \(training\.max_nonfinite\); .* saved as step 4\.$"
  with pytest.raises(Diverged, match=expected):
    progress.write(4, {})
  lines = runs.metrics(tmp_path)
  assert [line["sft/loss"] for line in lines] == [None, None]
  assert lines[0]["update/skipped"] == pytest.approx(2 / 3)


def test_the_count_goes_on_where_it_was_and_later_lines_are_written_again(start, tmp_path):
  progress = start()
  for step in (1, 2, 3):
    progress.add(ROWS, numbers(float(step)))
    progress.write(step, {})
  progress = start(step=2, nonfinite=1)
  assert [line["step"] for line in runs.metrics(tmp_path)] == [1, 2]
  progress.add(ROWS, numbers(5.0, skipped=1.0))
  with pytest.raises(Diverged):
    progress.write(3, {})
  assert [line["sft/loss"] for line in runs.metrics(tmp_path)] == [1.0, 2.0, 5.0]


def test_a_summary_is_made_of_the_lines(start, tmp_path):
  assert summary(tmp_path)["steps"] == 0 and summary(tmp_path)["last_loss"] is None
  progress = start(**{"data.held_out": "some"})
  held_out = {4: 2.0, 6: 2.5}
  for step in range(1, 7):
    progress.add(ROWS, numbers(7.0 - step))
    if step in (3, 4, 6):
      extra = {"sft/held_out_loss": held_out[step]} if step in held_out else {}
      progress.write(step, extra)
  found, lines = summary(tmp_path), runs.metrics(tmp_path)
  assert (found["steps"], found["first_loss"], found["last_loss"]) == (6, 5.0, 1.5)
  assert (found["held_out_loss"], found["best_held_out_loss"], found["best_step"]) == (2.5, 2.0, 4)
  times = zip((3, 1, 2), lines, strict=True)
  assert found["seconds"] == pytest.approx(sum(n * line["seconds/step"] for n, line in times))
  assert found["tokens"] == 6 * 15
