"""Sampled tokens a second of a multi-turn dialogue batch through the engine.

    python -m benchmarks.rollout [--model DIR] [--peer SCRIPT]

Each row has a system prompt of its own; at every turn `--user` new tokens are read and exactly
`--new` are drawn. Compilation and one warm-up run are not timed. The peer, if given, is run
afterwards in a process of its own with the same sizes.
"""

import time

import numpy as np

from benchmarks import peer
from rlver_jax import partitioning
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import EngineSettings, Request
from rlver_jax.sampling.sampler import Sampling


def main() -> None:
  args = peer.arguments(__doc__.splitlines()[0], batch=16, turns=4, system=256, user=40, new=48)
  model, directory = peer.load(args.model, remat="none")
  total = args.system + args.turns * (args.user + args.new)
  # The ladder steps by one turn, so that attention never looks far past the longest row.
  steps = range(1, args.turns + 1)
  windows = tuple(args.system + t * (args.user + args.new) for t in steps)
  buckets = tuple(sorted({args.user + 1, args.system + args.user}))
  settings = EngineSettings(args.batch, windows, buckets, args.new)
  engine = Engine(model, partitioning.make_mesh(1, 1, 1), settings, Sampling(), [], seed=0)
  engine.compile()
  numbers = np.random.default_rng(0)
  seconds = []
  for repeat in range(args.repeats + 1):
    rows = [numbers.integers(100, 1000, args.system).tolist() for _ in range(args.batch)]
    start = time.perf_counter()
    for turn in range(args.turns):
      for slot, ids in enumerate(rows):
        ids += numbers.integers(100, 1000, args.user).tolist()
        engine.submit(slot, Request(tuple(ids), (repeat, slot, turn, 0), args.new))
      for slot, sample in engine.step().items():
        assert len(sample.ids) == args.new
        rows[slot] += sample.ids
    seconds.append(time.perf_counter() - start)
    assert all(len(ids) == total for ids in rows)
  peer.report("rollout", args.batch * args.turns * args.new, seconds[1:], args, directory)


if __name__ == "__main__":
  main()
