"""Exporting a checkpoint's policy: what transformers loads is what was trained."""

import json

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy
import subprocesses

from rlver_jax import cli, export, trainables
from rlver_jax.errors import UserError
from rlver_jax.models import hub, source, weights
from rlver_jax.partitioning import make_mesh

SETTINGS = runs.config(**{"checkpoint.every": 1, "checkpoint.keep": 4})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The folder of a run of four steps with all its checkpoints."""
  folder = tmp_path_factory.mktemp("run")
  runs.play(SETTINGS, folder)
  return folder


def call(workdir, out, step=None, best=False, dtype="bfloat16"):
  return export.export(workdir, out, step, best, dtype)


def refusal(*args, **kwargs) -> str:
  with pytest.raises(UserError) as raised:
    call(*args, **kwargs)
  assert "\n" not in str(raised.value)
  return str(raised.value)


def loaded(directory, dtype="float32"):
  config = hub.read_config(directory, dtype="float32", param_dtype=dtype, remat="none")
  return weights.load(directory, config, make_mesh(1, -1, 1))


def trained(workdir, step=None, settings=SETTINGS):
  """What a checkpoint holds of the policy."""
  return runs.restored(workdir, settings, step)[0].policy.model


def same(a, b) -> bool:
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("which", ["newest", "step", "best"])
def test_the_checkpoint_that_was_asked_for_is_written(workdir, tmp_path, which):
  rewards = {record["step"]: record["reward/mean"] for record in runs.metrics(workdir)}
  step, asked = {
    "newest": (4, {}),
    "step": (1, {"step": 1}),
    "best": (max(rewards, key=lambda step: (rewards[step], step)), {"best": True}),
  }[which]
  out = tmp_path / "deep" / "out"
  assert call(workdir, out, **asked, dtype="float32") == step
  ours = loaded(out)
  for other in (1, 2, 3, 4):
    assert same(ours, trained(workdir, other)) == (other == step)


def test_bfloat16_rounds_and_the_tokenizer_comes_along(workdir, tmp_path):
  call(workdir, tmp_path / "out")
  rounded = jax.tree.map(lambda x: x.astype("bfloat16"), trained(workdir))
  assert same(loaded(tmp_path / "out", "bfloat16"), rounded)
  tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  embedded = runs.REPOSITORY / "rlver_jax" / "assets" / "tiny"
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    assert (tmp_path / "out" / name).read_bytes() == (embedded / name).read_bytes()


@pytest.mark.slow
def test_transformers_loads_the_same_weights_and_tokenizer(workdir, tmp_path):
  torch = pytest.importorskip("torch", reason="transformers loads models with PyTorch")
  import transformers

  out = tmp_path / "out"
  call(workdir, out, dtype="float32")
  model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
  ours = trained(workdir)
  theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  np.testing.assert_array_equal(theirs["model.embed_tokens.weight"], ours.embed[...])
  np.testing.assert_array_equal(theirs["model.norm.weight"], ours.norm[...])
  for layer in range(2):
    q = np.asarray(ours.layers.q[...][layer])  # [width, heads, head]
    expected = q.reshape(q.shape[0], -1).T
    np.testing.assert_array_equal(theirs[f"model.layers.{layer}.self_attn.q_proj.weight"], expected)
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  chat = [{"role": "user", "content": "I lost my keys."}]
  ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
  ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
  with torch.no_grad():
    logits = model(ids).logits[0].numpy()
  assert np.isfinite(logits).all()


def test_the_written_policy_can_be_trained_further(workdir, tmp_path):
  call(workdir, tmp_path / "out", dtype="float32")
  settings = runs.config(**{"policy.path": str(tmp_path / "out")})
  sources = runs.open_sources(settings)
  assert not sources.policy.drawn


ADAPTED = ("q", "o", "down")


@pytest.mark.slow
def test_adapters_are_written_as_the_weights_that_they_make(tmp_path):
  """W + alpha / rank * A B for each adapted map, whose axes are flattened to a matrix here."""
  settings = runs.config(
    **{"steps": 1, "lora.policy_rank": 3, "lora.alpha": 6.0, "lora.targets": ADAPTED}
  )
  runs.play(settings, tmp_path / "run")
  assert call(tmp_path / "run", tmp_path / "out", dtype="float32") == 1
  opened = source.open_source("tiny", "policy.path", dtype="float32", param_dtype="float32")
  base = source.load_model(opened, make_mesh(1, -1, 1), settings.seed + trainables.POLICY_WEIGHTS)
  adapters, ours = trained(tmp_path / "run", settings=settings), loaded(tmp_path / "out")
  assert set(adapters) == set(ADAPTED)
  runs.assert_merged(ours, base, adapters)
  np.testing.assert_array_equal(ours.embed[...], base.embed[...])


def test_reading_leaves_the_run_as_it_is(workdir, tmp_path):
  def files():
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}

  before = files()
  call(workdir, tmp_path / "out")
  assert files() == before


def test_what_cannot_be_exported_is_named(workdir, tmp_path):
  out = tmp_path / "out"
  assert refusal(workdir, out, step=7).endswith("steps: 1, 2, 3, 4; expected one of step 7.")
  assert refusal(tmp_path / "none", out) == (
    f"{tmp_path}/none/config.json cannot be read (No such file or directory), expected the folder "
    "of a run."
  )
  fresh = tmp_path / "fresh"
  runs.claim(str(fresh), SETTINGS)
  assert "checkpoints of steps: none; expected a checkpoint" in refusal(fresh, out)
  assert "checkpoints of steps: none; expected a checkpoint" in refusal(fresh, out, best=True)
  (fresh / "config.json").write_text("[1]")
  assert refusal(fresh, out).startswith(f"{fresh}/config.json is not the configuration of a run")
  (fresh / "config.json").write_text("{}")
  assert refusal(fresh, out).startswith(
    f"{fresh}/config.json: algorithm.advantage is missing, expected "
  )
  assert not out.exists()


def test_a_place_that_is_taken_is_left_alone(workdir, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("x")
  assert refusal(workdir, tmp_path / "out").startswith(
    f"--out is {tmp_path}/out, which holds files"
  )
  assert refusal(workdir, tmp_path / "out" / "mine").startswith(f"--out is {tmp_path}/out/mine")
  below = tmp_path / "out" / "mine" / "deep"
  assert refusal(workdir, below).startswith(f"{below} cannot be created (Not a directory)")
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ([], "--workdir or --out is missing"),
    (["--workdir=runs/x"], "--workdir or --out is missing"),
    (["--workdir=a", "--out=b", "--best", "--step=2"], "--best is given with --step=2"),
    (["--workdir=a", "--out=b", "--dtype=int8"], "flag --dtype=int8"),
    (["--workdir=a", "--out=b", "--step=last"], "flag --step=last"),
    (["--workdir=/none", "--out=b"], "/none/config.json cannot be read"),
  ],
)
def test_a_wrong_flag_is_named(command, arguments, expected):
  code, out, err = command(*arguments, run=lambda: cli.run(export.main))
  assert (code, out) == (2, "")
  assert err.startswith("rlver_jax: ") and err.count("\n") == 1, err
  assert expected in err


def test_the_command_writes_and_says_so(workdir, tmp_path):
  words = [f"--workdir={workdir}", f"--out={tmp_path}/out", "--best"]
  done = subprocesses.finished("-m", "rlver_jax.export", *words)
  assert (done.returncode, done.stderr) == (0, "")
  rewards = {record["step"]: record["reward/mean"] for record in runs.metrics(workdir)}
  best = max(rewards, key=lambda step: (rewards[step], step))
  assert done.stdout == f"Wrote the policy of step {best} to {tmp_path}/out.\n"
