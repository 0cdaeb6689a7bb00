"""Small real components that several test modules share, and the references they are held to."""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax import partitioning
from rlver_jax import tokenizer as tokenizer_lib
from rlver_jax.assets.build_tokenizer import TINY_TOKENIZER
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators import language_model
from rlver_jax.models import weights
from rlver_jax.models.attention import tree_attention
from rlver_jax.models.qwen2 import Qwen2, Qwen2Config
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import EngineSettings, Sample
from rlver_jax.sampling.sampler import Sampling

# Tokens that a model may sample, in the byte-level alphabet (Ċ is a line break, Ġ a space, ä the
# first byte of 你): marks of a thought cut in the middle or glued to what follows.
EXTRA = ("<th", "ink>", "</thi", "nk>", "nk>Hi", "nk>ĊĊ", "nk>Ġ", "nk>ä", "nk>HiĠ", "think>")
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


def package_template(language: str) -> str:
  """The text of the package's template file."""
  folder = importlib.resources.files("rlver_jax.dialogue") / "prompts"
  return (folder / f"{language}.txt").read_text(encoding="utf-8")


@functools.cache
def tokenizer() -> tokenizer_lib.Tokenizer:
  """The embedded tokenizer with the tokens of `EXTRA`, which encoding a text never gives."""
  spec = json.loads((TINY_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
  vocabulary = spec["model"]["vocab"]
  vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(EXTRA)}
  for i, token in enumerate(spec["added_tokens"]):
    token["id"] = len(vocabulary) + i
  with tempfile.TemporaryDirectory() as directory:
    shutil.copytree(TINY_TOKENIZER, directory, dirs_exist_ok=True)
    pathlib.Path(directory, "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    loaded = tokenizer_lib.load(directory)
  assert min(loaded.special_ids) == len(vocabulary)
  return loaded


def ids(*pieces: str) -> list[int]:
  """The ids of these pieces, each a token of `EXTRA` or a text to be encoded."""
  vocabulary = tokenizer()._plain.get_vocab()
  encoded = ([vocabulary[p]] if p in EXTRA else tokenizer().encode(p) for p in pieces)
  return [i for piece in encoded for i in piece]


@functools.cache
def mesh() -> jax.sharding.Mesh:
  return partitioning.make_mesh(1, 1, 1)


def model(vocab_size: int, hidden_size: int = 32, scale: float = 0.3) -> Qwen2:
  """A model of 2 layers with grouped heads whose logits depend strongly on the whole context."""
  config = Qwen2Config(
    vocab_size,
    hidden_size=hidden_size,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
    max_position_embeddings=4096,
    remat="none",
  )
  random = np.random.default_rng(0)

  def fill(path, leaf):
    is_norm = "norm" in jax.tree_util.keystr(path)
    value = random.normal(is_norm, 0.2 if is_norm else scale, leaf.shape)
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, weights.abstract_model(config))


@functools.cache
def _text_model() -> Qwen2:
  return model(tokenizer().vocab_size, hidden_size=64, scale=0.2)


def text_model(reverse: bool = False) -> Qwen2:
  """A random model over the tokenizer's vocabulary that samples special tokens now and then.

  reverse: another one, of the same numbers in another order.
  """
  random = jax.tree.map(lambda x: x[..., ::-1] if reverse else x, _text_model())
  special = np.array(sorted(tokenizer().special_ids))
  random.head[...] = random.head[...].at[special].multiply(2.5)
  return random


def chain_model(*chains: tuple[float, list[int]]) -> Qwen2:
  """A model of the sizes of `text_model` that, as a rule, goes on as its chains do.

  Each chain is (logit, ids): after one of its ids that is about the logit of the next one,
  where those of other tokens are about 0 to 1. The layers' outputs are scaled down, so that the
  last token decides; where chains fork, their logits do.
  """
  copy = text_model()
  random = np.random.default_rng(0)
  embed = random.normal(size=copy.embed[...].shape).astype(np.float32)
  head = 0.03 * random.normal(size=embed.shape).astype(np.float32)
  for logit, chain in chains:
    for token, following in itertools.pairwise(chain):
      head[following] += logit * embed[token] / np.sum(embed[token] ** 2)
  copy.embed[...], copy.head[...] = jnp.asarray(embed), jnp.asarray(head)
  copy.norm[...] = jnp.ones_like(copy.norm[...])
  copy.layers.o[...] *= 0.02
  copy.layers.down[...] *= 0.02
  return copy


@functools.partial(jax.jit, static_argnames="tail")
def _tail_logits(model: Qwen2, tokens_BT: jax.Array, start: jax.Array, tail: int) -> jax.Array:
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  hidden_BTD, _ = model(tokens_BT, positions_BT, tree_attention(jnp.zeros_like(tokens_BT)))
  hidden_BtD = jax.lax.dynamic_slice_in_dim(hidden_BTD, start, tail, 1)
  return hidden_BtD @ model.unembedding().T


def sequence_logprobs(model: Qwen2, context, *continuations, temperature=1.0) -> list[np.ndarray]:
  """Log-probability of each id of each continuation after the context.

  From passes over context and continuation as a whole, one row each, without any cache. Rows
  are padded on the right to few lengths, which a causal pass does not see.
  """
  logprobs = _next_logprobs(model, context, continuations, temperature)
  return [row[np.arange(len(ids)), ids] for row, ids in zip(logprobs, continuations, strict=True)]


def best_logprobs(model: Qwen2, context, continuation, temperature=1.0) -> np.ndarray:
  """As `sequence_logprobs`, of the most probable token in place of each of the continuation's."""
  (logprobs,) = _next_logprobs(model, context, [continuation], temperature)
  return logprobs[: len(continuation)].max(-1)


def _next_logprobs(model: Qwen2, context, continuations, temperature) -> np.ndarray:
  first, tail = len(context) - 1, 32
  tokens = np.zeros((len(continuations), -(-(first + tail) // 256) * 256), np.int32)
  for row, ids in zip(tokens, continuations, strict=True):
    row[: len(context) + len(ids)] = [*context, *ids]
  return log_softmax(np.asarray(_tail_logits(model, tokens, first, tail)) / temperature)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, in float64."""
  logits = np.asarray(logits, np.float64)
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def text_engine(role: str, slots: int = 4, decode_steps: int = 48) -> "RecordingEngine":
  """An engine for texts, compiled once for all tests that share it: call `fresh` before use.

  role: "policy" or "simulator", which also scores the integers -10..10.
  """
  return _text_engine(role, slots, decode_steps)


@functools.cache
def _text_engine(role: str, slots: int, decode_steps: int) -> "RecordingEngine":
  is_simulator = role == "simulator"
  engine = RecordingEngine(
    text_model(reverse=is_simulator),
    mesh(),
    EngineSettings(slots, windows=(1024,), extend_buckets=(128,), decode_steps=decode_steps),
    Sampling(),
    tokenizer().chat.stop_ids,
    0,
    language_model.change_choices(tokenizer()) if is_simulator else None,
  )
  engine.compile()
  return engine


class RecordingEngine(Engine):
  """An engine that keeps what it was asked and what it answered.

  asked: (slot, context, numbers, most new tokens) of each request; greedy: the numbers of those
  that were greedy; samples: (slot, sample) of each complete sample; scored: (slot, context,
  log-probabilities) of each row that was scored. write: given the numbers of a request, the text
  to take in place of what was drawn, ended as a message is; None, of it or for it: what was drawn.
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.first_model = self.model
    self.fresh()

  def fresh(self, model: Qwen2 | None = None) -> "RecordingEngine":
    """Forgets everything, and takes `model` or else the one that it was made with."""
    self.model = model or self.first_model
    self.asked, self.greedy, self.samples, self.scored = [], [], [], []
    self.write = None
    self.take_stats()
    return self

  def submit(self, slot, request):
    super().submit(slot, request)
    self.asked.append((slot, request.ids, request.numbers, request.max_new_tokens))
    self.greedy += [request.numbers] * request.greedy

  def step(self):
    samples = super().step()
    if self.write:
      samples = {slot: self._written(slot, sample) for slot, sample in samples.items()}
    self.samples += samples.items()
    return samples

  def _written(self, slot, drawn):
    numbers = next(numbers for at, _, numbers, _ in reversed(self.asked) if at == slot)
    if (text := self.write(numbers)) is None:
      return drawn
    ids = [*tokenizer().encode(text), tokenizer().chat.assistant_end[0]]
    return Sample(ids, [0.0] * len(ids), stopped=True)

  def score(self, contexts):
    answers = super().score(contexts)
    self.scored += [(slot, tuple(contexts[slot]), row) for slot, row in answers.items()]
    return answers
