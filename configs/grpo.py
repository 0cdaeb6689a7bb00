"""GRPO with a frozen simulated user: `--config=configs/grpo.py[:preset]`.

Presets: `tiny` (the default; embedded models, nothing to download), `qwen2.5-0.5b`,
`qwen2.5-1.5b`, `qwen2.5-7b` (the published recipe, arXiv 2507.03112). Any field can be
overridden on the command line: `--config.policy.path=DIR --config.steps=20`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "tiny") -> ConfigDict:
  """The complete recipe of a preset."""
  config = common.base(preset)
  config.algorithm = ConfigDict(
    {
      # Divide a group's advantages by its standard deviation (off: Dr. GRPO).
      "scale_by_std": True,
      # How tokens are averaged in the loss: token_mean, sequence_mean, constant. `constant`
      # divides a sequence's sum by `max_response_tokens` whatever its length (Dr. GRPO).
      "aggregation": "token_mean",
      # The ratio to the sampling policy is clipped to
      "clip_low": 0.2,  # 1 less this
      "clip_high": 0.2,  # and 1 plus this.
      # Weight of the entropy bonus.
      "entropy_coef": 0.001,
      # Weight of the KL to the frozen reference; 0 loads no reference.
      "kl_coef": 0.0,
      # Passes over a batch of dialogues.
      "epochs": 1,
    }
  )
  return config
