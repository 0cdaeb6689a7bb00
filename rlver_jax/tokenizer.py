"""Text to token ids and back, and the chat format of a tokenizer directory.

Two readings of a text are kept apart. The template's own literals are encoded with special
tokens on; what a policy, a user or a scenario says is encoded with them off, so no text can end
a message or open a role. A chat is therefore put together from pieces, and `ChatFormat` checks
once, when it is read from the template, that the pieces give what the template renders.
"""

import bisect
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# That PyTorch is missing, which transformers would say on stderr, is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import tokenizers
import transformers

from rlver_jax.errors import UserError

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class ChatFormat:
  """Whole messages as token ids, and the wrappers they are made of.

  A message does not depend on what follows it, so a chat grows by appending; `assistant_start`
  is what asks for a reply, and `assistant_end` completes it. Templates that strip the blanks
  around a message's text are not imitated in that: the text is encoded as given.

  unprompted: what the template puts before a chat without a system message, such as one of its
    own (Qwen2.5); None where it takes no such chat.
  stop_ids: what ends a reply: the first id of `assistant_end`, then the directory's eos ids.
  """

  encode: Callable[[str], list[int]] = dataclasses.field(repr=False)
  system_start: tuple[int, ...]
  system_end: tuple[int, ...]
  user_start: tuple[int, ...]
  user_end: tuple[int, ...]
  assistant_start: tuple[int, ...]
  assistant_end: tuple[int, ...]
  unprompted: tuple[int, ...] | None
  stop_ids: tuple[int, ...]

  def system(self, text: str) -> list[int]:
    """Ids of a system message, with whatever the template puts before a chat."""
    return [*self.system_start, *self.encode(text), *self.system_end]

  def user(self, text: str) -> list[int]:
    """Ids of a user message."""
    return [*self.user_start, *self.encode(text), *self.user_end]

  def assistant(self, text: str) -> list[int]:
    """Ids of an assistant message."""
    return [*self.assistant_start, *self.encode(text), *self.assistant_end]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer read from a local directory by `load`.

  special_ids: ids of all added tokens, among them the chat markers; `encode` never gives one.
  vocab_size: the largest id plus one.
  """

  special_ids: frozenset[int]
  vocab_size: int
  chat: ChatFormat
  _full: tokenizers.Tokenizer = dataclasses.field(repr=False)
  _plain: tokenizers.Tokenizer = dataclasses.field(repr=False)

  def encode(self, text: str) -> list[int]:
    """Ids of `text` read as ordinary characters, also where it spells a special token.

    `decode` gives the text back after the tokenizer's own normalisation (NFC for Qwen2.5);
    lone surrogates, which no UTF-8 text can hold, become the replacement character.
    """
    return _encode(self._plain, text)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens.

    Ids that mean nothing (the padding of an embedding table) are skipped; bytes that are not
    UTF-8, as at the end of a text cut inside a character, become the replacement character.
    """
    return self._full.decode([int(i) for i in ids], skip_special_tokens=True)

  def split_at(self, ids: Sequence[int], marker: str) -> int | None:
    """The smallest k such that the text of `ids[:k]` contains `marker`; None if there is none."""
    ids = [int(i) for i in ids]
    if marker not in self.decode(ids):
      return None
    # Once a prefix contains the marker, every longer one does.
    return bisect.bisect_left(
      range(len(ids) + 1), True, key=lambda k: marker in self.decode(ids[:k])
    )


def load(directory: str | pathlib.Path) -> Tokenizer:
  """Reads tokenizer.json, tokenizer_config.json and the chat template of a local directory.

  Never touches the network. Raises UserError if files are missing or broken, if there is no
  chat template, or if the template can't be taken apart into messages that are only appended.
  """
  directory = pathlib.Path(directory)
  # Without this file transformers falls back to an empty tokenizer or looks for a hub id.
  if not (directory / "tokenizer.json").is_file():
    raise UserError(f"{directory} holds no tokenizer.json, expected a Hugging Face directory")
  try:
    loaded = read_files(directory)
    full = loaded.backend_tokenizer
  except Exception as error:  # the tokenizers library raises bare Exception for broken files
    raise UserError(
      f"the tokenizer files in {directory} can't be read ({_first_line(error)}), "
      "expected tokenizer.json and tokenizer_config.json as transformers writes them"
    ) from error
  if not loaded.chat_template:
    raise UserError(
      f"the tokenizer in {directory} has no chat template, expected chat_template.jinja or a "
      "chat_template field in tokenizer_config.json"
    )
  full.encode_special_tokens = False
  full.no_truncation()
  full.no_padding()
  special_ids = frozenset(full.get_added_tokens_decoder())
  plain = _without_added_tokens(full, directory)

  def render(messages: Messages, ask: bool = False) -> str:
    try:
      return loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program: whatever it raises is its own mistake
      raise UserError(
        f"the chat template in {directory} fails on a chat of system, user and assistant "
        f"messages ({_first_line(error)}), expected one that renders it"
      ) from error

  literals = _literals(render, directory)
  pieces = {name: tuple(_encode(full, text)) for name, text in literals.items()}
  for name in ("user_start", "assistant_start", "assistant_end"):
    if not special_ids.intersection(pieces[name][:1]):
      raise UserError(
        f"the chat template in {directory} has {literals[name]!r} for {name}, expected it to "
        "begin with a special token, which no message's text can imitate"
      )
  _check_append_only(render, literals, full, plain, directory)
  stop_ids = (pieces["assistant_end"][0], *_eos_ids(loaded, directory))
  unprompted = _unprompted(render, literals["user_start"])
  chat = ChatFormat(
    encode=lambda text: _encode(plain, text),
    unprompted=None if unprompted is None else tuple(_encode(full, unprompted)),
    stop_ids=tuple(dict.fromkeys(stop_ids)),
    **pieces,
  )
  return Tokenizer(special_ids, max(full.get_vocab().values()) + 1, chat, full, plain)


