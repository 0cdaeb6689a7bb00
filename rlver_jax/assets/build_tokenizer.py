"""Rebuilds the embedded tokenizer: `python -m rlver_jax.assets.build_tokenizer`.

Byte-level BPE with Qwen2.5's way of cutting text into words (every digit by itself) and the
ChatML markers, trained on the package's own prompts and scenarios. The same texts give the same
files, and any text can be encoded, since each byte is a token.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import tokenizers
import transformers

from rlver_jax.errors import UserError

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
TINY_TOKENIZER = PACKAGE / "assets" / "tiny"
VOCAB_SIZE = 2048
END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
# The scenario files that it is trained on; the shipped models know no other ids.
SCENARIOS = ("en", "tiny", "tiny-held-out", "zh")
# Every message names its role: often enough that each name is a single token.
ROLE_TEXTS = ("system", "user", "assistant") * 300

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
  save(train([*texts, *ROLE_TEXTS], VOCAB_SIZE), TINY_TOKENIZER)
  print(f"{VOCAB_SIZE} ids from {len(texts)} texts, {sum(map(len, texts))} characters")


def package_texts(prompts: pathlib.Path, scenarios: pathlib.Path) -> list[str]:
  """The prompt files (.txt) and every string of SCENARIOS (.jsonl), in name order."""
  prompt_files = sorted(prompts.glob("*.txt"))
  scenario_files = [p for p in sorted(scenarios.glob("*.jsonl")) if p.stem in SCENARIOS]
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
