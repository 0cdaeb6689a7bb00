"""A supervised update on 8 emulated devices against one device.

The number of devices is fixed when JAX starts, so each mesh has a process of its own, which runs
this file as a script and leaves what it computed in files.
"""

import json
import math
import pathlib
import sys

import numpy as np
import pytest
import subprocesses

ONE, ALL_AXES = (1, 1, 1), (2, 2, 2)
RANKS = (0, 4)  # of adapters; 0: the whole model is trained

pytestmark = pytest.mark.slow


def work(mesh: tuple[int, int, int], folder: pathlib.Path) -> None:
  """What is computed on this mesh; writes rank0.npz and rank4.npz."""
  for rank in RANKS:
    np.savez(folder / f"rank{rank}.npz", **update(mesh, folder, rank))


def update(mesh: tuple[int, int, int], folder: pathlib.Path, rank: int) -> dict[str, np.ndarray]:
  """Of two updates the metrics, the loss before each, and the weights at the end."""
  import jax

  from configs import sft as sft_configs
  from rlver_jax import config as config_lib
  from rlver_jax import sft, trainables
  from rlver_jax.models.lora import Adapted, merge
  from rlver_jax.rl.prepare import Frozen
  from rlver_jax.rl.rows import make_packed_rows, row_length
  from rlver_jax.supervised.examples import stream

  def chat(i):
    answer = {"role": "assistant", "content": f"{i} keys are {i % 3} too many. " * (1 + i % 4)}
    return {"messages": [{"role": "user", "content": f"I lost {i} keys."}, answer]}

  path = folder / "chats.jsonl"
  path.write_text("".join(json.dumps(chat(i)) + "\n" for i in range(20)))
  config = sft_configs.get_config("tiny")
  config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
  config.data.path, config.compilation_cache, config.lora.policy_rank = str(path), "", rank
  config.training.update(rows=8, row_length=256, microbatch=4, logprob_chunk=256)
  # See tests/test_update.py: the step must not be the sign of a rounding error.
  config.optimizer.update(eps=1e-3, warmup_fraction=0.0)
  config_lib.validate(config)
  sources = sft.open_sources(config)
  base = trainables.load_frozen(config, sources).base
  learner = sft.make_learner(config, sources)
  state = learner.init(trainables.fresh(config, sources, Frozen(base))[0])
  examples = sources.examples
  order = stream(list(map(row_length, examples)), 0, 256, 8)
  arrays = {}
  for step in range(2):
    packed = [[examples[i] for i in row] for row in next(order)]
    rows = learner.place(make_packed_rows(packed, 256))
    arrays[f"held_out{step}"] = learner.score(state, base, rows)
    state, numbers = learner.learn(state, base, rows)
    arrays |= {f"{name}{step}": value for name, value in numbers.items()}
  model = state.policy.model if base is None else merge(Adapted(base, state.policy.model))
  arrays |= {f"weight{i}": x for i, x in enumerate(jax.tree.leaves(model))}
  return jax.device_get(arrays)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
  """By mesh and rank, what its process has computed."""
  found = {}
  for mesh in (ONE, ALL_AXES):
    folder = tmp_path_factory.mktemp("mesh")
    subprocesses.emulated(math.prod(mesh), __file__, json.dumps(mesh), folder)
    found |= {(mesh, rank): dict(np.load(folder / f"rank{rank}.npz")) for rank in RANKS}
  return found


@pytest.mark.parametrize("rank", RANKS, ids=["whole", "adapters"])
def test_an_update_on_a_mesh_is_that_of_one_device(computed, rank):
  one, many = (computed[mesh, rank] for mesh in (ONE, ALL_AXES))
  assert one.keys() == many.keys() and one["loss1"] < one["loss0"]
  assert one["held_out0"] == pytest.approx(one["loss0"], abs=1e-5)
  for name, value in one.items():
    np.testing.assert_allclose(many[name], value, atol=2e-5, rtol=2e-5, err_msg=name)


if __name__ == "__main__":
  work(tuple(json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))
