"""Checks a configuration before anything is loaded."""

import math
import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import eval as eval_config
from configs import grpo, sft
from rlver_jax.dialogue import environment as environment_lib
from rlver_jax.dialogue import levels as levels_lib
from rlver_jax.dialogue.emotion import MAX_EMOTION
from rlver_jax.errors import UserError
from rlver_jax.fields import OF_TASK, Checks
from rlver_jax.models.lora import TARGETS
from rlver_jax.rl.advantages import ESTIMATORS
from rlver_jax.supervised.chats import ROLES
from rlver_jax.supervised.recorded import ANSWERS

# By task, see `recipe_of`.
_RECIPES: dict[str, tuple[str, Callable[[], ConfigDict]]] = {
  "rl": ("configs/grpo.py", grpo.get_config),
  "sft": ("configs/sft.py", sft.get_config),
  "benchmark": ("configs/eval.py", eval_config.get_config),
  "fidelity": ("configs/eval.py:fidelity", lambda: eval_config.get_config("fidelity")),
  "capabilities": ("configs/eval.py:capabilities", lambda: eval_config.get_config("capabilities")),
  "retention": ("configs/eval.py:retention", lambda: eval_config.get_config("retention")),
}


def recipe_of(config: ConfigDict) -> tuple[str, Callable[[], ConfigDict]]:
  """What --config names for all fields of this configuration's task, and how they are made."""
  return _RECIPES.get(config.get("task"), _RECIPES["rl"])


def get(config: ConfigDict, field: str) -> Any:
  """The value of a dotted field; UserError where a configuration lacks it."""
  value = config
  for name in field.split("."):
    if name not in value:
      raise UserError(
        f"{field} is missing, expected a configuration with all of {recipe_of(config)[0]}."
      )
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
  of_task = {
    "rl": _validate_rl,
    "sft": _validate_sft,
    "benchmark": _validate_benchmark,
    "fidelity": _validate_fidelity,
    "capabilities": _validate_capabilities,
    "retention": _validate_buckets,
  }
  of_task[task](config)


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
  d, e, s, u = config.dialogue, config.environment, config.sampling, config.training
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
  _validate_curriculum(config)
  _validate_dialogues(config, environment_lib.played(e.level, e.weights))


def _validate_benchmark(config: ConfigDict) -> None:
  """What the fields of the benchmark expect of one another."""
  _validate_dialogues(config, (config.environment.level,))
  d = config.dialogue
  if d.failure_at < 0 or d.success_at > MAX_EMOTION:
    raise UserError(
      f"dialogue.failure_at is {d.failure_at} and dialogue.success_at {d.success_at}, expected "
      f"both in 0..{MAX_EMOTION}, the scale of the benchmark's emotions."
    )
  if config.policy.kind == "openai":
    _validate_remote(config, "policy")


def _validate_fidelity(config: ConfigDict) -> None:
  """What the fields of a replay expect of one another."""
  _validate_recorded(config)
  _validate_simulator(config)


def _validate_capabilities(config: ConfigDict) -> None:
  """What the fields of a judge expect of one another."""
  _validate_recorded(config)
  _validate_buckets(config)
  if config.judge.kind == "openai":
    _validate_remote(config, "judge")


def _validate_recorded(config: ConfigDict) -> None:
  if not config.data.recorded:
    raise UserError("data.recorded is empty, expected files of recorded dialogues.")


def _validate_dialogues(config: ConfigDict, levels: Sequence[str]) -> None:
  """What the fields of what plays dialogues, at these levels, expect of one another."""
  d = config.dialogue
  if not d.failure_at < d.initial_emotion < d.success_at:
    raise UserError(
      f"dialogue.initial_emotion is {d.initial_emotion}, expected a number between "
      f"dialogue.failure_at ({d.failure_at}) and dialogue.success_at ({d.success_at})."
    )
  _validate_levels(config, levels)
  _validate_simulator(config)


def _validate_simulator(config: ConfigDict) -> None:
  """What the fields of engines and of the simulated user expect of one another."""
  _validate_buckets(config)
  if config.simulator.score == "generate" and not config.simulator.appraise:
    raise UserError(
      "simulator.appraise is False, expected True with simulator.score 'generate', which reads "
      "the change from the appraisal."
    )
  if config.simulator.kind == "openai":
    _validate_remote(config, "simulator")


def _validate_buckets(config: ConfigDict) -> None:
  buckets = list(config.sampling.extend_buckets)
  whole = all(isinstance(n, int) and n > 0 for n in buckets)
  if not buckets or not whole or buckets != sorted(set(buckets)):
    raise UserError(
      f"sampling.extend_buckets is {tuple(buckets)}, expected positive integers that ascend."
    )


def _validate_remote(config: ConfigDict, section: str) -> None:
  """What a remote partner needs. Values that might hold a secret are not repeated."""
  field = f"{section}.remote"
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
  if a.advantage == "grpo_process" and config.reward.kind == "final":
    raise UserError(
      "reward.kind is 'final', expected change or both with algorithm.advantage 'grpo_process', "
      "which compares replies by what each earns."
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


def _validate_curriculum(config: ConfigDict) -> None:
  """How levels are chosen in training."""
  e = config.environment
  if e.level == "mixture" and not any(e.weights.values()):
    raise UserError("environment.weights are all 0, expected one at least that is more.")
  raise_at, lower_at = (
    _number(config, f"environment.curriculum.{n}_at") for n in ("raise", "lower")
  )
  if lower_at >= raise_at:
    raise UserError(
      f"environment.curriculum.lower_at is {lower_at}, expected less than raise_at ({raise_at})."
    )


def _validate_levels(config: ConfigDict, levels: Sequence[str]) -> None:
  """The emotion with which users of these levels start."""
  d, e = config.dialogue, config.environment
  for name in levels:
    offset = 0 if name == levels_lib.VANILLA.name else e[name].emotion_offset
    if not d.failure_at < d.initial_emotion + offset < d.success_at:
      raise UserError(
        f"environment.{name}.emotion_offset is {offset}, expected dialogue.initial_emotion "
        f"({d.initial_emotion}) with it between dialogue.failure_at ({d.failure_at}) and "
        f"dialogue.success_at ({d.success_at})."
      )
