"""The device mesh, and the table that says how every array lies on it.

Mesh axes: `data` (copies of the model, different rows), `fsdp` (rows, and parameters cut
along the model width), `tensor` (heads, feed-forward and vocabulary). A logical axis that a
mesh axis does not divide is left whole, so a model with 2 key/value heads runs on tensor=4.

Training and sampling lay the same model out differently. A training step reads many tokens for
each weight, so rows stay where they are and a layer's weights are gathered for them. A decoding
step reads one token a row, so weights stay where they are, cut along their outputs or heads by
all of `fsdp` and `tensor`, and the few activations travel.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlver_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES = {
  "batch": ("data", "fsdp"),  # rows of a batch, slots of a cache
  "stream": ("data", "fsdp"),  # rows between the sublayers of the model
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
  "rank": (),  # of low-rank adapters
  "head": (),
  "layers": (),
  "length": (),
  "whole": (),
}

# What sampling does otherwise: nothing of a model is gathered, rows are apart in attention alone.
SAMPLING_RULES = RULES | {
  "stream": ("data",),
  "embed": (),
  "vocab": ("tensor", "fsdp"),
  "mlp": ("tensor", "fsdp"),
  "head": ("fsdp",),
}

_rules: contextvars.ContextVar[dict] = contextvars.ContextVar("rules", default=RULES)


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
  return _product(mesh, RULES["batch"])


def sharding(
  mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...], rules: dict = RULES
) -> NamedSharding:
  """The sharding of an array of `shape` whose dimensions have the logical names `axes`."""
  spec = []
  for size, axis in zip(shape, axes, strict=True):
    names = tuple(n for n in rules[axis] if mesh.shape[n] > 1)
    spec.append(names if names and size % _product(mesh, names) == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def divides(mesh: Mesh, size: int, axis: str) -> bool:
  """Whether the mesh cuts a dimension of this size and logical name into equal pieces."""
  return size % _product(mesh, RULES[axis]) == 0


def _product(mesh: Mesh, names: tuple[str, ...]) -> int:
  return int(np.prod([mesh.shape[n] for n in names]))


@contextlib.contextmanager
def layout(mesh: Mesh, rules: dict = RULES) -> Iterator[None]:
  """Functions traced inside lay their arrays out on this mesh by these rules."""
  token = _rules.set(rules)
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _rules.reset(token)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Inside a jitted function: `x` laid out by the logical names of its dimensions.

  Mesh and rules are those of the `layout` in which the function is traced; without one, or on
  one device, `x` is returned as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return x
  return jax.lax.with_sharding_constraint(x, sharding(mesh, x.shape, axes, _rules.get()))


def constrain_model(tree: Any) -> Any:
  """As `constrain`, for a model or a tree of its gradients: laid out as its parameters are."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, model_shardings(mesh, tree))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def model_shardings(mesh: Mesh, tree: Any, rules: dict = RULES) -> Any:
  """Shardings of a model or of a state that holds models (gradients, moments), abstract or not.

  Parameters are laid out by their `axes` metadata, a leading axis beyond it being the layers;
  every other array is replicated. Returns the tree with NamedShardings for leaves.
  """

  def one(leaf):
    if not isinstance(leaf, nnx.Variable):
      return replicated(mesh)
    axes, shape = leaf.get_metadata("axes"), leaf.get_value().shape
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    return leaf.replace(sharding(mesh, shape, axes, rules))

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def for_sampling(mesh: Mesh, model: Any, dtype: str) -> Any:
  """A copy of `model` in `dtype`, laid out for sampling.

  Arrays that are so already are shared, so that a float32 model on a CPU is not held twice.
  """

  def one(x, where):
    x = x if x.dtype == dtype else x.astype(dtype)
    return x if x.sharding.is_equivalent_to(where, x.ndim) else jax.device_put(x, where)

  # Array by array: casts and moves that are compiled once for all steps.
  return jax.tree.map(one, model, model_shardings(mesh, model, SAMPLING_RULES))


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
