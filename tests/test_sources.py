"""What a run reads from: all that is checked before anything large is read."""

import dataclasses
import json

import builders
import jax
import numpy as np
import pytest
import runs

from rlver_jax import partitioning
from rlver_jax.dialogue import scenario
from rlver_jax.dialogue.simulators import chat as chat_lib
from rlver_jax.errors import UserError
from rlver_jax.models import source, weights
from rlver_jax.sources import open_sources, simulator_settings


@pytest.fixture(scope="module", autouse=True)
def no_weights():
  """Opening what a run reads from never loads a model."""

  def load(*_):
    raise AssertionError("a model was loaded")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(source, "load_model", load)
    patch.setattr(weights, "initialise", load)
    patch.setattr(weights, "load", load)
    yield


PPO = {"algorithm.advantage": "gae"}


def refusal(**changes) -> str:
  """What opening the sources of the small configuration with these changes says, in one line."""
  with pytest.raises(UserError) as raised:
    open_sources(runs.config(**changes))
  assert "\n" not in str(raised.value)
  return str(raised.value)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A Hugging Face directory: the embedded model's files with empty tensors."""
  path = tmp_path_factory.mktemp("models") / "policy"
  opened = source.open_source("tiny", "policy.path", dtype="float32", param_dtype="float32")
  abstract = weights.abstract_model(opened.config)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
  weights.save(jax.device_put(zeros), path, source=opened.directory, dtype="float32")
  return path


def copy_with(directory, tmp_path, **sizes):
  """A copy of the directory whose config.json has other sizes."""
  for file in directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  config = json.loads((directory / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | sizes))
  return tmp_path


def test_sources_of_the_default_run():
  sources = open_sources(runs.config(**runs.LANGUAGE_MODEL))
  assert sources.mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
  assert len(sources.scenarios) == 64
  assert list(sources.templates) == ["en"]
  assert sources.policy.drawn and sources.simulator.drawn
  assert sources.policy.config.param_dtype == "float32"
  assert sources.reference is None
  assert sources.critic is None


def test_only_what_a_run_needs_is_opened(tmp_path):
  nowhere = {f"{name}.path": str(tmp_path) for name in ("simulator", "reference", "critic")}
  sources = open_sources(runs.config(**nowhere))  # scripted, no KL, no critic
  assert sources.simulator is None and sources.reference is None and sources.critic is None
  assert refusal(**nowhere | runs.LANGUAGE_MODEL).startswith(f"{tmp_path}/config.json is missing")
  assert refusal(**nowhere, **{"algorithm.kl_coef": 0.1}).startswith(f"{tmp_path}/config.json")
  assert refusal(**nowhere, **PPO).startswith(f"{tmp_path}/config.json")


def test_an_empty_reference_path_means_the_policys():
  sources = open_sources(runs.config(**{"algorithm.kl_coef": 0.1}))
  assert sources.reference.directory == sources.policy.directory
  assert sources.reference.config.param_dtype == sources.policy.config.dtype


def test_an_empty_critic_path_means_the_policys(directory):
  changes = {"policy.path": str(directory), "policy.param_dtype": "bfloat16"}
  sources = open_sources(runs.config(**PPO, **changes))
  assert sources.critic.directory == sources.policy.directory == directory
  assert sources.critic.config == sources.policy.config
  assert sources.critic.config.param_dtype == "bfloat16"
  other = open_sources(runs.config(**PPO, **{"critic.path": str(directory)}))
  assert other.critic.directory == directory and other.policy.drawn


@pytest.mark.parametrize(
  ("mesh", "found"),
  [({"tensor": 3}, "tensor=3"), ({"data": -1}, "data=-1"), ({"fsdp": 0}, "fsdp=0")],
)
def test_a_mesh_that_does_not_match_the_devices_is_named(mesh, found):
  text = refusal(**{f"mesh.{axis}": size for axis, size in mesh.items()})
  assert found in text and "the 1 available device(s)" in text


def test_a_microbatch_that_the_mesh_cannot_share_out_is_named(monkeypatch):
  monkeypatch.setattr(partitioning, "batch_shards", lambda mesh: 4)
  text = refusal()
  assert text == (
    "training.microbatch is 2, expected a multiple of mesh.data * mesh.fsdp, which is 4."
  )


def test_context_beyond_the_models_positions_is_named_with_the_limit_that_counts():
  policy = refusal(**{"sampling.max_prompt_tokens": 8000})
  assert policy == (
    "sampling.max_prompt_tokens + sampling.max_response_tokens is 8256, expected at most the 8192 "
    "positions of the policy model."
  )
  simulator = refusal(**runs.LANGUAGE_MODEL | {"simulator.cache_length": 8193})
  assert simulator == (
    "simulator.cache_length is 8193, expected at most the 8192 positions of the simulator model."
  )


