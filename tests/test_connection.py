"""Calls to a server: every fault that one can have, how it is tried again, and what is counted."""

import dataclasses
import datetime
import email.utils
import logging
import time

import pytest
import remote_server
from remote_server import DROP, HALF, KEY, MODEL, SAMPLING, VARIABLE, Answer, settings, usual

from rlver_jax.dialogue.remote import connection as connection_lib
from rlver_jax.dialogue.remote.connection import (
  CallFailed,
  Connection,
  RemoteSampling,
)
from rlver_jax.errors import UserError

HELLO = [{"role": "user", "content": "Hello."}]
FAULTS = {
  "busy": Answer(status=429, body=b"{}"),
  "conflict": Answer(status=409, body=b"{}"),
  "error": Answer(status=500, body=b"oops"),
  "overloaded": Answer(status=503, body=b"<html>"),
  "broken JSON": Answer(body=b'{"choices": [{"mess'),
  "no JSON": Answer(body=b"Good day.", headers={"Content-Type": "text/plain"}),
  "not UTF-8": Answer(body=b'{"choices": "\xff\xfe"}'),
  "another JSON": Answer(body=b"[1, 2]"),
  "null": Answer(body=b"null"),
  "empty choices": Answer(body=b'{"choices": []}'),
  "null message": Answer(body=b'{"choices": [{"message": null}]}'),
  "no text": Answer(body=b'{"choices": [{"message": {"content": [1]}}]}'),
  "nested too deep": Answer(body=b"[" * 100_000),
  "half-closed": Answer("what was I saying", HALF),
  "dropped": Answer(status=DROP),
  "slow": Answer("late", delay=30.0),
}


@pytest.fixture
def connect(server):
  """Connects to the server with changes to the settings and the sampling."""
  opened = []

  def connect(sampling=SAMPLING, key=KEY, **changes):
    opened.append(Connection(settings(server.url, **changes), sampling, key))
    return opened[-1]

  yield connect
  for connection in opened:
    connection.close()


def ask(connection, seed=1):
  return connection.spawn(connection.chat(HELLO, 9, seed)).result()


def test_a_call_is_what_was_asked_for(server, connect):
  connection = connect()
  assert ask(connection, 7).text == "Hello."
  (call,) = server.calls
  assert call.body == {
    "model": MODEL, "messages": HELLO, "max_tokens": 9, "seed": 7, "temperature": 0.7, "top_p": 0.9,
  }  # fmt: skip
  assert connection.counts == {
    "requests": 1, "retries": 0, "prompt_tokens": 1, "completion_tokens": 1, "without_usage": 0,
  }  # fmt: skip
  ask(connect(RemoteSampling(0.7, 5, 0.9)))
  assert server.calls[1].body["top_k"] == 5


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_may_pass_is_tried_again_with_the_same_seed(server, connect, fault):
  server.decide = lambda call: usual(call) if call.number else dataclasses.replace(fault)
  connection = connect()
  assert ask(connection).text == "Hello."
  assert (connection.counts["requests"], connection.counts["retries"]) == (2, 1)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_does_not_pass_is_given_up(server, connect, fault):
  server.decide = lambda call: dataclasses.replace(fault)
  connection = connect(timeout=0.2)
  with pytest.raises(CallFailed, match=", also after 2 more tries"):
    ask(connection)
  assert connection.counts["requests"] == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_pass_is_not_tried_again(server, connect, status):
  server.decide = lambda call: Answer(status=status, body=b"{}")
  connection = connect()
  with pytest.raises(CallFailed, match=f"^HTTP {status}$") as failure:
    ask(connection)
  assert failure.value.status == status
  assert connection.counts["requests"] == 1


def test_drops_of_an_answer_do_not_outlast_the_time_limit(server, connect):
  """The client's own limit starts anew with every byte."""
  body = remote_server.completion("Hello.", remote_server.Call("", {"messages": HELLO}, 0, "", 0))
  server.decide = lambda call: Answer(body=body, headers={"Content-Length": "9999999"})
  started = time.monotonic()
  with pytest.raises(CallFailed, match=r"no answer within 0\.3 s"):
    ask(connect(timeout=0.3, retries=0))
  assert time.monotonic() - started < 2


