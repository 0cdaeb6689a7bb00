"""Checkpoints: exact, safe under donation and kills, and clear about what does not fit."""

import os
import pathlib
import random
import signal
import subprocess
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import subprocesses

from rlver_jax.checkpoint import Checkpoints
from rlver_jax.errors import UserError
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config
from rlver_jax.partitioning import model_shardings

CONFIG = Qwen2Config(
  vocab_size=64,
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=4,
  param_dtype="bfloat16",
)


def run_python(code: str, *args: object) -> subprocess.Popen:
  """A Python process of its own, with one device."""
  return subprocesses.emulating(1, "-c", textwrap.dedent(code), *args)


def train_shapes() -> dict:
  def make():
    model = Qwen2(CONFIG, jax.random.key(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(model)
    return {"model": model, "optimizer": optimizer, "step": jnp.int32(7)}

  return jax.eval_shape(make)


def train_state() -> dict:
  """A model and its optimizer state, every leaf filled with numbers of its own."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.array((100 * rng.standard_normal(x.shape)).astype(x.dtype)), train_shapes()
  )


def assert_same(found, expected):
  """Equal structure, and leaves equal in shape, dtype and every bit."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def small(step: int) -> dict:
  """The state that the tests of bookkeeping save at `step`."""
  return {"w": jnp.arange(12.0).reshape(3, 4) + step, "n": jnp.int32(step)}


def save_small(directory, steps, keep=3, reward=lambda step: float(step)) -> Checkpoints:
  checkpoints = Checkpoints(directory, keep)
  for step in steps:
    checkpoints.save(step, small(step), {"position": step}, reward(step))
  checkpoints.wait()
  return checkpoints


def test_model_and_optimizer_come_back_bit_equal_in_the_given_structure(tmp_path):
  state = train_state()
  checkpoints = Checkpoints(tmp_path, keep=2)
  metadata = {"position": [3, 14], "digest": "ab", "nested": {"seed": 5}}
  checkpoints.save(7, state, metadata, reward=0.5)
  restored, found = checkpoints.restore(train_shapes())
  assert_same(restored, state)
  assert found == metadata
  assert restored["model"].config == CONFIG
  assert restored["model"].embed.get_metadata("axes") == ("vocab", "embed")
  checkpoints.close()


def test_a_checkpoint_is_plain_nested_dictionaries_to_orbax(tmp_path):
  state = train_state()
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, state, {}, reward=0.0)
  checkpoints.close()
  plain = ocp.StandardCheckpointer().restore(tmp_path / "1" / "state")
  assert set(plain) == {"model", "optimizer", "step"}
  np.testing.assert_array_equal(plain["model"]["layers"]["q"], state["model"].layers.q[...])
  moments = plain["optimizer"]["1"]["0"]["nu"]
  np.testing.assert_array_equal(moments["embed"], state["optimizer"][1][0].nu.embed[...])


def test_a_part_of_the_state_is_read_alone_when_asked(tmp_path):
  state = train_state()
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, state, {"a": 1}, reward=0.0)
  part = {"model": train_shapes()["model"]}
  with pytest.raises(UserError, match="is in it and not expected"):
    checkpoints.restore(part)
  restored, metadata = checkpoints.restore(part, partial=True)
  assert_same(restored, {"model": state["model"]})
  assert metadata == {"a": 1}
  with pytest.raises(UserError, match="other is missing in it"):
    checkpoints.restore(part | {"other": jnp.zeros(2)}, partial=True)
  checkpoints.close()


def test_numbers_and_numpy_arrays_are_saved_as_they_were(tmp_path):
  counts = np.arange(5, dtype=np.int32)
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, {"counts": counts, "scale": 0.25}, {}, reward=0.0)
  counts += 100
  restored, _ = checkpoints.restore({"counts": jnp.zeros(5, jnp.int32), "scale": jnp.float32(0)})
  np.testing.assert_array_equal(restored["counts"], [0, 1, 2, 3, 4])
  assert float(restored["scale"]) == 0.25
  checkpoints.close()


