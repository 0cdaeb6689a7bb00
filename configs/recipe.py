"""Every field of a configuration: what it means, and its value in the published recipe (arXiv
2507.03112); `common.py` says what the smaller presets change."""


def published(path: str) -> dict:
  """The recipe with this model as policy and as simulated user."""
  return {
    # rl: dialogues with a simulated user; sft, of configs/sft.py, is supervised training.
    "task": "rl",
    # Determines every random number of a run, with step, dialogue and turn.
    "seed": 0,
    # Rollout-and-update steps of the run.
    "steps": 1000,
    "policy": {
      # Local Hugging Face directory, hub id, or an embedded model: `tiny-policy`,
      # `tiny-simulator`, or `tiny`, whose weights are drawn from the seed.
      "path": path,
      # Of activations and products: bfloat16 or float32 (on CPU float32 is far faster).
      "dtype": "bfloat16",
      # Of the trained parameters.
      "param_dtype": "float32",
      # What the backward pass recomputes: none, dots (all but products), full.
      "remat": "full",
    },
    "critic": {
      # Used by algorithm.advantage gae. Path as policy.path; empty: the policy's initial weights.
      "path": "",
      # How many of the lowest layers, with the embedding, it shares with the policy: it reads them
      # as they stand and trains those above (they are frozen where the policy is trained by
      # adapters, else the policy goes on training them); 0: all its weights are its own.
      "shared_layers": 0,
      # After warm-up; the other fields of `optimizer` hold for both.
      "learning_rate": 5e-6,
      # Share of all its updates in which the rate rises linearly to the full one.
      "warmup_fraction": 0.05,
      # First steps of the run in which it alone is trained.
      "warmup_steps": 0,
      # How far a value may move from what it was before the step; beyond, it earns no gradient.
      "value_clip": 0.5,
    },
    "lora": {
      # Rank of the adapters that are trained in place of the whole weights (arXiv 2106.09685),
      "policy_rank": 0,  # of the policy; 0: the whole policy is trained,
      "critic_rank": 0,  # and of the critic.
      # What adapters add is scaled by alpha / rank.
      "alpha": 32.0,
      # The linear maps of every layer that get one.
      "targets": ("q", "k", "v", "o", "gate", "up", "down"),
    },
    "reference": {
      # The frozen model of the KL term; empty: the policy's own initial weights.
      "path": "",
    },
    "simulator": {
      # language_model (a frozen model here), openai (a model behind an OpenAI-compatible server,
      # see `remote`) or scripted (a fixed appraisal, for debugging).
      "kind": "language_model",
      # As policy.path and policy.dtype; its parameters are kept in the same dtype.
      "path": path,
      "dtype": "bfloat16",  # or float32
      # How the change of emotion is read: `generate` (the last field of the appraisal) or
      # `choice` (the most probable of the integers -10..10).
      "score": "generate",
      # Write an appraisal before the change is read; `generate` needs it.
      "appraise": True,
      # More appraisals, with other seeds, where no change can be read from one (`generate`); then
      # the change alone is asked for, as by `choice`.
      "reparse": 2,
      # Sampling of appraisals and messages.
      "temperature": 0.7,  # 0: greedy
      "top_k": 0,  # only the so many most probable tokens; 0: all
      "top_p": 0.9,  # only the most probable tokens that together have this probability
      # Most new tokens of one answer.
      "max_plan_tokens": 512,  # of an appraisal
      "max_message_tokens": 256,  # of a message
      # Tokens that one simulated user's chat may hold, persona included.
      "cache_length": 16384,
      # Folder to use instead of the package's templates: en.txt and zh.txt, and for levels of
      # difficulty other than vanilla the same in easy/ and challenging/.
      "templates": "",
      # For simulator.kind=openai, which also takes score, appraise, reparse, the sampling and the
      # limits above; there `choice` asks for the integer (with `reparse` more tries), as few
      # servers score continuations.
      "remote": {
        # Address of the server's interface, as in https://host/v1 or http://localhost:8000/v1.
        "base_url": "",
        # The server's name of the model.
        "model": "",
        # Name of the environment variable that holds the key (any word where none is wanted).
        "api_key_env": "OPENAI_API_KEY",
        # Requests under way at once.
        "concurrency": 64,
        # Seconds until a request without an answer is given up.
        "timeout": 120.0,
        # More tries of a request after 408, 409, 425, 429, 5xx, time-outs, lost connections and
        # answers that cannot be read.
        "retries": 6,
        # Seconds before the first of them (half to all of it, by chance), doubling with each, and
        # the most; Retry-After is honoured up to the most.
        "first_wait": 1.0,
        "max_wait": 60.0,  # seconds
        # Prompt and completion tokens that a run may spend, as the server reports them, through
        # all its restarts; 0: no limit. Requests under way when it is reached come on top.
        "token_budget": 0,
        # Dialogues of a run that may be dropped because their user failed for good.
        "failure_budget": 200,
      },
    },
    "dialogue": {
      # direct, or think (<think>...</think> before the reply).
      "mode": "think",
      # Scenarios that a step draws.
      "scenarios_per_step": 32,
      # Dialogues for each of them.
      "group_size": 4,
      # Most replies of the policy in one dialogue.
      "max_turns": 8,
      # The user's emotion at the start; the most is 100.
      "initial_emotion": 30,
      # A dialogue ends when the emotion is
      "failure_at": 0,  # at most this,
      "success_at": 100,  # or at least this.
      # Taken from the reward for the share of replies without a well-formed thought (think).
      "malformed_penalty": 0.0,
      # ... and for the share of replies that say for the most part what an earlier reply of the
      # dialogue said, which a small simulated user may fail to notice.
      "repeated_penalty": 0.0,
    },
    # How hard the simulated user is: its prompts (simulator.templates) and the numbers below.
    "environment": {
      # For every dialogue easy, vanilla (the published set-up) or challenging; or mixture (drawn
      # for each scenario of a step, by `weights`) or curriculum (moves between the three).
      "level": "vanilla",
      # How often a mixture draws a level, in proportion; 0: never.
      "weights": {
        "easy": 1.0,  # against
        "vanilla": 1.0,  # against
        "challenging": 1.0,  # the others
      },
      "curriculum": {
        # The level of the first step.
        "start": "easy",
        # Steps over which the mean final emotion is taken; so many at least are played at a level.
        "window": 10,
        # That mean moves it to the next
        "raise_at": 70.0,  # harder level when at least this,
        "lower_at": 20.0,  # easier level when at most this.
      },
      # `vanilla` has 0 for all of these, and 1.0 for gain and loss.
      "easy": {
        # Added to dialogue.initial_emotion.
        "emotion_offset": 10,
        # A change of emotion is multiplied by
        "gain": 1.25,  # this where it is a rise
        "loss": 0.8,  # and by this where it is a fall.
        # Scripted user: points on top (below 0: less) for what does not meet the need in full.
        "leniency": 2,
        # Scripted user: the share of messages without a hint at its need that get one (below 0:
        # of those with a hint that lose it), and the share of hints that say it plainly.
        "hints": 1.0,  # -1 to 1
        "plain": 0.5,  # 0 to 1
      },
      # As `easy`.
      "challenging": {
        "emotion_offset": -10,  # added to dialogue.initial_emotion
        "gain": 1.0,  # times a rise; less would put success out of reach
        "loss": 1.25,  # times a fall
        "leniency": -3,  # points of the scripted user
        "hints": -0.75,  # as above
        "plain": 0.0,  # as above
      },
    },
    "data": {
      # Scenario file in the published format (JSON lines), or `en`, `zh` or `adversarial` for ours.
      "path": "zh",
      # Where prepared data sets are kept.
      "cache_dir": "~/.cache/rlver_jax/scenarios",
    },
    "sampling": {
      # The policy's sampling, as the simulator's.
      "temperature": 1.0,  # 0: greedy
      "top_k": 0,  # 0: all tokens
      "top_p": 1.0,  # 1: all tokens
      # Most tokens
      "max_new_tokens": 1024,  # of one reply,
      "max_prompt_tokens": 5000,  # of instructions and the user's first message,
      "max_response_tokens": 10000,  # and of all that follows them, the user's messages included.
      # Dialogues under way at once; 0 means all of a step.
      "slots": 0,
      # Tokens drawn before the host looks again.
      "decode_steps": 128,
      # Numbers of tokens that are read at a time: the list of compiled shapes.
      "extend_buckets": (128, 1024),
      # The smallest attention window; larger ones follow by steps of a half and a third (each
      # second one doubles) up to the cache length.
      "smallest_window": 1024,
    },
    "reward": {
      # final (the emotion at the end, at the last token), change (of emotion in each turn, at the
      # reply's last token), or both.
      "kind": "final",
      # What max(final emotion, 0) / 100 is multiplied by,
      "final_weight": 1.0,
      # and what the change of emotion / 100 is.
      "change_weight": 1.0,
    },
    "algorithm": {
      # grpo, grpo_process (each reply against all of its group's: needs rewards of each reply),
      # dr_grpo (GRPO without division by the group's deviation), rloo, reinforce_pp, remax (plays
      # one more, greedy, dialogue a group) or gae (PPO, with a critic).
      "advantage": "grpo",
      # clip (PPO's ratio of each token) or gspo (one ratio a dialogue).
      "loss": "clip",
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
      # k1 (for the reward alone), k2, k3 or k3_clamped: see rlver_jax/rl/losses.py.
      "kl_estimator": "k3",
      # Where the KL counts: loss or reward (of each token).
      "kl_in": "loss",
      # Adapts kl_coef so that the KL stays near this, in nats a token; 0: kl_coef is fixed.
      "kl_target": 0.0,
      # ... over about so many dialogues, at least those of a step.
      "kl_horizon": 10_000,
      # For gae and reinforce_pp: discount of rewards, from one token of the policy to its next;
      # for grpo_process from one reply to the next.
      "gamma": 1.0,
      # For gae: 1 trusts the rewards, 0 the critic.
      "lam": 1.0,
      # Advantages get mean 0 and variance 1 over the step's tokens.
      "whiten": False,
      # Most further rounds of dialogues on other scenarios in place of groups whose rewards are all
      # equal (DAPO's dynamic sampling); 0: none.
      "dynamic_sampling_rounds": 0,
      # Most of a token's importance weight between sampler and trainer, which are then compared in
      # a pass of their own; 0: no weights, and the ratio is taken to the sampler's log-probability.
      "importance_cap": 0.0,
      # Passes over a batch of dialogues,
      "epochs": 1,
      # each in so many updates.
      "minibatches": 1,
    },
    "optimizer": {
      # After warm-up.
      "learning_rate": 1e-6,
      # Share of all updates in which the rate rises linearly to the full one.
      "warmup_fraction": 0.02,
      # After that: constant or cosine (to zero).
      "schedule": "constant",
      # AdamW (arXiv 1711.05101).
      "b1": 0.9,  # decay of the first moment
      "b2": 0.999,  # decay of the second moment
      "eps": 1e-8,  # added to the root of the second moment
      "weight_decay": 0.01,  # times the learning rate
      # Of AdamW's first moment: float32 or bfloat16.
      "moment_dtype": "float32",
      # Gradients are scaled down to this global norm.
      "max_grad_norm": 1.0,
    },
    "training": {
      # Rows of a microbatch; must divide scenarios_per_step * group_size.
      "microbatch": 8,
      # Tokens, over all rows of a microbatch, whose logits are alive at a time.
      "logprob_chunk": 1024,
      # The smallest padded row length; larger ones double up to the longest row, with one halfway.
      "smallest_row": 1024,
      # Consecutive updates with a loss or gradient that is not finite that end the run.
      "max_nonfinite": 3,
    },
    "evaluation": {
      # Scenarios that are held out: a file, or a name, as for data.path. Dialogues on them are
      # played before the first step and after the last (see rlver_jax/heldout.py); empty: none.
      "path": "",
      # How many of its first scenarios are played, one dialogue each; at most those it has.
      "scenarios": 64,
    },
    # Devices along each axis of the mesh; one may be -1 for those that are left.
    "mesh": {
      "data": 1,  # copies of the model, each with rows of its own
      "fsdp": -1,  # rows, and parameters cut along the model's width
      "tensor": 1,  # heads, feed-forward and vocabulary
    },
    # Where JAX runs on a CPU: devices that it is split into. The products of a small model are too
    # small for several cores; their rows are not.
    "cpu_devices": 1,
    "checkpoint": {
      # Steps between checkpoints; the last step and an interrupted run are always saved.
      "every": 5,
      # Newest checkpoints that are kept, beside the best by reward.
      "keep": 2,
    },
    "log": {
      # Write the metrics for TensorBoard too.
      "tensorboard": True,
      # Steps between files of dialogues; 0 for none.
      "dialogues_every": 1,
    },
    # Compiled programs are kept here between runs; empty: not kept.
    "compilation_cache": "~/.cache/rlver_jax/xla",
  }
