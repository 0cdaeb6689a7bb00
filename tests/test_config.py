"""Configurations: the presets, the checks, and what tells two of them apart."""

import ast
import json
import math

import pytest
import runs
from ml_collections import ConfigDict

from configs import common, grpo, ppo
from rlver_jax import config as config_lib
from rlver_jax import fields, flat_config
from rlver_jax.dialogue.levels import NAMES
from rlver_jax.errors import UserError

PRESETS = tuple(common.MODELS)
FIELDS = tuple(flat_config.flatten(grpo.get_config()))


def changed(**changes) -> ConfigDict:
  """The tiny preset with these fields set, whatever their types."""
  config = grpo.get_config()
  for field, value in changes.items():
    *sections, name = field.split(".")
    section = config_lib.get(config, ".".join(sections)) if sections else config
    with section.ignore_type():
      section[name] = value
  return config


def message(**changes) -> str:
  """What `validate` says of the tiny preset with these changes."""
  with pytest.raises(UserError) as raised:
    config_lib.validate(changed(**changes))
  return str(raised.value)


@pytest.mark.parametrize("recipe", [grpo, ppo], ids=["grpo", "ppo"])
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_complete_and_valid(recipe, preset):
  config = recipe.get_config(preset)
  config_lib.validate(config)
  assert tuple(flat_config.flatten(config)) == FIELDS
  assert config.policy.path == common.MODELS[preset]
  assert config.simulator.path == ("tiny-simulator" if preset == "tiny" else config.policy.path)


def test_the_7b_preset_is_the_published_recipe():
  published = {
    "steps": 1000,
    "dialogue.scenarios_per_step": 32,
    "dialogue.group_size": 4,
    "dialogue.max_turns": 8,
    "dialogue.initial_emotion": 30,
    "dialogue.failure_at": 0,
    "dialogue.success_at": 100,
    "dialogue.malformed_penalty": 0.0,
    "dialogue.repeated_penalty": 0.0,
    "environment.level": "vanilla",
    "sampling.temperature": 1.0,
    "sampling.top_k": 0,
    "sampling.top_p": 1.0,
    "sampling.max_prompt_tokens": 5000,
    "sampling.max_response_tokens": 10000,
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_fraction": 0.02,
    "optimizer.max_grad_norm": 1.0,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.entropy_coef": 0.001,
    "algorithm.kl_coef": 0.0,
    "algorithm.epochs": 1,
    "checkpoint.every": 5,
    "policy.path": "Qwen/Qwen2.5-7B-Instruct",
  }
  flat = flat_config.flatten(grpo.get_config("qwen2.5-7b"))
  assert {field: flat[field] for field in published} == published
  # What PPO changes of it: a critic, and as many scenarios with one dialogue each.
  changed = {
    "dialogue.group_size": 1,
    "algorithm.advantage": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.whiten": True,
    "critic.path": "",
    "critic.shared_layers": 0,
    "critic.learning_rate": 5e-6,
    "critic.warmup_fraction": 0.05,
  }
  flat = flat_config.flatten(ppo.get_config("qwen2.5-7b"))
  assert {field: flat[field] for field in published | changed} == published | changed


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "qwen2.5-7b"])
def test_the_small_presets_play_as_many_dialogues_with_ppo_as_with_grpo(preset):
  dialogues = [r.get_config(preset).dialogue for r in (grpo, ppo)]
  numbers = [d.scenarios_per_step * d.group_size for d in dialogues]
  assert numbers[0] == numbers[1]
  assert dialogues[1].group_size == 1


@pytest.mark.parametrize("advantage", ["dr_grpo", "rloo", "reinforce_pp", "remax", "gae"])
@pytest.mark.parametrize("loss", ["clip", "gspo"])
def test_any_estimator_and_loss_is_an_override_away(advantage, loss):
  config_lib.validate(changed(**{"algorithm.advantage": advantage, "algorithm.loss": loss}))


