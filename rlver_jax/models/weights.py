"""Weights in Hugging Face's safetensors: read straight into a sharded `Qwen2`, and written back.

`LAYOUT` is the one place that knows how the two relate. Files hold linear maps as [out, in]
with heads merged into one axis, a tensor per layer; the model holds [in, ..., out] with heads
apart and all layers stacked. Reading takes, for each device, only the part of each tensor that
the device keeps, so the host never holds more than one device's share of one parameter beside
the result.
"""

import contextlib
import functools
import json
import operator
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import safetensors
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from rlver_jax import partitioning
from rlver_jax.errors import UserError
from rlver_jax.models.hub import (
  is_empty_directory,
  new_directory,
  read_header,
  read_index,
  write_config,
)
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as safetensors names them

# Parameter: (name in the file; for each axis of the file's tensor, the parameter's axes that it
# merges, counted without the layer axis).
LAYOUT = {
  "embed": ("model.embed_tokens.weight", ((0,), (1,))),
  "layers.attention_norm": ("model.layers.{}.input_layernorm.weight", ((0,),)),
  "layers.q": ("model.layers.{}.self_attn.q_proj.weight", ((1, 2), (0,))),
  "layers.k": ("model.layers.{}.self_attn.k_proj.weight", ((1, 2), (0,))),
  "layers.v": ("model.layers.{}.self_attn.v_proj.weight", ((1, 2), (0,))),
  "layers.q_bias": ("model.layers.{}.self_attn.q_proj.bias", ((0, 1),)),
  "layers.k_bias": ("model.layers.{}.self_attn.k_proj.bias", ((0, 1),)),
  "layers.v_bias": ("model.layers.{}.self_attn.v_proj.bias", ((0, 1),)),
  "layers.o": ("model.layers.{}.self_attn.o_proj.weight", ((2,), (0, 1))),
  "layers.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", ((0,),)),
  "layers.gate": ("model.layers.{}.mlp.gate_proj.weight", ((1,), (0,))),
  "layers.up": ("model.layers.{}.mlp.up_proj.weight", ((1,), (0,))),
  "layers.down": ("model.layers.{}.mlp.down_proj.weight", ((1,), (0,))),
  "norm": ("model.norm.weight", ((0,),)),
  "head": ("lm_head.weight", ((0,), (1,))),
}


class Tensor(NamedTuple):
  """One tensor of a file and the parameter (or the layer of a parameter) that it is."""

  name: str
  shape: tuple[int, ...]
  parameter: str
  layer: int | None


def initialise(config: Qwen2Config, seed: int, mesh: Mesh) -> Qwen2:
  """A model with random weights, created in its shards; the same for every mesh."""
  shardings = partitioning.model_shardings(mesh, abstract_model(config))
  create = jax.jit(functools.partial(Qwen2, config), out_shardings=shardings)
  return create(jax.random.key(seed))


def abstract_model(config: Qwen2Config) -> Qwen2:
  """The model's structure with shapes and dtypes in place of arrays."""
  return jax.eval_shape(functools.partial(Qwen2, config), jax.random.key(0))


