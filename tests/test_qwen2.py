"""The model against PyTorch, against a NumPy forward pass, and on real weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rlver_jax.models import hub, weights
from rlver_jax.models.attention import CONTEXT, PADDING, tree_attention
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config
from rlver_jax.partitioning import make_mesh

REFERENCE = (
  pathlib.Path(__file__).parents[2] / "shared" / "data" / "qwen2_5_0_5b_reference.npz"
)  # written by PyTorch in float32


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(1, 1, 1)


def read(directory, mesh, param_dtype="float32"):
  config = hub.read_config(directory, dtype="float32", param_dtype=param_dtype, remat="none")
  return weights.load(directory, config, mesh)


@jax.jit
def logits(model, tokens_BT):
  T = tokens_BT.shape[1]
  positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
  attention = tree_attention(jnp.zeros_like(tokens_BT))
  hidden_BTD, _ = model(tokens_BT, positions_BT, attention)
  return hidden_BTD @ model.unembedding().T


def tokens(vocabulary, shape=(2, 11)):
  return np.random.default_rng(7).integers(0, vocabulary, shape).astype(np.int32)


def torch_model(tied):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.Qwen2Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=50_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=tied,
    attn_implementation="eager",
  )
  model = transformers.Qwen2ForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # biases and norms begin as zeros and ones
      parameter.add_(0.2 * torch.randn_like(parameter))
  return torch, transformers, model


def torch_logits(torch, model, ids):
  with torch.no_grad():
    return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_pytorch(tied, tmp_path, mesh):
  torch, _, model = torch_model(tied)
  model.save_pretrained(tmp_path)
  ids = tokens(61)
  ours = logits(read(tmp_path, mesh), ids)
  np.testing.assert_allclose(ours, torch_logits(torch, model, ids), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_an_exported_model(tied, tmp_path, mesh):
  torch, transformers, model = torch_model(tied)
  model.save_pretrained(tmp_path / "origin")
  exported = tmp_path / "exported"
  ours = read(tmp_path / "origin", mesh)
  weights.save(ours, exported, source=tmp_path / "origin", dtype="float32")
  loaded = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
  before, after = model.state_dict(), loaded.state_dict()
  assert before.keys() == after.keys()
  assert all(torch.equal(before[name], after[name]) for name in before)
  ids = tokens(61)
  expected = torch_logits(torch, model, ids)  # by another attention kernel than the loaded one
  np.testing.assert_allclose(torch_logits(torch, loaded, ids), expected, atol=1e-5)
  assert loaded.dtype == torch.float32
  assert loaded.config.tie_word_embeddings == tied
  assert loaded.config.rope_parameters["rope_theta"] == 50_000.0

  weights.save(ours, tmp_path / "half", source=None)
  half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
  assert half.dtype == torch.bfloat16
  rounded = model.bfloat16().state_dict()
  assert all(torch.equal(value, rounded[name]) for name, value in half.state_dict().items())


def numpy_logits(tensors, config, ids_T):
  """A forward pass over one row in float64, from tensors as Hugging Face names them."""
  tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
  H, G, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim

  def norm(x, name):
    scale = np.sqrt(np.mean(x**2, -1, keepdims=True) + config.rms_norm_eps)
    return x / scale * tensors[name]

  def rotate(x_K, position):
    y = np.empty_like(x_K)
    for i in range(K // 2):  # each pair (i, i + K/2) is a complex number that turns
      turned = complex(x_K[i], x_K[i + K // 2]) * np.exp(
        1j * position * config.rope_theta ** (-2 * i / K)
      )
      y[i], y[i + K // 2] = turned.real, turned.imag
    return y

  x_TD = tensors["model.embed_tokens.weight"][ids_T]
  for layer in range(config.num_hidden_layers):
    prefix = f"model.layers.{layer}."

    def linear(x, name, prefix=prefix):
      y = x @ tensors[prefix + name + ".weight"].T
      return y + tensors.get(prefix + name + ".bias", 0.0)

    h_TD = norm(x_TD, prefix + "input_layernorm.weight")
    q, k, v = (linear(h_TD, f"self_attn.{n}_proj").reshape(len(ids_T), -1, K) for n in "qkv")
    out_THK = np.zeros((len(ids_T), H, K))
    for t in range(len(ids_T)):
      for head in range(H):
        group = head // (H // G)
        query = rotate(q[t, head], t)
        scores = [query @ rotate(k[s, group], s) / np.sqrt(K) for s in range(t + 1)]
        weight = np.exp(scores - np.max(scores))
        out_THK[t, head] = weight / weight.sum() @ v[: t + 1, group]
    x_TD = x_TD + linear(out_THK.reshape(len(ids_T), -1), "self_attn.o_proj")
    h_TD = norm(x_TD, prefix + "post_attention_layernorm.weight")
    gate = linear(h_TD, "mlp.gate_proj")
    x_TD = x_TD + linear(gate / (1 + np.exp(-gate)) * linear(h_TD, "mlp.up_proj"), "mlp.down_proj")
  head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
  return norm(x_TD, "model.norm.weight") @ head.T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_a_numpy_forward_pass(tied, tmp_path):
  config = Qwen2Config(29, 12, 20, 2, 6, 3, 4, rope_theta=100.0, tie_word_embeddings=tied)
  rng = np.random.default_rng(0)
  model = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    weights.abstract_model(config),
  )
  weights.save(model, tmp_path / "model", source=None, dtype="float32")
  ids = tokens(29)
  tensors = load_file(tmp_path / "model" / weights.SINGLE)
  assert ("lm_head.weight" in tensors) != tied
  expected = np.stack([numpy_logits(tensors, config, row) for row in ids])
  np.testing.assert_allclose(logits(model, ids), expected, atol=1e-4)


@pytest.fixture(scope="module")
def real(qwen_path, mesh) -> Qwen2:
  return read(qwen_path, mesh)


@pytest.fixture(scope="module")
def reference(real):
  """PyTorch's numbers for each chat, and our hidden states over chat + greedy continuation."""
  if not REFERENCE.exists():
    pytest.skip(f"{REFERENCE.name} is not in the shared data folder")
  data = np.load(REFERENCE)
  count = sum(name.startswith("ids_") for name in data)
  chats = [{n[:-2]: data[n] for n in data if n.endswith(f"_{i}")} for i in range(count)]
  rows = [np.concatenate([chat["ids"], chat["greedy"]]) for chat in chats]
  shape = (count, max(map(len, rows)))
  ids_BT, branch_BT = np.zeros(shape, np.int32), np.full(shape, PADDING, np.int32)
  for i, row in enumerate(rows):
    ids_BT[i, : len(row)], branch_BT[i, : len(row)] = row, CONTEXT

  @jax.jit
  def run(model, ids_BT, branch_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    hidden_BTD, _ = model(ids_BT, positions_BT, tree_attention(branch_BT))
    mask_BT = branch_BT == CONTEXT
    targets_BT = jnp.roll(ids_BT, -1, 1)
    return hidden_BTD, token_logprobs(hidden_BTD, model.unembedding(), targets_BT, mask_BT)[0]

  hidden_BTD, logprobs_BT = run(real, ids_BT, branch_BT)
  return chats, hidden_BTD, np.asarray(logprobs_BT)


@pytest.mark.slow
@pytest.mark.qwen
def test_real_weights_give_the_reference_logprobs(reference):
  chats, _, logprobs_BT = reference
  for chat, row in zip(chats, logprobs_BT, strict=True):
    expected = chat["token_logprobs"]
    np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.qwen
def test_real_weights_give_the_reference_distribution_and_greedy_tokens(real, reference):
  chats, hidden_BTD, _ = reference
  for row, chat in enumerate(chats):
    last = len(chat["ids"]) - 1
    hidden = hidden_BTD[row, last : last + len(chat["greedy"])]
    logits_TV = np.asarray(hidden @ real.unembedding().T)
    first = logits_TV[0].astype(np.float64)
    normaliser = first.max() + np.log(np.exp(first - first.max()).sum())
    np.testing.assert_allclose(normaliser, chat["last_logsumexp"], atol=1e-3)
    np.testing.assert_allclose(first[chat["last_top_ids"]], chat["last_top_logits"], atol=1e-2)
    np.testing.assert_array_equal(logits_TV.argmax(-1), chat["greedy"])


@pytest.mark.slow
@pytest.mark.qwen
def test_real_weights_survive_export_bit_for_bit(real, qwen_path, tmp_path, mesh):
  exported = tmp_path / "exported"
  weights.save(real, exported, source=qwen_path)
  with (
    safe_open(qwen_path / weights.SINGLE, "np") as before,
    safe_open(exported / weights.SINGLE, "np") as after,
  ):
    assert set(before.keys()) == set(after.keys())
    for name in before.keys():  # noqa: SIM118
      left, right = before.get_tensor(name), after.get_tensor(name)
      assert left.dtype == right.dtype
      assert np.array_equal(left.view(np.uint16), right.view(np.uint16)), name
  for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
    assert (exported / name).read_bytes() == (qwen_path / name).read_bytes()
  again = read(exported, mesh)
  assert again.config == real.config
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), real, again)))
