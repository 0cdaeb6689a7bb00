"""The critic: a Qwen2.5 backbone with a value head, for PPO.

Three ways to hold the backbone, from most memory to least: weights of its own; the layers above
the policy's lowest ones, which it reads but does not train; low-rank adapters beside a frozen
model that the policy may share.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from rlver_jax.models import lora
from rlver_jax.models.qwen2 import Attention, Block, Qwen2, embed, rms_norm, run_layers


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["embed", "layers", "norm", "adapters", "head"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Critic:
  """What is trained; None where the frozen model's is used instead.

  layers: a stack of blocks, as in `Qwen2`; with fewer than the frozen model has, they stand above
  its lowest ones. head [D]: the value is its product with the last hidden state.
  """

  embed: nnx.Param | None
  layers: Block | None
  norm: nnx.Param | None
  adapters: lora.Adapters | None
  head: nnx.Param

  def __call__(
    self,
    frozen: Qwen2,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attention: Attention,
  ) -> jax.Array:
    """The value after each token: float32 [B, T].

    frozen: the model of which this critic uses a part, or nothing; no gradient goes there.
    """
    frozen = jax.lax.stop_gradient(frozen)
    if self.adapters is not None:
      hidden_BTD, _ = frozen(tokens_BT, positions_BT, attention, adapters=self.adapters)
      return self._values(hidden_BTD)
    c = self.layers.config
    table = self.embed if self.embed is not None else frozen.embed
    x_BTD = embed(table[...], tokens_BT, c.dtype)
    own = jax.tree.leaves(self.layers)[0].shape[0]
    lower = c.num_hidden_layers - own
    if lower:
      x_BTD, _ = run_layers(c, frozen.layers, x_BTD, positions_BT, attention, lowest=lower)
      x_BTD = jax.lax.stop_gradient(x_BTD)
    x_BTD, _ = run_layers(c, self.layers, x_BTD, positions_BT, attention)
    return self._values(rms_norm(x_BTD, self.norm[...], c.rms_norm_eps))

  def _values(self, hidden_BTD):
    return jnp.einsum("btd,d->bt", hidden_BTD.astype(jnp.float32), self.head[...])


def from_model(model: Qwen2, shared_layers: int) -> Critic:
  """A critic that starts from `model`, without its lowest layers; the value head starts at zero."""
  layers = jax.tree.map(lambda x: x[shared_layers:], model.layers)
  table = None if shared_layers else model.embed
  return Critic(table, layers, model.norm, None, _head(model))


def from_adapters(model: Qwen2, adapters: lora.Adapters) -> Critic:
  """A critic that is `model`, frozen, with adapters."""
  return Critic(None, None, None, adapters, _head(model))


def _head(model: Qwen2) -> nnx.Param:
  return nnx.Param(jnp.zeros(model.config.hidden_size, jnp.float32), axes=("norm",))
