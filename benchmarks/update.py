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
from rlver_jax.rl.rows import Rows
from rlver_jax.rl.update import Updater, UpdateSettings


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
  settings = UpdateSettings(
    microbatch=args.batch // args.chunks,
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.2,
    entropy_coef=0.0,
    kl_coef=0.0,
    aggregation="token_mean",
    aggregation_constant=1.0,
    max_grad_norm=1.0,
    logprob_chunk=512,
  )
  updater = Updater(partitioning.make_mesh(1, 1, 1), optax.adamw(1e-6), settings, model)
  state = updater.init(model)
  updater.compile(args.batch, (args.length,), reference=None)
  seconds = []
  for _ in range(args.repeats + 1):
    start = time.perf_counter()
    batch = updater.batch(rows, numbers.standard_normal(args.batch))
    state, _ = jax.block_until_ready(updater.update(state, batch))
    seconds.append(time.perf_counter() - start)
  peer.report("update", args.batch * args.length, seconds[1:], args, directory)


if __name__ == "__main__":
  main()