def load(directory: str | pathlib.Path, config: Qwen2Config, mesh: Mesh) -> Qwen2:
  """The model in `directory`, its parameters in `config.param_dtype` and sharded over `mesh`.

  Raises UserError as `check` does, before anything large is read.
  """
  files = check(directory, config)
  model = abstract_model(config)
  shardings = partitioning.model_shardings(mesh, model)

  def read(path, parameter, sharding):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    template = parameter.get_value()
    return parameter.replace(_read_parameter(name, template, sharding.get_value(), files))

  return jax.tree_util.tree_map_with_path(
    read, model, shardings, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def check(directory: str | pathlib.Path, config: Qwen2Config) -> dict[str, pathlib.Path]:
  """Compares the headers in `directory` with `config`; reads no tensor.

  Returns the file of each tensor by name.

  Raises:
    UserError: naming the file and, where there is one, the tensor: a missing, truncated or
      corrupt file; a missing tensor; a shape that differs from `config`; a dtype that is no
      plain float; a tensor that this model does not have.
  """
  directory = pathlib.Path(directory)
  source, placed = directory / SINGLE, {}
  if not source.exists() and (directory / INDEX).exists():
    source = directory / INDEX
    placed = read_index(source)
  headers = {file: read_header(file) for file in sorted(set(placed.values())) or [source]}
  for name, file in placed.items():
    if name not in headers[file]:
      raise UserError(f"{file} lacks the tensor {name}, which {INDEX} places there.")
  files = {name: file for file, header in headers.items() for name in header}

  tensors = {tensor.name: tensor for tensor in _tensors(config)}
  for name, file in files.items():
    unused = name.endswith("rotary_emb.inv_freq")  # a buffer that old versions stored
    unused |= name == LAYOUT["head"][0] and config.tie_word_embeddings
    if name not in tensors and not unused:
      raise UserError(
        f"{file} holds the tensor {name}, which a Qwen2 model of {config.num_hidden_layers} "
        "layers as in its config.json does not have."
      )
  for name, tensor in tensors.items():
    if name not in files:
      raise UserError(f"{source} lacks the tensor {name}, which its config.json asks for.")
    shape, dtype = headers[files[name]][name]
    if shape != tensor.shape:
      raise UserError(
        f"{files[name]}: the tensor {name} has the shape {list(shape)}, expected "
        f"{list(tensor.shape)} from config.json."
      )
    if dtype not in DTYPES.values():
      raise UserError(
        f"{files[name]}: the tensor {name} has the dtype {dtype}, expected F32, F16 or BF16."
      )
  return files


def _tensors(config: Qwen2Config) -> list[Tensor]:
  """The tensors of a model of these sizes, in the order in which they are written."""
  model = abstract_model(config)
  stacked = [name for name in LAYOUT if name.startswith("layers.")]
  order = [("embed", None)]
  order += [(name, layer) for layer in range(config.num_hidden_layers) for name in stacked]
  order += [("norm", None)] if config.tie_word_embeddings else [("norm", None), ("head", None)]

  def tensor(parameter, layer):
    template, groups = LAYOUT[parameter]
    sizes = operator.attrgetter(parameter)(model).get_value().shape
    sizes = sizes if layer is None else sizes[1:]
    shape = tuple(int(np.prod([sizes[axis] for axis in group])) for group in groups)
    return Tensor(template.format(layer), shape, parameter, layer)

  return [tensor(*item) for item in order]


def _read_parameter(
  name: str, template: jax.ShapeDtypeStruct, sharding: NamedSharding, files: dict
) -> jax.Array:
  """One parameter as a sharded array; each distinct shard is read once and then handed over."""
  owners: dict[tuple, list] = {}
  for device, index in sharding.addressable_devices_indices_map(template.shape).items():
    bounds = [part.indices(size)[:2] for part, size in zip(index, template.shape, strict=True)]
    owners.setdefault(tuple(bounds), []).append(device)
  pieces = []
  for bounds, devices in owners.items():
    shard = _read_shard(name, bounds, template, files)
    pieces += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
  return jax.make_array_from_single_device_arrays(template.shape, sharding, pieces)


def _read_shard(
  name: str, bounds: tuple, template: jax.ShapeDtypeStruct, files: dict
) -> np.ndarray:
  """The part of a parameter between `bounds`, a (start, stop) for each of its axes."""
  file_name, groups = LAYOUT[name]
  is_stacked = name.startswith("layers.")
  inner, sizes = bounds[is_stacked:], template.shape[is_stacked:]
  order = [axis for group in groups for axis in group]
  lengths = [inner[axis][1] - inner[axis][0] for axis in order]
  ranges = []
  for first, *rest in groups:
    # Merged axes are one range as long as only the first of them is cut; partitioning.RULES
    # keeps the axis `head` whole.
    unit = int(np.prod([sizes[axis] for axis in rest]))
    ranges.append(slice(inner[first][0] * unit, inner[first][1] * unit))

  out = _empty_aligned(tuple(stop - start for start, stop in bounds), template.dtype)
  # Files are closed after each shard: mapped pages that were read count as this process's memory.
  with contextlib.ExitStack() as stack:
    opened = functools.cache(lambda file: stack.enter_context(safetensors.safe_open(file, "np")))
    layers = range(*bounds[0]) if is_stacked else [None]
    for target, layer in zip(out if is_stacked else [out], layers, strict=True):
      tensor = file_name.format(layer)
      block = opened(files[tensor]).get_slice(tensor)[tuple(ranges)].reshape(lengths)
      # Transposing before the conversion moves half the bytes of a bfloat16 file.
      target[...] = np.ascontiguousarray(block.transpose(np.argsort(order)))
  return out


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array that begins at a multiple of 64 bytes.

  The CPU backend takes such an array over as it is, where it copies any other.
  """
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def save(
  model: Qwen2,
  directory: str | pathlib.Path,
  *,
  source: pathlib.Path | None,
  dtype: str = "bfloat16",
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes `model` as a directory that transformers and vLLM load.

  The directory appears under its name only when it is complete. Every process of a run must
  call this; the first one writes.

  Args:
    model: its arrays may be sharded over devices and hosts; one tensor is gathered at a time.
    directory: must not exist or be empty.
    source: the model's origin, whose tokenizer and generation settings are copied.
    dtype: of the stored tensors: bfloat16, float16 or float32.
    max_shard_bytes: tensors beyond it go to a further file; at most one file is in memory.

  Raises:
    UserError: for another dtype, or when `directory` is a file, holds something or can't be
      created.
  """
  if dtype not in DTYPES:
    raise UserError(f"The dtype of the export is {dtype!r}, expected one of {', '.join(DTYPES)}.")
  directory = pathlib.Path(directory).expanduser().resolve()
  is_writer = jax.process_index() == 0
  is_taken = is_writer and directory.exists() and not is_empty_directory(directory)
  if multihost_utils.broadcast_one_to_all(np.asarray(is_taken)):
    raise UserError(f"{directory} exists already, expected the name of a new or empty directory.")
  placed, size = {}, 0
  with new_directory(directory) if is_writer else contextlib.nullcontext() as scratch:
    if is_writer:
      write_config(scratch, model.config, dtype, source)
    shards = _plan_shards(model.config, dtype, max_shard_bytes)
    for file, tensors in shards.items():
      arrays = {tensor.name: _gather(model, tensor, dtype) for tensor in tensors}
      placed |= dict.fromkeys(arrays, file)
      size += sum(array.nbytes for array in arrays.values())
      if is_writer:
        save_file(arrays, scratch / file, metadata={"format": "pt"})
    if is_writer and SINGLE not in shards:
      index = {"metadata": {"total_size": size}, "weight_map": placed}
      (scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(config: Qwen2Config, dtype: str, max_shard_bytes: int) -> dict[str, list[Tensor]]:
  """The tensors of each file, filled in order."""
  shards, used = [[]], 0
  for tensor in _tensors(config):
    size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
    if shards[-1] and used + size > max_shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(tensor)
    used += size
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  count = len(shards)
  return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _gather(model: Qwen2, tensor: Tensor, dtype: str) -> np.ndarray:
  """One tensor as its file holds it, on every host."""
  value = operator.attrgetter(tensor.parameter)(model).get_value()
  value = value.astype(dtype) if tensor.layer is None else _pick(value, tensor.layer, dtype)
  if not value.is_fully_addressable:
    value = multihost_utils.process_allgather(value, tiled=True)
  order = [axis for group in LAYOUT[tensor.parameter][1] for axis in group]
  return np.ascontiguousarray(np.asarray(value).transpose(order).reshape(tensor.shape))


@functools.partial(jax.jit, static_argnames="dtype")
def _pick(stacked: jax.Array, layer: int, dtype: str) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False).astype(dtype)