def test_an_unknown_preset_is_named_with_those_there_are():
  with pytest.raises(ValueError, match="preset is 'qwen3', expected one of: tiny, "):
    grpo.get_config("qwen3")


def test_every_field_has_a_comment_on_its_line_or_right_above():
  """Fields are the string keys with a plain value in the dictionaries of configs/recipe.py."""
  source = (runs.REPOSITORY / "configs" / "recipe.py").read_text(encoding="utf-8")
  lines = source.splitlines()
  bare, seen = [], set()
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Dict) or len(node.keys) == 0:
      continue
    for key, value in zip(node.keys, node.values, strict=True):
      if isinstance(value, ast.Dict) or key.value in common.MODELS:
        continue
      seen.add(key.value)
      on, above = lines[key.lineno - 1], lines[key.lineno - 2].strip()
      if "#" not in on and not above.startswith("#"):
        bare.append(key.value)
  assert seen == {field.split(".")[-1] for field in FIELDS}
  assert not bare


@pytest.mark.parametrize("field", fields.CHOICES)
def test_a_value_outside_the_choices_is_named_with_them(field):
  allowed = ", ".join(fields.CHOICES[field])
  assert message(**{field: "other"}) == f"{field} is 'other', expected one of: {allowed}."


@pytest.mark.parametrize("field", fields.AT_LEAST)
def test_a_number_below_the_least_is_named_with_it(field):
  least = fields.AT_LEAST[field]
  bad = type(config_lib.get(grpo.get_config(), field))(least - 1)
  assert message(**{field: bad}) == f"{field} is {bad}, expected at least {least}."


@pytest.mark.parametrize("field", fields.BETWEEN)
def test_a_number_beyond_its_bounds_is_named_with_them(field):
  least, most = fields.BETWEEN[field]
  for bad in (least - 1, most + 1):
    bad = type(config_lib.get(grpo.get_config(), field))(bad)
    expected = f"expected a number in [{least}, {most}]."
    assert message(**{field: bad}) == f"{field} is {bad}, {expected}"


@pytest.mark.parametrize(
  ("field", "bad", "expected"),
  [
    *((field, bad, "more than 0") for field in fields.POSITIVE for bad in (0.0, -1.0)),
    *((field, bad, "in [0, 1)") for field in fields.FRACTIONS for bad in (1.0, -0.1)),
    *((field, bad, "in (0, 1]") for field in fields.SHARES for bad in (0.0, 1.1)),
  ],
)
def test_a_number_outside_its_range_is_named_with_it(field, bad, expected):
  assert message(**{field: bad}).startswith(f"{field} is {bad}, expected ")
  assert expected in message(**{field: bad})


@pytest.mark.parametrize(
  "field",
  [
    "algorithm.gamma", "algorithm.lam", "algorithm.advantage", "algorithm.loss",
    "algorithm.aggregation", "algorithm.clip_low", "algorithm.clip_high", "algorithm.entropy_coef",
    "algorithm.kl_coef", "algorithm.kl_estimator", "algorithm.kl_in", "algorithm.kl_target",
    "algorithm.kl_horizon", "algorithm.importance_cap", "algorithm.dynamic_sampling_rounds",
    "algorithm.epochs", "algorithm.minibatches", "critic.shared_layers", "critic.learning_rate",
    "critic.warmup_fraction", "critic.warmup_steps", "critic.value_clip", "lora.policy_rank",
    "lora.critic_rank", "lora.alpha", "lora.targets", "reward.kind", "reward.final_weight",
    "reward.change_weight",
  ],
)  # fmt: skip
def test_no_field_of_an_algorithm_goes_unchecked(field):
  """-1e9, a word for what is a number, and a number for what is a word."""
  value = config_lib.get(grpo.get_config(), field)
  bad = ("x",) if isinstance(value, tuple) else -1e9 if isinstance(value, str) else "x"
  assert message(**{field: bad}).startswith(f"{field} is ")
  if not isinstance(value, str | tuple) and field not in fields.NUMBERS:
    assert message(**{field: -1e9}).startswith(f"{field} is -1000000000.0, expected ")