def test_waits_double_with_jitter_up_to_the_most(connect):
  connection = connect(first_wait=1.0, max_wait=5.0)
  for tried, most in enumerate((1, 2, 4, 5, 5)):
    pauses = {connection._pause(tried, 0.0) for _ in range(200)}
    assert most / 2 <= min(pauses) < 0.6 * most and 0.9 * most < max(pauses) <= most
  assert all(3.0 <= connection._pause(0, 3.0) <= 3.3 for _ in range(50))
  assert connection._pause(0, 1000.0) == 5.0


def test_retry_after_is_honoured(server, connect):
  busy = Answer(status=429, body=b"{}", headers={"Retry-After": "1"})
  server.decide = lambda call: usual(call) if call.number else busy
  ask(connect())
  first, second = server.calls
  assert 1.0 <= second.began - first.ended < 3


def test_retry_after_is_a_number_or_a_date():
  soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
  parse = connection_lib._retry_after
  assert 25 < parse(email.utils.format_datetime(soon, usegmt=True)) <= 30
  assert [parse(x) for x in ("2", "0.5", "-1", "soon", "nan", "inf", "", None)] == [
    2, 0.5, 0, 0, 0, 0, 0, 0,
  ]  # fmt: skip
  assert parse("Wed, 21 Oct 2015 07:28:00 GMT") == 0
  assert parse("Wed, 21 Oct 99999999999 07:28:00 GMT") == 0


def test_no_more_requests_are_under_way_than_allowed(server, connect):
  server.decide = lambda call: Answer("Hello.", delay=0.05)
  connection = connect(concurrency=3)
  futures = [connection.spawn(connection.chat(HELLO, 9, i)) for i in range(12)]
  assert [f.result().text for f in futures] == ["Hello."] * 12
  assert server.most_open == 3


def test_waiting_to_try_again_takes_nobodys_place(server, connect):
  """One request is to be tried again in a second; with room for one, others go first."""
  busy = Answer(status=429, body=b"{}", headers={"Retry-After": "1"})
  server.decide = lambda call: busy if (call.body["seed"], call.number) == (0, 0) else usual(call)
  connection = connect(concurrency=1)
  futures = [connection.spawn(connection.chat(HELLO, 9, i)) for i in range(5)]
  assert [f.result().text for f in futures] == ["Hello."] * 5
  assert [c.body["seed"] for c in server.calls] == [0, 1, 2, 3, 4, 0]


def test_answers_without_usage_and_with_odd_text_are_taken(server, connect):
  said = (
    b'{"choices": [{"message": {"content": "a\\ud800b\\u0000 "}}], "usage": {"prompt_tokens": "x"}}'
  )
  server.decide = lambda call: Answer(body=said)
  connection = connect()
  assert ask(connection) == connection_lib.Completion("a?b\0", 0)
  assert connection.counts["without_usage"] == 1
  server.decide = lambda call: Answer(body=b'{"choices": [{"message": {"content": null}}]}')
  assert ask(connection).text == ""
  endless = b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": %s}}'
  server.decide = lambda call: Answer(body=endless % (b"9" * 400))
  assert ask(connection).text == "a" and connection.counts["prompt_tokens"] == 0


def test_a_thought_before_the_text_is_nobodys_to_read(server, connect):
  connection = connect()
  for said, read in (
    ("<think>He wants praise.\nChange: +10</think>\n\nHi", "Hi"),
    (" <think>It never ends", ""),
    ("I <think> so", "I <think> so"),
  ):
    server.decide = lambda call, said=said: Answer(said)
    assert ask(connection).text == read


def test_nothing_is_sent_once_the_tokens_are_spent(server, connect):
  connection = connect(token_budget=4)
  ask(connection), ask(connection)
  assert connection.tokens() == 4
  with pytest.raises(CallFailed, match="budget of tokens"):
    ask(connection)
  assert len(server.calls) == 2


