"""Metrics: the record on disk, timers, counters, and what is shown."""

import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax import metrics
from rlver_jax.errors import UserError


def lines(workdir: pathlib.Path) -> list[str]:
  return (workdir / metrics.METRICS_FILE).read_text().split("\n")


def write_steps(workdir, records: dict[int, dict]) -> None:
  writer = metrics.MetricsWriter(workdir, logdir_tensorboard=False)
  for step, scalars in records.items():
    writer.write(step, scalars)
  writer.close()


def test_a_line_has_the_step_first_then_sorted_names_and_exact_numbers(tmp_path):
  scalars = {
    "b/x": 0.1 + 0.2,
    "a/count": 3,
    "a/numpy": np.float32(0.1),
    "c/jax": jnp.float32(2.5),
    "c/nan": math.nan,
    "c/inf": -math.inf,
  }
  write_steps(tmp_path, {1: scalars})
  assert lines(tmp_path) == [
    '{"step": 1, "a/count": 3, "a/numpy": 0.10000000149011612, "b/x": 0.30000000000000004, '
    '"c/inf": null, "c/jax": 2.5, "c/nan": null}',
    "",
  ]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, logdir_tensorboard=False)
  for step in (1, 2):
    writer.write(step, {"x": step})
    assert [r["step"] for r in metrics.read_metrics(tmp_path)] == list(range(1, step + 1))
  writer.close()


def test_a_step_that_is_there_is_not_written_again(tmp_path):
  write_steps(tmp_path, {1: {"x": 1}, 2: {"x": 2}})
  writer = metrics.MetricsWriter(tmp_path, logdir_tensorboard=False)
  writer.write(2, {"x": 20})
  writer.write(3, {"x": 3})
  writer.write(3, {"x": 30})
  writer.close()
  assert [(r["step"], r["x"]) for r in metrics.read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3)]


def test_a_line_that_a_kill_cut_short_is_dropped_and_written_again(tmp_path):
  write_steps(tmp_path, {1: {"x": 1}, 2: {"x": 2}})
  file = tmp_path / metrics.METRICS_FILE
  os.truncate(file, file.stat().st_size - 4)
  assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [1]
  write_steps(tmp_path, {2: {"x": 2.5}})
  assert lines(tmp_path) == ['{"step": 1, "x": 1}', '{"step": 2, "x": 2.5}', ""]


def test_truncate_removes_later_steps_and_lets_them_be_written_again(tmp_path):
  write_steps(tmp_path, {step: {"x": step} for step in range(1, 6)})
  writer = metrics.MetricsWriter(tmp_path, logdir_tensorboard=False)
  writer.truncate(3)
  assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [1, 2, 3]
  writer.write(4, {"x": 40})
  writer.close()
  assert [(r["step"], r["x"]) for r in metrics.read_metrics(tmp_path)][-2:] == [(3, 3), (4, 40)]
  assert [path.name for path in tmp_path.iterdir()] == [metrics.METRICS_FILE]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"x": 1}', '{"step": "1"}', "\0\0\0"])
def test_a_foreign_line_is_named(tmp_path, line):
  write_steps(tmp_path, {1: {"x": 1}})
  with (tmp_path / metrics.METRICS_FILE).open("a") as file:
    file.write(line + "\n")
  with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is .*expected a JSON object"):
    metrics.MetricsWriter(tmp_path, logdir_tensorboard=False)


TENSORBOARD = """
  import sys
  from absl import app, logging
  from rlver_jax import metrics

  def main(argv):
    writer = metrics.MetricsWriter(argv[1])
    writer.write(1, {"loss": 0.5, "nan": float("nan")})
    writer.write(2, {"loss": 0.25})
    assert len(metrics.read_metrics(argv[1])) == 2
    assert "clu.metric_writers.summary_writer" not in sys.modules  # nobody waits for the import
    writer.close()
    read_back(argv[1] + "/tensorboard")

  def read_back(logdir):
    import glob, json
    import tensorflow as tf
    [file] = glob.glob(logdir + "/*")
    found = []
    for event in tf.compat.v1.train.summary_iterator(file):
      for value in event.summary.value:
        found.append([event.step, value.tag, str(tf.make_ndarray(value.tensor))])
    print(json.dumps(found))

  logging.set_verbosity(int(sys.argv.pop()))
  app.run(main)
"""


