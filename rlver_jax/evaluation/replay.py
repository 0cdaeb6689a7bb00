"""Which simulated user is good enough to train with: recorded dialogues, appraised by another one.

Dialogues of any origin, in the format of recorded Sentient-benchmark dialogues, are put to the
simulated user of the configuration turn by turn (see `fidelity.py`). What is left in the run's
folder:

  replayed.jsonl    a line for each dialogue: file, id, and the changes of its turns
  table.csv, table.md   how near they are, by file and over all
  summary.json      over all

The same command goes on with the dialogues that have no line yet, among them those in which the
simulated user's server failed.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlver_jax import build, cli, json_lines, partitioning, processes
from rlver_jax import metrics as metrics_lib
from rlver_jax import sources as sources_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records, rescore
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.dialogue import HELD_OUT_STEP, Failed
from rlver_jax.dialogue.emotion import MAX_CHANGE, MIN_CHANGE
from rlver_jax.dialogue.levels import VANILLA
from rlver_jax.dialogue.rescore import Recorded, Rescored
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators.base import Simulator
from rlver_jax.errors import UserError
from rlver_jax.evaluation import fidelity, recorded_files, scores, tables
from rlver_jax.evaluation.board import INTERVAL
from rlver_jax.evaluation.fidelity import Fidelity, Replayed, compare
from rlver_jax.evaluation.recorded_files import Key
from rlver_jax.evaluation.tables import Range
from rlver_jax.interrupt import Interrupts
from rlver_jax.json_lines import Misfit, field
from rlver_jax.sources import Sources

REPLAYED = "replayed.jsonl"
_COUNTS = ("unparsed", "tokens", "recorded_final", "found_final")
HEAD = (
  "dialogues", "turns", "error", "sign", "Spearman", "final error", "unparsed", "unread", "tokens",
  "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RecordedSources(Sources):
  """With the dialogues, in the order of the files."""

  dialogues: dict[Key, Recorded]


def open_sources(config: ConfigDict) -> RecordedSources:
  """Opens and checks what is read; raises UserError for what is wrong."""
  mesh = partitioning.make_mesh(**config.mesh)
  known = None
  if config.data.path:
    path = scenario_lib.resolve(config.data.path)
    known = {scenario.id: scenario for scenario in scenario_lib.read(path)[0]}
  dialogues = recorded_files.read(config.data, lambda record: _scenario(record, known))
  scenarios = [recorded.start.scenario for recorded in dialogues.values()]
  templates = sources_lib.open_templates(config, scenarios, (VANILLA.name,))
  simulator = sources_lib.open_simulator(config, scenarios, templates)
  sources_lib.check_server(config)
  return RecordedSources(mesh, scenarios, (), templates, None, None, None, simulator, dialogues)


def _scenario(record: Any, known: dict[str, Scenario] | None) -> Scenario:
  """The scenario of a record, that of data.path where there is one, of a user at `vanilla`."""
  if (level := field(record, "level", str, VANILLA.name)) != VANILLA.name:
    raise Misfit(f"the level {level!r:.60}, expected {VANILLA.name}")
  scenario = records.scenario_of(record)
  if known is None:
    return scenario
  if (told := known.get(scenario.id)) is None:
    raise Misfit(f"the id {scenario.id!r:.60}, expected one of data.path")
  for name in ("persona", "background", "task"):
    if getattr(told, name) != getattr(scenario, name):
      raise Misfit(f"another {name} than that of scenario {scenario.id!r:.60} in data.path")
  return told


def run(
  config: ConfigDict, sources: RecordedSources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Replays what is not replayed yet and returns the summary.

  Raises Interrupted when asked to stop, UserError where `workdir` cannot be written or holds what
  is damaged.
  """
  done = recorded_files.done(workdir / REPLAYED, lambda: _found(workdir, sources))
  waiting = {key: r for key, r in sources.dialogues.items() if key not in done}
  if waiting:
    if processes.is_first():
      print(f"{len(waiting)} of {len(sources.dialogues)} dialogues to replay.", flush=True)
      print("Loading the model and compiling ...", flush=True)
    simulator = build.build_simulator(config, sources)
    if (engine := getattr(simulator, "engine", None)) is not None:
      engine.compile()
    with workdir_lib.accounted(workdir, {"": simulator}):
      _replay(simulator, waiting, build.slots(config, sources.mesh), workdir, interrupts)
  if not processes.is_first():
    return {}
  found = _found(workdir, sources)
  if not found:
    raise UserError("the simulated user failed in every dialogue, expected one that answers.")
  with workdir_lib.writing(workdir):
    tables.write(board(recorded_files.by_file(found)), workdir)
    total = dataclasses.asdict(compare(list(found.values())))
    told = {name: None if math.isnan(value) else value for name, value in total.items()}
    told |= {"failed": len(sources.dialogues) - len(found)} | workdir_lib.read_spent(workdir)
    return metrics_lib.save_summary(workdir, told)


def describe(
  summary: dict[str, Any], config: ConfigDict, sources: RecordedSources, workdir: pathlib.Path
) -> str:
  """The text for the terminal."""
  del config
  table = tables.text(board(recorded_files.by_file(_found(workdir, sources))))
  failed = summary["failed"]
  note = f"{failed} dialogues are missing: their user's server failed.\n" if failed else ""
  return f"\n{table}\n\n{note}(tokens, seconds: of a turn)\nchanges: {workdir / REPLAYED}"


