"""Calls to an OpenAI-compatible server: bounded, timed, retried and counted.

The calls run in an event loop of their own thread, so that they wait on the network while the
devices work. There is one policy of retries, ours; the client's own is switched off. The key is
read from the environment and held by the client alone; no error quotes a server's text, which
might quote the key, but for the names of its models.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import datetime
import email.utils
import math
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import openai

from rlver_jax.errors import UserError

Message = dict[str, str]
Result = TypeVar("Result")
_THOUGHT = re.compile(r"\A\s*<think>.*?(</think>|\Z)", re.DOTALL)
PASSING = (408, 409, 425, 429)  # statuses worth another try, besides all from 500
MOST_TOKENS = 2**40  # of one call; a server that says more counts nothing
CHECK_RETRIES, CHECK_TIMEOUT = 2, 30.0  # most of either before a run starts


@dataclasses.dataclass(frozen=True)
class RemoteSettings:
  """The fields of the section `remote` of `section`; configs/recipe.py explains them."""

  section: str  # simulator or policy
  base_url: str
  model: str
  api_key_env: str
  concurrency: int
  timeout: float
  retries: int
  first_wait: float
  max_wait: float
  token_budget: int
  failure_budget: int


@dataclasses.dataclass(frozen=True)
class RemoteSampling:
  """As `sampling.sampler.Sampling`; a top_k of 0 is not sent, as not every server knows it."""

  temperature: float
  top_k: int
  top_p: float


@dataclasses.dataclass(frozen=True)
class Completion:
  """What the server's model wrote, how many tokens it took for that (0: it did not say), and
  whether the limit cut it off."""

  text: str
  tokens: int
  cut: bool = False


class Fault(NamedTuple):
  """What went wrong, in our own words; the HTTP status, None where nothing was answered; whether
  it may pass; the seconds until then that the server asks for."""

  reason: str
  status: int | None
  passing: bool
  wait: float = 0.0


class CallFailed(Exception):
  """A call that is given up; `status` is as in `Fault`."""

  def __init__(self, reason: str, status: int | None = None):
    super().__init__(reason)
    self.status = status


class Unreadable(CallFailed):
  """The server answered as often as it was asked, with nothing that can be read."""


class OutOfTokens(CallFailed):
  """The run's budget of tokens is spent; no call of this user's has failed."""


def read_key(settings: RemoteSettings) -> str:
  """The key from the environment; UserError where there is none that a request can carry."""
  name = settings.api_key_env
  where = f"{settings.section}.remote.api_key_env names the environment variable {name}"
  expected = "expected the server's key (any word for a server that wants none)."
  if name not in os.environ:
    raise UserError(f"{where}, which is not set, {expected}")
  key = os.environ[name].strip()
  if not key:
    raise UserError(f"{where}, which is empty, {expected}")
  if not (key.isascii() and key.isprintable() and " " not in key):
    raise UserError(f"{where}, which holds characters that no HTTP header can carry, {expected}")
  return key


class Connection:
  """A client in a background thread, and the counts of what it did.

  counts: requests (each try), retries (tries after the first of a call), prompt_tokens and
  completion_tokens as the server reports them, without_usage (answers that report none).
  """

  def __init__(self, settings: RemoteSettings, sampling: RemoteSampling, key: str):
    self.settings = settings
    self.counts: collections.Counter[str] = collections.Counter()
    self._sampling = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.top_k:
      self._sampling["extra_body"] = {"top_k": sampling.top_k}
    self._client = openai.AsyncOpenAI(
      api_key=key, base_url=settings.base_url, timeout=settings.timeout, max_retries=0
    )
    self._room = asyncio.Semaphore(settings.concurrency)
    self._jitter = random.Random()
    self._calls: set[concurrent.futures.Future] = set()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
    self._thread.start()

  def spawn(self, call: Coroutine) -> concurrent.futures.Future:
    """Starts a coroutine in the background."""
    future = asyncio.run_coroutine_threadsafe(call, self._loop)
    self._calls.add(future)
    future.add_done_callback(self._calls.discard)
    return future

  def cancel(self) -> None:
    """Drops all that was started and is not done."""
    for future in list(self._calls):
      future.cancel()

  def close(self) -> None:
    """Drops all calls and ends the thread."""
    if self._loop.is_closed():
      return
    asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  async def _shut(self) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await self._client.close()

  def tokens(self) -> int:
    """Tokens spent so far."""
    return self.counts["prompt_tokens"] + self.counts["completion_tokens"]

  async def chat(
    self, messages: list[Message], max_tokens: int, seed: int, *, keep_thought: bool = False
  ) -> Completion:
    """The model's next message; raises CallFailed when the call is given up.

    keep_thought: a thought that stands in the text before the message is a part of it.
    """

    async def call() -> Completion:
      response = await self._client.chat.completions.create(
        model=self.settings.model,
        messages=messages,
        max_tokens=max_tokens,
        seed=seed,
        **self._sampling,
      )
      tokens = self._count(getattr(response, "usage", None))
      text = _text(response, keep_thought)
      return Completion(text, tokens, response.choices[0].finish_reason == "length")

    return await self._retrying(call)

  def _count(self, usage: Any) -> int:
    """Books what the server says that an answer took; returns the completion's tokens."""
    prompt, completion = (
      n if isinstance(n := getattr(usage, name, None), int) and 0 <= n < MOST_TOKENS else None
      for name in ("prompt_tokens", "completion_tokens")
    )
    self.counts["without_usage"] += prompt is None or completion is None
    self.counts["prompt_tokens"] += prompt or 0
    self.counts["completion_tokens"] += completion or 0
    return completion or 0

  async def _retrying(self, call: Callable[[], Awaitable[Result]]) -> Result:
    """What `call` returns, tried again after faults that may pass."""
    s = self.settings
    for tried in range(s.retries + 1):
      async with self._room:  # not held while waiting to try again
        if s.token_budget and self.tokens() >= s.token_budget:
          raise OutOfTokens("the budget of tokens is spent")
        self.counts["requests"] += 1
        self.counts["retries"] += tried > 0
        try:
          async with asyncio.timeout(s.timeout):  # the client's own limit is for each read
            return await call()
        except Exception as error:
          fault = _fault(error, s.timeout)
      if not fault.passing:
        raise CallFailed(fault.reason, fault.status)
      if tried < s.retries:
        await asyncio.sleep(self._pause(tried, fault.wait))
    again = f", also after {s.retries} more tries" if s.retries else ""
    raise CallFailed(fault.reason + again, fault.status)

  def _pause(self, tried: int, asked: float) -> float:
    """Seconds before the next try: doubling, jittered, no less than the server asked for."""
    s = self.settings
    doubled = min(s.first_wait * 2**tried, s.max_wait) * self._jitter.uniform(0.5, 1.0)
    return min(max(doubled, asked * self._jitter.uniform(1.0, 1.1)), s.max_wait)

  async def check(self) -> None:
    """Raises UserError where the server cannot be reached, refuses the key or lacks the model."""
    s = self.settings
    try:
      known = await self._retrying(self._models)
    except CallFailed as failure:
      if failure.status is None:
        raise UserError(
          f"{s.section}.remote.base_url is '{s.base_url}', where no server answers "
          f"({failure}), expected the address of an OpenAI-compatible server."
        ) from None
      known = []  # not every server has such a list
    if s.model in known:
      return
    try:
      await self.chat([{"role": "user", "content": "Hello."}], max_tokens=1, seed=0)
    except CallFailed as failure:
      if failure.status in (401, 403):
        raise UserError(
          f"{s.section}.remote.api_key_env names the environment variable {s.api_key_env}, whose "
          f"key the server at {s.base_url} refuses ({failure}), expected one that it takes."
        ) from None
      if failure.status in (400, 404, 422):
        some = f" (it lists {', '.join(sorted(known)[:5])})" if known else ""
        raise UserError(
          f"{s.section}.remote.model is '{s.model}', which the server at {s.base_url} does not "
          f"serve ({failure}), expected one of its models{some}."
        ) from None
      if failure.status != 429:  # busy, but there
        raise UserError(
          f"{s.section}.remote.base_url is '{s.base_url}', where a short question fails "
          f"({failure}), expected a server that answers it."
        ) from None

  async def _models(self) -> list[str]:
    """The names in the server's list of models."""
    page = await self._client.models.list()
    names = [getattr(model, "id", None) for model in getattr(page, "data", None) or []]
    return [n[:60] for n in names if isinstance(n, str) and self._client.api_key not in n]


