"""Supervised training: its loss, its runs, and what the command line says of mistakes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from configs import sft as sft_configs
from rlver_jax import config as config_lib
from rlver_jax import export, interrupt, sft, trainables
from rlver_jax.errors import UserError
from rlver_jax.interrupt import Interrupted
from rlver_jax.models import source, weights
from rlver_jax.models.attention import tree_attention
from rlver_jax.partitioning import make_mesh
from rlver_jax.rl.rows import make_packed_rows, pack, row_length
from rlver_jax.workdir import claim

SMALL = {
  "steps": 6,
  "data.templates": "",
  "training.rows": 2,
  "training.microbatch": 1,
  "training.row_length": 128,
  "training.logprob_chunk": 32,
  "optimizer.learning_rate": 0.003,
  "checkpoint.every": 3,
  "evaluation.every": 4,
  "log.every": 2,
  "log.tensorboard": False,
  "compilation_cache": "",
}
METRICS = """compile/from_cache compile/programs compile/seconds rows/fill rows/trained_tokens
  seconds/step sft/loss tokens/per_second update/gradient_norm update/learning_rate
  update/skipped"""


def chat(i: int) -> dict:
  return {
    "messages": [
      {"role": "user", "content": f"I lost key {i} of {7 * i % 10} today."},
      {"role": "assistant", "content": f"Oh no, key {i}? That must hurt."},
    ]
  }


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
  file.write_text("".join(json.dumps(chat(i)) + "\n" for i in range(9)))
  return file


def config(chats, **changes):
  result = sft_configs.get_config("tiny")
  fields = {"data.path": str(chats), "data.held_out": str(chats)}
  result.update_from_flattened_dict(SMALL | fields | changes)
  config_lib.validate(result)
  return result


def run(settings, workdir, interrupts=interrupt.Interrupts):
  with runs.signals_restored():
    sources = sft.open_sources(settings)
    return sft.train_supervised(settings, sources, claim(str(workdir), settings), interrupts())


def weights_of(workdir, out, dtype="float32"):
  export.export(workdir, out, None, False, dtype)
  opened = source.open_source(str(out), "policy.path", dtype="float32", param_dtype="float32")
  return weights.load(opened.directory, opened.config, make_mesh(1, -1, 1))


def same(a, b, tolerance=0.0):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance)


@pytest.fixture(scope="module")
def finished(chats, tmp_path_factory):
  settings, workdir = config(chats), tmp_path_factory.mktemp("sft") / "run"
  return settings, workdir, run(settings, workdir)


def negative_log_likelihood(model, example) -> tuple[float, int]:
  """Of one example in a row of its own, from whole logits in NumPy."""
  ids = [i for segment in example for i in segment.ids]
  mask = [s.logprobs is not None for s in example for _ in s.ids]
  tokens = jnp.array([ids], jnp.int32)
  positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
  hidden, _ = model(tokens, positions, tree_attention(jnp.zeros_like(tokens)))
  logits = np.asarray(hidden[0] @ model.unembedding().T, np.float64)
  top = logits.max(-1, keepdims=True)
  logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
  return -sum(logprobs[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]), sum(mask[1:])


def test_the_loss_of_packed_rows_is_the_mean_over_all_trained_tokens(chats):
  settings = config(chats)
  sources = sft.open_sources(settings)
  model = source.load_model(sources.policy, sources.mesh, 5)
  learner = sft.make_learner(settings, sources)
  found = [negative_log_likelihood(model, example) for example in sources.examples]
  wanted = sum(total for total, _ in found) / sum(count for _, count in found)
  lengths = [row_length(example) for example in sources.examples]
  packed = [[sources.examples[i] for i in row] for row in pack(range(9), lengths, 128)]
  assert max(map(len, packed)) > 1
  rows = learner.place(make_packed_rows(packed, 128))
  assert float(learner.score(learner.init(model), None, rows)) == pytest.approx(wanted, abs=1e-5)


def test_a_run_learns_and_leaves_metrics(finished):
  _, workdir, summary = finished
  lines = runs.metrics(workdir)
  assert [line["step"] for line in lines] == [2, 3, 4, 6]
  for line in lines:
    evaluated = line["step"] in (4, 6)
    extra = {"sft/held_out_loss", "seconds/evaluation"} if evaluated else set()
    stages = {name for name in line if name == "seconds/checkpoint"}
    assert line.keys() - stages == {"step", *METRICS.split()} | extra
    assert line["update/skipped"] == 0 and 0 < line["rows/fill"] <= 1
  assert lines[-1]["sft/held_out_loss"] < lines[0]["sft/loss"] - 0.5
  # Nothing is compiled once the run is under way.
  assert len({line["compile/programs"] + line["compile/from_cache"] for line in lines[1:]}) == 1
  assert summary == json.loads((workdir / "summary.json").read_text())
  assert summary["steps"] == 6 and summary["held_out_loss"] == lines[-1]["sft/held_out_loss"]


@pytest.mark.slow
def test_a_stopped_and_resumed_run_gives_the_same_weights(finished, tmp_path):
  settings, workdir, _ = finished

  class Stops(interrupt.Interrupts):
    """A signal that arrives in the fourth step."""

    calls = 0

    def check(self):
      self.calls += 1
      if self.calls == 4:
        raise Interrupted(15)

  with pytest.raises(Interrupted):
    run(settings, tmp_path / "run", Stops)
  assert [line["step"] for line in runs.metrics(tmp_path / "run")][-1] == 4
  run(settings, tmp_path / "run")
  whole, resumed = (
    weights_of(w, tmp_path / n) for w, n in ((workdir, "a"), (tmp_path / "run", "b"))
  )
  same(whole, resumed, 1e-6)
  steps = [line["step"] for line in runs.metrics(tmp_path / "run")]
  assert steps == sorted(set(steps)) and steps[-1] == 6


def test_an_export_can_be_trained_on(finished, chats, tmp_path):
  _, workdir, _ = finished
  first = weights_of(workdir, tmp_path / "exported")
  changes = {"policy.path": str(tmp_path / "exported"), "policy.from_scratch": False, "steps": 1}
  settings = config(chats, **changes | {"optimizer.learning_rate": 0.0})
  run(settings, tmp_path / "run")
  same(first, weights_of(tmp_path / "run", tmp_path / "again"))


@pytest.mark.slow
def test_adapters_are_trained_and_merged(chats, tmp_path):
  changes = {"lora.policy_rank": 2, "optimizer.learning_rate": 0.02}
  settings = config(chats, **changes)
  summary = run(settings, tmp_path / "run")
  assert summary["held_out_loss"] < summary["first_loss"]
  merged = weights_of(tmp_path / "run", tmp_path / "merged")
  opened = source.open_source(
    "tiny", "policy.path", dtype="float32", param_dtype="float32", from_scratch=True
  )
  base = source.load_model(opened, make_mesh(1, -1, 1), settings.seed + trainables.POLICY_WEIGHTS)
  np.testing.assert_array_equal(merged.embed[...], base.embed[...])
  assert float(jnp.max(jnp.abs(merged.layers.q[...] - base.layers.q[...]))) > 1e-3


def command(workdir, *overrides):
  program = ["-m", "rlver_jax.main", "--config=configs/sft.py", f"--workdir={workdir}"]
  flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
  return subprocess.run(
    [sys.executable, *program, *flags, *overrides],
    cwd=runs.REPOSITORY,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"data.path": ""}, "data.path is empty, expected a file of examples"),
    ({"data.kind": "chats"}, "data.kind is 'chats', expected one of: chat, policy, simulator"),
    ({"data.roles": ("helper",)}, "data.roles is ('helper',), expected some of: system, user"),
    ({"training.microbatch": 3}, "training.microbatch is 3, expected a divisor of training.rows"),
    ({"task": "dpo"}, "task is 'dpo', expected one of: rl, sft"),
  ],
)
def test_values_that_cannot_work_are_told(chats, changes, words):
  with pytest.raises(UserError) as raised:
    config(chats, **changes)
  assert words in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_cannot_work_are_told(chats, finished, tmp_path):
  _, workdir, _ = finished
  cases = {
    f"workdir {workdir} belongs to": lambda: run(config(chats, seed=1), workdir),
    f"{tmp_path}/none": lambda: sft.open_sources(config(tmp_path / "none")),
    "training.row_length is 9000": lambda: sft.open_sources(
      config(chats, **{"training.row_length": 9000})
    ),
  }
  for words, act in cases.items():
    with pytest.raises(UserError, match=words):
      act()


def test_a_run_does_not_go_on_with_other_examples(chats, finished):
  _, workdir, _ = finished
  text = chats.read_text()
  try:
    chats.write_text(text.replace("key 3", "key 33"))
    with pytest.raises(UserError, match=r"data.path is .* which gives other examples than the run"):
      run(config(chats, steps=7), workdir)
  finally:
    chats.write_text(text)


@pytest.mark.slow
def test_the_command_line_ends_with_one_sentence_and_code_2(chats, tmp_path):
  (tmp_path / "broken.jsonl").write_text('{"messages": 3}\n')
  broken = command(tmp_path / "a", f"--config.data.path={tmp_path / 'broken.jsonl'}")
  assert broken.returncode == 2 and broken.stdout == ""
  assert broken.stderr.strip().startswith(f"rlver_jax: {tmp_path / 'broken.jsonl'}, line 1: found")
  assert "\n" not in broken.stderr.strip()
  fine = command(tmp_path / "b", f"--config.data.path={chats}")
  assert fine.returncode == 0, fine.stderr
  assert "step 6/6" in fine.stdout and "loss" in fine.stdout.splitlines()[-2]
