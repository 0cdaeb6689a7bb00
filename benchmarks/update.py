"""Tokens a second of one clipped policy-gradient step with AdamW.

    python -m benchmarks.update [--model DIR] [--peer SCRIPT]

All tokens of all rows are trained. Compilation and one warm-up step are not timed. The peer,
if given, is run afterwards in a process of its own with the same sizes.
"""

import time

import jax
import numpy as np
import optax

from benchmarks import peer
from configs import grpo
from rlver_jax import partitioning, trainables
from rlver_jax.rl.learner import Learner
from rlver_jax.rl.prepare import Experience, Frozen
from rlver_jax.rl.rows import Rows


def main() -> None:
  args = peer.arguments(__doc__.splitlines()[0], batch=8, length=512, chunks=1)
  model, directory = peer.load(args.model, remat="full")
  shape = (args.batch, args.length)
  numbers = np.random.default_rng(0)
  mask = np.ones(shape, bool)
  mask[:, 0] = False
  rows = Rows(
    tokens=numbers.integers(100, 1000, shape, np.int32),
    positions=np.broadcast_to(np.arange(args.length, dtype=np.int32), shape).copy(),
    branch=np.zeros(shape, np.int32),
    mask=mask,
    logprobs=np.full(shape, -12, np.float32),
  )
  config = grpo.get_config("qwen2.5-0.5b")
  config.update_from_flattened_dict(
    {
      "algorithm.advantage": "remax",  # with baselines of zero: a row's advantage is its reward
      "algorithm.entropy_coef": 0.0,
      "dialogue.scenarios_per_step": args.batch,
      "training.microbatch": args.batch // args.chunks,
      "training.logprob_chunk": 512,
    }
  )
  settings = trainables.learner_settings(config)
  learner = Learner(partitioning.make_mesh(1, 1, 1), settings, optax.adamw(1e-6), model)
  state = learner.init(model)
  learner.compile(args.batch, (args.length,), Frozen())
  seconds = []
  for repeat in range(args.repeats + 1):
    start = time.perf_counter()
    rewards = np.zeros(shape, np.float32)
    rewards[:, -1] = numbers.standard_normal(args.batch)
    groups = np.arange(args.batch, dtype=np.int32)
    experience = Experience(rows, rewards, groups, np.zeros(args.batch, np.float32))
    state, _ = learner.learn(state, Frozen(), experience, step=repeat, seed=0)
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - start)
  peer.report("update", args.batch * args.length, seconds[1:], args, directory)


if __name__ == "__main__":
  main()
