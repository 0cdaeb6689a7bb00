"""Checkpoints of a run: written in the background, kept by age and by reward, restored sharded.

A checkpoint is an Orbax directory `<directory>/<step>` with the state as nested dictionaries of
arrays (readable with Orbax alone, no class of ours needed), a small JSON object `metadata`, and
the reward. It appears under its name only when it is complete.

Arrays are written uncompressed: trained weights shrink by a tenth at most, while compressing
them holds a second copy of the whole state in memory and takes three times as long.
"""

import contextlib
import gc
import json
import logging as standard_logging
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from orbax.checkpoint import checkpoint_managers as policies

from rlver_jax.errors import UserError

_STRAGGLER_SECONDS = 0.3  # how long the other reads of a damaged checkpoint may still fail

_Leaves = dict[tuple[str, ...], Any]


class Checkpoints:
  """The checkpoints of one directory: the newest `keep` and the best by reward.

  With `keep=None` the directory is only read: nothing in it is created, removed or cleaned up,
  so a run that is writing there is not disturbed. Otherwise what a killed run left half-written
  is removed. Only one run at a time may write. Raises UserError when the reward of an existing
  checkpoint cannot be read.
  """

  def __init__(self, directory: str, keep: int | None):
    logging.get_absl_logger().addFilter(_quiet_orbax)
    self.directory = epath.Path(directory).expanduser().resolve()
    writing = keep is not None
    kept = [
      policies.LatestN(n=keep),
      # Without a reward it is what a killed run had begun to delete.
      policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
    ]
    options = ocp.CheckpointManagerOptions(
      best_fn=_rank,
      preservation_policy=policies.AnyPreservationPolicy(kept),
      create=writing,
      cleanup_tmp_directories=writing,
      read_only=not writing,
      save_interval_steps=1 if writing else 0,
    )
    try:
      self._manager = ocp.CheckpointManager(
        self.directory, options=options, handler_registry=_handlers()
      )
    except ValueError:  # it reads the rewards, and does not say which one is broken
      for path in self.directory.glob("[0-9]*/metrics/metrics"):
        _read(path.parent.parent, lambda path=path: json.loads(path.read_text()))
      raise

  def save(self, step: int, state: Any, metadata: dict, reward: float) -> None:
    """Starts to write a checkpoint and returns once `state` may be donated or overwritten.

    `state` is a pytree of arrays (numbers become arrays; random keys go as their key data),
    `metadata` a small JSON object, `reward` what `best` compares (NaN ranks lowest). Waits for
    the save before. Raises ValueError when the step is there already, UserError when the save
    before failed.
    """
    self.wait()
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(_nest(_arrays(state))), metadata=ocp.args.JsonSave(metadata)
    )
    self._manager.save(step, args=items, metrics={"reward": float(reward)}, force=True)

  def latest(self) -> int | None:
    """The newest checkpoint's step, or None; waits for a save in progress."""
    self.wait()
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step of the checkpoint with the highest reward (of equals the newest), or None."""
    self.wait()
    return self._manager.best_step()

  def restore(
    self, abstract_state: Any, step: int | None = None, *, partial: bool = False
  ) -> tuple[Any, dict]:
    """Reads the checkpoint of `step`, or the newest one.

    `abstract_state` has the structure of the saved state; its leaves are arrays or
    jax.ShapeDtypeStruct, whose shardings the restored arrays take (one without a sharding goes
    to the first device). The mesh may differ from the one that the state was saved on. With
    `partial`, what the checkpoint holds beyond `abstract_state` is left unread.

    Returns (state, metadata). Raises UserError when there is no such checkpoint, when it is
    damaged, or when its tree, shapes or dtypes differ from those of `abstract_state`.
    """
    latest = self.latest()
    step = latest if step is None else step
    if step not in self._manager.all_steps():
      wanted = "a checkpoint" if step is None else f"one of step {step}"
      found = ", ".join(map(str, self._manager.all_steps())) or "none"
      raise UserError(f"{self.directory} holds checkpoints of steps: {found}; expected {wanted}.")
    path = self.directory / str(step)
    wanted = _named(abstract_state)
    tree = _read(path, lambda: self._manager.item_metadata(step)["state"].tree)
    saved = _named(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    if partial:
      saved = {name: leaf for name, leaf in saved.items() if name in wanted}
    if difference := _first_difference(saved, wanted):
      raise UserError(f"Checkpoint {path} does not fit this configuration: {difference}.")
    structs = _nest({name: _struct(leaf) for name, leaf in wanted.items()})
    items = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        structs,
        restore_args=ocp.checkpoint_utils.construct_restore_args(structs),
        partial_restore=partial,
      ),
      metadata=ocp.args.JsonRestore(),
    )
    restored = _read(path, lambda: self._manager.restore(step, args=items))
    arrays = _named(restored["state"])
    leaves = [arrays[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), restored["metadata"]

  def wait(self) -> None:
    """Returns when the save in progress is complete; raises UserError when it failed."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise UserError(
        f"Checkpoint directory {self.directory} could not be written ({_brief(error)}): "
        f"expected a writable disk with room for the state."
      ) from error

  def close(self) -> None:
    """Waits for the save in progress and ends the background threads."""
    self.wait()
    self._manager.close()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  """How the items of a checkpoint are written and read."""
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  # Each array is written by its first replica: to share that among replicas, Orbax would compile
  # a slice of every array in the middle of the run.
  arrays = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
  )
  state = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=arrays)
  metadata = ocp.JsonCheckpointHandler()
  registry.add("state", ocp.args.PyTreeSave, state)
  registry.add("state", ocp.args.PyTreeRestore, state)
  registry.add("metadata", ocp.args.JsonSave, metadata)
  registry.add("metadata", ocp.args.JsonRestore, metadata)
  return registry


