"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) beside the linear maps of a frozen model.

An adapted map is x W + (alpha / rank) (x A) B. A is drawn and B is zero, so that training starts
at the frozen model. Only A and B are trained: they, their gradients and moments are all that an
update holds beside one copy of the frozen weights, which policy and critic may share.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rlver_jax.models.qwen2 import LINEAR, Attention, Qwen2

TARGETS = tuple(LINEAR)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["down", "up"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class Adapter:
  """The pair of one map: down [inputs..., rank] and up [rank, outputs...], with a leading layer
  axis outside the model's scan; scale = alpha / rank."""

  down: nnx.Param
  up: nnx.Param
  scale: float

  def __call__(self, equation: str, x: jax.Array) -> jax.Array:
    """What the adapter adds to the map `equation` (see `LINEAR`) of `x`."""
    a = _axes(equation)
    down, up = (p[...].astype(x.dtype) for p in (self.down, self.up))
    reduced = jnp.einsum(f"{a.argument},{a.inputs}r->btr", x, down)
    return self.scale * jnp.einsum(f"btr,r{a.outputs}->{a.result}", reduced, up)


Adapters = dict[str, Adapter]  # by the name of the map


class _Axes(NamedTuple):
  """Letters of a map's argument, weight and result, and of the weight's inputs and outputs."""

  argument: str
  weight: str
  result: str
  inputs: str
  outputs: str


def _axes(equation: str) -> _Axes:
  arguments, result = equation.split("->")
  argument, weight = arguments.split(",")
  inputs = "".join(a for a in weight if a in argument)
  outputs = "".join(a for a in weight if a not in argument)
  return _Axes(argument, weight, result, inputs, outputs)


def create(
  base: Qwen2, targets: tuple[str, ...], rank: int, alpha: float, key: jax.Array
) -> Adapters:
  """Adapters in float32 for the named maps of `base`, whose arrays may be abstract."""
  layers = base.config.num_hidden_layers

  def adapter(name: str, key: jax.Array) -> Adapter:
    weight = getattr(base.layers, name)
    letters = _axes(LINEAR[name])
    inputs, outputs = letters.inputs, letters.outputs
    sizes = dict(zip(letters.weight, weight.get_value().shape[1:], strict=True))
    axes = dict(zip(letters.weight, weight.get_metadata("axes"), strict=True))
    down_shape = (layers, *(sizes[a] for a in inputs), rank)
    fan_in = jnp.prod(jnp.array(down_shape[1:-1]))
    down = jax.random.normal(key, down_shape, jnp.float32) * fan_in**-0.5
    up = jnp.zeros((layers, rank, *(sizes[a] for a in outputs)), jnp.float32)
    return Adapter(
      nnx.Param(down, axes=(*(axes[a] for a in inputs), "rank")),
      nnx.Param(up, axes=("rank", *(axes[a] for a in outputs))),
      alpha / rank,
    )

  keys = jax.random.split(key, len(targets))
  return {name: adapter(name, k) for name, k in zip(sorted(targets), keys, strict=True)}


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["base", "adapters"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A frozen model with its adapters; stands wherever a `Qwen2` is called."""

  base: Qwen2
  adapters: Adapters

  @property
  def config(self):
    return self.base.config

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, attention: Attention, state: Any = None
  ) -> tuple[jax.Array, Any]:
    """As `Qwen2.__call__`."""
    return self.base(tokens_BT, positions_BT, attention, state, self.adapters)

  def unembedding(self) -> jax.Array:
    """As `Qwen2.unembedding`."""
    return self.base.unembedding()


def merge(adapted: Adapted) -> Qwen2:
  """A model of its own that computes what the adapted one does: W + scale A B, in W's dtype."""
  merged = jax.tree.map(lambda x: x, adapted.base)
  for name, adapter in adapted.adapters.items():
    weight = getattr(merged.layers, name)
    a = _axes(LINEAR[name])
    change = jnp.einsum(
      f"l{a.inputs}r,lr{a.outputs}->l{a.weight}",
      adapter.down[...],
      adapter.up[...],
      precision="highest",
    )
    value = weight[...].astype(jnp.float32) + adapter.scale * change
    setattr(merged.layers, name, weight.replace(value.astype(weight[...].dtype)))
  return merged
