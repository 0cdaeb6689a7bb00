"""Checks a configuration before anything is loaded, and tells two of them apart."""

import hashlib
import json
import math
import re
import urllib.parse
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.errors import UserError
from rlver_jax.models.qwen2 import REMAT_POLICIES
from rlver_jax.rl.losses import AGGREGATIONS

CHOICES = {
  "policy.dtype": ("float32", "bfloat16"),
  "policy.param_dtype": ("float32", "bfloat16"),
  "policy.remat": tuple(REMAT_POLICIES),
  "simulator.kind": ("language_model", "openai", "scripted"),
  "simulator.dtype": ("float32", "bfloat16"),
  "simulator.score": ("generate", "choice"),
  "dialogue.mode": ("direct", "think"),
  "optimizer.schedule": ("constant", "cosine"),
  "optimizer.moment_dtype": ("float32", "bfloat16"),
  "algorithm.aggregation": AGGREGATIONS,
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
  "simulator.remote.concurrency": 1,
  "simulator.remote.retries": 0,
  "simulator.remote.reparse": 0,
  "simulator.remote.token_budget": 0,
  "simulator.remote.failure_budget": 0,
  "dialogue.scenarios_per_step": 1,
  "dialogue.group_size": 2,
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
  "algorithm.clip_low": 0,
  "algorithm.clip_high": 0,
  "algorithm.entropy_coef": 0,
  "algorithm.kl_coef": 0,
  "algorithm.epochs": 1,
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

POSITIVE = (
  "optimizer.eps",
  "optimizer.max_grad_norm",
  "simulator.remote.timeout",
  "simulator.remote.first_wait",
  "simulator.remote.max_wait",
)
FRACTIONS = ("optimizer.warmup_fraction", "optimizer.b1", "optimizer.b2")  # in [0, 1)

# Fields that a run in the same workdir may change: they say how long it goes on and what it
# keeps, not what a step computes (`steps` also sets the length of warm-up and of a cosine). Where
# and how patiently a remote model is asked is free as well, which model is not.
REMOTE = "base_url api_key_env concurrency timeout retries first_wait max_wait"
REMOTE += " token_budget failure_budget"
FREE = (
  *("steps", "checkpoint", "log", "compilation_cache", "data.cache_dir"),
  *(f"simulator.remote.{name}" for name in REMOTE.split()),
)


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
  for field in ("sampling.top_p", "simulator.top_p"):
    if not 0 < (value := _number(config, field)) <= 1:
      raise UserError(f"{field} is {value}, expected a number in (0, 1].")
  d, s, u = config.dialogue, config.sampling, config.training
  rows = d.scenarios_per_step * d.group_size
  if rows % u.microbatch:
    raise UserError(
      f"training.microbatch is {u.microbatch}, expected a divisor of the {rows} dialogues of a "
      f"step (dialogue.scenarios_per_step * dialogue.group_size)."
    )
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
  if config.simulator.kind == "openai":
    _validate_remote(config)


def _validate_remote(config: ConfigDict) -> None:
  """What a remote simulated user needs. Values that might hold a secret are not repeated."""
  field = "simulator.remote"
  address, model, variable = (
    str(get(config, f"{field}.{name}")) for name in ("base_url", "model", "api_key_env")
  )
  try:
    url = urllib.parse.urlsplit(address)
    whole = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
  except ValueError:
    whole = False
  if not whole:
    raise UserError(
      f"{field}.base_url is '{address}', expected an address such as http://localhost:8000/v1."
    )
  if url.username is not None or url.query or url.fragment:
    raise UserError(
      f"{field}.base_url holds more than an address, expected no user, query or fragment: a key "
      f"belongs into the environment variable that {field}.api_key_env names."
    )
  if not model.strip():
    raise UserError(f"{field}.model is empty, expected the server's name of the model.")
  if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", variable):
    raise UserError(
      f"{field}.api_key_env is not a name in capitals such as OPENAI_API_KEY, expected that of an "
      "environment variable: the key itself is never part of a configuration."
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