def test_a_cache_without_room_for_persona_and_a_turn_is_named():
  text = refusal(**runs.LANGUAGE_MODEL | {"simulator.cache_length": 512})
  assert text.startswith("simulator.cache_length is 512 tokens, but the persona of scenario ")


def test_a_prompt_limit_below_the_instructions_is_named():
  text = refusal(**{"sampling.max_prompt_tokens": 16})
  assert text.startswith("sampling.max_prompt_tokens is 16, expected room for the ")
  # Thinking takes longer instructions.
  opened = source.open_source("tiny", "policy.path", dtype="float32", param_dtype="float32")
  templates = open_sources(runs.config()).templates["en"]
  direct, think = (
    len(opened.tokenizer.chat.system(templates.render(section)))
    for section in ("policy", "policy_think")
  )
  assert direct < think
  open_sources(runs.config(**{"sampling.max_prompt_tokens": direct + 1}))
  text = refusal(**{"sampling.max_prompt_tokens": direct + 1, "dialogue.mode": "think"})
  assert f"room for the {think} tokens" in text


def test_a_reply_longer_than_all_replies_is_named():
  text = refusal(**{"sampling.max_new_tokens": 257})
  assert text == (
    "sampling.max_new_tokens is 257, expected at most sampling.max_response_tokens (256)."
  )


def test_a_directory_is_opened_by_its_headers_alone(directory):
  sources = open_sources(runs.config(**{"policy.path": str(directory)}))
  assert not sources.policy.drawn and sources.policy.directory == directory


def test_missing_and_truncated_weights_are_named(directory, tmp_path):
  copy = copy_with(directory, tmp_path)
  file = copy / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1000])
  for field in ("policy.path", "simulator.path"):
    text = refusal(**runs.LANGUAGE_MODEL | {field: str(copy)})
    assert text.startswith(f"{file} is truncated or no safetensors file (")
  file.unlink()
  text = refusal(**{"policy.path": str(copy)})
  assert text == f"{file} is missing, expected the model's weights in safetensors."


def test_a_path_that_leads_nowhere_is_named_with_the_preset_that_needs_none(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  text = refusal(**{"policy.path": str(tmp_path / "none")})
  assert text.startswith(f"policy.path is '{tmp_path}/none', which is neither a local directory")
  assert "preset tiny" in text


def test_a_tokenizer_without_a_chat_template_is_named(directory, tmp_path):
  copy = copy_with(directory, tmp_path)
  (copy / "chat_template.jinja").unlink()
  text = refusal(**{"policy.path": str(copy)})
  assert text.startswith(f"the tokenizer in {copy} has no chat template, expected")


def test_a_tokenizer_with_ids_beyond_the_embedding_is_named(directory, tmp_path):
  copy = copy_with(directory, tmp_path)
  file = copy / "tokenizer.json"
  spec = json.loads(file.read_text())
  spec["model"]["vocab"]["zzzz"] = 2048
  file.write_text(json.dumps(spec))
  assert refusal(**{"policy.path": str(copy)}) == (
    f"{copy}: the tokenizer has ids up to 2048, expected ids below vocab_size in config.json, 2048."
  )


def save_with(path, **sizes):
  """Writes the embedded model's files with empty tensors of other sizes."""
  opened = source.open_source("tiny", "policy.path", dtype="float32", param_dtype="float32")
  config = dataclasses.replace(opened.config, **sizes)
  abstract = weights.abstract_model(config)
  zeros = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract))
  weights.save(zeros, path, source=opened.directory, dtype="float32")
  spec = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(spec | sizes))
  return str(path)


@pytest.mark.parametrize(
  ("field", "needed"),
  [("reference.path", {"algorithm.kl_coef": 0.1}), ("critic.path", PPO)],
  ids=["reference", "critic"],
)
def test_a_model_of_another_vocabulary_is_named(tmp_path, field, needed):
  path = save_with(tmp_path / "model", vocab_size=2050)
  assert refusal(**needed, **{field: path}) == (
    f"{field} has a vocabulary of 2050, expected the policy's, 2048."
  )


def test_a_critic_shares_fewer_layers_than_it_has():
  layers = open_sources(runs.config()).policy.config.num_hidden_layers
  open_sources(runs.config(**PPO, **{"critic.shared_layers": layers - 1}))
  for shared in (layers, layers + 1):
    assert refusal(**PPO, **{"critic.shared_layers": shared}) == (
      f"critic.shared_layers is {shared}, expected fewer than the critic's {layers} layers."
    )


@pytest.mark.parametrize(
  "sizes",
  [
    {"num_hidden_layers": 3},
    {"intermediate_size": 96},
    {"num_key_value_heads": 4},
    {"head_dim": 16},
  ],
  ids=lambda sizes: next(iter(sizes)),
)
def test_a_critic_of_other_sizes_shares_no_layers(tmp_path, sizes):
  policy = open_sources(runs.config()).policy.config
  assert all(getattr(policy, name) != size for name, size in sizes.items())
  changes = PPO | {"critic.path": save_with(tmp_path / "model", **sizes)}
  open_sources(runs.config(**changes))
  assert refusal(**changes, **{"critic.shared_layers": 1}) == (
    "critic.shared_layers is 1, expected 0 with a critic.path whose sizes are not the policy's."
  )


