"""Evaluations of a policy or of a simulated user: `--config=configs/eval.py[:preset]`.

The Sentient benchmark (SAGE, arXiv 2505.02847) plays a policy on the scenarios of a file, one
dialogue each. Presets are the models of configs/grpo.py: `tiny` (the default), `qwen2.5-0.5b`,
`qwen2.5-1.5b`, `qwen2.5-7b`. `--config.policy.path` names the policy, `--config.simulator.path`
the simulated user. `--config.data.path=adversarial` plays difficult users.

With the preset `fidelity`, or `fidelity,MODEL` with the name of a model, a simulated user appraises
recorded dialogues anew: `--config.data.recorded=FILE,FILE`.

With `capabilities`, or `capabilities,MODEL`, a judge says of such dialogues what the policy is good
at: `--config.data.recorded=FILE,FILE`. With the model `tiny` the judge has labels from word lists.

With `retention`, or `retention,MODEL`, tasks of lm-evaluation-harness tell what the policy keeps of
mathematics, code and instruction following: `--config.policy.path=RUN`.
"""

from ml_collections import ConfigDict

from configs import common

FIDELITY, CAPABILITIES, RETENTION = "fidelity", "capabilities", "retention"


def get_config(preset: str = "tiny") -> ConfigDict:
  """Every field with the preset's values."""
  kind, _, model = preset.partition(",")
  if kind == FIDELITY:
    return ConfigDict(_fidelity(common.base(model or "tiny")))
  if kind == CAPABILITIES:
    return ConfigDict(_capabilities(common.base(model or "tiny"), (model or "tiny") == "tiny"))
  if kind == RETENTION:
    return ConfigDict(_retention(common.base(model or "tiny")))
  config = ConfigDict(_benchmark(common.base(preset, FIDELITY, CAPABILITIES, RETENTION)))
  if preset == "tiny":
    config.data.path = "tiny-held-out"
  return config


def _benchmark(shared: ConfigDict) -> dict:
  return {
    # See rlver_jax/evaluation/benchmark.py.
    "task": "benchmark",
    "policy": {
      # language_model (a model here) or openai (one behind an OpenAI-compatible server).
      "kind": "language_model",
      # As in configs/recipe.py, or the folder of a run,
      "path": shared.policy.path,
      # of which this is the checkpoint: its step, 0 for the newest, -1 for the best by reward.
      "step": 0,
      # As in configs/recipe.py.
      "dtype": shared.policy.dtype,
      # For policy.kind=openai, as simulator.remote in configs/recipe.py.
      "remote": shared.simulator.remote.to_dict(),
    },
    "dialogue": {
      # As in configs/recipe.py: direct or think.
      "mode": shared.dialogue.mode,
      # Most replies of the policy in one dialogue. In the recorded dialogues of the benchmark the
      # tenth is not appraised any more, as if this were 9.
      "max_turns": 10,
      # The user's emotion at the start; the benchmark's is 40, a training run's 30.
      "initial_emotion": 40,
      # A dialogue ends when the emotion is
      "failure_at": 9,  # at most this, as in the recorded dialogues of the benchmark,
      "success_at": 100,  # or at least this.
    },
    "environment": {
      # How hard the simulated user is: easy, vanilla (the benchmark's) or challenging.
      "level": "vanilla",
      # As in configs/recipe.py.
      "easy": shared.environment.easy,
      "challenging": shared.environment.challenging,
    },
    "data": {
      # Scenario file, or a name, as in configs/recipe.py. A scenario without a first line is
      # opened by the simulated user.
      "path": shared.data.path,
      # How many of its first scenarios are played; 0: all.
      "scenarios": 0,
    },
    # As in configs/recipe.py, but for the policy's temperature (the benchmark is greedy) and the
    # room, which is for more turns than training has.
    "sampling": shared.sampling.to_dict()
    | _slots()
    | {
      "temperature": 0.0,
      "max_response_tokens": shared.sampling.max_response_tokens * 3 // 2,
    },
  } | _with_simulator(shared)


