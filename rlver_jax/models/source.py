"""Where a model comes from: a Hugging Face directory, or one that is embedded in the package.

A model may also be drawn from a seed: then the directory needs no weights, and those that it has
are left alone. Opening a source reads configuration and tokenizer and checks the weights' headers;
the weights themselves are read by `load_model`.
"""

import dataclasses
import importlib.resources
import pathlib

from jax.sharding import Mesh

from rlver_jax import tokenizer as tokenizer_lib
from rlver_jax.errors import UserError
from rlver_jax.models import hub, weights
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config

# The paths that name embedded models, of which DRAWN has no weights but those of a seed.
DRAWN = "tiny"
EMBEDDED = (DRAWN, "tiny-policy", "tiny-simulator")


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """drawn: the weights are drawn from a seed, not read from the directory."""

  directory: pathlib.Path
  config: Qwen2Config
  tokenizer: tokenizer_lib.Tokenizer
  drawn: bool


def open_source(
  path: str,
  field: str,
  *,
  dtype: str,
  param_dtype: str,
  remat: str = "none",
  from_scratch: bool = False,
) -> ModelSource:
  """Opens the model that `path`, the value of the config field `field`, names.

  from_scratch: the weights are drawn, whatever the directory holds. Those of `DRAWN` always are.

  Raises UserError for a path that leads nowhere and for files that are missing or broken.
  """
  directory = embedded_directory(path) if path in EMBEDDED else hub.resolve(path, field)
  config = hub.read_config(directory, dtype=dtype, param_dtype=param_dtype, remat=remat)
  drawn = from_scratch or path == DRAWN
  if not drawn:
    weights.check(directory, config)
  tokenizer = tokenizer_lib.load(directory)
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, expected ids below "
      f"vocab_size in config.json, {config.vocab_size}."
    )
  return ModelSource(directory, config, tokenizer, drawn)


def load_model(source: ModelSource, mesh: Mesh, seed: int) -> Qwen2:
  """The model's weights on the mesh; `seed` draws those that are not read."""
  if source.drawn:
    return weights.initialise(source.config, seed, mesh)
  return weights.load(source.directory, source.config, mesh)


def embedded_directory(name: str) -> pathlib.Path:
  """The directory of a model of `EMBEDDED`."""
  return pathlib.Path(str(importlib.resources.files("rlver_jax") / "assets" / name))