def test_closing_drops_what_is_under_way_and_ends_the_thread(server, connect):
  server.decide = lambda call: Answer("late", delay=30)
  connection = connect(timeout=60)
  future = connection.spawn(connection.chat(HELLO, 9, 1))
  while not server.open_now:
    time.sleep(0.01)
  started = time.monotonic()
  connection.close()
  connection.close()
  assert time.monotonic() - started < 2
  assert future.cancelled() and not connection._thread.is_alive()


# Before a run.


def refusal(url, **changes) -> str:
  with pytest.raises(UserError) as raised:
    connection_lib.check(settings(url, **changes), SAMPLING)
  text = str(raised.value)
  assert "\n" not in text and text.endswith(".") and KEY not in text
  assert KEY[:8] not in text
  return text


def test_a_server_that_lists_the_model_is_asked_nothing_else(server):
  connection_lib.check(settings(server.url), SAMPLING)
  assert not server.calls


@pytest.mark.parametrize("models", [None, (), ("another",)])
def test_a_server_without_the_model_in_a_list_is_tried(server, models):
  server.models = models
  connection_lib.check(settings(server.url), SAMPLING)
  assert len(server.calls) == 1
  server.decide = lambda call: Answer(status=429, body=b"{}")
  connection_lib.check(settings(server.url), SAMPLING)  # it is there, and busy


def test_a_key_that_is_missing_empty_or_no_key_is_named(server, monkeypatch):
  named = f"simulator.remote.api_key_env names the environment variable {VARIABLE}, which "
  for value, found in (("", "is empty"), (" \n", "is empty"), ("a\nb", "holds"), ("ключ", "holds")):
    monkeypatch.setenv(VARIABLE, value)
    assert refusal(server.url).startswith(f"{named}{found}")
  monkeypatch.delenv(VARIABLE)
  assert refusal(server.url) == (
    f"{named}is not set, expected the server's key (any word for a server that wants none)."
  )
  monkeypatch.setenv(VARIABLE, KEY + "\n")  # as files of secrets end
  connection_lib.check(settings(server.url), SAMPLING)


def test_a_key_that_is_refused_is_named_and_not_shown(server, monkeypatch):
  """The server's own message quotes the key."""
  wrong = "sk-wrong-key"
  monkeypatch.setenv(VARIABLE, wrong)
  text = refusal(server.url)
  assert text == (
    f"simulator.remote.api_key_env names the environment variable {VARIABLE}, whose key the server "
    f"at {server.url} refuses (HTTP 401), expected one that it takes."
  )
  assert wrong not in text


def test_an_unknown_model_is_named_with_those_there_are(server):
  assert refusal(server.url, model="nobody") == (
    f"simulator.remote.model is 'nobody', which the server at {server.url} does not serve "
    f"(HTTP 404), expected one of its models (it lists {MODEL})."
  )
  server.models = None
  assert refusal(server.url, model="nobody").endswith("expected one of its models.")


def test_a_server_that_is_not_there_is_named(server):
  url = server.url
  server.close()
  assert refusal(url) == (
    f"simulator.remote.base_url is '{url}', where no server answers (no connection, also after 2 "
    "more tries), expected the address of an OpenAI-compatible server."
  )


def test_a_server_that_only_fails_is_named(server):
  server.models = None
  server.decide = lambda call: Answer(status=500, body=b"oops")
  assert "where a short question fails (HTTP 500, also after 2 more tries)" in refusal(server.url)


def test_the_key_is_in_no_log(server, connect, caplog):
  caplog.set_level(logging.DEBUG)
  server.decide = lambda call: usual(call) if call.number else Answer(status=500, body=b"oops")
  ask(connect())
  with pytest.raises(CallFailed):
    ask(connect(key="sk-wrong-key"))
  assert caplog.records
  shown = "\n".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records)
  assert KEY not in shown and "sk-wrong-key" not in shown
  assert KEY not in repr(connect()) + repr(connect().settings)
