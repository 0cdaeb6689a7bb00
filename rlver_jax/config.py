"""Checks a configuration before anything is loaded, and tells two of them apart."""

import hashlib
import json
import math
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.errors import UserError
from rlver_jax.models.lora import TARGETS
from rlver_jax.models.qwen2 import REMAT_POLICIES
from rlver_jax.rl.advantages import ESTIMATORS
from rlver_jax.rl.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES

CHOICES = {
  "policy.dtype": ("float32", "bfloat16"),
  "policy.param_dtype": ("float32", "bfloat16"),
  "policy.remat": tuple(REMAT_POLICIES),
  "simulator.kind": ("language_model", "scripted"),
  "simulator.dtype": ("float32", "bfloat16"),
  "simulator.score": ("generate", "choice"),
  "dialogue.mode": ("direct", "think"),
  "optimizer.schedule": ("constant", "cosine"),
  "optimizer.moment_dtype": ("float32", "bfloat16"),
  "reward.kind": ("final", "change", "both"),
  "algorithm.advantage": tuple(ESTIMATORS),
  "algorithm.loss": POLICY_LOSSES,
  "algorithm.aggregation": AGGREGATIONS,
  "algorithm.kl_estimator": KL_ESTIMATORS,
  "algorithm.kl_in": ("loss", "reward"),
}

# The lowest allowed value of a field.
AT_LEAST = {
  "steps": 1,
  "seed": 0,
  "simulator.temperature": 0,
  "simulator.top_k": 0,
  "simulator.max_plan_tokens": 1,
  "simulator.max_message_tokens": 1,
  "simulator.cache_length": 1,
  "dialogue.scenarios_per_step": 1,
  "dialogue.group_size": 1,
  "dialogue.max_turns": 1,
  "dialogue.malformed_penalty": 0,
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
  "critic.value_clip": 0,
  "lora.policy_rank": 0,
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
  "optimizer.learning_rate": 0,
  "optimizer.weight_decay": 0,
  "training.microbatch": 1,
  "training.logprob_chunk": 1,
  "training.smallest_row": 1,
  "training.max_nonfinite": 1,
  "checkpoint.every": 1,
  "checkpoint.keep": 1,
  "log.dialogues_every": 0,
}

NUMBERS = ("reward.final_weight", "reward.change_weight")  # of any size
POSITIVE = ("optimizer.eps", "optimizer.max_grad_norm", "lora.alpha")
# In [0, 1).
FRACTIONS = ("optimizer.warmup_fraction", "critic.warmup_fraction", "optimizer.b1", "optimizer.b2")
# In (0, 1].
SHARES = ("sampling.top_p", "simulator.top_p", "algorithm.gamma", "algorithm.lam")

# Fields that a run in the same workdir may change: they say how long it goes on and what it
# keeps, not what a step computes (`steps` also sets the length of warm-up and of a cosine).
FREE = ("steps", "checkpoint", "log", "compilation_cache", "data.cache_dir")


def get(config: ConfigDict, field: str) -> Any:
  """The value of a dotted field; UserError where a configuration lacks it."""
  value = config
  for name in field.split("."):
    if name not in value:
      raise UserError(f"{field} is missing, expected a configuration with all of configs/grpo.py.")
    value = value[name]
  return value


