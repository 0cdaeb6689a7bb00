"""Supervised training of a policy or a simulated user: `--config=configs/sft.py[:preset]`.

Presets as in configs/grpo.py, and `tiny-policy` and `tiny-simulator`, with which
`rlver_jax/embedded/build.py` makes models of the embedded world. `data.path` names the examples
and has no default: `--config.data.path=chats.jsonl`. The policy of a run is the model that is
trained, whoever it plays afterwards.
"""

from ml_collections import ConfigDict

from configs import common, recipe


def get_config(preset: str = "tiny") -> ConfigDict:
  """Every field with the preset's values."""
  embedded = {"tiny": "chat", "tiny-policy": "policy", "tiny-simulator": "simulator"}
  path = preset if preset in embedded else common.model(preset, "tiny-policy", "tiny-simulator")
  config = ConfigDict(_fields(path))
  if preset in embedded:
    _tiny(config)
    config.data.kind = embedded[preset]
  return config


def _fields(path: str) -> dict:
  shared = recipe.published(path)
  return {
    # See configs/recipe.py.
    "task": "sft",
    # Determines the order of the examples, and weights and adapters that are drawn.
    "seed": 0,
    # Updates of the run.
    "steps": 500,
    # The model that is trained: fields as in configs/recipe.py, and
    "policy": shared["policy"]
    | {
      # whether its weights are drawn from the seed: then the directory in `path` needs none.
      "from_scratch": False,
    },
    # Adapters that are trained in its place: as in configs/recipe.py.
    "lora": {name: value for name, value in shared["lora"].items() if name != "critic_rank"},
    "data": {
      # Examples, one JSON object a line: see README.md.
      "path": "",
      # Examples of the same kind that are not trained on, whose loss is measured; empty: none.
      "held_out": "",
      # chat (messages with roles), or recorded dialogues of a run as the policy saw them (policy)
      # or as the simulated user did (simulator).
      "kind": "chat",
      # chat: the roles whose messages are learned (system, user, assistant).
      "roles": ("assistant",),
      # simulator: the answers that are learned, changes of emotion (change) and what is said, the
      # opening included (message),
      "answers": ("change", "message"),
      # and what is learned of a change, plan (the appraisal, whose last line it is) or choice (the
      # integer alone, as without an appraisal).
      "form": "plan",
      # policy, simulator: folder to use instead of the package's templates, as
      # simulator.templates in configs/recipe.py.
      "templates": "",
    },
    "training": {
      # Rows of an update,
      "rows": 32,
      # each of so many tokens, in which as many examples are packed as fit.
      "row_length": 2048,
      # Rows of a microbatch; must divide rows.
      "microbatch": 4,
      # Tokens, over all rows of a microbatch, whose logits are alive at a time.
      "logprob_chunk": 1024,
      # Consecutive updates with a loss or gradient that is not finite that end the run.
      "max_nonfinite": 3,
    },
    # As in configs/recipe.py, but for
    "optimizer": shared["optimizer"]
    | {
      # the rate after warm-up,
      "learning_rate": 1e-5,
      # and what follows.
      "schedule": "cosine",
    },
    # As in configs/recipe.py.
    "mesh": shared["mesh"],
    # Likewise.
    "cpu_devices": shared["cpu_devices"],
    "checkpoint": {
      # Steps between checkpoints; the last step and an interrupted run are always saved.
      "every": 100,
      # Newest checkpoints that are kept, beside the best by loss (on data.held_out, where given).
      "keep": 2,
    },
    "evaluation": {
      # Steps between measurements on data.held_out, which also come at the end; 0: only there.
      "every": 50,
    },
    "log": {
      # Write the metrics for TensorBoard too.
      "tensorboard": True,
      # Steps between lines of metrics, which are means over them.
      "every": 1,
    },
    # Compiled programs are kept here between runs; empty: not kept.
    "compilation_cache": shared["compilation_cache"],
  }


def _tiny(config: ConfigDict) -> None:
  """An embedded model from scratch on two CPU cores."""
  config.steps = 300
  config.policy.update(dtype="float32", remat="none", from_scratch=True)
  config.data.templates = "tiny"
  config.training.update(rows=8, row_length=1024, microbatch=8, logprob_chunk=512)
  config.optimizer.update(learning_rate=3e-3, warmup_fraction=0.05, b2=0.98)
  config.log.every = 10
