"""A server as OpenAI-compatible ones are, on 127.0.0.1, with the faults that they have.

It answers as a simulated user would: an appraisal in the five lines, a message, an integer. What
it does with each request is decided by a function of the test's own. As a script it serves from a
process of its own, with delays and faults at random, and logs each request as a line of JSON.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import sys
import threading
import time

import builders

from rlver_jax.dialogue.remote.connection import RemoteSampling, RemoteSettings

VARIABLE = "RLVER_TEST_KEY"  # see the fixture `server`
SAMPLING = RemoteSampling(0.7, 0, 0.9)
MODEL, KEY = "user-model", "sk-test-Zm9vYmFy-0123456789"
SECTIONS = ("plan", "choice", "message", "opening")
DROP, HALF = "drop", "half"  # no answer at all; one that ends in its middle


@dataclasses.dataclass
class Call:
  """One request for a chat completion. kind: the section whose question stands last, or "" for
  another; number: how many were asked for with the same seed and kind before it."""

  kind: str
  body: dict
  number: int
  key: str
  began: float
  status: int | str = 200
  ended: float = 0.0

  @property
  def messages(self):
    return self.body["messages"]

  @property
  def helper(self) -> str:
    """The reply that is appraised or was answered last."""
    return re.findall(r"<<<\n(.*?)\n>>>", "\n".join(m["content"] for m in self.messages), re.S)[-1]


@dataclasses.dataclass
class Answer:
  """What is sent back: `text` in a completion, or `body` as it is; after `delay` seconds."""

  text: str = ""
  status: int | str = 200
  body: bytes | None = None
  headers: dict[str, str] = dataclasses.field(default_factory=dict)
  delay: float = 0.0


def usual(call: Call) -> Answer:
  """A user who is moved a little by everything."""
  labels = builders.templates()["en"].labels
  plan = "\n".join(f"{labels[f]}: {f} it is" for f in labels if f != "change")
  texts = {
    "plan": f"{plan}\n{labels['change']}: +2",
    "choice": "3",
    "message": f"Well, that is {len(call.messages)} messages now.",
    "opening": "My brother sold my bike.",
  }
  return Answer(texts.get(call.kind, "Hello."))


class Server:
  """Serves on an ephemeral port until closed; `decide` may be replaced at any time.

  calls: the requests for completions, in the order of their answers.
  """

  def __init__(self, decide=usual, models=(MODEL,), on_call=lambda call: None):
    self.decide, self.models, self.on_call = decide, models, on_call
    self.calls: list[Call] = []
    self.open_now = self.most_open = 0
    self._seen: dict[tuple, int] = {}
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024))
    self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

  def _do(self, coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

  def close(self) -> None:
    """Stops at once: connections are cut, whatever was being answered."""
    if self._loop.is_closed():
      return

    async def stop():
      self._server.close()
      tasks = asyncio.all_tasks() - {asyncio.current_task()}
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)

    self._do(stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def settled(self) -> int:
    """How many requests have been answered, once those that were under way are among them."""
    before = -1
    while before < len(self.calls):
      before = len(self.calls)
      time.sleep(0.5)
    return before

  async def _serve(self, reader, writer):
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
      while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split("\r\n")[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        key = re.search(r"(?i)^authorization: bearer (.*)$", head, re.M)
        answer = await self._answer(method, path, body, key[1].strip() if key else "")
        if answer.status == DROP:
          break
        writer.write(_bytes(answer))
        await writer.drain()
        if answer.status == HALF:
          break
    writer.transport.abort() if not self._server.is_serving() else writer.close()

  async def _answer(self, method, path, body, key) -> Answer:
    if key != KEY:
      said = {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}}
      return Answer(status=401, body=json.dumps(said).encode())
    if path == "/v1/models" and self.models is not None:
      data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.models
      ]
      return Answer(body=json.dumps({"object": "list", "data": data}).encode())
    if (method, path) != ("POST", "/v1/chat/completions"):
      return Answer(status=404, body=b'{"detail":"Not Found"}')
    asked = json.loads(body)
    if asked["model"] != MODEL:
      return Answer(status=404, body=b'{"error":{"message":"The model does not exist"}}')
    call = self._call(asked, key)
    self.open_now += 1
    self.most_open = max(self.most_open, self.open_now)
    try:
      answer = self.decide(call)
      await asyncio.sleep(answer.delay)
    finally:
      self.open_now -= 1
    if answer.body is None:
      answer.body = completion(answer.text, call)
    call.status, call.ended = answer.status, time.monotonic()
    self.calls.append(call)
    self.on_call(call)
    return answer

  def _call(self, asked: dict, key: str) -> Call:
    last = asked["messages"][-1]["content"]
    ends = {name: builders.templates()["en"].sections[name][-1][0] for name in SECTIONS}
    kind = next((name for name, end in ends.items() if last.endswith(end)), "")
    number = self._seen.get((kind, asked["seed"]), 0)
    self._seen[kind, asked["seed"]] = number + 1
    return Call(kind, asked, number, key, time.monotonic())


def settings(url: str, **changes) -> RemoteSettings:
  """Patience for tests, with these fields changed."""
  fields = {
    "section": "simulator", "model": MODEL, "api_key_env": VARIABLE, "concurrency": 8,
    "timeout": 2.0, "retries": 2, "first_wait": 0.01, "max_wait": 5.0,
    "token_budget": 0, "failure_budget": 100,
  }  # fmt: skip
  return RemoteSettings(base_url=url, **fields | changes)


def completion(text: str, call: Call, finish: str = "stop") -> bytes:
  """The body of a chat completion, its tokens counted as words."""
  prompt = sum(len(m["content"].split()) for m in call.messages)
  words = len(text.split())
  return json.dumps(
    {
      "id": "chatcmpl-1",
      "object": "chat.completion",
      "created": 0,
      "model": MODEL,
      "choices": [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
      ],
      "usage": {
        "prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words,
      },
    }
  ).encode()  # fmt: skip


def _bytes(answer: Answer) -> bytes:
  status = 200 if answer.status == HALF else answer.status
  headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}
  head = "".join(f"{k}: {v}\r\n" for k, v in (headers | answer.headers).items())
  whole = f"HTTP/1.1 {status} As Such\r\n{head}\r\n".encode() + answer.body
  return whole[: len(whole) - len(answer.body) // 2] if answer.status == HALF else whole


def faults(seed: int, share: float, delays: tuple[float, float], silence: float):
  """A `decide` with delays at random, and a share of requests that go wrong in some way.

  silence: seconds for which a request that is to time out is held.
  """
  draw = random.Random(seed)

  def decide(call: Call) -> Answer:
    delay = draw.uniform(*delays)
    if draw.random() >= share:
      return dataclasses.replace(usual(call), delay=delay)
    wrong = [
      Answer(status=429, body=b"{}", headers={"Retry-After": "1"}),
      Answer(status=500, body=b"oops", delay=delay),
      Answer(status=503, body=b"{}"),
      Answer(body=b'{"choices": [{"mess', delay=delay),
      Answer(body=b'{"choices": []}', delay=delay),
      Answer(status=HALF, text="half", delay=delay),
      Answer(status=DROP, delay=delay),
      Answer(text="too late", delay=silence),
      Answer(status=400, body=b"{}"),  # for good
    ]
    return draw.choice(wrong)

  return decide


def main() -> None:
  log, seed, share, low, high, silence = sys.argv[1:]

  def note(call: Call) -> None:
    line = {"helper": call.helper if call.kind else "", "status": call.status}
    print(json.dumps(line | {"began": call.began, "ended": call.ended}), file=file, flush=True)

  decide = faults(int(seed), float(share), (float(low), float(high)), float(silence))
  with pathlib.Path(log).open("w", encoding="utf-8") as file:
    server = Server(decide, on_call=note)
    print(server.url, flush=True)
    sys.stdin.read()  # until the test closes it
    server.close()


if __name__ == "__main__":
  main()