def read_files(directory: str | pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer of a local directory as transformers has it, which also writes chats as text.

  It is what tokenizer.json says. AutoTokenizer gives the same, but first loads the configuration of
  every model, and PyTorch where it is installed: seconds of each start.
  """
  return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
  # Through UTF-16, so that a surrogate pair becomes its character and a lone one is replaced.
  text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
  return backend.encode(text, add_special_tokens=False).ids


def _without_added_tokens(
  full: tokenizers.Tokenizer, directory: pathlib.Path
) -> tokenizers.Tokenizer:
  """The same tokenizer knowing none of the added tokens, special or not.

  The library's switch for ordinary text covers only the tokens flagged special: Qwen2.5's
  <tool_call> would still be matched as one id.
  """
  spec = json.loads(full.to_str())
  model = spec["model"]
  if model["type"] != "BPE":
    raise UserError(f"tokenizer.json in {directory} holds a {model['type']} model, expected BPE")
  added = {token["id"] for token in spec["added_tokens"]}
  model["vocab"] = {token: i for token, i in model["vocab"].items() if i not in added}
  spec["added_tokens"], spec["post_processor"] = [], None
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _literals(render: Callable[..., str], directory: pathlib.Path) -> dict[str, str]:
  """The template's text around the messages of each role, found with sentinels as messages."""
  chat = _chat("sentinelalpha", "sentinelbravo", "sentinelcharlie", "sentineldelta")
  texts = [message["content"] for message in chat]

  def around(count: int) -> list[str]:
    """What stands before, between and after the texts of the first `count` messages."""
    rest, parts = render(chat[:count]), []
    for text in texts[:count]:
      before, found, rest = rest.partition(text)
      if not found or text in rest:
        raise UserError(
          f"the chat template in {directory} does not show each message's text once and in "
          "order, expected system, user and assistant messages one after the other"
        )
      parts.append(before)
    return [*parts, rest]

  system_start, system_to_user, user_end = around(2)
  assistant_end = around(3)[-1]
  user_start = around(4)[3].removeprefix(assistant_end)
  return {
    "system_start": system_start,
    "system_end": system_to_user.removesuffix(user_start),
    "user_start": user_start,
    "user_end": user_end,
    "assistant_start": render(chat[:2], ask=True).removeprefix(render(chat[:2])),
    "assistant_end": assistant_end,
  }


def _unprompted(render: Callable[..., str], user_start: str) -> str | None:
  """The template's text before a chat without a system message, None where it takes none."""
  try:
    before, found, _ = render([{"role": "user", "content": "sentinel"}]).partition("sentinel")
  except UserError:
    return None
  return before.removesuffix(user_start) if found and before.endswith(user_start) else None


def _check_append_only(
  render: Callable[..., str],
  literals: Mapping[str, str],
  full: tokenizers.Tokenizer,
  plain: tokenizers.Tokenizer,
  directory: pathlib.Path,
) -> None:
  """Raises UserError unless the literals compose what the template renders, text and ids."""
  chat = _chat("Be kind.", "I lost my keys.", "Oh no, again?", "很烦。", "听起来很累。")
  pieces = []
  for count, message in enumerate(chat, start=1):
    role = message["role"]
    pieces += [
      (full, literals[f"{role}_start"]),
      (plain, message["content"]),
      (full, literals[f"{role}_end"]),
    ]
    ask = [(full, literals["assistant_start"])] if role == "user" else []
    rendered = render(chat[:count], ask=bool(ask))
    composed = "".join(text for _, text in pieces + ask)
    ids = [i for backend, text in pieces + ask for i in _encode(backend, text)]
    if composed != rendered or ids != _encode(full, rendered):
      raise UserError(
        f"the chat template in {directory} is not append-only, as a chat of {count} messages "
        "differs from its messages put together, expected that a message is rendered the same "
        "whatever comes before and after it"
      )


def _chat(*texts: str) -> Messages:
  """A system message, then user and assistant in turn."""
  roles = ("system", *("user", "assistant") * len(texts))
  return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def _eos_ids(loaded: Any, directory: pathlib.Path) -> list[int]:
  """The eos ids of generation_config.json, where there is one, and of the tokenizer."""
  path = directory / "generation_config.json"
  eos = []
  if path.is_file():
    try:
      eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
      raise UserError(f"{path} can't be read ({error}), expected a JSON object") from error
    eos = eos if isinstance(eos, list) else [eos]
  return [i for i in (*eos, loaded.eos_token_id) if i is not None]


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0].rstrip('.:')}" if lines else type(error).__name__