def test_what_is_written_is_the_state_before_its_buffers_were_donated(tmp_path):
  shapes = [(1 << size,) for size in range(23)]

  @jax.jit
  def make():
    return [jnp.arange(shape[0], dtype=jnp.float32) for shape in shapes]

  overwrite = jax.jit(lambda state: [x * 0 - 1 for x in state], donate_argnums=0)
  overwrite(make())
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step in range(3):
    state = make()
    checkpoints.save(step, state, {}, reward=0.0)
    state = jax.block_until_ready(overwrite(state))
    restored, _ = checkpoints.restore(state)
    for array, shape in zip(restored, shapes, strict=True):
      np.testing.assert_array_equal(array, np.arange(shape[0], dtype=np.float32))
  checkpoints.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
  rewards = {1: 0.2, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.3, 6: 0.4}
  checkpoints = save_small(tmp_path, rewards, keep=2, reward=rewards.get)
  assert (checkpoints.latest(), checkpoints.best()) == (6, 2)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
  again = Checkpoints(tmp_path, keep=2)
  assert (again.latest(), again.best()) == (6, 2)
  for step in (2, 5, 6):
    restored, metadata = again.restore(small(0), step)
    assert_same(restored, small(step))
    assert metadata == {"position": step}
  again.save(7, small(7), {}, reward=0.9)  # as good as 2, and newer
  assert again.best() == 7
  again.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]


def test_a_step_is_not_saved_twice(tmp_path):
  checkpoints = save_small(tmp_path, [1])
  with pytest.raises(ValueError, match="step 1 already exists"):
    checkpoints.save(1, small(2), {}, reward=9.0)
  assert_same(checkpoints.restore(small(0))[0], small(1))
  checkpoints.close()


def test_reading_leaves_a_directory_alone(tmp_path):
  save_small(tmp_path, [1, 2]).close()
  begun = tmp_path / "3.orbax-checkpoint-tmp"
  begun.mkdir()
  reader = Checkpoints(tmp_path, keep=None)
  assert reader.latest() == 2
  assert_same(reader.restore(small(0))[0], small(2))
  reader.close()
  assert begun.exists()
  missing = tmp_path / "missing"
  with pytest.raises(UserError, match=r"missing holds checkpoints of steps: none; expected a "):
    Checkpoints(missing, keep=None).restore(small(0))
  assert not missing.exists()


def test_a_step_that_is_not_there_is_named(tmp_path):
  checkpoints = save_small(tmp_path, [1, 2])
  with pytest.raises(UserError, match=r"steps: 1, 2; expected one of step 5\.$"):
    checkpoints.restore(small(0), step=5)
  checkpoints.close()


@pytest.mark.parametrize(
  ("wanted", "message"),
  [
    ({"w": jnp.zeros((3, 5)), "n": jnp.int32(0)}, r"w is float32\[3, 4\], expected float32\[3, 5"),
    ({"w": jnp.zeros((3, 4)), "n": jnp.float32(0)}, r"n is int32\[\], expected float32\[\]"),
    ({"w": small(0)["w"], "n": jnp.int32(0), "b": {"c": jnp.int32(0)}}, "b/c is missing in it"),
    ({"w": small(0)["w"]}, "n is in it and not expected"),
  ],
)
def test_the_first_difference_from_the_configuration_is_named(tmp_path, wanted, message):
  checkpoints = save_small(tmp_path, [4])
  with pytest.raises(UserError, match=rf"{tmp_path}/4 does not fit.*: {message}"):
    checkpoints.restore(wanted)
  checkpoints.close()


