"""PPO with a critic and a frozen simulated user: `--config=configs/ppo.py[:preset]`.

Presets as in configs/grpo.py; `qwen2.5-7b` is the published recipe, arXiv 2507.03112: one dialogue
for each scenario, a critic that starts from the policy, generalised advantage estimation with
gamma and lambda 1 over the policy's own tokens, and advantages whitened over the step.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "tiny") -> ConfigDict:
  """The complete recipe of a preset."""
  config = common.base(preset)
  config.algorithm.update(advantage="gae", whiten=True)
  dialogues = config.dialogue.scenarios_per_step * config.dialogue.group_size
  config.dialogue.group_size = 1
  if preset != "qwen2.5-7b":  # as many dialogues a step as with groups
    config.dialogue.scenarios_per_step = dialogues
  if preset == "tiny":
    # A critic of this size has more to learn than a pretrained one; rewards fade over a reply's
    # length, so that each counts for the reply that earned it. The lower half of its layers is read
    # from the policy, so that its updates take less time.
    config.critic.update(learning_rate=1e-3, warmup_fraction=0.0, shared_layers=2)
    config.algorithm.gamma = 0.97
  return config