@pytest.mark.parametrize("bad", [math.nan, math.inf, "3", None])
@pytest.mark.parametrize(
  "field", ["optimizer.learning_rate", "steps", "sampling.top_p", *fields.NUMBERS]
)
def test_what_is_no_finite_number_is_named(field, bad):
  assert message(**{field: bad}) == f"{field} is {bad!r}, expected a finite number."


@pytest.mark.parametrize("field", ["algorithm.epochs", "policy.dtype", "optimizer.b1"])
def test_a_field_that_a_file_of_the_users_own_lacks_is_named(field):
  config = grpo.get_config()
  section, name = field.split(".")
  del config[section][name]
  with pytest.raises(UserError, match=f"^{field} is missing, expected"):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"training.microbatch": 3}, ("training.microbatch is 3", "divisor of the 32 dialogues")),
    (
      {"dialogue.group_size": 3, "training.microbatch": 16},
      ("training.microbatch is 16", "divisor of the 24 dialogues"),
    ),
    (
      {"algorithm.advantage": "grpo_process", "reward.kind": "final"},
      ("reward.kind is 'final'", "expected change or both", "'grpo_process'"),
    ),
    ({"sampling.slots": 33}, ("sampling.slots is 33", "at most the 32 dialogues")),
    ({"sampling.extend_buckets": ()}, ("sampling.extend_buckets is ()", "positive integers")),
    ({"sampling.extend_buckets": (64, 64)}, ("sampling.extend_buckets is (64, 64)", "ascend")),
    ({"sampling.extend_buckets": (256, 64)}, ("sampling.extend_buckets is (256, 64)", "ascend")),
    ({"sampling.extend_buckets": (0, 64)}, ("sampling.extend_buckets is (0, 64)", "positive")),
    ({"sampling.extend_buckets": ("a", 64)}, ("sampling.extend_buckets is ('a', 64)", "integers")),
    ({"dialogue.initial_emotion": 0}, ("dialogue.initial_emotion is 0", "failure_at (0)")),
    ({"dialogue.initial_emotion": 100}, ("dialogue.initial_emotion is 100", "success_at (100)")),
    (
      {"environment.level": "mixture"} | {f"environment.weights.{n}": 0.0 for n in NAMES},
      ("environment.weights are all 0",),
    ),
    (
      {"environment.curriculum.lower_at": 70.0},
      ("environment.curriculum.lower_at is 70.0", "less than raise_at (70.0)"),
    ),
    (
      {"environment.level": "challenging", "dialogue.initial_emotion": 10},
      ("environment.challenging.emotion_offset is -10", "dialogue.failure_at (0)"),
    ),
    (
      {"environment.level": "curriculum", "environment.easy.emotion_offset": 70},
      ("environment.easy.emotion_offset is 70", "dialogue.success_at (100)"),
    ),
    (
      {"simulator.score": "generate", "simulator.appraise": False},
      ("simulator.appraise is False", "'generate'"),
    ),
    (
      {"algorithm.minibatches": 3, "training.microbatch": 4},
      ("algorithm.minibatches is 3", "divisor of the 8 microbatches"),
    ),
    ({"training.microbatch": 32}, ("algorithm.minibatches is 4", "the 1 microbatches")),
    *(
      (
        {"algorithm.advantage": name, "dialogue.group_size": 1, "training.microbatch": 2},
        ("dialogue.group_size is 1", "at least 2", f"'{name}'"),
      )
      for name in ("grpo", "dr_grpo", "rloo")
    ),
    *(
      (
        {"algorithm.advantage": name, "algorithm.dynamic_sampling_rounds": 2},
        ("algorithm.dynamic_sampling_rounds is 2", "expected 0", f"'{name}'"),
      )
      for name in ("reinforce_pp", "remax", "gae")
    ),
    (
      {"algorithm.kl_target": 0.1, "algorithm.kl_coef": 0.0},
      ("algorithm.kl_target is 0.1", "kl_coef is 0"),
    ),
    (
      {"algorithm.kl_target": 0.1, "algorithm.kl_coef": 0.1, "algorithm.kl_horizon": 3},
      ("algorithm.kl_horizon is 3", "at least the"),
    ),
    (
      {"algorithm.kl_coef": 0.1, "algorithm.kl_estimator": "k1"},
      ("algorithm.kl_estimator is 'k1'", "k2, k3 or k3_clamped"),
    ),
    ({"lora.targets": ()}, ("lora.targets is ()", "some of: q, k, v, o, gate, up, down.")),
    ({"lora.targets": ("q", "qkv")}, ("lora.targets is ('q', 'qkv')", "some of: q, k, v")),
    (
      {"lora.critic_rank": 4, "critic.shared_layers": 1},
      ("critic.shared_layers is 1", "lora.critic_rank"),
    ),
    ({"lora.critic_rank": 4, "critic.path": "x"}, ("critic.path is 'x'", "lora.critic_rank")),
  ],
)
def test_values_that_do_not_go_together_are_named(changes, named):
  assert all(part in message(**changes) for part in named)


