"""What a policy is good at: recorded dialogues, judged.

For each dialogue a judge (see `judges/`) gives five core capabilities a mark from 1 to 5 with a
reason that quotes a reply, says which strategies each appraised reply uses and how it says that the
user feels (see `consistency.py`), and places the whole on the social-cognition plane. What is left
in the run's folder:

  judged.jsonl      a line for each dialogue, as soon as it is judged; when all are, in the order of
                    the files. One that has no room in judge.cache_length has "room": false
  table.csv, table.md   the marks, by file and over all
  strategies.csv, strategies.md   how often each strategy is used, and what it brings
  consistency.csv, consistency.md   how well what is said of the user's feelings fits the records
  plane.png         the plane
  summary.json      over all

The same command goes on with the dialogues that have no line yet, among them those in which the
judge's server failed.
"""

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import build, cli, json_lines, partitioning, processes, trainables
from rlver_jax import metrics as metrics_lib
from rlver_jax import sources as sources_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue.dialogue import Failed, NoRoom
from rlver_jax.dialogue.rescore import Recorded
from rlver_jax.errors import UserError
from rlver_jax.evaluation import consistency, plane, recorded_files, tables
from rlver_jax.evaluation import judged as judged_lib
from rlver_jax.evaluation.judged import Judged
from rlver_jax.evaluation.judges import language_model
from rlver_jax.evaluation.judges import rubrics as rubrics_lib
from rlver_jax.evaluation.judges.base import (
  AXES,
  CAPABILITIES,
  LEAST,
  MOST,
  STATES,
  Judge,
  Judgement,
)
from rlver_jax.evaluation.judges.rubrics import Rubrics
from rlver_jax.evaluation.judges.scripted import ScriptedJudge
from rlver_jax.evaluation.recorded_files import Key
from rlver_jax.interrupt import Interrupts
from rlver_jax.json_lines import Misfit, field
from rlver_jax.models import source as model_source
from rlver_jax.models.source import ModelSource
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.sampler import Sampling

JUDGED, PLANE = "judged.jsonl", "plane.png"

# The tables, by the names of their files.
_BOARDS = {
  "table": judged_lib.board,
  "strategies": judged_lib.strategies_board,
  "consistency": consistency.board,
}


@dataclasses.dataclass(frozen=True)
class JudgeSources:
  """What a judge reads from, opened and checked; judge: its model, None where it has none here."""

  mesh: Mesh
  dialogues: dict[Key, Recorded]
  rubrics: dict[str, Rubrics]
  judge: ModelSource | None


def open_sources(config: ConfigDict) -> JudgeSources:
  """Opens and checks what is read; raises UserError for what is wrong."""
  mesh = partitioning.make_mesh(**config.mesh)
  dialogues = recorded_files.read(config.data)
  languages = sorted({r.start.scenario.language for r in dialogues.values()})
  rubrics = {language: rubrics_lib.load(language, config.judge.rubrics) for language in languages}
  c, opened = config.judge, None
  if c.kind == "language_model":
    opened = model_source.open_source(c.path, "judge.path", dtype=c.dtype, param_dtype=c.dtype)
    sources_lib.check_positions("judge", opened, "judge.cache_length", c.cache_length)
  elif c.kind == "openai":
    from rlver_jax.evaluation.judges import remote  # late: others do without the client

    remote.check(c)
  return JudgeSources(mesh, dialogues, rubrics, opened)


def run(
  config: ConfigDict, sources: JudgeSources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Judges what is not judged yet and returns the summary.

  Raises Interrupted when asked to stop, UserError where `workdir` cannot be written or holds what
  is damaged, and where no dialogue could be judged.
  """
  done = recorded_files.done(workdir / JUDGED, lambda: _found(workdir, sources))
  waiting = {key: r for key, r in sources.dialogues.items() if key not in done}
  if waiting:
    if processes.is_first():
      print(f"{len(waiting)} of {len(sources.dialogues)} dialogues to judge.", flush=True)
    judge = _build_judge(config, sources)
    with workdir_lib.accounted(workdir, {"": judge}):
      _judge(judge, waiting, build.slots(config, sources.mesh), workdir, interrupts)
  return _write(workdir, sources) if processes.is_first() else {}


def describe(
  summary: dict[str, Any], config: ConfigDict, sources: JudgeSources, workdir: pathlib.Path
) -> str:
  """The text for the terminal."""
  by_file = _by_file(_found(workdir, sources))
  boards = [board(by_file) for board in _BOARDS.values()]
  notes = []
  if failed := summary["failed"]:
    notes.append(f"{failed} dialogues are missing: their judge failed; the command goes on.")
  if no_room := summary["no_room"]:
    length = config.judge.cache_length
    notes.append(f"{no_room} dialogues are left out: they have no room in judge.cache_length, "
                 f"{length}.")  # fmt: skip
  files = f"judgements: {workdir / JUDGED}\nplane: {workdir / PLANE}"
  return "\n\n".join(["", *map(tables.text, boards), *notes, files])


def _build_judge(config: ConfigDict, sources: JudgeSources) -> Judge:
  """The judge that the configuration asks for, its model loaded and compiled."""
  c = config.judge
  if c.kind == "openai":
    from rlver_jax.evaluation.judges import remote  # late: others do without the client

    return remote.build(c, sources.rubrics, config.seed)
  if sources.judge is None:
    return ScriptedJudge(sources.rubrics)
  if processes.is_first():
    print("Loading the model and compiling ...", flush=True)
  tokenizer = sources.judge.tokenizer
  seed = config.seed + trainables.SIMULATOR_WEIGHTS
  model = model_source.load_model(sources.judge, sources.mesh, seed)
  engine = Engine(
    partitioning.for_sampling(sources.mesh, model, c.dtype),
    sources.mesh,
    build.engine_settings(config, sources.mesh, c.cache_length, c.max_reason_tokens),
    Sampling(c.temperature, c.top_k, c.top_p),
    tokenizer.chat.stop_ids,
    config.seed,
    language_model.answer_choices(tokenizer),
  )
  engine.compile()
  return language_model.LanguageModelJudge(engine, tokenizer, sources.rubrics, c.max_reason_tokens)


def _judge(
  judge: Judge,
  waiting: dict[Key, Recorded],
  slots: int,
  workdir: pathlib.Path,
  interrupts: Interrupts,
) -> None:
  """Judges dialogues, each of which is kept as soon as it has its verdict."""
  left, active, free, ended = list(waiting), {}, list(range(slots)), 0
  while left or active:
    interrupts.check()
    placed = {}
    while left and free:
      slot = free.pop(0)
      active[slot] = left.pop(0)
      placed[slot] = waiting[active[slot]]
    if placed:
      judge.open(placed)
    for slot, verdict in judge.poll(wait=True).items():
      key = active.pop(slot)
      free.append(slot)
      ended += 1
      if not processes.is_first():
        continue
      if isinstance(verdict, Failed):
        state = "the judge failed"
      else:
        found = None if isinstance(verdict, NoRoom) else Judged.of(verdict, waiting[key])
        with workdir_lib.writing(workdir):
          json_lines.append(workdir / JUDGED, _line(key, found))
        state = _state(found)
      cli.show(f"{ended}/{len(waiting)}  {key[1]:.40}  {state}")


def _state(found: Judged | None) -> str:
  if found is None:
    return "no room in judge.cache_length"
  return ", ".join(f"{judged_lib.SHORT[n]} {s}" for n, s in found.judgement.scores.items())


def _line(key: Key, found: Judged | None) -> dict[str, Any]:
  """A line of judged.jsonl; None: the judge had no room."""
  line = {"file": key[0], "id": key[1], "room": found is not None}
  if found is None:
    return line
  j = found.judgement
  replies = zip(j.strategies, found.changes, j.states, found.emotions, strict=True)
  return line | {
    "scores": j.scores,
    "plane": j.plane,
    "reasons": j.reasons,
    "quoted": found.quoted,
    "replies": [
      {"strategies": list(names), "change": change, "state": state, "emotion": emotion}
      for names, change, state, emotion in replies
    ],
  }


def _found(workdir: pathlib.Path, sources: JudgeSources) -> dict[Key, Judged | None]:
  """What the folder holds, in the order of the files; UserError where it is damaged."""

  def make(line: Any, recorded: Recorded) -> Judged | None:
    if not field(line, "room", bool):
      return None
    scores, places = (_numbers(line, *x) for x in (("scores", CAPABILITIES), ("plane", AXES)))
    reasons = field(line, "reasons", dict)
    if list(reasons) != list(CAPABILITIES) or not all(isinstance(r, str) for r in reasons.values()):
      raise Misfit(f"{list(reasons)!r:.60} as 'reasons', expected one for each capability")
    replies = field(line, "replies", list)
    strategies = tuple(tuple(field(reply, "strategies", list)) for reply in replies)
    states = tuple(_state_of(reply) for reply in replies)
    if len(strategies) == len(recorded.turns):
      found = Judged.of(Judgement(scores, reasons, places, strategies, states), recorded)
      if _line((line["file"], line["id"]), found) == line:
        return found
    raise Misfit(f"other replies of {line['id']!r:.60}, expected those of data.recorded")

  return recorded_files.kept(workdir / JUDGED, sources.dialogues, make, "what this judge wrote")


def _state_of(reply: Any) -> str:
  state = field(reply, "state", str)
  if state not in STATES:
    raise Misfit(f"{state!r:.60} as 'state', expected one of {', '.join(STATES)}")
  return state


def _numbers(line: Any, name: str, expected: tuple[str, ...]) -> dict[str, int]:
  found = field(line, name, dict)
  whole = all(type(n) is int and LEAST <= n <= MOST for n in found.values())
  if list(found) != list(expected) or not whole:
    raise Misfit(
      f"{found!r:.60} as {name!r}, expected {LEAST}..{MOST} for each of {', '.join(expected)}"
    )
  return found


def _by_file(found: dict[Key, Judged | None]) -> dict[str, list[Judged]]:
  return recorded_files.by_file({key: one for key, one in found.items() if one is not None})


def _write(workdir: pathlib.Path, sources: JudgeSources) -> dict[str, Any]:
  """Puts the lines into the order of the files and writes what they come to."""
  found = _found(workdir, sources)
  judged = [one for one in found.values() if one is not None]
  if not judged:
    no_room = f"; {len(found)} have no room in judge.cache_length" if found else ""
    raise UserError(f"no dialogue could be judged{no_room}, expected a judge that answers.")
  by_file = _by_file(found)
  with workdir_lib.writing(workdir):
    json_lines.write(workdir / JUDGED, (_line(key, one) for key, one in found.items()))
    for name, board in _BOARDS.items():
      tables.write(board(by_file), workdir, name)
    plane.draw(by_file, workdir / PLANE)
    told = judged_lib.summary(judged) | {"consistency": consistency.summary(judged)}
    told |= {"failed": len(sources.dialogues) - len(found), "no_room": len(found) - len(judged)}
    return metrics_lib.save_summary(workdir, told | workdir_lib.read_spent(workdir))
