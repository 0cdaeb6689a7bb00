"""Checks a configuration before anything is loaded, and tells two of them apart."""

import hashlib
import json
import math
import re
import urllib.parse
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from configs import grpo, sft
from rlver_jax.dialogue import environment as environment_lib
from rlver_jax.dialogue import levels as levels_lib
from rlver_jax.errors import UserError
from rlver_jax.fields import OF_TASK, Checks
from rlver_jax.models.lora import TARGETS
from rlver_jax.rl.advantages import ESTIMATORS
from rlver_jax.supervised.chats import ROLES
from rlver_jax.supervised.recorded import ANSWERS

# Fields that a run in the same workdir may change: they say how long it goes on and what it
# keeps, not what a step computes (`steps` also sets the length of warm-up and of a cosine). Where
# and how patiently a remote model is asked is free as well, which model is not.
REMOTE = "base_url api_key_env concurrency timeout retries first_wait max_wait"
REMOTE += " token_budget failure_budget"
FREE = (
  *("steps", "checkpoint", "log", "evaluation", "compilation_cache"),
  *("data.cache_dir", "data.held_out"),
  *(f"simulator.remote.{name}" for name in REMOTE.split()),
)


# The file of each task that has all its fields.
_RECIPES = {"rl": grpo, "sft": sft}


def _recipe(config: ConfigDict) -> ModuleType:
  return _RECIPES.get(config.get("task"), grpo)


def get(config: ConfigDict, field: str) -> Any:
  """The value of a dotted field; UserError where a configuration lacks it."""
  value = config
  for name in field.split("."):
    if name not in value:
      file = _recipe(config).__name__.replace(".", "/") + ".py"
      raise UserError(f"{field} is missing, expected a configuration with all of {file}.")
    value = value[name]
  return value


def _number(config: ConfigDict, field: str) -> float:
  value = get(config, field)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise UserError(f"{field} is {value!r}, expected a finite number.")
  return value


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first value that cannot work, whatever the files and devices."""
  if (task := get(config, "task")) not in OF_TASK:
    raise UserError(f"task is '{task}', expected one of: {', '.join(OF_TASK)}.")
  _validate_fields(config, OF_TASK[task])
  _validate_rl(config) if task == "rl" else _validate_sft(config)


def _validate_fields(config: ConfigDict, checks: Checks) -> None:
  """Raises UserError for the first value that its own table does not allow."""
  for field, allowed in checks.choices.items():
    if (value := get(config, field)) not in allowed:
      raise UserError(f"{field} is '{value}', expected one of: {', '.join(map(str, allowed))}.")
  for field, least in checks.at_least.items():
    if (value := _number(config, field)) < least:
      raise UserError(f"{field} is {value}, expected at least {least}.")
  for field in checks.positive:
    if (value := _number(config, field)) <= 0:
      raise UserError(f"{field} is {value}, expected more than 0.")
  for field in checks.fractions:
    if not 0 <= (value := _number(config, field)) < 1:
      raise UserError(f"{field} is {value}, expected a number in [0, 1).")
  for field in checks.numbers:
    _number(config, field)
  for field, (least, most) in checks.between.items():
    if not least <= (value := _number(config, field)) <= most:
      raise UserError(f"{field} is {value}, expected a number in [{least}, {most}].")
  for field in checks.shares:
    if not 0 < (value := _number(config, field)) <= 1:
      raise UserError(f"{field} is {value}, expected a number in (0, 1].")


def _validate_sft(config: ConfigDict) -> None:
  """What the fields of supervised training expect of one another."""
  d, t = config.data, config.training
  _validate_adapters(config)
  if not d.path:
    example = "--config.data.path=chats.jsonl"
    raise UserError(f"data.path is empty, expected a file of examples, as in {example}.")
  for name, known in (("roles", ROLES), ("answers", ANSWERS)):
    if not d[name] or not set(d[name]) <= set(known):
      raise UserError(f"data.{name} is {tuple(d[name])}, expected some of: {', '.join(known)}.")
  if t.rows % t.microbatch:
    raise UserError(
      f"training.microbatch is {t.microbatch}, expected a divisor of training.rows ({t.rows})."
    )


def _validate_rl(config: ConfigDict) -> None:
  """What the fields of reinforcement learning expect of one another."""
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
  _validate_environment(config)
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
    shown = "not a whole address" if re.search(r"[@?#]", address) else f"'{address}'"
    raise UserError(
      f"{field}.base_url is {shown}, expected an address such as http://localhost:8000/v1."
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
  rows = config.dialogue.scenarios_per_step * config.dialogue.group_size
  if a.kl_target and a.kl_horizon < rows:
    raise UserError(
      f"algorithm.kl_horizon is {a.kl_horizon}, expected at least the {rows} dialogues of a step, "
      "as the coefficient would otherwise overshoot."
    )
  if a.kl_coef and a.kl_in == "loss" and a.kl_estimator == "k1":
    raise UserError(
      "algorithm.kl_estimator is 'k1', expected k2, k3 or k3_clamped with algorithm.kl_in 'loss', "
      "where the gradient of k1 is zero on average."
    )
  _validate_adapters(config)
  if lora.critic_rank and (config.critic.shared_layers or config.critic.path):
    field = "shared_layers" if config.critic.shared_layers else "path"
    raise UserError(
      f"critic.{field} is {config.critic[field]!r}, expected none with lora.critic_rank, whose "
      "adapters stand beside the policy's initial weights."
    )


def _validate_adapters(config: ConfigDict) -> None:
  targets = config.lora.targets
  if not targets or not set(targets) <= set(TARGETS):
    raise UserError(f"lora.targets is {tuple(targets)}, expected some of: {', '.join(TARGETS)}.")


def _validate_environment(config: ConfigDict) -> None:
  """Values that do not go together in the section `environment`."""
  d, e = config.dialogue, config.environment
  if e.level == "mixture" and not any(e.weights.values()):
    raise UserError("environment.weights are all 0, expected one at least that is more.")
  raise_at, lower_at = (
    _number(config, f"environment.curriculum.{n}_at") for n in ("raise", "lower")
  )
  if lower_at >= raise_at:
    raise UserError(
      f"environment.curriculum.lower_at is {lower_at}, expected less than raise_at ({raise_at})."
    )
  for name in environment_lib.played(e.level, e.weights):
    offset = 0 if name == levels_lib.VANILLA.name else e[name].emotion_offset
    if not d.failure_at < d.initial_emotion + offset < d.success_at:
      raise UserError(
        f"environment.{name}.emotion_offset is {offset}, expected dialogue.initial_emotion "
        f"({d.initial_emotion}) with it between dialogue.failure_at ({d.failure_at}) and "
        f"dialogue.success_at ({d.success_at})."
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
  for field in flatten(_recipe(config).get_config()):
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