def read(folder: str | os.PathLike) -> dict[str, list[Replayed]]:
  """What a replay left in its folder, by a short name of the dialogues' file, in the order of the
  files; neither these nor the simulated user's model are opened.

  Raises UserError for a folder that is not of this task, or holds nothing or what is damaged.
  """
  folder = pathlib.Path(folder).expanduser()
  config = workdir_lib.read_config(folder)
  if config.task != "fidelity":
    raise UserError(f"{folder} holds a run of task '{config.task}', expected fidelity.")
  file = folder / REPLAYED
  lines = json_lines.read(file, _told, "what this replay wrote", growing=True)
  paths = [path.strip() for path in config.data.recorded.split(",")]
  found = {key: replayed for path in paths for key, replayed in lines if key[0] == path}
  if not found:
    raise UserError(f"{file} has no dialogue of data.recorded, expected a replay that has begun.")
  return recorded_files.by_file(found)


def _told(line: Any) -> tuple[Key, Replayed]:
  """A line as a value; Misfit where it is none of a replay's."""
  recorded, found = (tuple(field(line, name, list)) for name in ("recorded", "found"))
  known = {*range(MIN_CHANGE, MAX_CHANGE + 1)}
  whole = all(type(c) is int and c in known for c in recorded)
  whole &= all(c is None or (type(c) is int and c in known) for c in found)
  if not recorded or len(recorded) != len(found) or not whole:
    raise Misfit(f"{list(found)!r:.60} as 'found', expected a change for each of 'recorded'")
  counts = (field(line, name, int) for name in _COUNTS)
  replayed = Replayed(recorded, found, *counts, field(line, "seconds", float))
  return (field(line, "file", str), field(line, "id", str)), replayed


def finals(by_file: dict[str, list[Replayed]]) -> tables.Rows:
  """For each file the mean final emotion as recorded and as found, and how far they differ."""
  head = ["dialogues of", "dialogues", "recorded", "found", "found − recorded", INTERVAL]
  rows: list[list[str | Range]] = [head]
  for name, replayed in by_file.items():
    ends = fidelity.finals(replayed)
    if not len(ends):
      rows.append([name, "0", "-", "-", "-", Range("-", "-", "-")])
      continue
    changes = np.diff(ends)[:, 0]
    means = [f"{mean:.1f}" for mean in ends.mean(axis=0)]
    bounds = Range(*(f"{bound:+.1f}" for bound in scores.interval(changes)))
    rows.append([name, f"{len(ends)}", *means, f"{changes.mean():+.1f}", bounds])
  return rows


def board(by_file: dict[str, Sequence[Replayed]]) -> tables.Rows:
  """A row for each file, and with several one for all."""
  rows = [["dialogues of", *HEAD]]
  for name, replayed in by_file.items():
    rows.append([name, *_cells(compare(replayed))])
  if len(by_file) > 1:
    rows.append(["all", *_cells(compare([r for some in by_file.values() for r in some]))])
  return rows


def _cells(f: Fidelity) -> list[str]:
  written = (
    "{:}",
    "{:}",
    "{:.2f}",
    "{:.1%}",
    "{:.2f}",
    "{:.1f}",
    "{:.1%}",
    "{:.1%}",
    "{:.0f}",
    "{:.2f}",
  )
  return [
    "-" if math.isnan(value) else form.format(value)
    for form, value in zip(written, dataclasses.astuple(f), strict=True)
  ]


def _replay(
  simulator: Simulator,
  waiting: dict[Key, Recorded],
  slots: int,
  workdir: pathlib.Path,
  interrupts: Interrupts,
) -> None:
  """Replays dialogues, each of which is kept as soon as its last turn is appraised."""
  key_of = {r.start.index: key for key, r in waiting.items()}
  last, ended = time.perf_counter(), 0

  def keep(found: Rescored) -> None:
    nonlocal last, ended
    ended += 1
    if not processes.is_first():
      return
    now = time.perf_counter()
    file, name = key_of[found.recorded.start.index]
    state = "the user's server failed"
    if not any(isinstance(answer, Failed) and not answer.answered for answer in found.answers):
      replayed = Replayed.of(found, round(now - last, 3))
      last = now
      with workdir_lib.writing(workdir):
        line = {"file": file, "id": name} | dataclasses.asdict(replayed)
        json_lines.append(workdir / REPLAYED, line)
      state = f"final emotion {replayed.recorded_final}, here {replayed.found_final}"
    cli.show(f"{ended}/{len(waiting)}  {name:.40}  {len(found.answers)} turns, {state}")

  rescore.rescore(
    simulator,
    list(waiting.values()),
    step=HELD_OUT_STEP,
    slots=slots,
    on_round=interrupts.check,
    on_end=keep,
  )


def _found(workdir: pathlib.Path, sources: RecordedSources) -> dict[Key, Replayed]:
  """What the folder holds, in the order of the files; UserError where it is damaged."""

  def make(line: Any, recorded: Recorded) -> Replayed:
    _, replayed = _told(line)
    if replayed.recorded != tuple(turn.plan.change for turn in recorded.turns):
      raise Misfit(f"other turns of {line['id']!r:.60}, expected those of data.recorded")
    return replayed

  file = workdir / REPLAYED
  return recorded_files.kept(file, sources.dialogues, make, "what this replay wrote")