def test_an_empty_and_a_broken_scenario_file_are_named(tmp_path):
  file = tmp_path / "scenarios.jsonl"
  cache = {"data.path": str(file), "data.cache_dir": str(tmp_path / "cache")}
  file.write_text("\n\n")
  assert refusal(**cache).startswith(f"{file}: the file is empty, expected at least one scenario")
  file.write_text('{"id": "a"}\n')
  assert refusal(**cache) == f"{file}, line 1: field 'player' is missing, expected a string."
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
  ("level", "loaded"),
  [
    ("vanilla", []),
    ("easy", ["easy"]),
    ("mixture", ["easy"]),
    ("curriculum", ["challenging", "easy"]),
  ],
)
def test_the_templates_of_the_levels_that_a_run_may_play_are_loaded(level, loaded):
  changes = {"environment.level": level, "environment.weights.challenging": 0.0}
  templates = open_sources(runs.config(**changes)).templates["en"]
  assert sorted(templates.levels) == loaded


def test_a_folder_of_templates_needs_the_levels_that_a_run_may_play(tmp_path):
  (tmp_path / "en.txt").write_text(builders.package_template("en"), encoding="utf-8")
  own = {"simulator.templates": str(tmp_path)}
  open_sources(runs.config(**own))
  text = refusal(**own, **{"environment.level": "easy"})
  assert text.startswith(f"the prompt templates {tmp_path}/easy/en.txt cannot be read")


def test_a_cache_without_room_for_the_longest_level_is_named():
  """The texts of a level may be longer than those of `vanilla`."""
  opened = source.open_source("tiny", "simulator.path", dtype="float32", param_dtype="float32")
  sources = open_sources(runs.config(**{"environment.level": "curriculum"}))
  templates = sources.templates["en"]

  def longest(texts):
    persona = [chat_lib.persona_ids(opened.tokenizer, texts, s) for s in sources.scenarios]
    return max(map(len, persona)) + 16  # and the plan and the message of runs.LANGUAGE_MODEL

  room = longest(templates)
  assert room < longest(templates.at("challenging"))
  changes = runs.LANGUAGE_MODEL | {"simulator.cache_length": room}
  open_sources(runs.config(**changes))
  text = refusal(**changes, **{"environment.level": "challenging"})
  assert text.startswith(f"simulator.cache_length is {room} tokens, but the persona of scenario ")


def test_a_greedy_user_is_not_asked_again_what_it_would_answer_the_same():
  for temperature, kind, expected in (
    (0.7, "language_model", 2),
    (0.0, "language_model", 0),
    (0.0, "openai", 2),
  ):
    config = runs.config(**{"simulator.temperature": temperature, "simulator.kind": kind})
    assert simulator_settings(config).reparse == expected


def held_out(folder, **fields) -> dict:
  """The field that names a file with one held-out scenario, the package's first with changes."""
  text = scenario.resolve("en").read_text(encoding="utf-8").splitlines()[0]
  file = folder / "held_out.jsonl"
  file.write_text(json.dumps(json.loads(text) | fields) + "\n", encoding="utf-8")
  return {"evaluation.path": str(file)}


def test_the_first_held_out_scenarios_are_opened_with_their_languages(tmp_path):
  path = runs.held_out(tmp_path, 3)
  number = {"evaluation.path": str(path), "evaluation.scenarios": 2}
  sources = open_sources(runs.config(**number))
  assert [s.id for s in sources.heldout] == ["held-en-listen-01", "held-en-listen-02"]
  assert len(open_sources(runs.config(**number | {"evaluation.scenarios": 9})).heldout) == 3
  sources = open_sources(runs.config(**{"evaluation.path": "zh"}))
  assert len(sources.heldout) == 32
  assert list(sources.templates) == ["en", "zh"]
  assert open_sources(runs.config()).heldout == ()


def test_held_out_scenarios_are_checked_as_those_of_training(tmp_path):
  assert refusal(**{"evaluation.path": "/none"}).startswith("/none: cannot be read")
  task = held_out(tmp_path, task="You want tea.")
  assert "held_out.jsonl, line 1: field 'task'" in refusal(**task)
  long = held_out(tmp_path, player="Mara " * 3000)
  text = refusal(**runs.LANGUAGE_MODEL | long)
  assert "the persona of scenario en-listen-01 takes" in text
  open_sources(runs.config(**long))  # the scripted user has room for anything


def test_a_scenario_that_is_trained_on_is_not_held_out(tmp_path):
  assert refusal(**held_out(tmp_path, id="renamed")) == (
    "evaluation.path has the scenario 'renamed', which data.path has too, expected scenarios that "
    "the run does not train on."
  )
