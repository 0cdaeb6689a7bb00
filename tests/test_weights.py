"""Reading and writing model directories: layout, shards, devices, and every refusal."""

import contextlib
import functools
import http.server
import json
import socket
import textwrap
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
import subprocesses
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from rlver_jax.errors import UserError
from rlver_jax.models import hub, weights
from rlver_jax.partitioning import make_mesh

# Sizes as in config.json: 4 query heads over 2 key/value heads of 4, an odd vocabulary.
CONFIG = {
  "model_type": "qwen2",
  "vocab_size": 33,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rope_theta": 10_000.0,
  "rms_norm_eps": 1e-5,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
}
LAYER_SHAPES = {
  "input_layernorm.weight": (16,),
  "self_attn.q_proj.weight": (16, 16),
  "self_attn.q_proj.bias": (16,),
  "self_attn.k_proj.weight": (8, 16),
  "self_attn.k_proj.bias": (8,),
  "self_attn.v_proj.weight": (8, 16),
  "self_attn.v_proj.bias": (8,),
  "self_attn.o_proj.weight": (16, 16),
  "post_attention_layernorm.weight": (16,),
  "mlp.gate_proj.weight": (24, 16),
  "mlp.up_proj.weight": (24, 16),
  "mlp.down_proj.weight": (16, 24),
}
DOWN = "model.layers.1.mlp.down_proj.weight"


def make_tensors(tied=False, dtype=np.float32):
  shapes = {"model.embed_tokens.weight": (33, 16), "model.norm.weight": (16,)}
  shapes |= {f"model.layers.{i}.{n}": s for i in range(2) for n, s in LAYER_SHAPES.items()}
  shapes |= {} if tied else {"lm_head.weight": (33, 16)}
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def make_directory(directory, tensors, **fields):
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps(CONFIG | fields))
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  return directory


def make_shards(directory, tensors):
  """Two shards and their index; returns the index's path."""
  make_directory(directory, {})
  (directory / "model.safetensors").unlink()
  names = sorted(tensors)
  placed = {}
  for i, part in enumerate((names[::2], names[1::2])):
    file = f"model-{i + 1:05}-of-00002.safetensors"
    save_file({name: tensors[name] for name in part}, directory / file)
    placed |= dict.fromkeys(part, file)
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
  return index


def config_of(directory, param_dtype="float32"):
  return hub.read_config(directory, dtype="float32", param_dtype=param_dtype, remat="none")


def load(directory, param_dtype="float32"):
  return weights.load(directory, config_of(directory, param_dtype), make_mesh(1, 1, 1))


def refusal(function, *args, **kwargs):
  """The one sentence with which `function` refuses its input."""
  with pytest.raises(UserError) as caught:
    function(*args, **kwargs)
  message = str(caught.value)
  assert message.endswith(".") and "\n" not in message
  return message


def same_bytes(left, right):
  assert left.keys() == right.keys()
  return all(
    left[n].dtype == right[n].dtype and left[n].tobytes() == right[n].tobytes() for n in left
  )


def assert_holds(model, tensors):
  """Compares some parameters element by element with the file's tensors, indices spelled out."""
  assert np.array_equal(model.embed[...], tensors["model.embed_tokens.weight"])
  for layer in range(2):
    prefix = f"model.layers.{layer}."
    q, o = tensors[prefix + "self_attn.q_proj.weight"], tensors[prefix + "self_attn.o_proj.weight"]
    for d, h, k in np.ndindex(16, 4, 4):
      assert model.layers.q[layer, d, h, k] == q[h * 4 + k, d]
      assert model.layers.o[layer, h, k, d] == o[d, h * 4 + k]
    bias = tensors[prefix + "self_attn.k_proj.bias"]
    assert np.array_equal(model.layers.k_bias[layer], [bias[:4], bias[4:]])
    down, norm = (
      tensors[prefix + "mlp.down_proj.weight"],
      tensors[prefix + "input_layernorm.weight"],
    )
    assert np.array_equal(model.layers.down[layer], down.T)
    assert np.array_equal(model.layers.attention_norm[layer], norm)


def on_host(model):
  return jax.tree.map(np.asarray, model)


def test_load_puts_every_element_in_its_place(tmp_path):
  tensors = make_tensors()
  model = on_host(load(make_directory(tmp_path, tensors)))
  assert_holds(model, tensors)
  assert np.array_equal(model.head[...], tensors["lm_head.weight"])


def test_load_reads_a_sharded_set(tmp_path):
  tensors = make_tensors()
  make_shards(tmp_path, tensors)
  assert_holds(on_host(load(tmp_path)), tensors)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_load_converts_to_the_parameter_dtype(stored, kept, tmp_path):
  tensors = make_tensors(dtype=stored)
  model = on_host(load(make_directory(tmp_path, tensors), kept))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {kept}
  expected = tensors[DOWN].T.astype(np.dtype(kept))
  assert np.array_equal(model.layers.down[1], expected)


def test_tied_model_has_no_head_and_ignores_a_stored_one(tmp_path):
  tensors = make_tensors()
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  model = load(make_directory(tmp_path, tensors, tie_word_embeddings=True))
  assert model.head is None
  assert_holds(on_host(model), tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_save_writes_back_the_same_tensors(dtype, tmp_path):
  tensors = make_tensors(dtype=np.dtype(dtype))
  source = make_directory(tmp_path / "source", tensors, eos_token_id=5)
  (source / "tokenizer.json").write_text("{}")
  (source / "notes.txt").write_text("not part of the model")
  out = tmp_path / "deep" / "out"
  weights.save(load(source), out, source=source, dtype=dtype)
  assert same_bytes(load_file(out / "model.safetensors"), tensors)
  assert sorted(f.name for f in out.iterdir()) == [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  assert [f.name for f in out.parent.iterdir()] == ["out"]  # no temporary directory is left
  written = json.loads((out / "config.json").read_text())
  expected = CONFIG | {"torch_dtype": dtype, "eos_token_id": 5}
  assert {field: written[field] for field in expected} == expected
  assert written["architectures"] == ["Qwen2ForCausalLM"]
  assert config_of(out) == config_of(source)


def test_save_cuts_into_shards_with_an_index(tmp_path):
  tensors = make_tensors()
  model = load(make_directory(tmp_path / "source", tensors))
  out = tmp_path / "out"
  out.mkdir()  # an empty destination is fine
  weights.save(model, out, source=None, dtype="float32", max_shard_bytes=4_000)
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  files = sorted(out.glob("*.safetensors"))
  assert len(files) > 3
  assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
  found = {}
  for file in files:
    part = load_file(file)
    assert sum(t.nbytes for t in part.values()) <= 4_000
    assert all(index["weight_map"][name] == file.name for name in part)
    found |= part
  assert same_bytes(found, tensors)
  assert_holds(on_host(load(out)), tensors)


def test_save_refuses_to_overwrite_and_leaves_nothing_behind(tmp_path, monkeypatch):
  model = load(make_directory(tmp_path / "source", make_tensors()))
  taken = tmp_path / "taken"
  taken.mkdir()
  (taken / "precious").write_text("kept")
  assert str(taken) in refusal(weights.save, model, taken, source=None)
  assert [f.name for f in taken.iterdir()] == ["precious"]
  assert "precious" in refusal(weights.save, model, taken / "precious", source=None)
  assert "precious" in refusal(weights.save, model, taken / "precious" / "out", source=None)
  assert "'int8'" in refusal(weights.save, model, tmp_path / "out", source=None, dtype="int8")

  def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(weights, "save_file", full_disk)
  with pytest.raises(OSError, match="No space"):
    weights.save(model, tmp_path / "out", source=None)
  assert sorted(f.name for f in tmp_path.iterdir()) == ["source", "taken"]


SHARDED = """
  import sys, jax, numpy as np
  from safetensors.numpy import load_file
  from rlver_jax.models import hub, weights
  from rlver_jax.partitioning import bytes_per_device, make_mesh

  source, out = sys.argv[1:]
  config = hub.read_config(source, dtype="float32", param_dtype="float32", remat="none")
  mesh, whole = make_mesh(2, 2, 2), make_mesh(8, 1, 1)
  model = weights.load(source, config, mesh)
  copies = weights.load(source, config, whole)

  def share(name, tensor):
    if tensor.ndim == 2:  # fsdp and tensor both cut a matrix; 2 divides all but the vocabulary
      return tensor.nbytes // (2 if len(tensor) == 33 else 4)
    return tensor.nbytes // (2 if name.endswith("bias") else 1)

  tensors = load_file(source + "/model.safetensors")
  expected = sum(share(name, tensor) for name, tensor in tensors.items())
  assert bytes_per_device(model) == dict.fromkeys(range(8), expected)
  total = sum(tensor.nbytes for tensor in tensors.values())
  assert bytes_per_device(copies) == dict.fromkeys(range(8), total)
  np.savez(out + ".npz", *map(np.asarray, jax.tree.leaves(model)))
  weights.save(model, out, source=None, dtype="float32")
"""
CREATED = """
  import sys, jax, numpy as np
  from rlver_jax.models import hub, weights
  from rlver_jax.partitioning import bytes_per_device, make_mesh

  source, out = sys.argv[1:]
  config = hub.read_config(source, dtype="float32", param_dtype="float32", remat="none")
  model = weights.initialise(config, 4, make_mesh(2, 2, 2))
  loaded = weights.load(source, config, make_mesh(2, 2, 2))
  assert bytes_per_device(model) == bytes_per_device(loaded)
  np.savez(out + ".npz", *map(np.asarray, jax.tree.leaves(model)))
"""


def test_eight_devices_hold_their_shares_and_the_same_values(tmp_path):
  tensors = make_tensors()
  source, out = make_directory(tmp_path / "source", tensors), tmp_path / "out"
  subprocesses.emulated(8, "-c", textwrap.dedent(SHARDED), source, out)
  sharded, single = np.load(f"{out}.npz"), jax.tree.leaves(load(source))
  assert len(sharded) == len(single)
  assert all(np.array_equal(a, b) for a, b in zip(sharded.values(), single, strict=True))
  assert same_bytes(load_file(out / "model.safetensors"), tensors)


@pytest.mark.slow
def test_initialise_gives_the_same_model_on_every_mesh(tmp_path):
  source, out = make_directory(tmp_path / "source", make_tensors()), tmp_path / "out"
  subprocesses.emulated(8, "-c", textwrap.dedent(CREATED), source, out)
  single = weights.initialise(config_of(source), 4, make_mesh(1, 1, 1))
  sharded, single = np.load(f"{out}.npz"), jax.tree.leaves(single)
  for a, b in zip(sharded.values(), single, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-7)  # fused differently, so not always bit-equal
  assert all(np.std(x) > 0.015 for x in single if x.ndim > 3)


TWO_PROCESSES = """
  import sys, jax, numpy as np
  from rlver_jax.errors import UserError
  from rlver_jax.models import hub, weights
  from rlver_jax.partitioning import make_mesh

  address, process, source, out = sys.argv[1:]
  jax.distributed.initialize(address, 2, int(process))
  config = hub.read_config(source, dtype="float32", param_dtype="float32", remat="none")
  model = weights.load(source, config, make_mesh(1, 8, 1))
  assert jax.device_count() == 8 and not model.embed.get_value().is_fully_addressable
  weights.save(model, out, source=None, dtype="float32", max_shard_bytes=4_000)
  jax.experimental.multihost_utils.sync_global_devices("saved")
  try:
    weights.save(model, out, source=None)  # the first process alone looks; both must stop
  except UserError:
    sys.exit(7)
"""


@pytest.mark.slow
def test_two_processes_write_one_model(tmp_path):
  tensors = make_tensors()
  source, out = make_directory(tmp_path / "source", tensors), tmp_path / "out"
  with socket.create_server(("127.0.0.1", 0)) as free:
    address = f"127.0.0.1:{free.getsockname()[1]}"
  program = textwrap.dedent(TWO_PROCESSES)
  processes = [subprocesses.emulating(4, "-c", program, address, i, source, out) for i in range(2)]
  try:
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [7, 7], errors
  finally:
    for process in processes:
      process.kill()
  assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
  assert_holds(on_host(load(out)), tensors)


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": "big"}, "rope_theta is 'big'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"hidden_size": 16.0}, "hidden_size is 16.0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"num_attention_heads": 6}, "hidden_size is 16"),
    ({"head_dim": 3}, "head_dim is 3"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
  ],
)
def test_config_names_the_field_that_it_refuses(fields, named, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields))
  message = refusal(config_of, tmp_path)
  assert message.startswith(f"{tmp_path / 'config.json'}: {named}")


