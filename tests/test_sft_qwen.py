"""One step of supervised training on real Qwen2.5-0.5B weights, against PyTorch."""

import itertools
import json

import pytest
import runs

from configs import sft as sft_configs
from rlver_jax import config as config_lib
from rlver_jax import sft
from rlver_jax.rl.rows import row_length
from rlver_jax.supervised import examples

CHATS = [  # the first without a system message, for which Qwen's template has its own
  [("user", "I lost my keys again."), ("assistant", "Oh no, that is so annoying. Where were you?")],
  [
    ("system", "Be kind."),
    ("user", "很烦，今天又加班了。"),
    ("assistant", "听起来真的很累。"),
    ("user", "嗯。"),
    ("assistant", "想聊聊吗？"),
  ],
  [("user", "He forgot my birthday."), ("assistant", "Ouch. You had been looking forward to it.")],
]


def messages(chat) -> list[dict]:
  return [{"role": role, "content": text} for role, text in chat]


def torch_losses(path) -> list[list[float]]:
  """Of each chat by itself, the negative log-likelihood of the tokens of its replies and of their
  ends."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")

  def ids_of(part, ask):
    text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)
    return tokenizer.encode(text, add_special_tokens=False)

  losses = []
  for chat in map(messages, CHATS):
    ids = ids_of(chat, False)
    with torch.no_grad():
      logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    losses.append([])
    for i, message in enumerate(chat):
      if message["role"] == "assistant":
        start, stop = len(ids_of(chat[:i], True)), ids.index(end, len(ids_of(chat[:i], True)))
        losses[-1] += [-float(logprobs[at - 1, ids[at]]) for at in range(start, stop + 1)]
  return losses


@pytest.mark.qwen
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_loss_of_a_packed_row_on_real_weights_is_pytorchs(qwen_path, tmp_path):
  file = tmp_path / "chats.jsonl"
  lines = [json.dumps({"messages": messages(chat)}) + "\n" for chat in CHATS]
  file.write_text("".join(lines), encoding="utf-8")
  settings = sft_configs.get_config("qwen2.5-0.5b")
  changes = {
    "steps": 1,
    "policy.path": str(qwen_path),
    "policy.dtype": "float32",
    "data.path": str(file),
    "data.held_out": str(file),
    "training.rows": 1,
    "training.microbatch": 1,
    "training.row_length": 256,
    "training.logprob_chunk": 64,
    "optimizer.warmup_fraction": 0.0,
    "log.tensorboard": False,
    "compilation_cache": "",
  }
  settings.update_from_flattened_dict(changes)
  config_lib.validate(settings)
  runs.play_supervised(settings, tmp_path / "run")
  (line,) = runs.metrics(tmp_path / "run")
  lengths = [row_length(example) for example in sft.open_sources(settings).examples]
  ((row,),) = itertools.islice(examples.stream(lengths, settings.seed, 256, 1), 1)
  assert {0, 1, 2} <= set(row)  # some twice: the row is longer than an epoch
  losses = torch_losses(qwen_path)
  wanted = [loss for i in row for loss in losses[i]]
  assert line["rows/trained_tokens"] == len(wanted)
  assert line["sft/loss"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
  assert line["update/skipped"] == 0
  assert line["sft/held_out_loss"] < line["sft/loss"] - 1e-3  # the update has learned from it
