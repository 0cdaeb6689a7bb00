"""The compiled programs of an engine, each made once for the shapes that it is called with."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rlver_jax import partitioning
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.sampling import programs
from rlver_jax.sampling.cache import Cache
from rlver_jax.sampling.choices import Choices
from rlver_jax.sampling.requests import EngineSettings

Call = tuple[str, dict, tuple]  # a program's name, its static arguments, and the others


class DevicePrograms:
  """The functions of `programs.py` by name, compiled for a mesh.

  where: shardings of the cache; decode: `programs.decode` with its settings; choices: of `score`.
  """

  def __init__(
    self,
    mesh: Mesh,
    where: Cache,
    decode: Callable,
    choices: Choices | None,
  ):
    self._mesh, self._where = mesh, where
    self._functions = {  # and which argument is donated
      "extend": (programs.extend, (1,)),
      "read": (programs.read, (1,)),
      "install": (programs.install, (0,)),
      "decode": (decode, (1,)),
      "score": (functools.partial(programs.score, choices=choices), ()),
    }
    self.compiled: dict[tuple, jax.stages.Compiled] = {}

  def run(self, name: str, static: dict, *arguments):
    """What the program gives, which is compiled first where it has not been."""
    key = self._key(name, static, arguments)
    if key not in self.compiled:
      self.compiled[key] = self._lower(name, static, arguments).compile()
    return self.compiled[key](*arguments)

  def compile(self, calls: Sequence[Call]) -> int:
    """Compiles what these calls need, several at a time; returns how many programs there are."""

    def build(call: Call):
      return self._key(*call), self._lower(*call).compile()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      self.compiled.update(pool.map(build, calls))
    return len(self.compiled)

  def _key(self, name: str, static: dict, arguments: tuple) -> tuple:
    """What tells one compiled program from another: only reading has several shapes."""
    shapes = [np.shape(x) for x in arguments[2:]] if name in ("extend", "read") else []
    return name, *static.values(), *shapes

  def _lower(self, name: str, static: dict, arguments: tuple) -> jax.stages.Lowered:
    function, donated = self._functions[name]
    everywhere = partitioning.replicated(self._mesh)
    both = self._where, everywhere
    out = {"decode": both, "read": both, "score": everywhere}.get(name, self._where)
    program = jax.jit(
      functools.partial(function, **static), donate_argnums=donated, out_shardings=out
    )
    with partitioning.layout(self._mesh, partitioning.SAMPLING_RULES):
      return program.lower(*arguments)


def calls(
  settings: EngineSettings, model: Qwen2, cache: Cache, prefixes: Cache, scores: bool
) -> list[Call]:
  """Every call that an engine of these settings makes, but those of `Engine.logprobs`.

  prefixes: the cache of what several slots share; scores: whether continuations are compared.
  """
  slots = settings.slots

  def ints(*shape):
    return np.zeros(shape, np.int32)

  rows = (cache, ints(slots), ints(slots))
  numbers = np.zeros((slots, 5), np.uint32)
  found: list[Call] = [("install", {}, (cache, prefixes, ints(slots)))]
  for window in settings.windows:
    static = {"window": window}
    decode = (*rows, numbers, ints(slots), ints(slots), np.zeros(slots, bool), np.int32(0))
    found.append(("decode", static, (model, *decode)))
    if scores:
      found.append(("score", static, (model, *rows)))
    for bucket in settings.extend_buckets:
      for read in (cache, prefixes):
        n = read.k.shape[1]
        arguments = (model, read, ints(n, bucket), ints(n), ints(n))
        found.append(("extend", static, arguments))
  return found
