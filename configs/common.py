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
  """Embedded models on two CPU cores: the whole loop in a couple of minutes."""
  config.steps = 10
  config.policy.dtype = config.simulator.dtype = "float32"
  config.policy.remat = "none"
  config.simulator.update(
    score="choice", max_plan_tokens=48, max_message_tokens=32, cache_length=3072
  )
  config.dialogue.update(mode="direct", scenarios_per_step=4, max_turns=3)
  config.data.path = "en"
  config.sampling.update(
    max_new_tokens=48, max_prompt_tokens=512, max_response_tokens=512,
    extend_buckets=(64, 256), smallest_window=1024, decode_steps=48,
  )  # fmt: skip
  config.optimizer.learning_rate = 1e-3
  config.training.update(microbatch=16, smallest_row=512, logprob_chunk=512)
  config.checkpoint.every = 1
