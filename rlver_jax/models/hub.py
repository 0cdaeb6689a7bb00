"""Model directories in Hugging Face's layout: finding one, and what it holds beside tensors.

Here are the config, the index of a set of shards, the headers of safetensors files and the
tokenizer's files; the tensors themselves are read and written by `weights.py`.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import safetensors
from huggingface_hub.errors import LocalEntryNotFoundError

from rlver_jax.errors import UserError
from rlver_jax.models.qwen2 import Qwen2Config

# What a text-generation tool needs beside weights; copied as it is when a model is exported.
COMPANIONS = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TIMEOUT = 10.0  # seconds that the hub may take to answer before its cache is used instead

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
)


def resolve(path: str, field: str) -> pathlib.Path:
  """The directory that `path` names: a local one, or a hub id fetched into the hub's cache.

  Without network (or with HF_HUB_OFFLINE=1) a hub id is answered from the cache alone.

  Args:
    path: a local directory in Hugging Face's layout, or a hub id such as `org/name`.
    field: the config field that holds `path`, for the error message.

  Raises:
    UserError: when `path` is no directory and can't be fetched.
  """
  local = pathlib.Path(path).expanduser()
  if path and local.is_dir():
    return local
  try:
    return pathlib.Path(_fetch(path))
  except Exception as error:  # the hub's client raises the errors of several libraries
    raise UserError(
      f"{field} is {path!r}, which is neither a local directory nor a model that the Hugging "
      f"Face hub or its local cache can give now ({type(error).__name__}), while the preset tiny "
      "(--config=configs/grpo.py:tiny) needs no download."
    ) from error


def _fetch(repository: str) -> str:
  files = ["config.json", *COMPANIONS, *WEIGHTS]
  try:
    # snapshot_download asks the hub without a time limit, so a network that swallows packets
    # would hang it: this request finds out first.
    huggingface_hub.HfApi().model_info(repository, timeout=TIMEOUT)
  except Exception as error:
    try:
      return huggingface_hub.snapshot_download(
        repository, allow_patterns=files, local_files_only=True
      )
    except LocalEntryNotFoundError:
      raise error from None  # why the hub refused tells more than that the cache is empty
  return huggingface_hub.snapshot_download(repository, allow_patterns=files, etag_timeout=TIMEOUT)


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The JSON object in `file`; UserError when it is missing, unreadable or something else."""
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(
      f"{file} is missing, expected a model directory in Hugging Face's layout."
    ) from None
  except OSError as error:
    raise UserError(f"{file} cannot be read ({error.strerror}), expected a JSON file.") from error
  except ValueError as error:
    raise UserError(f"{file} is not JSON ({error}), expected a JSON object.") from error
  if not isinstance(value, dict):
    raise UserError(f"{file} holds a {type(value).__name__}, expected a JSON object.")
  return value


