"""The mesh, and where the table puts an array on it."""

import jax
import numpy as np
import pytest
import subprocesses
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from rlver_jax import partitioning
from rlver_jax.errors import UserError
from rlver_jax.models import weights
from rlver_jax.models.qwen2 import Qwen2Config

MESH = AbstractMesh((2, 2, 2), partitioning.MESH_AXES)


def spec(mesh, shape, *axes):
  return partitioning.sharding(mesh, shape, axes).spec


def test_dimensions_are_cut_by_the_axes_of_the_table():
  assert spec(MESH, (8, 6), "vocab", "embed") == PartitionSpec("tensor", "fsdp")
  assert spec(MESH, (4, 9), "batch", "length") == PartitionSpec(("data", "fsdp"), None)
  assert spec(MESH, (3, 6, 4, 5), "layers", "embed", "heads", "head") == PartitionSpec(
    None, "fsdp", "tensor", None
  )


def test_a_dimension_that_its_axes_do_not_divide_stays_whole():
  mesh = AbstractMesh((1, 3, 4), partitioning.MESH_AXES)
  assert spec(mesh, (6, 2, 5), "embed", "kv_heads", "head") == PartitionSpec("fsdp", None, None)
  assert spec(mesh, (7, 8), "embed", "mlp") == PartitionSpec(None, "tensor")
  assert spec(MESH, (6,), "batch") == PartitionSpec(None)  # 2 * 2 does not divide 6


def test_a_mesh_axis_of_size_one_is_not_named():
  mesh = AbstractMesh((1, 8, 1), partitioning.MESH_AXES)
  assert spec(mesh, (8, 16), "vocab", "embed") == PartitionSpec(None, "fsdp")
  assert spec(mesh, (16, 3), "batch", "length") == PartitionSpec(("fsdp",), None)


def test_a_shape_needs_a_name_for_each_dimension():
  with pytest.raises(ValueError):
    partitioning.sharding(MESH, (2, 3), ("batch",))


def test_batch_shards():
  assert partitioning.batch_shards(MESH) == 4
  assert partitioning.batch_shards(AbstractMesh((1, 3, 2), partitioning.MESH_AXES)) == 3


def test_every_parameter_is_cut_by_what_divides_it():
  """The tiny sizes: all but the norms are cut along the width and along heads or vocabulary."""
  config = Qwen2Config(2048, 128, 384, 2, 4, 2, 32, tie_word_embeddings=True)
  model = weights.abstract_model(config)
  shardings = partitioning.model_shardings(MESH, model)
  specs = {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf.get_value().spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      shardings, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
  }
  f, t = "fsdp", "tensor"
  expected = {
    "embed": (t, f),
    "norm": (None,),
    "layers.attention_norm": (None, None),
    "layers.mlp_norm": (None, None),
    **{f"layers.{name}": (None, f, t, None) for name in "qkv"},
    **{f"layers.{name}_bias": (None, t, None) for name in "qkv"},
    "layers.o": (None, t, None, f),
    "layers.gate": (None, f, t),
    "layers.up": (None, f, t),
    "layers.down": (None, t, f),
  }
  assert specs == {name: PartitionSpec(*axes) for name, axes in expected.items()}


def test_what_is_no_parameter_is_replicated():
  shardings = partitioning.model_shardings(MESH, {"count": jax.ShapeDtypeStruct((4,), np.int32)})
  assert shardings["count"].spec == PartitionSpec()


def test_abstract_keeps_shapes_and_takes_shardings():
  array = np.zeros((4, 2), np.float32)
  where = partitioning.sharding(MESH, array.shape, ("batch", "length"))
  result = partitioning.abstract({"a": array}, {"a": where})["a"]
  assert (result.shape, result.dtype, result.sharding) == ((4, 2), np.float32, where)


def test_constrain_leaves_arrays_alone_without_a_mesh():
  x = np.arange(6.0).reshape(2, 3)
  assert partitioning.constrain(x, "batch", "length") is x
  assert partitioning.constrain_model([x])[0] is x


@pytest.mark.parametrize(
  "sizes", [(2, 1, 1), (1, 0, 1), (-1, -1, 1), (-2, 1, 1), (1, -1, 2), (0, -1, 1), (-1, -1, -1)]
)
def test_sizes_that_do_not_fit_the_devices_are_named(sizes):
  assert jax.device_count() == 1
  with pytest.raises(UserError) as error:
    partitioning.make_mesh(*sizes)
  text = str(error.value)
  assert "data={}, fsdp={}, tensor={}".format(*sizes) in text
  assert "1 available device" in text


def test_one_size_may_be_left_open():
  assert dict(partitioning.make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from rlver_jax import partitioning as p
from rlver_jax.errors import UserError
for sizes in ((2, -1, 2), (-1, 2, 1), (1, 8, 1)):
  print(list(p.make_mesh(*sizes).shape.values()))
for sizes in ((3, -1, 1), (2, 2, 1), (1, 16, 1)):
  try:
    p.make_mesh(*sizes)
  except UserError as error:
    print("8 available" in str(error))
mesh = p.make_mesh(2, 2, 2)
print({str(t) for t in mesh.axis_types})
cut = jax.device_put(jnp.zeros((4, 6), jnp.float32), p.sharding(mesh, (4, 6), ("batch", "mlp")))
whole = jax.device_put(jnp.zeros((5,), jnp.bfloat16), p.replicated(mesh))
print(p.bytes_per_device([cut, {"a": whole}]))

def f(x):
  return p.constrain(x + 1, "batch", "length")

with p.layout(mesh):
  print(jax.jit(f)(jnp.zeros((8, 4))).sharding.shard_shape((8, 4)))
"""


def test_a_mesh_of_eight_devices():
  out = subprocesses.emulated(8, "-c", EIGHT_DEVICES)
  # A device holds 1 of 4 rows and 3 of 6 columns of the first array, in float32, and all 5
  # entries of the second, in bfloat16.
  held = 1 * 3 * 4 + 5 * 2
  assert out.splitlines() == [
    "[2, 2, 2]",
    "[4, 2, 1]",
    "[1, 8, 1]",
    "True",
    "True",
    "True",
    "{'AxisType.Auto'}",
    str(dict.fromkeys(range(8), held)),
    "(2, 4)",  # rows in four
  ]


def test_a_copy_for_sampling_is_in_its_dtype_and_shares_what_is_so_already():
  mesh = partitioning.make_mesh(1, 1, 1)
  model = weights.initialise(Qwen2Config(64, 16, 24, 2, 4, 2, 4), 0, mesh)
  same = partitioning.for_sampling(mesh, model, "float32")
  assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model), strict=True))
  cast = partitioning.for_sampling(mesh, model, "bfloat16")
  for a, b in zip(jax.tree.leaves(cast), jax.tree.leaves(model), strict=True):
    assert (a.dtype, b.dtype) == ("bfloat16", "float32")
    np.testing.assert_array_equal(a, b.astype("bfloat16"))


def test_sampling_cuts_weights_by_what_they_put_out():
  rules = partitioning.SAMPLING_RULES

  def cut(shape, *axes):
    return partitioning.sharding(MESH, shape, axes, rules).spec

  both = ("tensor", "fsdp")
  assert cut((6, 8), "embed", "mlp") == PartitionSpec(None, both)
  assert cut((8, 6), "vocab", "embed") == PartitionSpec(both, None)
  assert cut((6, 4, 2), "embed", "heads", "head") == PartitionSpec(None, "tensor", "fsdp")
  assert cut((4, 3, 6), "stream", "length", "whole") == PartitionSpec("data", None, None)