def largest_file(directory: pathlib.Path) -> pathlib.Path:
  files = [path for path in directory.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("part", ["data cut", "data gone", "state gone", "metadata", "tree"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_still_reads(tmp_path, part):
  checkpoints = Checkpoints(tmp_path, keep=3)
  states = {step: {"a": jnp.full((64, 64), step), "b": jnp.full(999, step)} for step in (1, 2)}
  for step, state in states.items():
    checkpoints.save(step, state, {}, reward=0.0)
  checkpoints.close()
  damaged = tmp_path / "2"
  data = largest_file(damaged)
  match part:
    case "data cut":
      os.truncate(data, data.stat().st_size // 2)
    case "data gone":
      data.unlink()
    case "state gone":
      (damaged / "state").rename(tmp_path / "elsewhere")
    case "metadata":
      (damaged / "metadata" / "metadata").write_text("{")
    case "tree":
      (damaged / "state" / "_METADATA").unlink()
  checkpoints = Checkpoints(tmp_path, keep=3)
  with pytest.raises(UserError, match=rf"^Checkpoint {damaged} cannot be read .*move it away"):
    checkpoints.restore(states[2])
  assert_same(checkpoints.restore(states[2], step=1)[0], states[1])
  checkpoints.close()


def test_an_unreadable_reward_is_named_on_opening(tmp_path):
  save_small(tmp_path, [1, 2]).close()
  (tmp_path / "2" / "metrics" / "metrics").write_text("")
  with pytest.raises(UserError, match=rf"^Checkpoint {tmp_path}/2 cannot be read"):
    Checkpoints(tmp_path, keep=3)


def test_an_old_checkpoint_that_a_kill_left_half_deleted_does_no_harm(tmp_path):
  save_small(tmp_path, [1, 2, 3]).close()
  for path in sorted((tmp_path / "1").rglob("*"), reverse=True)[::2]:
    if path.is_file():
      path.unlink()
  (tmp_path / "1" / "metrics" / "metrics").unlink(missing_ok=True)
  checkpoints = Checkpoints(tmp_path, keep=3)
  assert_same(checkpoints.restore(small(0))[0], small(3))
  checkpoints.save(4, small(4), {}, reward=4.0)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


SAVE_FOREVER = """
  import os, pathlib, signal, sys, jax.numpy as jnp
  from rlver_jax.checkpoint import Checkpoints
  directory, size, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  checkpoints = Checkpoints(directory, keep=2)
  step = (checkpoints.latest() or 0) + 1
  while True:
    checkpoints.save(step, {"x": jnp.arange(size) * step}, {"position": step}, step % 5)
    if step == kill_at:
      while not list(pathlib.Path(directory).glob("*.orbax-checkpoint-tmp")):
        pass
      os.kill(os.getpid(), signal.SIGKILL)
    print(step, flush=True)
    step += 1
"""


def test_a_save_that_a_kill_cut_short_is_ignored_and_cleaned_up(tmp_path):
  size = 10_000_000
  child = run_python(SAVE_FOREVER, tmp_path, size, 2)
  child.communicate(timeout=60)
  assert child.returncode == -signal.SIGKILL
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest() == 1
  restored, metadata = checkpoints.restore({"x": jax.ShapeDtypeStruct((size,), jnp.int32)})
  np.testing.assert_array_equal(restored["x"], np.arange(size))
  assert metadata == {"position": 1}
  checkpoints.save(3, {"x": jnp.zeros(3)}, {}, 0.0)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


@pytest.mark.slow
def test_after_kills_at_random_moments_the_newest_checkpoint_is_whole(tmp_path):
  rng, size, latest = random.Random(0), 4000, 0
  for _ in range(5):
    child = run_python(SAVE_FOREVER, tmp_path, size, -1)
    # Some steps, however slow the disk, from what was restored here on.
    first = [int(child.stdout.readline()) for _ in range(rng.randint(2, 4))]
    assert first[0] == latest + 1
    time.sleep(rng.uniform(0.0, 0.3))
    child.kill()
    last_begun = int((child.communicate(timeout=60)[0].split() or first)[-1])
    checkpoints = Checkpoints(tmp_path, keep=2)
    latest = checkpoints.latest() or 0
    # A save begins once the one before is complete, and at most one is begun unannounced.
    assert last_begun - 1 <= latest <= last_begun + 1
    if latest:
      wanted = {"x": jax.ShapeDtypeStruct((size,), jnp.int32)}
      restored, metadata = checkpoints.restore(wanted)
      np.testing.assert_array_equal(restored["x"], np.arange(size) * latest)
      assert metadata == {"position": latest}
    checkpoints.close()
  assert latest > 5


SHARDED = """
  import sys, jax, jax.numpy as jnp, numpy as np, optax
  sys.path.insert(0, "tests")
  import test_checkpoint as t
  from rlver_jax.metrics import CompileCounter
  from rlver_jax.partitioning import bytes_per_device, make_mesh

  expected = jax.tree.map(np.asarray, t.train_state())

  def abstract(mesh):
    return t.abstract_train_state(make_mesh(*mesh))

  def placed(mesh):
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), expected, abstract(mesh))

  destroy = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  state = placed((2, 2, 2))
  assert not state["model"].layers.q[...].is_fully_replicated
  destroy(placed((2, 2, 2)))
  checkpoints = t.Checkpoints(sys.argv[1], keep=1)
  compiles = CompileCounter()
  checkpoints.save(1, state, {}, 0.0)
  assert compiles.count == 0, compiles.count
  state = jax.block_until_ready(destroy(state))
  for mesh in ((2, 2, 2), (1, 8, 1), (1, 2, 4)):
    restored, _ = checkpoints.restore(abstract(mesh))
    t.assert_same(restored, expected)
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract(mesh))):
      assert leaf.sharding == want.sharding, (leaf.sharding, want.sharding)
    assert bytes_per_device(restored) == bytes_per_device(placed(mesh))
  checkpoints.close()
  print("done")
"""


def abstract_train_state(mesh: jax.sharding.Mesh) -> dict:
  """The train state's shapes, with the shardings that training gives them on `mesh`."""
  state = train_shapes()
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def is_model(x):
    return isinstance(x, Qwen2)

  def shardings(x):
    return model_shardings(mesh, x) if is_model(x) else whole

  placed = jax.tree.map(shardings, state, is_leaf=is_model)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
  )


@pytest.mark.slow
def test_a_sharded_state_is_restored_on_other_meshes(tmp_path):
  assert subprocesses.emulated(8, "-c", textwrap.dedent(SHARDED), tmp_path).strip() == "done"


QUIET_AND_LEAN = """
  import pathlib, sys, time, jax, jax.numpy as jnp
  from absl import app
  from rlver_jax.checkpoint import Checkpoints
  from rlver_jax.errors import UserError

  def kilobytes(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field))

  def main(argv):
    make = jax.jit(lambda: [jax.random.bits(jax.random.key(i), (1 << 23,)) for i in range(4)])
    overwrite = jax.jit(lambda state: [x + 1 for x in state], donate_argnums=0)
    checkpoints = Checkpoints(argv[1], keep=1)
    state = jax.block_until_ready(overwrite(make()))
    time.sleep(0.3)
    before = kilobytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # starts the peak, VmHWM, anew
    checkpoints.save(1, state, {}, 0.0)
    state = jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    print((kilobytes("VmHWM") - before) * 1024 / sum(x.nbytes for x in state))
    checkpoints.restore(state)
    many = [jnp.full(1000, i) for i in range(60)]
    checkpoints.save(2, many, {}, 0.0)
    checkpoints.wait()
    for path in pathlib.Path(argv[1], "2", "state", "ocdbt.process_0", "d").iterdir():
      path.unlink()
    try:
      checkpoints.restore(many)
    except UserError as error:
      print(error)
    checkpoints.close()

  app.run(main)
"""


def test_saving_and_failing_are_silent_and_hold_one_more_copy_of_the_state(tmp_path):
  child = run_python(QUIET_AND_LEAN, tmp_path, "--verbosity=0")
  out, err = child.communicate(timeout=120)
  assert child.returncode == 0, err
  copies, message = out.strip().split("\n")
  assert float(copies) < 1.3
  assert message.startswith(f"Checkpoint {tmp_path}/2 cannot be read")
  assert err == ""


DISK_FULL = """
  import resource, signal, sys, jax.numpy as jnp
  from rlver_jax.checkpoint import Checkpoints
  from rlver_jax.errors import UserError
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  checkpoints = Checkpoints(sys.argv[1], keep=2)
  checkpoints.save(1, {"x": jnp.arange(1000)}, {}, 0.0)
  checkpoints.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
  checkpoints.save(2, {"x": jnp.arange(100_000)}, {}, 0.0)
  try:
    checkpoints.wait()
  except UserError as error:
    print(error)
  print(checkpoints.latest())
"""


@pytest.mark.slow
def test_a_save_that_finds_no_room_is_reported_and_costs_nothing_older(tmp_path):
  out, err = run_python(DISK_FULL, tmp_path).communicate(timeout=60)
  message, latest = out.strip().split("\n")
  assert message.startswith(f"Checkpoint directory {tmp_path} could not be written (")
  assert message.endswith("): expected a writable disk with room for the state.")
  assert latest == "1"
  assert "Traceback" not in err
  checkpoints = Checkpoints(tmp_path, keep=2)
  restored, _ = checkpoints.restore({"x": jnp.zeros(1000, jnp.int32)})
  np.testing.assert_array_equal(restored["x"], np.arange(1000))
  checkpoints.close()
