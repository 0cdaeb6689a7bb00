"""GRPO with a frozen simulated user: `--config=configs/grpo.py[:preset]`.

Presets: `tiny` (the default; embedded models, nothing to download), `qwen2.5-0.5b`,
`qwen2.5-1.5b`, `qwen2.5-7b` (the published recipe, arXiv 2507.03112). Any field can be
overridden on the command line: `--config.policy.path=DIR --config.steps=20`. The other
estimators and losses of the family without a critic are one override away, as in
`--config.algorithm.advantage=rloo`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "tiny") -> ConfigDict:
  """The complete recipe of a preset."""
  config = common.base(preset)
  config.algorithm.advantage = "grpo"
  if preset == "tiny":  # a policy that is told what each reply earned learns in minutes
    config.algorithm.update(advantage="grpo_process", gamma=0.5)
  return config
