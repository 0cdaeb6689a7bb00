"""What all configurations share: the presets, and what the smaller ones change in the recipe."""

from ml_collections import ConfigDict

from configs import recipe

# Local paths or hub ids; those of the preset `tiny` are embedded in the package.
MODELS = {
  "tiny": "tiny-policy",
  "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
  "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
  "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}


def model(preset: str, *others: str) -> str:
  """The path of a preset's model; ValueError, which also names `others`, where there is none."""
  if preset not in MODELS:
    known = ", ".join((*MODELS, *others))
    raise ValueError(f"preset is '{preset}', expected one of: {known}.")
  return MODELS[preset]


def base(preset: str, *others: str) -> ConfigDict:
  """Every field with the preset's values; what an algorithm sets otherwise is in its own file.

  others: presets without a model, which the caller knows by itself.
  """
  config = ConfigDict(recipe.published(model(preset, *others)))
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
  """Embedded models in the embedded world: a policy that learns within minutes on two CPU cores."""
  config.steps = 12
  config.policy.update(dtype="float32", remat="none")
  config.cpu_devices = 2
  config.mesh.update(data=-1, fsdp=1)
  config.simulator.update(
    path="tiny-simulator", dtype="float32", templates="tiny", temperature=0.3, top_p=1.0,
    max_plan_tokens=64, max_message_tokens=64, cache_length=1024,
  )  # fmt: skip
  # A simulated user of this size does not notice every reply that says the same again.
  config.dialogue.update(mode="direct", scenarios_per_step=8, max_turns=10, repeated_penalty=2.0)
  config.data.path = "tiny"
  config.evaluation.path = "tiny-held-out"
  # The least probable tokens of so small a model spell no word. A reply without an end holds up all
  # other dialogues; an appraisal, of about 50 tokens, is to be drawn in one go.
  config.sampling.update(
    temperature=0.65, top_p=0.95, max_new_tokens=48, max_prompt_tokens=96, max_response_tokens=768,
    extend_buckets=(32, 96), smallest_window=1024, decode_steps=64,
  )  # fmt: skip
  config.reward.kind = "change"
  # A run this short stays near its start by itself: no reference has to be run beside it.
  config.algorithm.update(kl_coef=0.0, minibatches=4)
  config.optimizer.update(learning_rate=5e-4, schedule="cosine")
  # Few dialogues with thoughts are longer; one length less to compile is worth longer rows.
  config.training.update(microbatch=8, smallest_row=1056)
  config.checkpoint.every = 10
