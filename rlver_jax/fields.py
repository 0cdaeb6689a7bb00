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

# Of both tasks that train.
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
  "cpu_devices": 1,
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


def _within(table: Mapping[str, Any], *sections: str) -> dict[str, Any]:
  """The entries of fields in these sections."""
  return {field: value for field, value in table.items() if field.startswith(sections)}


def _some_of_rl(
  *sections: str,
  choices: Mapping[str, tuple[Any, ...]],
  at_least: Mapping[str, float],
  positive: tuple[str, ...] = (),
  shares: tuple[str, ...] = (),
) -> Checks:
  """What a task shares with reinforcement learning in these sections, and fields of its own."""
  return Checks(
    _within(CHOICES, *sections) | dict(choices),
    _within(AT_LEAST, *sections) | dict(at_least),
    (),
    (*(field for field in POSITIVE if field.startswith(sections)), *positive),
    (),
    (*(field for field in SHARES if field.startswith(sections)), *shares),
    _within(BETWEEN, *sections),
  )


def _least_in(section: str, *simulators: str) -> dict[str, float]:
  """The lowest values of fields that a section has like the section `simulator`."""
  names = (f"simulator.{name}" for name in simulators)
  return {
    f"{section}.{field.partition('.')[2]}": x for field, x in _within(AT_LEAST, *names).items()
  }


def _positive_in(section: str) -> tuple[str, ...]:
  """The fields of a section's `remote` that are more than 0."""
  return tuple(f"{section}.remote.{name}" for name in ("timeout", "first_wait", "max_wait"))


_BENCHMARK = _some_of_rl(
  *("seed", "cpu_devices", "policy.dtype", "simulator.", "sampling."),
  *("dialogue.mode", "dialogue.max_turns", "environment.easy.", "environment.challenging."),
  choices={
    "environment.level": levels_lib.NAMES,
    "policy.kind": ("language_model", "openai"),
  },
  at_least={"sampling.slots": 1, "data.scenarios": 0, "policy.step": -1}
  | _least_in("policy", "remote."),
  positive=_positive_in("policy"),
)
_ENGINE = ("sampling.decode_steps", "sampling.smallest_window")
_FIDELITY = _some_of_rl(
  *("seed", "cpu_devices", "simulator.", *_ENGINE),
  choices={"data.skip_broken": (False, True)},
  at_least={"sampling.slots": 1, "data.dialogues": 0},
)
_JUDGES = ("temperature", "top_k", "cache_length", "reparse", "remote.")
_CAPABILITIES = _some_of_rl(
  *("seed", "cpu_devices", *_ENGINE),
  choices={
    "data.skip_broken": (False, True),
    "judge.kind": ("language_model", "openai", "scripted"),
    "judge.dtype": ("float32", "bfloat16"),
  },
  at_least={"sampling.slots": 1, "data.dialogues": 0, "judge.max_reason_tokens": 1}
  | _least_in("judge", *_JUDGES),
  positive=_positive_in("judge"),
  shares=("judge.top_p",),
)
_RETENTION = _some_of_rl(
  *("seed", "cpu_devices", "policy.dtype", "sampling.max_new_tokens", *_ENGINE),
  choices={"harness.chat": (False, True), "harness.unsafe_code": (False, True)},
  at_least={
    "policy.step": -1,
    "harness.few_shot": -1,
    "harness.limit": 0,
    "sampling.slots": 1,
    "sampling.cache_length": 2,
  },
)
OF_TASK = {
  "rl": Checks(CHOICES, AT_LEAST, NUMBERS, POSITIVE, FRACTIONS, SHARES, BETWEEN),
  "sft": Checks(
    _CHOICES | _SFT_CHOICES, _AT_LEAST | _SFT_AT_LEAST, (), _POSITIVE, _FRACTIONS, (), {}
  ),
  "benchmark": _BENCHMARK,
  "fidelity": _FIDELITY,
  "capabilities": _CAPABILITIES,
  "retention": _RETENTION,
}
