"""The main job on real Qwen2.5-0.5B weights, as policy and as simulated user."""

import json
import pathlib
import resource
import subprocess
import sys

import pytest


def run_steps(
  algorithm: str, steps: int, workdir: pathlib.Path, qwen_path: pathlib.Path, **changes
) -> str:
  """Runs the job up to `steps` steps in a process of its own; returns what it printed."""
  overrides = {
    "steps": steps,
    "policy.path": qwen_path,
    "policy.dtype": "float32",
    "simulator.path": qwen_path,
    "simulator.dtype": "float32",
    "simulator.max_plan_tokens": 4,
    "simulator.max_message_tokens": 4,
    "simulator.reparse": 0,
    "simulator.templates": "tiny",  # prompts of a few words, as are the scenarios
    "simulator.cache_length": 1024,
    "data.path": "tiny",
    "dialogue.max_turns": 2,
    "sampling.max_new_tokens": 8,
    "sampling.max_prompt_tokens": 128,
    "sampling.max_response_tokens": 64,
    # One window, one bucket and one row length: few programs to compile.
    "sampling.smallest_window": 1024,
    "sampling.extend_buckets": (128,),
    "training.microbatch": 2,
    "training.smallest_row": 192,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "log.tensorboard": False,
    "compilation_cache": "",  # that of the tests
  } | changes
  flags = [f"--config.{field}={value}" for field, value in overrides.items()]
  command = [
    sys.executable,
    "-m",
    "rlver_jax.main",
    f"--config=configs/{algorithm}.py:qwen2.5-0.5b",
  ]
  done = subprocess.run(
    [*command, f"--workdir={workdir}", *flags], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def read_lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def check_step(workdir: pathlib.Path, steps: list[int]) -> list[dict]:
  """Checks what the run left; returns its metrics."""
  metrics = read_lines(workdir / "metrics.jsonl")
  assert [m["step"] for m in metrics] == steps
  for m in metrics:
    assert m["update/skipped"] == 0
    # The sampler and the trainer see the same policy: their log-probabilities agree.
    assert abs(m["update/kl_sampler"]) < 1e-4
    assert m["update/clip_fraction"] == 0
    assert m["tokens/policy"] > 0
  records = read_lines(workdir / f"dialogues/step_{steps[-1]:06d}.jsonl")
  assert len(records) == 2
  assert all(1 <= len(r["history"]) <= 5 for r in records)
  return metrics


@pytest.mark.qwen
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_steps_on_real_weights_with_a_resume_between(qwen_path, tmp_path):
  groups = {"dialogue.scenarios_per_step": 1, "dialogue.group_size": 2}
  run_steps("grpo", 1, tmp_path, qwen_path, **groups)
  output = run_steps("grpo", 2, tmp_path, qwen_path, **groups)
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kB to GiB
  print(f"\npeak memory {peak:.1f} GiB\n{output}")
  assert "Going on after step 1." in output
  assert peak < 16
  check_step(tmp_path, [1, 2])


@pytest.mark.qwen
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_step_of_ppo_on_real_weights_with_shared_lower_layers(qwen_path, tmp_path):
  """The critic trains four layers of its own, above the policy's twenty lowest."""
  changes = {
    "dialogue.scenarios_per_step": 2,
    "dialogue.max_turns": 1,
    "critic.shared_layers": 20,
    "simulator.kind": "scripted",  # the other test has a model as user
  }
  output = run_steps("ppo", 1, tmp_path, qwen_path, **changes)
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  print(f"\npeak memory {peak:.1f} GiB\n{output}")
  assert peak < 20
  for m in check_step(tmp_path, [1]):
    assert m["critic/skipped"] == 0
    assert m["critic/gradient_norm"] > 0