def test_levels_that_are_not_played_may_start_anywhere():
  changes = {"dialogue.initial_emotion": 5, "environment.weights.challenging": 0.0}
  for level in ("vanilla", "easy", "mixture"):
    config_lib.validate(changed(**changes, **{"environment.level": level}))


REMOTE = {
  "simulator.kind": "openai",
  "simulator.remote.base_url": "http://localhost:8000/v1",
  "simulator.remote.model": "some-model",
}


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://host.example/v1/", "http://h"])
def test_addresses_of_a_remote_simulated_user(url):
  config_lib.validate(changed(**REMOTE | {"simulator.remote.base_url": url}))


@pytest.mark.parametrize(
  "url", ["", "localhost:8000/v1", "http://", "ftp://host/v1", "http://h:x/v1", "http://[::1/v1"]
)
def test_what_is_no_address_is_named(url):
  changes = REMOTE | {"simulator.remote.base_url": url}
  assert message(**changes) == (
    f"simulator.remote.base_url is '{url}', expected an address such as http://localhost:8000/v1."
  )
  config_lib.validate(changed(**changes | {"simulator.kind": "scripted"}))  # not needed there


@pytest.mark.parametrize(
  ("field", "value", "named"),
  [
    ("base_url", "https://sk-secret@host/v1", "base_url holds more than an address"),
    ("base_url", "https://me:sk-secret@host/v1", "base_url holds more than an address"),
    ("base_url", "https://host/v1?key=sk-secret", "base_url holds more than an address"),
    ("base_url", "me:sk-secret@host/v1", "base_url is not a whole address, expected"),
    ("base_url", "http://me:secret@host:99999/v1", "base_url is not a whole address, expected"),
    ("base_url", "host/v1?key=secret", "base_url is not a whole address, expected"),
    ("api_key_env", "sk-secret", "api_key_env is not a name in capitals"),
    ("api_key_env", "", "api_key_env is not a name in capitals"),
    ("model", " ", "model is empty, expected the server's name of the model."),
  ],
)
def test_other_mistakes_of_a_remote_simulated_user_are_named_and_no_secret(field, value, named):
  text = message(**REMOTE | {f"simulator.remote.{field}": value})
  assert text.startswith(f"simulator.remote.{named}")
  assert "secret" not in text