def _number(config: ConfigDict, field: str) -> float:
  value = get(config, field)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise UserError(f"{field} is {value!r}, expected a finite number.")
  return value


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first value that cannot work, whatever the files and devices."""
  for field, allowed in CHOICES.items():
    if (value := get(config, field)) not in allowed:
      raise UserError(f"{field} is '{value}', expected one of: {', '.join(allowed)}.")
  for field, least in AT_LEAST.items():
    if (value := _number(config, field)) < least:
      raise UserError(f"{field} is {value}, expected at least {least}.")
  for field in POSITIVE:
    if (value := _number(config, field)) <= 0:
      raise UserError(f"{field} is {value}, expected more than 0.")
  for field in FRACTIONS:
    if not 0 <= (value := _number(config, field)) < 1:
      raise UserError(f"{field} is {value}, expected a number in [0, 1).")
  for field in NUMBERS:
    _number(config, field)
  for field in SHARES:
    if not 0 < (value := _number(config, field)) <= 1:
      raise UserError(f"{field} is {value}, expected a number in (0, 1].")
  d, s, u = config.dialogue, config.sampling, config.training
  rows = d.scenarios_per_step * d.group_size
  if rows % u.microbatch:
    raise UserError(
      f"training.microbatch is {u.microbatch}, expected a divisor of the {rows} dialogues of a "
      f"step (dialogue.scenarios_per_step * dialogue.group_size)."
    )
  if rows % (config.algorithm.minibatches * u.microbatch):
    raise UserError(
      f"algorithm.minibatches is {config.algorithm.minibatches}, expected a divisor of the "
      f"{rows // u.microbatch} microbatches of a step."
    )
  _validate_algorithm(config)
  if s.slots > rows:
    raise UserError(
      f"sampling.slots is {s.slots}, expected at most the {rows} dialogues of a step."
    )
  buckets = list(s.extend_buckets)
  whole = all(isinstance(n, int) and n > 0 for n in buckets)
  if not buckets or not whole or buckets != sorted(set(buckets)):
    raise UserError(
      f"sampling.extend_buckets is {tuple(buckets)}, expected positive integers that ascend."
    )
  if not d.failure_at < d.initial_emotion < d.success_at:
    raise UserError(
      f"dialogue.initial_emotion is {d.initial_emotion}, expected a number between "
      f"dialogue.failure_at ({d.failure_at}) and dialogue.success_at ({d.success_at})."
    )
  if config.simulator.score == "generate" and not config.simulator.appraise:
    raise UserError(
      "simulator.appraise is False, expected True with simulator.score 'generate', which reads "
      "the change from the appraisal."
    )


def _validate_algorithm(config: ConfigDict) -> None:
  """What the fields of the algorithm, the critic and adapters expect of one another."""
  a, lora = config.algorithm, config.lora
  needs = ESTIMATORS[a.advantage]
  if needs == "group" and config.dialogue.group_size < 2:
    raise UserError(
      f"dialogue.group_size is {config.dialogue.group_size}, expected at least 2 with "
      f"algorithm.advantage '{a.advantage}', which compares the dialogues of a group."
    )
  if a.dynamic_sampling_rounds and needs != "group":
    raise UserError(
      f"algorithm.dynamic_sampling_rounds is {a.dynamic_sampling_rounds}, expected 0 with "
      f"algorithm.advantage '{a.advantage}', which does not compare the dialogues of a group."
    )
  if a.kl_target and not a.kl_coef:
    raise UserError(
      f"algorithm.kl_target is {a.kl_target}, expected 0 where algorithm.kl_coef is 0: there is no "
      "coefficient to adapt."
    )
  if not lora.targets or not set(lora.targets) <= set(TARGETS):
    raise UserError(
      f"lora.targets is {tuple(lora.targets)}, expected some of: {', '.join(TARGETS)}."
    )
  if lora.critic_rank and (config.critic.shared_layers or config.critic.path):
    field = "shared_layers" if config.critic.shared_layers else "path"
    raise UserError(
      f"critic.{field} is {config.critic[field]!r}, expected none with lora.critic_rank, whose "
      "adapters stand beside the policy's initial weights."
    )


def flatten(config: ConfigDict) -> dict[str, Any]:
  """Dotted field names with their values, tuples as lists (as JSON keeps them)."""
  flat: dict[str, Any] = {}

  def visit(prefix: str, value: Any) -> None:
    if isinstance(value, dict):
      for name, child in value.items():
        visit(f"{prefix}.{name}" if prefix else name, child)
    else:
      flat[prefix] = list(value) if isinstance(value, tuple) else value

  visit("", config.to_dict())
  return flat


def unflatten(flat: dict[str, Any]) -> ConfigDict:
  """The configuration that `flatten` made `flat` of, but for tuples, which stay lists.

  Raises UserError when it lacks a field that every configuration has.
  """
  config = ConfigDict()
  for field, value in flat.items():
    section = config
    *parents, name = field.split(".")
    for parent in parents:
      if parent not in section:
        section[parent] = ConfigDict()
      section = section[parent]
    section[name] = value
  for field in (*CHOICES, *AT_LEAST):
    get(config, field)
  return config


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
  """The first field in which two flattened configurations differ and a run may not, or None."""
  for field in sorted(old.keys() | new.keys()):
    if any(field == free or field.startswith(f"{free}.") for free in FREE):
      continue
    if old.get(field) != new.get(field):
      return field
  return None


def digest(config: ConfigDict) -> str:
  """A short fingerprint of the fields that a run may not change."""
  flat = flatten(config)
  kept = {k: v for k, v in flat.items() if difference({k: v}, {}) is not None}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
