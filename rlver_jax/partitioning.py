"""The device mesh, and the one table that says how every array lies on it.

Mesh axes: `data` (copies of the model, different rows), `fsdp` (rows, and parameters cut
along the model width), `tensor` (heads, feed-forward and vocabulary). A logical axis that a
mesh axis does not divide is left whole, so a model with 2 key/value heads runs on tensor=4.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlver_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES = {
  "batch": ("data", "fsdp"),  # rows of a batch, slots of a cache
  "data_rows": ("data",),  # rows while the fsdp axis cuts another dimension
  "vocab": ("tensor",),
  # The vocabulary projection of log-probabilities: the whole mesh, and a step on the way there.
  "vocab_spread": ("tensor", "fsdp", "data"),
  "vocab_fsdp": ("tensor", "fsdp"),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "norm": (),
  "head": (),
  "layers": (),
  "length": (),
  "whole": (),
}


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
  """A mesh over all devices; a size of -1 (at most one) takes the devices that are left.

  Axis types are Auto: XLA propagates shardings from arguments and constraints.
  Raises UserError when the sizes do not multiply to the number of devices.
  """
  sizes, devices = [data, fsdp, tensor], jax.device_count()
  if sizes.count(-1) == 1:
    rest = -int(np.prod(sizes))
    if rest > 0 and devices % rest == 0:
      sizes[sizes.index(-1)] = devices // rest
  if min(sizes) < 1 or np.prod(sizes) != devices:
    raise UserError(
      f"mesh is data={data}, fsdp={fsdp}, tensor={tensor}, whose product must be the "
      f"{devices} available device(s) (one size may be -1 for the rest)."
    )
  return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
  """How many pieces the batch axis is cut into."""
  return int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding:
  """The sharding of an array of `shape` whose dimensions have the logical names `axes`."""
  spec = []
  for size, axis in zip(shape, axes, strict=True):
    names = tuple(n for n in RULES[axis] if mesh.shape[n] > 1)
    spec.append(names if names and divides(mesh, size, axis) else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def divides(mesh: Mesh, size: int, axis: str) -> bool:
  """Whether the mesh cuts a dimension of this size and logical name into equal pieces."""
  return size % int(np.prod([mesh.shape[n] for n in RULES[axis]])) == 0


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Inside a jitted function: `x` laid out by the logical names of its dimensions.

  The mesh is the one set while the function is traced (`jax.set_mesh`); without one, or on one
  device, `x` is returned as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return x
  return jax.lax.with_sharding_constraint(x, sharding(mesh, x.shape, axes))


def constrain_model(tree: Any) -> Any:
  """As `constrain`, for a model or a tree of its gradients: laid out as its parameters are."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, model_shardings(mesh, tree))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def model_shardings(mesh: Mesh, tree: Any) -> Any:
  """Shardings of a model or of a state that holds models (gradients, moments), abstract or not.

  Parameters are laid out by their `axes` metadata, a leading axis beyond it being the layers;
  every other array is replicated. Returns the tree with NamedShardings for leaves.
  """

  def one(leaf):
    if not isinstance(leaf, nnx.Variable):
      return replicated(mesh)
    axes, shape = leaf.get_metadata("axes"), leaf.get_value().shape
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    return leaf.replace(sharding(mesh, shape, axes))

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract(tree: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs with these shardings in place of the arrays of `tree`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def bytes_per_device(tree: Any) -> dict[int, int]:
  """Bytes that the arrays of `tree` occupy on each addressable device, by device id."""
  total: dict[int, int] = {}
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      total[shard.device.id] = total.get(shard.device.id, 0) + shard.data.nbytes
  return total
