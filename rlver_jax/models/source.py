"""Where a model comes from: a Hugging Face directory, or the one embedded in the package.

Opening a source reads configuration and tokenizer and checks the weights' headers; the weights
themselves are read by `load_model`.
"""

import dataclasses
import importlib.resources
import pathlib

from jax.sharding import Mesh

from rlver_jax import tokenizer as tokenizer_lib
from rlver_jax.models import hub, weights
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config

EMBEDDED = "tiny"  # the path that names the embedded model


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """directory: None for the embedded model, whose weights are drawn from a seed."""

  directory: pathlib.Path | None
  config: Qwen2Config
  tokenizer: tokenizer_lib.Tokenizer


def open_source(
  path: str, field: str, *, dtype: str, param_dtype: str, remat: str = "none"
) -> ModelSource:
  """Opens the model that `path`, the value of the config field `field`, names.

  Raises UserError for a path that leads nowhere and for files that are missing or broken.
  """
  if path == EMBEDDED:
    tokenizer = tokenizer_lib.load(_embedded_tokenizer())
    return ModelSource(None, _embedded_config(tokenizer, dtype, param_dtype, remat), tokenizer)
  directory = hub.resolve(path, field)
  config = hub.read_config(directory, dtype=dtype, param_dtype=param_dtype, remat=remat)
  weights.check(directory, config)
  return ModelSource(directory, config, tokenizer_lib.load(directory))


def load_model(source: ModelSource, mesh: Mesh, seed: int) -> Qwen2:
  """The model's weights on the mesh; `seed` draws those of the embedded model."""
  if source.directory is None:
    return weights.initialise(source.config, seed, mesh)
  return weights.load(source.directory, source.config, mesh)


def tokenizer_directory(source: ModelSource) -> pathlib.Path:
  """The directory whose tokenizer files belong to the model."""
  return source.directory or _embedded_tokenizer()


def _embedded_tokenizer() -> pathlib.Path:
  return pathlib.Path(str(importlib.resources.files("rlver_jax") / "assets" / "tiny_tokenizer"))


def _embedded_config(tokenizer, dtype: str, param_dtype: str, remat: str) -> Qwen2Config:
  return Qwen2Config(
    vocab_size=tokenizer.vocab_size,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    initializer_range=0.05,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )
