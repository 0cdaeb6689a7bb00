"""A configuration as a flat table: kept in a run's folder, read back, and told from another one."""

import hashlib
import json
from typing import Any

from ml_collections import ConfigDict

from rlver_jax import config as config_lib

# Fields that a run in the same workdir may change: they say how long it goes on and what it
# keeps, not what a step computes (`steps` also sets the length of warm-up and of a cosine). Where
# and how patiently a remote model is asked is free as well, which model is not.
REMOTE = "base_url api_key_env concurrency timeout retries first_wait max_wait"
REMOTE += " token_budget failure_budget"
FREE = (
  *("steps", "checkpoint", "log", "evaluation", "compilation_cache"),
  *("data.cache_dir", "data.held_out"),
  *(f"{who}.remote.{name}" for who in ("simulator", "policy", "judge") for name in REMOTE.split()),
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
  for field in flatten(config_lib.recipe_of(config)[1]()):
    config_lib.get(config, field)
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