@pytest.mark.parametrize(
  "changes",
  [
    {"algorithm.advantage": "reinforce_pp", "dialogue.group_size": 1, "training.microbatch": 2},
    {"algorithm.minibatches": 4, "training.microbatch": 4},
    {"algorithm.kl_target": 0.1, "algorithm.kl_coef": 0.01, "algorithm.kl_in": "reward"},
    {"algorithm.dynamic_sampling_rounds": 3, "algorithm.advantage": "rloo"},
    {"lora.critic_rank": 4, "lora.policy_rank": 2, "lora.targets": ("down",)},
    {"critic.shared_layers": 1, "critic.path": "x"},
    {"reward.final_weight": -1.0, "reward.change_weight": 0.0, "reward.kind": "both"},
    {"algorithm.gamma": 1e-3, "algorithm.lam": 1, "algorithm.importance_cap": 2.0},
  ],
)
def test_values_that_go_together_are_taken(changes):
  config_lib.validate(changed(**changes))


def test_flatten_gives_dotted_names_and_what_json_keeps():
  config = ConfigDict({"a": 1, "b": {"c": (64, 256), "d": {"e": "x"}}})
  flat = flat_config.flatten(config)
  assert flat == {"a": 1, "b.c": [64, 256], "b.d.e": "x"}
  assert json.loads(json.dumps(flat)) == flat


@pytest.mark.parametrize("recipe", [grpo, ppo], ids=["grpo", "ppo"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_comes_back_from_what_json_kept_of_it(recipe, preset):
  config = recipe.get_config(preset)
  flat = json.loads(json.dumps(flat_config.flatten(config)))
  back = flat_config.unflatten(flat)
  assert flat_config.flatten(back) == flat
  assert flat_config.digest(back) == flat_config.digest(config)
  config_lib.validate(back)
  assert back.algorithm.advantage == config.algorithm.advantage
  assert list(back.lora.targets) == list(config.lora.targets)
  assert {name: type(v) for name, v in flat_config.flatten(back).items()} == {
    name: type(v) for name, v in flat.items()
  }


@pytest.mark.parametrize("field", ["steps", "reward.kind", "lora.policy_rank", "critic.value_clip"])
def test_a_configuration_that_lacks_a_field_does_not_come_back(field):
  flat = flat_config.flatten(grpo.get_config())
  del flat[field]
  with pytest.raises(UserError, match=f"^{field} is missing, expected"):
    flat_config.unflatten(flat)


def other(value):
  """A value of the same type that is another."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, list):
    return [value[-1], *value]
  return f"{value}-other" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("field", FIELDS)
def test_a_run_may_change_how_long_it_goes_on_and_what_it_keeps_and_nothing_else(field):
  free = {"steps", "compilation_cache", "data.cache_dir"}
  may_change = field in free or field.split(".")[0] in ("checkpoint", "log", "evaluation")
  if field.startswith("simulator.remote."):  # where and how patiently a model is asked, not which
    may_change = field.rpartition(".")[2] != "model"
  config = grpo.get_config()
  old = flat_config.flatten(config)
  new = old | {field: other(old[field])}
  assert flat_config.difference(old, new) == (None if may_change else field)
  assert flat_config.difference(old, dict(old)) is None
  without = {name: value for name, value in old.items() if name != field}
  assert flat_config.difference(old, without) == (None if may_change else field)
  section = field.rpartition(".")[0]
  node = config_lib.get(config, section) if section else config
  before = flat_config.digest(config)
  node[field.rpartition(".")[2]] = type(node[field.rpartition(".")[2]])(other(old[field]))
  assert (flat_config.digest(config) == before) == may_change


def test_the_first_difference_in_the_order_of_names_is_given():
  assert flat_config.difference({"b": 1, "a": 1, "steps": 1}, {"b": 2, "a": 2, "steps": 2}) == "a"


def test_a_section_that_only_begins_like_a_free_one_is_not_free():
  assert flat_config.difference({"steps_more": 1}, {"steps_more": 2}) == "steps_more"
  assert flat_config.difference({"logs.x": 1}, {"logs.x": 2}) == "logs.x"