def _rank(metrics: dict[str, float]) -> float:
  reward = metrics["reward"]
  return -math.inf if math.isnan(reward) else reward


def _quiet_orbax(record: standard_logging.LogRecord) -> bool:
  """Keeps Orbax's INFO lines, that a directory is read only, and tracebacks of what it raises
  anyway to verbosity DEBUG."""
  if logging.level_debug() or "orbax" not in pathlib.Path(record.pathname).parts:
    return True
  record.exc_info = None
  return record.levelno >= standard_logging.WARNING and "read only" not in str(record.msg)


def _named(tree: Any, is_leaf=lambda x: isinstance(x, nnx.Variable)) -> _Leaves:
  """The leaves of `tree` by path, in the order of jax.tree.leaves.

  A parameter of a module is one leaf, its metadata left out.
  """
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {
    tuple(jax.tree_util.keystr((key,), simple=True) for key in path): (
      leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    )
    for path, leaf in leaves
  }


def _arrays(state: Any) -> _Leaves:
  # Host arrays are copied: the caller may change them while they are written.
  return {
    name: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
    for name, leaf in _named(state).items()
  }


def _nest(leaves: _Leaves) -> dict:
  nested: dict = {}
  for name, leaf in leaves.items():
    inner = nested
    for part in name[:-1]:
      inner = inner.setdefault(part, {})
    inner[name[-1]] = leaf
  return nested


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_difference(saved: _Leaves, wanted: _Leaves) -> str:
  """What differs first between two trees of arrays, in words; empty when nothing does."""
  for name, leaf in wanted.items():
    path = "/".join(name)
    if name not in saved:
      return f"{path} is missing in it"
    found, expected = (f"{x.dtype}{list(x.shape)}" for x in (saved[name], leaf))
    if found != expected:
      return f"{path} is {found}, expected {expected}"
  extra = next((name for name in saved if name not in wanted), None)
  return f"{'/'.join(extra)} is in it and not expected" if extra else ""


def _read(path: epath.Path, read: Callable[[], Any]) -> Any:
  """What `read` returns; whatever it raises becomes a UserError that names `path`."""
  problem = ""
  with _silent_stragglers():
    try:
      return read()
    except Exception as error:  # Orbax raises a bare Exception for an array that it cannot read
      problem = _brief(error.__cause__ or error)
    time.sleep(_STRAGGLER_SECONDS)
    gc.collect()
  raise UserError(
    f"Checkpoint {path} cannot be read ({problem}): expected a complete and undamaged "
    f"checkpoint; move it away to go on from the one before."
  )


@contextlib.contextmanager
def _silent_stragglers():
  """Discards the pages that are printed by the reads which a failed one leaves pending."""
  hooks = sys.excepthook, sys.unraisablehook
  sys.excepthook = sys.unraisablehook = lambda *_: None
  asyncio_log = standard_logging.getLogger("asyncio")
  asyncio_log.disabled = True
  try:
    yield
  finally:
    asyncio_log.disabled = False
    sys.excepthook, sys.unraisablehook = hooks


def _brief(error: Exception) -> str:
  """The first words of a library's message, which can be pages long."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 160 else text[:160] + "..."