def _fidelity(shared: ConfigDict) -> dict:
  return {
    # See rlver_jax/evaluation/replay.py.
    "task": "fidelity",
    "data": _recorded()
    | {
      # File of the dialogues' scenarios, or a name; empty: as the records tell, which in those of
      # the Sentient benchmark is all but the user's traits.
      "path": "",
    },
    "sampling": _engine(shared),
  } | _with_simulator(shared)


def _capabilities(shared: ConfigDict, is_tiny: bool) -> dict:
  s = shared.simulator
  return {
    # See rlver_jax/evaluation/capabilities.py.
    "task": "capabilities",
    "data": _recorded(),
    "judge": {
      # language_model (a frozen model here), openai (a model behind an OpenAI-compatible server,
      # see `remote`) or scripted (labels from the scripted user's word lists, for debugging).
      "kind": "scripted" if is_tiny else "language_model",
      # As simulator.path and simulator.dtype in configs/recipe.py.
      "path": s.path,
      "dtype": s.dtype,
      # Sampling of reasons, of a server's model all its answers.
      "temperature": 0.0,  # 0: greedy
      "top_k": 0,  # only the so many most probable tokens; 0: all
      "top_p": 1.0,  # only the most probable tokens that together have this probability
      # Most new tokens of a reason.
      "max_reason_tokens": 128,
      # For judge.kind=openai: more tries, with other seeds, of an answer that cannot be read.
      "reparse": 2,
      # Tokens that a dialogue may take, with the instructions and the longest question; one that
      # takes more is counted and told of.
      "cache_length": 4096 if is_tiny else s.cache_length,
      # Folder to use instead of the package's rubrics: en.txt and zh.txt.
      "rubrics": "",
      # For judge.kind=openai, as simulator.remote in configs/recipe.py.
      "remote": s.remote.to_dict(),
    },
    "sampling": _engine(shared),
  } | _everywhere(shared)


def _retention(shared: ConfigDict) -> dict:
  return {
    # See rlver_jax/evaluation/retention.py.
    "task": "retention",
    "policy": {
      # As for the benchmark. Of a run the model that it started from is measured too.
      "path": shared.policy.path,
      "step": 0,
      "dtype": shared.policy.dtype,
    },
    "harness": {
      # Names of tasks or groups that lm-evaluation-harness knows, with commas between them. Their
      # data is downloaded.
      "tasks": "gsm8k,ifeval",
      # Folder with further task files; empty: none.
      "folder": "",
      # Examples before each question; -1: as many as the task says.
      "few_shot": -1,
      # How many of the first questions of a task are asked; 0: all.
      "limit": 0,
      # Whether questions are put as chats in the model's format.
      "chat": True,
      # Run programs that the model writes, as tasks like humaneval do: only in a container.
      "unsafe_code": False,
    },
    "sampling": _engine(shared)
    | {
      # Tokens of a question with its examples and its answer; longer ones lose their beginning.
      "cache_length": shared.sampling.max_prompt_tokens + shared.sampling.max_response_tokens,
      # Most tokens of an answer, where the task does not say.
      "max_new_tokens": 256,
    },
  } | _everywhere(shared)


def _recorded() -> dict:
  return {
    # Files of recorded dialogues, with commas between them.
    "recorded": "",
    # How many of the first dialogues of each file are looked at; 0: all.
    "dialogues": 0,
    # Leave out records that are broken (each is named) instead of ending with them.
    "skip_broken": False,
  }


def _engine(shared: ConfigDict) -> dict:
  # As in configs/recipe.py.
  names = ("decode_steps", "extend_buckets", "smallest_window")
  return {name: shared.sampling[name] for name in names} | _slots()


def _slots() -> dict:
  # Dialogues under way at once, of which each takes a cache.
  return {"slots": 32}


def _with_simulator(shared: ConfigDict) -> dict:
  # As in configs/recipe.py.
  return {"simulator": shared.simulator} | _everywhere(shared)


def _everywhere(shared: ConfigDict) -> dict:
  return {
    # Determines every random number, with the dialogue and the turn.
    "seed": 0,
    # As in configs/recipe.py.
    "mesh": shared.mesh,
    # Likewise.
    "cpu_devices": shared.cpu_devices,
    # Compiled programs are kept here between runs; empty: not kept.
    "compilation_cache": shared.compilation_cache,
  }
