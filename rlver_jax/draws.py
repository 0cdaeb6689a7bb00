"""Draws that are a function of what they are for: the same on every machine, in any order."""

import hashlib


def number(*what) -> int:
  """An integer in 0..2^64 - 1 for these values, each of which `repr` spells out."""
  digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big")


def share(*what) -> float:
  """A number in 0..1, below 1, as `number`."""
  return (number(*what) >> 11) / 2**53
