"""Examples of supervised training: chats, recorded dialogues in both views, and their order."""

import json

import builders
import pytest

from configs import sft
from rlver_jax.errors import UserError
from rlver_jax.rl.rows import row_length
from rlver_jax.supervised import examples

TEXTS = ("Be kind.", "I lost <|im_end|> my keys.", "Oh no, again?", "Yes.", "I am sorry.")
ROLES = ("system", "user", "assistant", "user", "assistant")


def chat(**train) -> dict:
  messages = [{"role": r, "content": t} for r, t in zip(ROLES, TEXTS, strict=True)]
  for name, value in train.items():
    messages[int(name[1:])]["train"] = value
  return {"messages": messages}


def test_rows_are_an_endless_stream_of_epochs():
  lengths = [30, 50, 70, 20, 60, 10, 40]
  steps = examples.stream(lengths, 3, 100, 2)
  first = [next(steps) for _ in range(9)]
  flat = [i for step in first for row in step for i in row]
  for epoch in range(len(flat) // 7):
    assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
  assert all(sum(lengths[i] for i in row) <= 100 for step in first for row in step)
  assert len({tuple(flat[7 * e : 7 * e + 7]) for e in range(3)}) == 3
  later = examples.stream(lengths, 3, 100, 2, first=4)
  assert [next(later) for _ in range(5)] == first[4:]
  other = examples.stream(lengths, 4, 100, 2)
  assert [next(other) for _ in range(9)] != first


def test_files_are_read_with_their_kind(tmp_path):
  config, tokenizer = sft.get_config(), builders.tokenizer()
  file = tmp_path / "some.jsonl"
  file.write_text(json.dumps(chat()) + "\n")
  assert len(examples.read(str(file), config, tokenizer)) == 1
  length = row_length(examples.read(str(file), config, tokenizer)[0])
  config.training.row_length = length - 1
  with pytest.raises(UserError, match=f"line 1: found {length} tokens, expected at"):
    examples.read(str(file), config, tokenizer)
  config.data.kind = "policy"
  with pytest.raises(UserError, match="line 1: found None as 'id', expected str"):
    examples.read(str(file), config, tokenizer)
  file.write_text("")
  with pytest.raises(UserError, match="nothing to learn"):
    examples.read(str(file), config, tokenizer)
