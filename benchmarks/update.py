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
from rlver_jax import partitioning
from rlver_jax.rl.learner import Learner
from rlver_jax.rl.prepare import Experience, Frozen, LearnerSettings
from rlver_jax.rl.rows import Rows
from rlver_jax.rl.update import LossSettings


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
  loss = LossSettings(
    policy_loss="clip",
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.2,
    entropy_coef=0.0,
    kl_estimator="k3",
    kl_in_loss=False,
    value_clip=0.5,
    logprob_chunk=512,
  )
  settings = LearnerSettings(
    loss=loss,
    estimator="remax",  # with baselines of zero: a row's advantage is its reward
    aggregation="token_mean",
    aggregation_constant=1.0,
    whiten=False,
    gamma=1.0,
    lam=1.0,
    kl_in_reward=False,
    kl_coef=0.0,
    kl_target=0.0,
    kl_horizon=1.0,
    importance_cap=0.0,
    epochs=1,
    minibatches=1,
    microbatch=args.batch // args.chunks,
    groups=args.batch,
    max_grad_norm=1.0,
    critic_warmup_steps=0,
  )
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
