"""Small real components that several test modules share, and the references they are held to."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax import partitioning
from rlver_jax import tokenizer as tokenizer_lib
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.models import source, weights
from rlver_jax.models.attention import tree_attention
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config
from rlver_jax.sampling.engine import Engine

SCENARIOS = {
  "en": Scenario(
    id="bike",
    persona="Mara, 34, repairs bicycles and talks in short sentences.",
    background="Her brother sold the old bike without asking. She found out on Sunday.",
    character="passive",
    traits=("quiet", "proud"),
    task="You want the helper to truly listen.",
    first_message="My brother sold my bike.",
  ),
  "zh": Scenario(
    id="自行车",
    persona="小马，三十四岁，修自行车，话不多。",
    background="弟弟没打招呼就卖掉了她的旧车。",
    character="消极型",
    traits=("安静", "要强"),
    task="你希望对方能够倾听你",
    first_message="我弟把我的车卖了。",
  ),
}


def scenario(language: str = "en", **changes) -> Scenario:
  """A short scenario of one language; `changes` replace fields."""
  return dataclasses.replace(SCENARIOS[language], **changes)


@functools.cache
def templates() -> dict[str, templates_lib.Templates]:
  return {language: templates_lib.load(language) for language in SCENARIOS}


@functools.cache
def tokenizer() -> tokenizer_lib.Tokenizer:
  """The embedded tokenizer."""
  return _embedded().tokenizer


@functools.cache
def _embedded() -> source.ModelSource:
  return source.open_source("tiny", "policy.path", dtype="float32", param_dtype="float32")


def tokenizer_with(directory: pathlib.Path, *tokens: str) -> tokenizer_lib.Tokenizer:
  """The embedded tokenizer with further ordinary tokens, spelled as the byte-level alphabet does.

  Encoding a text never gives one of them; a model may sample them, and they are decoded.
  """
  spec = json.loads(tokenizer()._full.to_str())
  first = tokenizer().vocab_size
  spec["model"]["vocab"] |= {token: first + i for i, token in enumerate(tokens)}
  for file in source.tokenizer_directory(_embedded()).iterdir():
    if file.is_file():
      (directory / file.name).write_bytes(file.read_bytes())
  (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
  return tokenizer_lib.load(directory)


@functools.cache
def mesh() -> jax.sharding.Mesh:
  return partitioning.make_mesh(1, 1, 1)


def model(vocab_size: int, seed: int = 0, **changes) -> Qwen2:
  """A model of 2 layers with grouped heads whose logits depend strongly on the whole context."""
  sizes = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10_000.0,
    "initializer_range": 0.3,
    "max_position_embeddings": 4096,
    "remat": "none",
  }
  return weights.initialise(Qwen2Config(vocab_size, **(sizes | changes)), seed, mesh())


def chain_model(vocab_size: int, chains: list[list[int]], sharpness: float, seed: int = 0) -> Qwen2:
  """A model that likes to go on from each token of a chain with the next one.

  `sharpness` is about the logit of that next token, where all others are about 0. The layers
  are those of a random model, scaled down so that the last token decides.
  """
  base = model(vocab_size, seed, hidden_size=64, initializer_range=0.05)
  embed = np.random.default_rng(seed).normal(size=(vocab_size, 64)).astype(np.float32)
  head = np.array(base.head[...])
  for chain in chains:
    for token, following in zip(chain, chain[1:], strict=False):
      head[following] += sharpness * embed[token] / np.sum(embed[token] ** 2) * 8 / 8
  base.embed[...], base.head[...] = jnp.asarray(embed), jnp.asarray(head)
  return base


@jax.jit
def _logits(model: Qwen2, tokens_1T: jax.Array) -> jax.Array:
  positions = jnp.arange(tokens_1T.shape[1])[None]
  hidden_1TD, _ = model(tokens_1T, positions, tree_attention(jnp.zeros_like(tokens_1T)))
  return hidden_1TD[0] @ model.unembedding().T


def full_logprobs(model: Qwen2, ids, temperature: float = 1.0) -> np.ndarray:
  """Log-probabilities [T, V] after each of the ids, from one pass over all of them.

  Padded on the right to few lengths, which a causal pass does not see.
  """
  padded = np.zeros((1, -(-len(ids) // 128) * 128), np.int32)
  padded[0, : len(ids)] = ids
  return log_softmax(np.asarray(_logits(model, padded), np.float64)[: len(ids)] / temperature)


def sequence_logprobs(model: Qwen2, context, ids, temperature: float = 1.0) -> np.ndarray:
  """Log-probability of each of `ids` when they follow `context`, from one pass over both."""
  logprobs = full_logprobs(model, [*context, *ids], temperature)
  return logprobs[np.arange(len(context) - 1, len(context) + len(ids) - 1), list(ids)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, in float64."""
  logits = np.asarray(logits, np.float64)
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


class RecordingEngine(Engine):
  """An engine that keeps what it was asked and what it answered.

  asked: (slot, context, numbers) of each request; samples: each complete sample with its slot;
  scored: (slot, context, log-probabilities) of each row that was scored.
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.asked, self.samples, self.scored = [], [], []

  def submit(self, slot, request):
    super().submit(slot, request)
    self.asked.append((slot, request.ids, request.numbers))

  def step(self):
    samples = super().step()
    self.samples += samples.items()
    return samples

  def score(self, contexts):
    answers = super().score(contexts)
    self.scored += [(slot, tuple(contexts[slot]), row) for slot, row in answers.items()]
    return answers
