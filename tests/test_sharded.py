"""A rollout and an update on 8 emulated devices against one device, and what each device holds.

The number of devices is fixed when JAX starts, so each mesh has a process of its own, which
runs this file as a script and leaves what it computed in a folder.
"""

import collections
import json
import math
import pathlib
import re
import sys

import numpy as np
import pytest
import subprocesses

ONE, ALL_AXES, FSDP = (1, 1, 1), (2, 2, 2), (1, 8, 1)
B1 = 0.9
REWARDS = (0, 1, 3, 2, 5, 5, 0, 2)
PPO_FIELDS = {
  "algorithm.advantage": "gae",
  "algorithm.whiten": True,
  "algorithm.kl_coef": 0.0,
  "critic.learning_rate": 1e-3,
}
PPO = {
  "shared": {"critic.shared_layers": 1},
  "adapters": {"critic.shared_layers": 0, "lora.policy_rank": 8, "lora.critic_rank": 8},
}
COLLECTIVE = re.compile(
  r" = (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)

pytestmark = pytest.mark.slow


def largest_moves(engine) -> dict[str, int]:
  """Elements of the largest array that moves between devices in a decoding step: within the
  loop over layers, and outside of it."""
  largest = {"layers": 0, "outside": 0}
  for (name, *_), program in engine.programs.compiled.items():
    if name != "decode":
      continue
    for line in program.as_text().splitlines():
      if found := COLLECTIVE.search(line):
        where = "layers" if "while/body/while/body" in line else "outside"
        shapes = re.findall(r"\[([\d,]*)\]", found[1])
        sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
        largest[where] = max(largest[where], *sizes)
  return largest


def learn_ppo(config, experience, changes: dict):
  """Two steps of PPO on the experience from fresh weights: state and metrics."""
  from rlver_jax import trainables
  from rlver_jax.sources import open_sources

  config.update_from_flattened_dict(PPO_FIELDS | changes)
  sources = open_sources(config)
  frozen = trainables.load_frozen(config, sources)
  learner = trainables.make_learner(config, sources)
  state = learner.init(*trainables.fresh(config, sources, frozen))
  for step in range(2):
    state, values = learner.learn(state, frozen, experience, step=step, seed=0)
  return state, values


def work(mesh: tuple[int, int, int], folder: pathlib.Path) -> None:
  """Plays, updates and plays again on a mesh; writes arrays.npz and sizes.json."""
  import jax
  import runs

  from rlver_jax import build as build_lib
  from rlver_jax import config as config_lib
  from rlver_jax.dialogue.rollout import rollout
  from rlver_jax.partitioning import bytes_per_device, for_sampling
  from rlver_jax.rl.prepare import Experience
  from rlver_jax.rl.rows import make_rows, place_rewards, row_length
  from rlver_jax.sources import open_sources

  config = runs.config(**runs.LANGUAGE_MODEL)
  config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
  config.dialogue.update(mode="think", scenarios_per_step=2, group_size=4, max_turns=2)
  config.sampling.update(
    max_new_tokens=6, decode_steps=6, max_prompt_tokens=256, max_response_tokens=128,
    extend_buckets=(64,), smallest_window=4096,
  )  # fmt: skip
  config.simulator.update(max_plan_tokens=6, max_message_tokens=6, cache_length=2048)
  config.training.update(microbatch=8, smallest_row=512, logprob_chunk=512)
  # See tests/test_update.py: the step must not be the sign of a rounding error.
  config.optimizer.update(learning_rate=1e-3, eps=1e-3, b1=B1, warmup_fraction=0.0)
  config.algorithm.kl_coef = 0.1
  config.compilation_cache = ""
  config_lib.validate(config)

  sources = open_sources(config)
  run = build_lib.build(config, sources)
  scenarios = [sources.scenarios[0], sources.scenarios[1]]
  arrays, sizes = {}, {}

  def measure(name, tree):
    total = sum(x.nbytes for x in jax.tree.leaves(tree))
    sizes[name] = {"total": total, "devices": list(bytes_per_device(tree).values())}

  def play(step):
    dialogues = rollout(
      run.policy,
      run.simulator,
      scenarios,
      group_size=4,
      rules=run.rules,
      slots=run.slots,
      step=step,
    )
    segments = [d.segments for d in dialogues]
    rows = make_rows(segments, max(map(row_length, segments)))
    arrays.update({f"rows{step}_{name}": x for name, x in rows._asdict().items()})
    arrays[f"emotions{step}"] = np.array([[t.emotion for t in d.turns] for d in dialogues])
    sizes[f"messages{step}"] = [d.user_messages for d in dialogues]
    return segments

  measure("parameters before", run.state.policy.model)
  measure("moments before", run.state.policy.opt_state)
  measure("reference", run.frozen.reference)
  for name, engine in run.engines():
    measure(f"{name} model", engine.model)
    measure(f"{name} cache", engine._cache)
    measure(f"{name} prefixes", engine._prefixes)

  segments = play(0)
  rows = make_rows(segments, run.row_lengths[0])
  frozen = run.frozen._replace(reference=jax.tree.map(lambda x: 1.05 * x, run.frozen.reference))
  turns = [sum(s.logprobs is not None for s in d) for d in segments]
  rewards = [[0.0] * (n - 1) + [r] for n, r in zip(turns, REWARDS, strict=True)]
  placed = place_rewards(segments, rewards, rows.tokens.shape[1])
  experience = Experience(rows, placed, np.int32([0] * 4 + [1] * 4), np.zeros(8, np.float32))
  batch, *_ = run.learner.prepare(run.state, frozen, experience, step=0, seed=0)
  measure("batch", batch)
  arrays["reference_logprobs"] = np.asarray(batch.reference_logprobs)
  run.state, metrics = run.learner.learn(run.state, frozen, experience, step=0, seed=0)
  measure("parameters after", run.state.policy.model)
  measure("moments after", run.state.policy.opt_state)
  for name, tree in (
    ("parameter", run.state.policy.model),
    ("moment", run.state.policy.opt_state[0].mu),
  ):
    arrays.update({f"{name}_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))})
  arrays.update({name: np.asarray(x) for name, x in metrics.items()})
  for (program, _), compiled in run.learner._compiled.items():
    sizes[f"{program} temporaries"] = compiled.memory_analysis().temp_size_in_bytes

  run.policy.engine.model = for_sampling(sources.mesh, run.state.policy.model, "float32")
  play(1)
  for name, engine in run.engines():
    measure(f"{name} cache after", engine._cache)
    measure(f"{name} prefixes after", engine._prefixes)
  half = for_sampling(sources.mesh, run.state.policy.model, "bfloat16")
  measure("sampling copy", half)
  sizes["moves"] = {name: largest_moves(engine) for name, engine in run.engines()}

  for form, changes in PPO.items():
    state, values = learn_ppo(config, experience, changes)
    arrays.update({f"{form}/{name}": np.asarray(x) for name, x in values.items()})
    for name in ("policy", "critic"):
      trained = getattr(state, name)
      for part, tree in (("parameter", trained.model), ("moment", trained.opt_state[0].mu)):
        found = jax.tree.leaves(tree)
        arrays.update({f"{form}-{name}-{part}_{i}": np.asarray(x) for i, x in enumerate(found)})
    measure(f"{form} critic", state.critic)

  np.savez(folder / "arrays.npz", **arrays)
  (folder / "sizes.json").write_text(json.dumps(sizes))


Result = collections.namedtuple("Result", ["mesh", "arrays", "sizes"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """What the process of a mesh computed; each mesh is run once."""
  done = {}

  def get(mesh):
    if mesh not in done:
      folder = tmp_path_factory.mktemp("x".join(map(str, mesh)))
      subprocesses.emulated(math.prod(mesh), __file__, *mesh, folder)
      arrays = dict(np.load(folder / "arrays.npz"))
      done[mesh] = Result(mesh, arrays, json.loads((folder / "sizes.json").read_text()))
    return done[mesh]

  return get


@pytest.fixture(scope="module")
def one(results):
  return results(ONE)


@pytest.fixture(scope="module", params=[ALL_AXES, FSDP], ids=["2x2x2", "1x8x1"])
def many(results, request):
  return results(request.param)


def test_a_rollout_gives_the_tokens_of_one_device(many, one):
  assert one.arrays["rows0_mask"].sum() >= 8 * 2 * 3  # 8 dialogues of 2 turns, few cut short
  assert len({tuple(row) for row in one.arrays["rows0_tokens"].tolist()}) == 8
  for name in ("tokens", "positions", "branch", "mask"):
    key = f"rows0_{name}"
    np.testing.assert_array_equal(many.arrays[key], one.arrays[key])
  np.testing.assert_allclose(many.arrays["rows0_logprobs"], one.arrays["rows0_logprobs"], atol=1e-4)
  np.testing.assert_array_equal(many.arrays["emotions0"], one.arrays["emotions0"])
  assert many.sizes["messages0"] == one.sizes["messages0"]


def leaves(result, name):
  return [result.arrays[key] for key in sorted(result.arrays) if key.startswith(f"{name}_")]


def test_an_update_gives_the_parameters_and_gradients_of_one_device(many, one):
  keys = ("update/loss", "update/entropy", "update/kl_reference", "update/gradient_norm")
  for key in (*keys, "reference_logprobs"):
    np.testing.assert_allclose(many.arrays[key], one.arrays[key], atol=1e-5, rtol=1e-5)
  assert one.arrays["update/kl_reference"] > 1e-3
  assert one.arrays["update/skipped"] == 0
  for ours, expected in zip(leaves(many, "moment"), leaves(one, "moment"), strict=True):
    np.testing.assert_allclose(ours / (1 - B1), expected / (1 - B1), atol=1e-5)
  for ours, expected in zip(leaves(many, "parameter"), leaves(one, "parameter"), strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("form", PPO)
def test_ppo_gives_the_policy_and_critic_of_one_device(many, one, form):
  for key in ("critic/loss", "critic/explained_variance", "critic/gradient_norm", "update/loss"):
    key = f"{form}/{key}"
    np.testing.assert_allclose(many.arrays[key], one.arrays[key], atol=1e-5, rtol=1e-4)
  assert one.arrays[f"{form}/update/skipped"] == 0
  for model in ("policy", "critic"):
    for part in ("parameter", "moment"):
      ours, expected = (leaves(result, f"{form}-{model}-{part}") for result in (many, one))
      assert any(np.abs(x).max() > 1e-4 for x in expected)
      for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
  _, fsdp, tensor = many.mesh
  total, devices = many.sizes[f"{form} critic"].values()
  assert total == one.sizes[f"{form} critic"]["total"]
  # Adapters are cut along one side only: the rank is whole.
  assert max(devices) < (1.1 / (fsdp * tensor) if form == "shared" else 0.8) * total


def test_the_rollout_after_the_update_gives_the_tokens_of_one_device(many, one):
  assert not np.array_equal(one.arrays["rows1_tokens"], one.arrays["rows0_tokens"])
  np.testing.assert_array_equal(many.arrays["rows1_tokens"], one.arrays["rows1_tokens"])


def test_parameters_and_moments_are_cut_along_fsdp_and_tensor(many, one):
  """All but the norms, the biases (along fsdp) and a counter: 1.3% of the tiny model."""
  names = [f"{part} {when}" for part in ("parameters", "moments") for when in ("before", "after")]
  names += ["reference", "policy model", "simulator model", "sampling copy"]
  _, fsdp, tensor = many.mesh
  for name in names:
    total, devices = many.sizes[name].values()
    assert total == one.sizes[name]["total"], name
    assert len(devices) == 8
    assert max(devices) <= 1.02 * total / (fsdp * tensor), name
  sizes = one.sizes
  assert sizes["moments after"]["total"] == 2 * sizes["parameters after"]["total"] + 8  # counters
  assert sizes["sampling copy"]["total"] == sizes["parameters after"]["total"] // 2


def test_caches_and_batches_are_cut_along_every_axis_that_divides_them(many, one):
  """Slots along data and fsdp, key/value heads along tensor; rows along data and fsdp."""
  data, fsdp, tensor = many.mesh
  for engine in ("policy", "simulator"):
    for name in (f"{engine} cache", f"{engine} prefixes"):
      for when in (name, f"{name} after"):
        total, devices = many.sizes[when].values()
        assert devices == [total // (data * fsdp * tensor)] * 8, when
    assert many.sizes[f"{engine} cache"]["total"] == one.sizes[f"{engine} cache"]["total"]
  total, devices = many.sizes["batch"].values()
  assert total == one.sizes["batch"]["total"]
  assert devices == [total // (data * fsdp)] * 8


def test_decoding_moves_activations_but_no_weights(many):
  """The smallest piece of a matrix, of a key projection, has 128 x 32 elements; the logits of all
  rows are far smaller than the vocabulary's projection."""
  for moves in many.sizes["moves"].values():
    assert 0 < moves["layers"] <= 128 * 32 / 4
    assert 0 < moves["outside"] <= 8 * 2048


def test_activations_are_cut_too(many, one):
  """Every device works on its own rows: the temporaries of 8 devices are those of one."""
  for program in ("policy", "prepare"):
    together = 8 * many.sizes[f"{program} temporaries"]
    assert together <= 1.4 * one.sizes[f"{program} temporaries"], program


if __name__ == "__main__":
  work(tuple(int(size) for size in sys.argv[1:4]), pathlib.Path(sys.argv[4]))
