"""Which values each field of a configuration may have, whatever the others are.

The tables with plain names are of configs/recipe.py; `OF_TASK` has those of every task.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlver_jax.dialogue import environment as environment_lib
from rlver_jax.dialogue import levels as levels_lib
from rlver_jax.models.qwen2 import REMAT_POLICIES
from rlver_jax.rl.advantages import ESTIMATORS
from rlver_jax.rl.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES

# Of both tasks.
_CHOICES = {
  "policy.dtype": ("float32", "bfloat16"),
  "policy.param_dtype": ("float32", "bfloat16"),
  "policy.remat": tuple(REMAT_POLICIES),
  "optimizer.schedule": ("constant", "cosine"),
  "optimizer.moment_dtype": ("float32", "bfloat16"),
}
_AT_LEAST = {
  "steps": 1,
  "seed": 0,
  "lora.policy_rank": 0,
  "optimizer.learning_rate": 0,
  "optimizer.weight_decay": 0,
  "training.microbatch": 1,
  "training.logprob_chunk": 1,
  "training.max_nonfinite": 1,
  "checkpoint.every": 1,
  "checkpoint.keep": 1,
}
_POSITIVE = ("optimizer.eps", "optimizer.max_grad_norm", "lora.alpha")
_FRACTIONS = ("optimizer.warmup_fraction", "optimizer.b1", "optimizer.b2")

CHOICES = _CHOICES | {
  "simulator.kind": ("language_model", "openai", "scripted"),
  "simulator.dtype": ("float32", "bfloat16"),
  "simulator.score": ("generate", "choice"),
  "dialogue.mode": ("direct", "think"),
  "environment.level": environment_lib.KINDS,
  "environment.curriculum.start": levels_lib.NAMES,
  "reward.kind": ("final", "change", "both"),
  "algorithm.advantage": tuple(ESTIMATORS),
  "algorithm.loss": POLICY_LOSSES,
  "algorithm.aggregation": AGGREGATIONS,
  "algorithm.kl_estimator": KL_ESTIMATORS,
  "algorithm.kl_in": ("loss", "reward"),
}

# The lowest allowed value of a field.
AT_LEAST = _AT_LEAST | {
  "simulator.temperature": 0,
  "simulator.top_k": 0,
  "simulator.max_plan_tokens": 1,
  "simulator.max_message_tokens": 1,
  "simulator.cache_length": 1,
  "simulator.reparse": 0,
  "simulator.remote.concurrency": 1,
  "simulator.remote.retries": 0,
  "simulator.remote.token_budget": 0,
  "simulator.remote.failure_budget": 0,
  "dialogue.scenarios_per_step": 1,
  "dialogue.group_size": 1,
  "dialogue.max_turns": 1,
  "dialogue.malformed_penalty": 0,
  "dialogue.repeated_penalty": 0,
  "environment.weights.easy": 0,
  "environment.weights.vanilla": 0,
  "environment.weights.challenging": 0,
  "environment.curriculum.window": 1,
  "sampling.temperature": 0,
  "sampling.top_k": 0,
  "sampling.max_new_tokens": 1,
  "sampling.max_prompt_tokens": 1,
  "sampling.max_response_tokens": 1,
  "sampling.slots": 0,
  "sampling.decode_steps": 1,
  "sampling.smallest_window": 1,
  "critic.shared_layers": 0,
  "critic.learning_rate": 0,
  "critic.warmup_steps": 0,
  "lora.critic_rank": 0,
  "algorithm.clip_low": 0,
  "algorithm.clip_high": 0,
  "algorithm.entropy_coef": 0,
  "algorithm.kl_coef": 0,
  "algorithm.kl_target": 0,
  "algorithm.kl_horizon": 1,
  "algorithm.dynamic_sampling_rounds": 0,
  "algorithm.importance_cap": 0,
  "algorithm.epochs": 1,
  "algorithm.minibatches": 1,
  "training.smallest_row": 1,
  "evaluation.scenarios": 1,
  "log.dialogues_every": 0,
}

NUMBERS = ("reward.final_weight", "reward.change_weight")  # of any size
POSITIVE = (
  *_POSITIVE,
  "critic.value_clip",
  "simulator.remote.timeout",
  "simulator.remote.first_wait",
  "simulator.remote.max_wait",
  "environment.easy.gain",
  "environment.easy.loss",
  "environment.challenging.gain",
  "environment.challenging.loss",
)
# In [0, 1).
FRACTIONS = (*_FRACTIONS, "critic.warmup_fraction")
# In (0, 1].
SHARES = ("sampling.top_p", "simulator.top_p", "algorithm.gamma", "algorithm.lam")

# The lowest and the highest allowed value of a field.
BETWEEN = {
  "environment.easy.emotion_offset": (-100, 100),
  "environment.easy.leniency": (-20, 20),
  "environment.easy.hints": (-1, 1),
  "environment.easy.plain": (0, 1),
  "environment.challenging.emotion_offset": (-100, 100),
  "environment.challenging.leniency": (-20, 20),
  "environment.challenging.hints": (-1, 1),
  "environment.challenging.plain": (0, 1),
}


class Checks(NamedTuple):
  """The tables of one task."""

  choices: Mapping[str, tuple[Any, ...]]
  at_least: Mapping[str, float]
  numbers: tuple[str, ...]
  positive: tuple[str, ...]
  fractions: tuple[str, ...]
  shares: tuple[str, ...]
  between: Mapping[str, tuple[float, float]]


_SFT_CHOICES = {
  "policy.from_scratch": (False, True),
  "data.kind": ("chat", "policy", "simulator"),
  "data.form": ("plan", "choice"),
}
_SFT_AT_LEAST = {
  "training.rows": 1,
  "training.row_length": 2,
  "evaluation.every": 0,
  "log.every": 1,
}
OF_TASK = {
  "rl": Checks(CHOICES, AT_LEAST, NUMBERS, POSITIVE, FRACTIONS, SHARES, BETWEEN),
  "sft": Checks(
    _CHOICES | _SFT_CHOICES, _AT_LEAST | _SFT_AT_LEAST, (), _POSITIVE, _FRACTIONS, (), {}
  ),
}
