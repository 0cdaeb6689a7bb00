"""What all configurations share: the presets, and what the smaller ones change in the recipe."""

from ml_collections import ConfigDict

from configs import recipe

# Local paths or hub ids; those of the preset `tiny` are embedded in the package.
MODELS = {
  "tiny": "tiny",
  "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
  "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
  "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}


def model(preset: str) -> str:
  """The path of a preset's model; ValueError where there is no such preset."""
  if preset not in MODELS:
    raise ValueError(f"preset is '{preset}', expected one of: {', '.join(MODELS)}.")
  return MODELS[preset]


def base(preset: str) -> ConfigDict:
  """Every field with the preset's values; what an algorithm sets otherwise is in its own file."""
  config = ConfigDict(recipe.published(model(preset)))
  if preset == "tiny":
    _tiny(config)
  elif preset != "qwen2.5-7b":
    _small(config)
  return config


def _small(config: ConfigDict) -> None:
  """0.5B and 1.5B: a step that one accelerator, or a patient CPU, can hold."""
  config.steps = 200
  config.dialogue.mode = "direct"
  config.dialogue.scenarios_per_step = 8
  config.sampling.update(
    max_new_tokens=256, max_prompt_tokens=1024, max_response_tokens=3072,
    extend_buckets=(64, 512), smallest_window=1024,
  )  # fmt: skip
  config.simulator.update(max_plan_tokens=256, max_message_tokens=128, cache_length=8192)
  config.training.update(microbatch=4, smallest_row=512, logprob_chunk=256)


def _tiny(config: ConfigDict) -> None:
  """The embedded policy and simulated user on two CPU cores: they learn in a few minutes."""
  config.steps = 40
  config.policy.update(path="tiny-policy", dtype="float32", remat="none")
  config.simulator.update(
    path="tiny-simulator", dtype="float32", templates="tiny", temperature=0.7, top_p=1.0,
    max_plan_tokens=64, max_message_tokens=64, cache_length=1024,
  )  # fmt: skip
  config.dialogue.update(mode="direct", scenarios_per_step=8, max_turns=10)
  config.data.path = "tiny"
  config.evaluation.path = "tiny-held-out"
  config.sampling.update(
    max_new_tokens=48, max_prompt_tokens=96, max_response_tokens=704,
    extend_buckets=(32, 96), smallest_window=256, decode_steps=64,
  )  # fmt: skip
  config.optimizer.learning_rate = 1e-3
  config.training.update(microbatch=16, smallest_row=400, logprob_chunk=4096)
  config.checkpoint.every = 10