def test_config_names_a_missing_field_and_a_broken_file(tmp_path):
  file = tmp_path / "config.json"
  assert f"{file} is missing" in refusal(config_of, tmp_path)
  for text in ("{", "[]", "\udcff"):
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(file) in refusal(config_of, tmp_path)
  file.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "intermediate_size"}))
  assert "intermediate_size is missing" in refusal(config_of, tmp_path)


def test_config_reads_both_generations_of_fields(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  old = config_of(tmp_path)
  assert (old.head_dim, old.rope_theta, old.param_dtype) == (4, 10_000.0, "float32")
  new = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "torch_dtype")}
  new |= {"dtype": "float32", "layer_types": ["full_attention"] * 2}
  new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
  (tmp_path / "config.json").write_text(json.dumps(new))
  assert config_of(tmp_path) == old


def edited(directory, **changes):
  """A model directory in which tensors are replaced, or removed where the change is None."""
  names = {"down": DOWN, "extra": "model.layers.2.mlp.down_proj.weight"}
  tensors = make_tensors() | {names[key]: value for key, value in changes.items()}
  tensors = {name: value for name, value in tensors.items() if value is not None}
  return make_directory(directory, tensors)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"down": None}, [DOWN]),
    ({"down": np.zeros((24, 16), np.float32)}, [DOWN, "[24, 16]", "[16, 24]"]),
    ({"down": np.zeros((16, 24), np.int8)}, [DOWN, "I8"]),
    ({"extra": np.zeros((16, 24), np.float32)}, ["model.layers.2.mlp.down_proj.weight"]),
  ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(changes, named, tmp_path):
  edited(tmp_path, **changes)
  for function in (weights.check, functools.partial(weights.load, mesh=make_mesh(1, 1, 1))):
    message = refusal(function, tmp_path, config_of(tmp_path))
    assert all(part in message for part in ["model.safetensors", *named])