def in_process(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
  kept = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
    env={**kept, "JAX_PLATFORMS": "cpu", **environment},
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_tensorboard_and_the_log_get_every_step_and_the_terminal_no_banner(tmp_path):
  done = in_process(TENSORBOARD, tmp_path, 0)
  assert done.returncode == 0, done.stderr
  logged = [line.split("] ", 1)[1] for line in done.stderr.splitlines()[:2]]
  assert logged == ["[1] loss=0.5, nan=nan", "[2] loss=0.25"]
  assert json.loads(done.stdout) == [[1, "loss", "0.5"], [1, "nan", "nan"], [2, "loss", "0.25"]]
  assert "oneDNN" not in done.stderr and "cpu_feature_guard" not in done.stderr


def test_what_the_background_thread_raised_is_raised(tmp_path, monkeypatch):
  def fail(logdir):
    raise OSError(f"no room in {logdir}")

  monkeypatch.setattr(metrics, "_clu_writer", fail)
  writer = metrics.MetricsWriter(tmp_path)
  with pytest.raises(OSError, match=r"no room in .*tensorboard"):
    writer.close()


def test_the_timer_adds_up_each_stage_until_it_is_taken():
  timer = metrics.StageTimer()
  for _ in range(2):
    with timer("rollout"):
      time.sleep(0.03)
  with pytest.raises(KeyError), timer("update"):
    time.sleep(0.02)
    raise KeyError
  seconds = timer.take()
  assert set(seconds) == {"rollout", "update"}
  assert 0.06 <= seconds["rollout"] < 0.5
  assert 0.02 <= seconds["update"] < 0.5
  assert timer.take() == {}


def test_each_new_shape_is_one_program_and_a_repeated_call_none():
  inputs = [jax.device_put(np.zeros(n, np.float32)) for n in (3, 4, 3, 4)]
  function = jax.jit(lambda x: jnp.sin(x) + 1)
  counter = metrics.CompileCounter()
  counts = []
  for x in inputs:
    function(x).block_until_ready()
    counts.append(counter.count)
  assert counts == [1, 2, 2, 2]
  assert counter.seconds > 0
  assert counter.cached == 0


CACHED = """
  import sys, jax, numpy as np
  from rlver_jax.metrics import CompileCounter
  jax.config.update("jax_compilation_cache_dir", sys.argv[1])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  x = jax.device_put(np.zeros(3, np.float32))
  counter = CompileCounter()
  jax.jit(lambda x: x * 2)(x)
  jax.jit(lambda x: x - 5)(x)
  print(counter.count, counter.cached, counter.seconds > 0)
"""


def test_programs_from_the_persistent_cache_are_counted_apart(tmp_path):
  assert in_process(CACHED, tmp_path).stdout == "2 0 True\n"
  assert in_process(CACHED, tmp_path).stdout == "0 2 False\n"


def test_the_progress_line_shows_what_there_is():
  scalars = {
    "emotion/final_mean": 43.21,
    "reward/mean": 0.4321,
    "emotion/success_rate": 0.125,
    "emotion/failure_rate": 0.0,
    "update/loss": -0.01234,
    "update/clip_fraction": 0.0056,
    "tokens/per_second": 1234.4,
  }
  assert metrics.progress_line(12, 1000, scalars, 3.7) == (
    "step 12/1000 (1:00:56 left)  emotion 43.2  reward 0.43  success 12%  failure 0%  "
    "loss -0.012  clip 0.0056  1,234 tok/s"
  )
  assert (
    metrics.progress_line(5, 5, {"reward/mean": 1}, 9) == "step 5/5 (0:00:00 left)  reward 1.00"
  )


def test_the_progress_line_stays_under_120_columns():
  scalars = dict.fromkeys(
    [
      "emotion/final_mean",
      "reward/mean",
      "emotion/success_rate",
      "emotion/failure_rate",
      "update/loss",
      "update/clip_fraction",
      "tokens/per_second",
    ],
    -1234567.891,
  )
  line = metrics.progress_line(1, 100_000, scalars, 1e4)
  assert len(line) < 120
  assert line.startswith("step 1/100000 (277775:00:00 left)  emotion -1234567.9")


def step_record(emotion: float) -> dict:
  return {
    "emotion/final_mean": emotion,
    "tokens/policy": 100,
    "tokens/simulator": 23,
    "seconds/step": 200.5,
    "seconds/rollout": 150.25,
    "seconds/update": 40.0,
  }


def test_the_summary_averages_tenths_and_adds_up(tmp_path):
  emotions = [13.0, 15.0, *range(20, 36), 60.0, 50.0, 40.0]  # 21 steps: a tenth is 3
  write_steps(tmp_path, {i + 1: step_record(e) for i, e in enumerate(emotions)})
  result = metrics.write_summary(tmp_path, {"preset": "tiny"})
  assert result == {
    "steps": 21,
    "first_emotion": 16.0,
    "last_emotion": 50.0,
    "best_emotion": 60.0,
    "best_step": 19,
    "seconds": 21 * 200.5,
    "tokens": 21 * 123,
    "stage_seconds": {"rollout": 21 * 150.25, "update": 840.0},
    "checkpoints": str(tmp_path / "checkpoints"),
    "preset": "tiny",
  }
  assert json.loads((tmp_path / "summary.json").read_text()) == result
  assert metrics.format_summary(result).splitlines() == [
    "steps        21 in 1:10:10, 2,583 tokens",
    "emotion      first 16.0, last 50.0, best 60.0 at step 19",
    "time         rollout 0:52:35, update 0:14:00",
    f"checkpoints  {tmp_path}/checkpoints",
    "preset       tiny",
  ]


def test_the_summary_of_a_run_without_steps(tmp_path):
  result = metrics.write_summary(tmp_path, {})
  assert (result["steps"], result["first_emotion"], result["best_step"]) == (0, None, None)
  assert "first none, last none, best none" in metrics.format_summary(result)
