"""Permutations that stay the same whatever the version of NumPy."""

import numpy as np


def permutation(length: int, seed: int, number: int) -> np.ndarray:
  """A permutation of 0..length-1, int64, that is a function of its arguments alone.

  `seed` is taken modulo 2**64.
  """
  # Sorting raw words and not `Generator.permutation`: NumPy keeps a bit generator's stream the
  # same for good, but may change a distribution's, and a resumed run must not notice.
  bits = np.random.Philox(key=np.array([seed % 2**64, number], np.uint64))
  return np.argsort(bits.random_raw(length), kind="stable")