def test_untied_model_needs_its_head(tmp_path):
  make_directory(tmp_path, make_tensors(tied=True))
  assert "lm_head.weight" in refusal(load, tmp_path)


def test_broken_files_are_named(tmp_path):
  file = make_directory(tmp_path, make_tensors()) / "model.safetensors"
  content = file.read_bytes()
  broken = {
    "shorter than its header says": content[:-100],
    "cut within the header": content[:50],
    "longer than its header says": content + b"\0" * 8,
    "no header": b"version https://git-lfs",
    "header that is no JSON": content[:8] + b"!" * (len(content) - 8),
    "empty": b"",
  }
  for changed in broken.values():
    file.write_bytes(changed)
    assert str(file) in refusal(load, tmp_path)
  file.unlink()
  assert f"{file} is missing" in refusal(load, tmp_path)


def test_broken_sets_of_shards_are_named(tmp_path):
  index = make_shards(tmp_path, make_tensors())
  listing = json.loads(index.read_text())
  second = tmp_path / "model-00002-of-00002.safetensors"
  content = second.read_bytes()

  name, file = next(iter(listing["weight_map"].items()))
  moved = listing["weight_map"] | {name: second.name}
  assert file != second.name
  index.write_text(json.dumps({"weight_map": moved}))
  message = refusal(load, tmp_path)
  assert str(second) in message and name in message

  for text in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "nonsense"):
    index.write_text(text)
    assert str(index) in refusal(load, tmp_path)

  fewer = {key: value for key, value in listing["weight_map"].items() if key != DOWN}
  index.write_text(json.dumps({"weight_map": fewer}))
  assert load(tmp_path) is not None  # an index may be incomplete as long as its files are not

  index.write_text(json.dumps(listing))
  second.write_bytes(content[:-1])
  assert str(second) in refusal(load, tmp_path)
  second.unlink()
  assert f"{second} is missing" in refusal(load, tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty hub cache of our own."""
  folder = tmp_path / "cache"
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
  return folder


def test_resolve_takes_a_local_directory_as_it_is(tmp_path):
  assert hub.resolve(str(tmp_path), "policy.path") == tmp_path


@pytest.mark.parametrize("path", ["", "/no/such/folder", "no-such-org/no-such-model"])
def test_resolve_offline_names_field_path_and_preset(path, cache, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  message = refusal(hub.resolve, path, "policy.path")
  assert message.startswith(f"policy.path is {path!r}")
  assert "preset tiny (--config=configs/grpo.py:tiny)" in message


def test_resolve_without_an_answer_uses_the_cache_or_fails_fast(cache, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, never answers
    endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    assert "Timeout" in refusal(hub.resolve, "org/name", "simulator.path")
    folder = cache / "models--org--name"
    commit = "0" * 40
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    found = hub.resolve("org/name", "simulator.path")
    assert (found / "config.json").read_text() == "{}"


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a download of one small model takes."""

  commit = "1" * 40
  files: dict[str, bytes] = {  # noqa: RUF012
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"not wanted",
    "tokenizer.json": b"{ }",
  }

  def do_GET(self):
    path = self.path.split("?")[0]
    if path.startswith("/api/models/org/name/tree/"):
      listing = [
        {"type": "file", "path": name, "size": len(body), "oid": "2" * 40}
        for name, body in self.files.items()
      ]
      self.answer(json.dumps(listing).encode())
    elif path.startswith("/api/models/org/name"):
      self.answer(json.dumps({"id": "org/name", "sha": self.commit, "siblings": []}).encode())
    elif path.startswith("/org/name/resolve/"):
      self.answer(self.files[path.rsplit("/", 1)[1]])
    else:
      self.send_error(404)

  do_HEAD = do_GET

  def answer(self, body):
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("ETag", f'"{hash(body)}"')
    self.send_header("X-Repo-Commit", self.commit)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(handler):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def test_resolve_fetches_the_files_of_a_model(cache, monkeypatch):
  with serving(Hub) as endpoint:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
      constants,
      "HUGGINGFACE_CO_URL_TEMPLATE",
      endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    found = hub.resolve("org/name", "policy.path")
    fetched = {file.name: file.read_bytes() for file in found.iterdir()}
    assert fetched == {n: b for n, b in Hub.files.items() if n != "pytorch_model.bin"}
    assert "HTTPError" in refusal(hub.resolve, "org/other", "policy.path")
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert hub.resolve("org/name", "policy.path") == found
