"""The sampling engine: a fixed set of slots over one key/value cache, driven from the host.

A request says what a slot's whole context must be, as token ids. The engine compares it with
what the slot holds, forgets what differs (a rewind is a smaller length), reads only what is
new, and samples. So callers keep no cache state, and nothing that is cached is read again.

Every device program has one of a short list of shapes (`EngineSettings.windows`,
`extend_buckets`); all are compiled by `compile`, before the first request.

On several hosts every process makes the same calls with the same arguments: what is decided
here depends only on ids and on results, which are replicated.
"""

import contextlib
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlver_jax import partitioning
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.sampling import programs
from rlver_jax.sampling.cache import CACHE_AXES, Cache
from rlver_jax.sampling.choices import Choices
from rlver_jax.sampling.compiled import DevicePrograms, calls
from rlver_jax.sampling.requests import (
  EngineSettings,
  EngineStats,
  Likelihood,
  Request,
  Sample,
  common_length,
)
from rlver_jax.sampling.sampler import Sampling


class Engine:
  """Slots with caches for one model.

  `model` is laid out for sampling (`partitioning.for_sampling`) and may be replaced (after an
  update), which empties the slots; `seed` counts modulo 2**32.
  """

  def __init__(
    self,
    model: Qwen2,
    mesh: Mesh,
    settings: EngineSettings,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int,
    choices: Choices | None = None,
  ):
    self.settings, self.stats = settings, EngineStats()
    self._mesh, self._seed, self._scores = mesh, seed % 2**32, choices is not None
    self.model = model
    self._prefix_rows = partitioning.batch_shards(mesh)
    self._cache = self._new_cache(settings.slots)
    self._prefixes = self._new_cache(self._prefix_rows)
    decode = functools.partial(
      programs.decode,
      steps=settings.decode_steps,
      sampling=sampling,
      stop_ids=tuple(sorted(set(stop_ids))),
    )
    where = jax.tree.map(lambda x: x.sharding, self._cache)
    self.programs = DevicePrograms(mesh, where, decode, choices)

  @property
  def model(self) -> Qwen2:
    return self._model

  @model.setter
  def model(self, model: Qwen2) -> None:
    self._model = model
    self.clear()  # cached keys and values are the old weights'

  # Requests.

  def clear(self) -> None:
    """Empties all slots: what they hold is forgotten, unfinished requests are dropped."""
    self._held: list[list[int]] = [[] for _ in range(self.settings.slots)]
    self._jobs: dict[int, tuple[Request, Sample]] = {}

  def prefill(self, prefixes: dict[int, Sequence[int]]) -> None:
    """Puts the given ids into these slots; ids that several slots share are read once.

    Raises ValueError, as `submit` and `score` do, for a slot with an unfinished request and for
    ids that a slot can't hold.
    """
    for slot, ids in prefixes.items():
      self._check(slot, ids, 0)
    with self._clock():
      slots_of: dict[tuple[int, ...], list[int]] = {}
      for slot, ids in prefixes.items():
        if self._held[slot][: len(ids)] != list(ids):
          slots_of.setdefault(tuple(ids), []).append(slot)
      distinct = list(slots_of)
      for first in range(0, len(distinct), self._prefix_rows):
        batch = distinct[first : first + self._prefix_rows]
        held: list[list[int]] = [[] for _ in range(self._prefix_rows)]
        self._prefixes = self._read(self._prefixes, held, dict(enumerate(batch)))
        self.stats.prefilled += sum(map(len, batch))
        source = np.full(self.settings.slots, -1, np.int32)
        for row, ids in enumerate(batch):
          for slot in slots_of[ids]:
            source[slot] = row
            self._held[slot] = list(ids)
        self._cache = self.programs.run("install", {}, self._cache, self._prefixes, source)

  def fits(self, ids: Sequence[int], new_tokens: int) -> bool:
    """Whether a slot can hold `ids` and that many tokens more."""
    return len(ids) + new_tokens <= self.settings.cache_length

  def submit(self, slot: int, request: Request) -> None:
    """Asks for a sample in a slot; one request a slot at a time."""
    self._check(slot, request.ids, request.max_new_tokens)
    if not request.ids or request.max_new_tokens < 1:
      raise ValueError(f"slot {slot} needs at least one token to go on from and one to draw")
    self._jobs[slot] = (request, Sample([], []))

  def step(self) -> dict[int, Sample]:
    """Reads what the requests need, draws up to `decode_steps` tokens for each, and returns
    the samples that are complete, by slot. The others go on at the next call."""
    if not self._jobs:
      return {}
    with self._clock():
      fresh = {s: r.ids[:-1] for s, (r, sample) in self._jobs.items() if not sample.ids}
      self._extend(fresh)
      rows = self._rows({s: self._pending(*job) for s, job in self._jobs.items()})
      numbers = np.zeros((self.settings.slots, 5), np.uint32)
      drawn, budget = np.zeros((2, self.settings.slots), np.int32)
      greedy = np.zeros(self.settings.slots, bool)
      for slot, (request, sample) in self._jobs.items():
        numbers[slot] = (self._seed, *request.numbers)
        drawn[slot], budget[slot] = len(sample.ids), request.max_new_tokens
        greedy[slot] = request.greedy
      limit = min(self.settings.decode_steps, int(np.max(budget - drawn)))
      # A row never draws past its budget, so its context never outgrows what `submit` checked.
      ends = rows["start"] + np.minimum(limit, budget - drawn)
      self._cache, result = self.programs.run(
        "decode", {"window": self._window(ends)}, self.model,
        self._cache, rows["start"], rows["pending"], numbers, drawn, budget, greedy,
        np.int32(limit),
      )  # fmt: skip
      return self._take(programs.Drawn(*(np.asarray(x) for x in result)))

  def drawn(self) -> dict[int, list[int]]:
    """The ids drawn so far for each request that is not complete, by slot."""
    return {slot: list(sample.ids) for slot, (_, sample) in self._jobs.items()}

  def score(self, contexts: dict[int, Sequence[int]]) -> dict[int, np.ndarray]:
    """Log-probability of every continuation in `choices` after each slot's context, by slot."""
    for slot, ids in contexts.items():
      self._check(slot, ids, 0)
      if not ids:
        raise ValueError(f"slot {slot} needs at least one token to go on from")
    with self._clock():
      self._extend({slot: ids[:-1] for slot, ids in contexts.items()})
      rows = self._rows({slot: ids[-1] for slot, ids in contexts.items()})
      static = {"window": self._window(rows["start"])}
      result = self.programs.run(
        "score", static, self.model, self._cache, rows["start"], rows["pending"]
      )
      self.stats.scored += len(contexts)
      logprobs = np.asarray(result)
      return {slot: logprobs[slot] for slot in contexts}

  def logprobs(self, texts: dict[int, tuple[Sequence[int], int]]) -> dict[int, Likelihood]:
    """How likely the last ids of each text are, after all that stand before them.

    texts: by slot the ids, and how many of the last ones are asked for: at least one, and fewer
      than there are. The last id itself is not read.
    """
    for slot, (ids, last) in texts.items():
      self._check(slot, ids[:-1], 0)
      if not 0 < last < len(ids):
        raise ValueError(
          f"slot {slot} is asked for {last} of {len(ids)} ids, expected some of them"
        )
    with self._clock():
      self._extend({slot: ids[: -last - 1] for slot, (ids, last) in texts.items()})
      found: dict[int, list] = {slot: [] for slot in texts}
      self._cache = self._read(
        self._cache, self._held, {slot: ids[:-1] for slot, (ids, _) in texts.items()},
        {slot: ids[1:] for slot, (ids, _) in texts.items()}, found,
      )  # fmt: skip
      self.stats.scored += sum(last for _, last in texts.values())
      return {
        slot: Likelihood(*(np.concatenate(x) for x in zip(*parts, strict=True)))
        for slot, parts in found.items()
      }

  def drop(self, slot: int) -> None:
    """Ends an unfinished request; what it drew is gone."""
    del self._jobs[slot]

  def take_stats(self) -> EngineStats:
    """The work done since the last call."""
    stats, self.stats = self.stats, EngineStats()
    return stats

  # Host side of a step.

  def _check(self, slot: int, ids: Sequence[int], new_tokens: int) -> None:
    if slot in self._jobs:
      raise ValueError(f"slot {slot} has an unfinished request")
    if not self.fits(ids, new_tokens):
      raise ValueError(
        f"slot {slot} is asked to hold {len(ids)} + {new_tokens} tokens, its cache holds "
        f"{self.settings.cache_length}"
      )

  def _pending(self, request: Request, sample: Sample) -> int:
    return sample.ids[-1] if sample.ids else request.ids[-1]

  def _rows(self, pending: dict[int, int]) -> dict[str, np.ndarray]:
    """Per-slot start and pending token; slots that take no part get start 0."""
    start, token = np.zeros((2, self.settings.slots), np.int32)
    for slot, value in pending.items():
      start[slot], token[slot] = len(self._held[slot]), value
    return {"start": start, "pending": token}

  def _take(self, drawn: programs.Drawn) -> dict[int, Sample]:
    """Books the drawn tokens and returns the samples that they complete."""
    complete = {}
    for slot, (request, sample) in list(self._jobs.items()):
      n = int(np.sum(drawn.tokens_BN[slot] >= 0))
      tokens = drawn.tokens_BN[slot, :n].tolist()
      self._held[slot] += [self._pending(request, sample), *tokens[:-1]]
      sample.ids += tokens
      sample.logprobs += drawn.logprobs_BN[slot, :n].tolist()
      sample.stopped = bool(drawn.stopped_B[slot])
      self.stats.drawn += n
      if sample.stopped or len(sample.ids) >= request.max_new_tokens:
        complete[slot] = sample
        del self._jobs[slot]
    return complete

  def _extend(self, contexts: dict[int, Sequence[int]]) -> None:
    """Makes each slot hold exactly its ids, reading only what it does not hold already."""
    for slot, ids in contexts.items():
      del self._held[slot][common_length(self._held[slot], ids) :]
    self.stats.extended += sum(len(ids) - len(self._held[s]) for s, ids in contexts.items())
    self._cache = self._read(self._cache, self._held, contexts)

  def _read(
    self,
    cache: Cache,
    held: list[list[int]],
    contexts: dict[int, Sequence[int]],
    targets: dict[int, Sequence[int]] | None = None,
    found: dict[int, list] | None = None,
  ) -> Cache:
    """Reads the rest of each context into its row of `cache`, and books it in `held`.

    With `targets`, the id after each of a context's, `found` gets what `programs.read` says of
    those that are read, a pair of arrays at a time.
    """
    while longest := max((len(ids) - len(held[r]) for r, ids in contexts.items()), default=0):
      bucket = self._bucket(longest)
      tokens, wanted = np.zeros((2, len(held), bucket), np.int32)
      start, count = np.zeros((2, len(held)), np.int32)
      for row, ids in contexts.items():
        part = ids[len(held[row]) : len(held[row]) + bucket]
        start[row], count[row] = len(held[row]), len(part)
        tokens[row, : len(part)] = part
        if targets is not None:
          wanted[row, : len(part)] = targets[row][start[row] : start[row] + len(part)]
        held[row] += part
      static = {"window": self._window(start + count)}
      if targets is None:
        cache = self.programs.run("extend", static, self.model, cache, tokens, start, count)
        continue
      cache, result = self.programs.run(
        "read", static, self.model, cache, tokens, wanted, start, count
      )
      logprobs, best = (np.asarray(x) for x in result)
      for row in contexts:
        if count[row]:
          found[row].append((logprobs[row, : count[row]], best[row, : count[row]]))
    return cache

  def _bucket(self, tokens: int) -> int:
    """How many tokens to read at a time: the most, of which at least half are needed."""
    buckets = self.settings.extend_buckets
    return max((b for b in buckets if b <= 2 * tokens), default=buckets[0])

  def _window(self, ends: np.ndarray) -> int:
    """The smallest attention window that holds positions below every end, and one more."""
    end = int(np.max(ends)) + 1
    return next((w for w in self.settings.windows if w >= end), self.settings.cache_length)

  # Device programs.

  def _new_cache(self, rows: int) -> Cache:
    c = self.model.config
    shape = (c.num_hidden_layers, rows, c.num_key_value_heads, self.settings.cache_length)
    shape += (c.head_dim,)
    where = partitioning.sharding(self._mesh, shape, CACHE_AXES)
    zeros = jax.jit(lambda: jnp.zeros(shape, c.dtype), out_shardings=where)
    return Cache(zeros(), zeros())

  def compile(self) -> int:
    """Compiles every program the settings allow, several at a time; returns how many."""
    return self.programs.compile(
      calls(self.settings, self.model, self._cache, self._prefixes, self._scores)
    )

  def cache_bytes(self) -> dict[int, int]:
    """Bytes of the cache on each addressable device."""
    return partitioning.bytes_per_device(self._cache)

  @contextlib.contextmanager
  def _clock(self):
    """Adds the time of a `with` block to the engine's seconds."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self.stats.seconds += time.perf_counter() - start
