"""Rebuilds the embedded tokenizer: `python -m rlver_jax.embedded.build_tokenizer`.

Byte-level BPE with Qwen2.5's way of cutting text into words (every digit by itself) and the
ChatML markers. It is trained on the phrases of the embedded world and of its scripted user, which
the tiny models say all the time, and on the package's English prompts and scenarios. The words
that details are made of are left out, so that those of training and of held-out scenarios are
cut into pieces alike. The same texts give the same files, and any text can be encoded, since
each byte is a token.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import tokenizers
import transformers

from rlver_jax.dialogue.simulators import lexicon
from rlver_jax.embedded import scenarios
from rlver_jax.errors import UserError

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
LANGUAGE = "en"
PHRASES_WEIGHT = 30  # how often a phrase counts, against a text of the package
TINY_TOKENIZER = PACKAGE / "assets" / "tiny"
VOCAB_SIZE = 2048
END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
# Every message names its role: often enough that each name is a single token.
ROLE_TEXTS = ("system", "user", "assistant") * 300

# Of the scripted user: what it thinks and says, not what it listens for.
USER_LISTS = (
  "content", "completion", "feeling", "activity", "reaction", "detail", "hint", "need", "opening",
  "farewell", "characters",
)  # fmt: skip

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def main() -> None:
  """Trains on the package's texts and replaces the shipped files."""
  texts = package_texts(PACKAGE / "dialogue" / "prompts", PACKAGE / "assets" / "scenarios")
  said = phrases()
  save(train([*texts, *said * PHRASES_WEIGHT, *ROLE_TEXTS], VOCAB_SIZE), TINY_TOKENIZER)
  print(f"{VOCAB_SIZE} ids from {len(texts)} texts and {len(said)} phrases")


def phrases() -> list[str]:
  """What the helper and the scripted user of the embedded world say, details left out."""
  world, user = scenarios.words(), lexicon.load(LANGUAGE).phrases
  lists = [world[name] for name in ("people", "stories", "good", "kind", "poor", "need", "intent")]
  lists += [user[name] for name in USER_LISTS]
  prompts = PACKAGE / "assets" / "embedded" / "prompts" / f"{LANGUAGE}.txt"
  return [*_strings(lists), prompts.read_text(encoding="utf-8")]


def package_texts(prompts: pathlib.Path, scenarios: pathlib.Path) -> list[str]:
  """The English prompts (.txt) and every string of the English scenarios (.jsonl)."""
  prompt_files = sorted(prompts.glob(f"{LANGUAGE}.txt"))
  scenario_files = sorted(scenarios.glob(f"{LANGUAGE}.jsonl"))
  for folder, files in ((prompts, prompt_files), (scenarios, scenario_files)):
    if not files:
      raise UserError(f"{folder} holds no text to train the tokenizer on, expected .txt or .jsonl")
  texts = [path.read_text(encoding="utf-8") for path in prompt_files]
  for path in scenario_files:
    with path.open(encoding="utf-8") as lines:
      for line in lines:
        texts += _strings(json.loads(line))
  return texts


def train(texts: Sequence[str], vocab_size: int) -> transformers.Qwen2Tokenizer:
  """A tokenizer of `vocab_size` ids: 256 bytes, merges, and the special tokens at the end.

  It is of Qwen2.5's class, so that a directory with this tokenizer and a Qwen2 config.json
  reads the same in transformers and in vLLM.
  """
  backend = transformers.Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
  words = tokenizers.Tokenizer(tokenizers.models.BPE())
  words.normalizer, words.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - len(SPECIAL_TOKENS),
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  words.train_from_iterator(texts, trainer)
  model = json.loads(words.to_str())["model"]
  tokenizer = transformers.Qwen2Tokenizer(
    vocab=model["vocab"],
    merges=[tuple(merge) for merge in model["merges"]],
    unk_token=None,
    eos_token=MESSAGE_END,
    pad_token=END_OF_TEXT,
    extra_special_tokens=list(SPECIAL_TOKENS),
    clean_up_tokenization_spaces=False,
  )
  tokenizer.chat_template = CHAT_TEMPLATE
  return tokenizer


def save(tokenizer: transformers.Qwen2Tokenizer, directory: pathlib.Path) -> None:
  """Writes the files that `rlver_jax.tokenizer.load` reads, each replaced at once."""
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory) as scratch:
    tokenizer.save_pretrained(scratch)
    for path in sorted(pathlib.Path(scratch).iterdir()):
      with path.open("rb") as file:
        os.fsync(file.fileno())
      os.replace(path, directory / path.name)


def _strings(value: object) -> Iterator[str]:
  """All strings of a JSON value, keys and ids left out."""
  match value:
    case str():
      yield value
    case list():
      for item in value:
        yield from _strings(item)
    case dict():
      for key, item in value.items():
        if key != "id":
          yield from _strings(item)


if __name__ == "__main__":
  main()
