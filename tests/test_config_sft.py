"""The configuration of supervised training: its presets, and a sentence for what cannot work."""

import ast
import json

import pytest
import runs

from configs import common, grpo, sft
from rlver_jax import config as config_lib
from rlver_jax import fields, flat_config
from rlver_jax.errors import UserError

CHECKS = fields.OF_TASK["sft"]
FIELDS = flat_config.flatten(sft.get_config())


def changed(preset="tiny", **changes):
  config = sft.get_config(preset)
  config.update_from_flattened_dict({"data.path": "chats.jsonl"} | changes)
  return config


def message(**changes) -> str:
  with pytest.raises(UserError) as raised:
    config_lib.validate(changed(**changes))
  assert "\n" not in str(raised.value)
  return str(raised.value)


@pytest.mark.parametrize("preset", common.MODELS)
def test_every_preset_is_valid_once_it_has_examples(preset):
  config = changed(preset)
  config_lib.validate(config)
  assert flat_config.flatten(config).keys() == FIELDS.keys()
  assert config.policy.from_scratch == (preset == "tiny")
  assert config.policy.path == ("tiny" if preset == "tiny" else common.MODELS[preset])


def test_an_unknown_preset_is_named_with_those_there_are():
  with pytest.raises(ValueError, match="preset is 'qwen3', expected one of: tiny, ") as raised:
    sft.get_config("qwen3")
  assert "qwen2.5-7b, tiny-policy, tiny-simulator." in str(raised.value)


def test_every_field_of_its_own_has_a_comment_right_above():
  """A section has its comments inside; the fields of the others are those of configs/recipe.py."""
  source = (runs.REPOSITORY / "configs" / "sft.py").read_text("utf-8")
  (function,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "_fields")
  lines, seen = source.splitlines(), set()
  for node in ast.walk(function):
    if not isinstance(node, ast.Dict):
      continue
    for key, value in zip(node.keys, node.values, strict=True):
      if not isinstance(value, ast.Dict):
        assert lines[key.lineno - 2].strip().startswith("#"), key.value
        seen.add(key.value)
  own = FIELDS.keys() - flat_config.flatten(grpo.get_config()).keys()
  assert seen >= {field.split(".")[-1] for field in own}


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"data.path": ""}, "data.path is empty, expected a file of examples, as in --config.data."),
    ({"data.roles": ()}, "data.roles is (), expected some of: system, user, assistant."),
    ({"data.roles": ("helper",)}, "data.roles is ('helper',), expected some of: system, user, as"),
    ({"data.answers": ()}, "data.answers is (), expected some of: change, message."),
    ({"data.answers": ("plan",)}, "data.answers is ('plan',), expected some of: change, message."),
    ({"training.microbatch": 3}, "training.microbatch is 3, expected a divisor of training.rows ("),
    ({"lora.targets": ("head",)}, "lora.targets is ('head',), expected some of: q, k, "),
    (
      {"task": "dpo"},
      "task is 'dpo', expected one of: rl, sft, benchmark, fidelity, ",
    ),
    ({"optimizer.eps": 0.0}, "optimizer.eps is 0.0, expected more than 0."),
    ({"optimizer.b1": 1.0}, "optimizer.b1 is 1.0, expected a number in [0, 1)."),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate is nan, expected a finit"),
  ],
)
def test_values_that_cannot_work_are_named(changes, expected):
  assert message(**changes).startswith(expected)


@pytest.mark.parametrize("field", CHECKS.choices)
def test_a_value_outside_the_choices_is_named_with_them(field):
  flat = FIELDS | {"data.path": "x", field: "other"}
  with pytest.raises(UserError) as raised:
    config_lib.validate(flat_config.unflatten(flat))
  allowed = ", ".join(map(str, CHECKS.choices[field]))
  assert str(raised.value) == f"{field} is 'other', expected one of: {allowed}."


@pytest.mark.parametrize("field", CHECKS.at_least)
def test_a_number_below_the_least_is_named_with_it(field):
  bad = type(FIELDS[field])(CHECKS.at_least[field] - 1)
  expected = f"{field} is {bad}, expected at least {CHECKS.at_least[field]}."
  assert message(**{field: bad}) == expected


def test_a_configuration_comes_back_from_what_json_kept_of_it():
  config = changed()
  flat = json.loads(json.dumps(flat_config.flatten(config)))
  back = flat_config.unflatten(flat)
  config_lib.validate(back)
  assert flat_config.flatten(back) == flat
  assert flat_config.digest(back) == flat_config.digest(config)


@pytest.mark.parametrize("field", ["data.kind", "training.rows", "policy.from_scratch"])
def test_one_that_lacks_a_field_does_not_come_back(field):
  flat = {name: value for name, value in FIELDS.items() if name != field}
  with pytest.raises(UserError) as raised:
    flat_config.unflatten(flat)
  expected = "expected a configuration with all of configs/sft.py."
  assert str(raised.value) == f"{field} is missing, {expected}"


def test_a_run_may_change_how_long_it_goes_on_and_what_it_keeps_and_nothing_else():
  free = ("steps", "compilation_cache", "data.held_out")
  sections = ("checkpoint", "evaluation", "log")
  for field in FIELDS:
    may = field in free or field.split(".")[0] in sections
    found = flat_config.difference(FIELDS, FIELDS | {field: "another"})
    assert found == (None if may else field)


def test_a_run_of_one_task_is_not_gone_on_with_by_the_other():
  rl = flat_config.flatten(grpo.get_config())
  assert flat_config.difference(FIELDS, rl) is not None
