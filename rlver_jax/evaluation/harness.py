"""A policy as a model of lm-evaluation-harness, over the sampling engine.

The harness asks for three things: how likely continuations are after a context, how likely a whole
text is, and what comes after a context up to a stop string. Texts are cut to what a slot holds as
the harness's own models cut them: from the left.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import transformers
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from rlver_jax.dialogue.dialogue import HELD_OUT_STEP
from rlver_jax.errors import UserError
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import Request
from rlver_jax.sampling.sampler import Sampling

BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
HARNESS_CALL = 0  # see `policy.POLICY_CALL`


class HarnessModel(TemplateLM):
  """Implements `lm_eval.api.model.LM`.

  Args:
    make_engine: gives an engine with empty slots that samples in this way.
    tokenizer: of the policy, as transformers has it: the harness writes chats as text.
    stop_ids: what ends an answer.
    max_new_tokens: of an answer, where the task does not say.
    on_round: called between steps of the engine with how many requests are done, and of how many.
  """

  backend = "causal"

  def __init__(
    self,
    make_engine: Callable[[Sampling], Engine],
    tokenizer: transformers.PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    on_round: Callable[[int, int], None],
  ):
    super().__init__()
    self.tokenizer = tokenizer
    self._make_engine, self._on_round = make_engine, on_round
    self._stop_ids, self._max_new_tokens = frozenset(stop_ids), max_new_tokens
    self._sampling = Sampling(0.0)
    self._engine = make_engine(self._sampling)

  # What the harness reads of a model.

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """What a text without a context stands after."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    return self.tokenizer.name_or_path.replace("/", "__")

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """The chat as text; the last message is left open where no answer is asked for."""
    return self.tokenizer.apply_chat_template(
      chat_history,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Ids of a text; what spells a special token is one."""
    del add_special_tokens, kwargs
    return self.tokenizer.encode(string, add_special_tokens=False)

  # How likely texts are.

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs,
  ) -> list[tuple[float, bool]]:
    """For each (what was asked, context ids, continuation ids) the log-probability of the
    continuation in nats, and whether it is the most probable one, token by token."""
    del disable_tqdm, kwargs
    longest = self._engine.settings.cache_length
    texts: list[tuple[int, list[int], int]] = []
    for number, (_, context, continuation) in enumerate(requests):
      if len(continuation) > longest:
        raise UserError(
          f"sampling.cache_length is {longest}, expected at least the {len(continuation)} tokens "
          "of a continuation that a task asks for."
        )
      texts.append((number, (context + continuation)[-longest - 1 :], len(continuation)))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    # Neighbours share the most, so each slot takes a stretch of them and forgets the least.
    texts = sorted((text for text in texts if text[2]), key=lambda text: text[1])
    share = -(-len(texts) // self._engine.settings.slots)
    queues = [
      collections.deque(texts[first : first + share]) for first in range(0, len(texts), share or 1)
    ]
    done = 0
    while any(queues):
      now = {slot: queue.popleft() for slot, queue in enumerate(queues) if queue}
      for slot, likely in self._engine.logprobs({s: t[1:] for s, t in now.items()}).items():
        number = now[slot][0]
        found[number] = (float(likely.logprobs.sum(dtype="float64")), bool(likely.best.all()))
        if (asked := requests[number][0]) is not None:
          self.cache_hook.add_partial("loglikelihood", asked, found[number])
      done += len(now)
      self._on_round(done, len(texts))
    return found

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """The log-probability of each whole text, in nats, in windows that a slot holds."""
    del disable_tqdm
    windows = [(number, w) for number, r in enumerate(requests) for w in self._windows(r.args[0])]
    found = self._loglikelihood_tokens([(None, *window) for _, window in windows])
    totals = [0.0] * len(requests)
    for (number, _), (logprob, _) in zip(windows, found, strict=True):
      totals[number] += logprob
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
    windows = utils.get_rolling_token_windows(
      token_list=self.tok_encode(text),
      prefix_token=self.prefix_token_id,
      max_seq_len=self._engine.settings.cache_length,
      context_len=1,
    )
    return map(utils.make_disjoint_window, windows)

  # What comes next.

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """The text after each context, up to a stop string, the end of the message or the budget."""
    del disable_tqdm
    found: list[str] = [""] * len(requests)
    of_sampling: dict[Sampling, list[int]] = {}
    for number, request in enumerate(requests):
      of_sampling.setdefault(sampling_of(request.args[1]), []).append(number)
    done = 0
    for sampling, numbers in of_sampling.items():
      if sampling != self._sampling:
        self._sampling, self._engine = sampling, self._make_engine(sampling)
      for number, text in self._generate({n: requests[n].args for n in numbers}):
        found[number] = text
        self.cache_hook.add_partial("generate_until", requests[number].args, text)
        done += 1
        self._on_round(done, len(requests))
    return found

  def _generate(self, asked: dict[int, tuple[str, dict]]) -> Iterator[tuple[int, str]]:
    """The answers with the numbers of their requests, as they are complete."""
    engine, longest = self._engine, self._engine.settings.cache_length
    prepared = []
    for number, (context, options) in asked.items():
      budget = budget_of(options, self._max_new_tokens)
      if budget >= longest:
        raise UserError(
          f"sampling.cache_length is {longest}, expected more than the {budget} tokens that a task "
          "asks for."
        )
      ids = self.tok_encode(context) or [self.prefix_token_id]
      prepared.append((ids[budget - longest :], budget, number, stops_of(options)))
    waiting = collections.deque(sorted(prepared, key=lambda p: p[0]))
    active: dict[int, tuple[int, list[str]]] = {}
    while waiting or active:
      for slot in range(engine.settings.slots):
        if slot not in active and waiting:
          ids, budget, number, stops = waiting.popleft()
          active[slot] = number, stops
          numbers = (HELD_OUT_STEP, number, 0, HARNESS_CALL)
          engine.submit(slot, Request(tuple(ids), numbers, budget))
      complete = {slot: sample.ids for slot, sample in engine.step().items()}
      unfinished = engine.drawn()
      for slot, (number, stops) in list(active.items()):
        ids = complete.get(slot)
        text = self._text(unfinished[slot] if ids is None else ids)
        kept = cut(text, stops)
        if ids is None and kept == text:
          continue
        if ids is None:
          engine.drop(slot)
        del active[slot]
        yield number, kept

  def _text(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(
      [i for i in ids if i not in self._stop_ids], skip_special_tokens=True
    )


def sampling_of(options: dict[str, Any]) -> Sampling:
  """How a task wants an answer drawn; greedily where it does not say."""
  temperature = float(options.get("temperature") or 0.0)
  if not options.get("do_sample", temperature > 0):
    return Sampling(0.0)
  return Sampling(
    temperature or 1.0, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
  )


def budget_of(options: dict[str, Any], default: int) -> int:
  """The most tokens of an answer: the first of the names that tasks have for it."""
  return int(next((options[name] for name in BUDGETS if options.get(name) is not None), default))


def stops_of(options: dict[str, Any]) -> list[str]:
  """The stop strings of a task."""
  until = options.get("until") or []
  return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of the stop strings that it holds."""
  return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