def check(settings: RemoteSettings, sampling: RemoteSampling) -> None:
  """Raises UserError where key, server or model will not do; sends one or two small requests."""
  short = dataclasses.replace(
    settings,
    retries=min(settings.retries, CHECK_RETRIES),
    timeout=min(settings.timeout, CHECK_TIMEOUT),
    token_budget=0,
  )
  connection = Connection(short, sampling, read_key(settings))
  try:
    connection.spawn(connection.check()).result()
  finally:
    connection.close()


def _text(response: Any, keep_thought: bool) -> str:
  """The text of a chat completion, "" where the model wrote none; ValueError for anything else.

  A thought before it, which some servers leave in the text, is nobody's to read, unless asked for.
  """
  try:
    text = response.choices[0].message.content
  except (AttributeError, IndexError, KeyError, TypeError) as error:
    raise ValueError("no chat completion") from error
  if text is not None and not isinstance(text, str):
    raise ValueError("no chat completion")
  text = text or ""
  if not keep_thought:
    text = _THOUGHT.sub("", text)
  # Lone surrogates, which JSON can spell, would fail wherever the text is written.
  return text.encode("utf-8", "replace").decode("utf-8").strip()


def _fault(error: Exception, timeout: float) -> Fault:
  """Raises `error` again where it is none of those that a server can cause."""
  match error:
    case openai.APIStatusError():
      status, wait = error.status_code, _retry_after(error.response.headers.get("retry-after"))
      return Fault(f"HTTP {status}", status, status in PASSING or status >= 500, wait)
    case openai.APITimeoutError() | TimeoutError():
      return Fault(f"no answer within {timeout:g} s", None, True)
    case openai.APIConnectionError():
      return Fault("no connection", None, True)
    # Of JSON, pydantic or `_text`.
    case openai.APIResponseValidationError() | ValueError() | RecursionError():
      return Fault("an answer that cannot be read", 200, True)
  raise error


def _retry_after(value: str | None) -> float:
  """Seconds that a Retry-After header asks for: a number or a date; 0 where it is neither."""
  try:
    seconds = float(value or 0)
  except ValueError:
    try:
      date = email.utils.parsedate_to_datetime(value)
      seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (OverflowError, TypeError, ValueError):
      return 0.0
  return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