def read_config(
  directory: str | pathlib.Path, *, dtype: str, param_dtype: str, remat: str
) -> Qwen2Config:
  """The sizes in a model directory's `config.json`, with the numerics that the caller chooses.

  Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`) and what transformers 5 writes
  (`rope_parameters`).

  Raises:
    UserError: naming the file and the field, for anything but a dense Qwen2 model with full
      attention and plain rotary embeddings.
  """
  file = pathlib.Path(directory) / "config.json"
  raw = read_json(file)

  def require(fine: bool, field: str, expected: str) -> None:
    if not fine:
      found = f"is {raw[field]!r}" if field in raw else "is missing"
      raise UserError(f"{file}: {field} {found}, expected {expected}.")

  def default(field: str, value: Any) -> Any:
    return value if raw.get(field) is None else raw[field]

  require(raw.get("model_type") == "qwen2", "model_type", "'qwen2' (the dense Qwen2.5 family)")
  require(default("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
  require(not raw.get("use_sliding_window"), "use_sliding_window", "false (full attention)")
  full = all(kind == "full_attention" for kind in default("layer_types", []))
  require(full, "layer_types", "'full_attention' in every layer")
  for field in SIZES:
    require(_positive_integer(raw.get(field)), field, "a positive integer")
  width, heads = raw["hidden_size"], raw["num_attention_heads"]
  grouped = heads % raw["num_key_value_heads"] == 0
  require(grouped, "num_key_value_heads", f"a divisor of the {heads} attention heads")
  if raw.get("head_dim") is None:
    require(width % heads == 0, "hidden_size", f"a multiple of the {heads} attention heads")
  head_dim = default("head_dim", width // heads)
  require(_positive_integer(head_dim) and head_dim % 2 == 0, "head_dim", "an even integer")

  rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
  for field in ("rope_scaling", "rope_parameters"):
    given = default(field, {})
    plain = isinstance(given, dict) and (
      given.get("rope_type", given.get("type")) in (None, "default")
    )
    require(plain, field, "none or the type 'default' (no scaling of positions)")
    rope |= given
  theta = _positive_number(rope["rope_theta"])
  require(theta, "rope_theta", "a positive number, here or in rope_parameters")
  numbers = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
  for field, value in numbers.items():
    require(_positive_number(default(field, value)), field, "a positive number")
  positions = default("max_position_embeddings", 32_768)
  require(_positive_integer(positions), "max_position_embeddings", "a positive integer")
  tied = default("tie_word_embeddings", False)
  require(isinstance(tied, bool), "tie_word_embeddings", "true or false")

  return Qwen2Config(
    **{field: raw[field] for field in SIZES},
    **{field: float(default(field, value)) for field, value in numbers.items()},
    head_dim=head_dim,
    rope_theta=float(rope["rope_theta"]),
    tie_word_embeddings=tied,
    max_position_embeddings=positions,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )


def write_config(
  directory: pathlib.Path, config: Qwen2Config, dtype: str, source: pathlib.Path | None
) -> None:
  """Writes `config.json` as transformers 4 and 5 and vLLM read it, and the companions of `source`.

  The ids of special tokens are no part of `Qwen2Config`: they come from the config of `source`.
  """
  value = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **{field: getattr(config, field) for field in SIZES},
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rope_theta": config.rope_theta,
    "rope_scaling": None,
    "rms_norm_eps": config.rms_norm_eps,
    "max_position_embeddings": config.max_position_embeddings,
    "initializer_range": config.initializer_range,
    "attention_dropout": 0.0,
    "tie_word_embeddings": config.tie_word_embeddings,
    "use_cache": True,
    "use_sliding_window": False,
    "torch_dtype": dtype,
  }
  if source is not None:
    origin = read_json(source / "config.json")
    value |= {field: origin[field] for field in TOKEN_IDS if field in origin}
    for name in COMPANIONS:
      if (source / name).exists():
        shutil.copyfile(source / name, directory / name)
  (directory / "config.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_index(index: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of each tensor, as the index of a set of shards says."""
  placed = read_json(index).get("weight_map")
  names = placed.values() if isinstance(placed, dict) else []
  if not names or not all(isinstance(name, str) for name in names):
    raise UserError(f"{index} has no weight_map, expected one from tensor names to file names.")
  return {name: index.parent / file for name, file in placed.items()}


def read_header(file: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
  """Shape and dtype of each tensor in `file`; the library also compares with the file's size."""
  try:
    with safetensors.safe_open(file, "np") as opened:
      slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
      return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
  except FileNotFoundError:
    raise UserError(f"{file} is missing, expected the model's weights in safetensors.") from None
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is truncated or no safetensors file ({error}), expected a complete one."
    ) from error


@contextlib.contextmanager
def new_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary sibling to fill, which takes the name `directory` once all is on the disk.

  `directory` may exist if it is empty. When the block raises, nothing is left behind.
  """
  scratch = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  try:
    scratch.mkdir(parents=True)
  except OSError as error:
    raise UserError(
      f"{directory} cannot be created ({error.strerror}), expected a name in a writable folder."
    ) from error
  try:
    yield scratch
    mode = (scratch / "config.json").stat().st_mode  # safetensors keeps others from its files
    for file in scratch.iterdir():
      file.chmod(mode)
      _sync(file)
    _sync(scratch)
    os.replace(scratch, directory)
    _sync(directory.parent)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


def is_empty_directory(path: pathlib.Path) -> bool:
  return path.is_dir() and not any(path.iterdir())


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _positive_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
