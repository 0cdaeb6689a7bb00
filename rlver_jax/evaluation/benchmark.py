"""The Sentient benchmark (SAGE, arXiv 2505.02847): a policy on the scenarios of a file.

Each scenario is played once; its number in the file determines all randomness of its dialogue.
What is left in the run's folder:

  dialogues.jsonl   a line for each dialogue, in the format of recorded ones, as soon as it ends;
                    when all have, in the order of the scenarios
  policy.json       of a run's policy the checkpoint that is played, to the end
  table.csv, table.md   the scores, of all dialogues and by groups
  summary.json      the scores of all dialogues

The same command goes on with the scenarios that have no line yet, or one of a dialogue in which a
partner failed. Dialogues that ended for lack of room are counted, and told of.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from rlver_jax import build, cli, json_lines, partitioning, processes, run_policy, trainables
from rlver_jax import metrics as metrics_lib
from rlver_jax import sources as sources_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records, rollout
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.dialogue import HELD_OUT_STEP, Dialogue
from rlver_jax.dialogue.policy import Policy
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.templates import Templates
from rlver_jax.errors import UserError
from rlver_jax.evaluation import board, scores, tables, transcripts
from rlver_jax.interrupt import Interrupts
from rlver_jax.json_lines import Misfit, field
from rlver_jax.models import source as model_source
from rlver_jax.models.source import ModelSource
from rlver_jax.sources import Sources

if TYPE_CHECKING:  # imported late: others do without the client
  from rlver_jax.dialogue.remote.policy import RemotePolicy

DIALOGUES = "dialogues.jsonl"
_POLICYS = "policy_"  # before what it has spent


def open_sources(config: ConfigDict) -> Sources:
  """Opens and checks what the benchmark reads from; raises UserError for what is wrong."""
  mesh = partitioning.make_mesh(**config.mesh)
  scenarios = scenario_lib.read(scenario_lib.resolve(config.data.path))[0]
  scenarios = scenarios[: config.data.scenarios or len(scenarios)]
  templates = sources_lib.open_templates(config, scenarios, (config.environment.level,))
  policy = _open_policy(config, templates, scenarios)
  simulator = sources_lib.open_simulator(config, scenarios, templates)
  sources_lib.check_server(config)
  if policy is None:
    from rlver_jax.dialogue.remote import policy as remote  # late: others do without the client

    remote.check(config)
  return Sources(mesh, scenarios, (), templates, policy, None, None, simulator)


def _open_policy(
  config: ConfigDict, templates: dict[str, Templates], scenarios: Sequence[Scenario]
) -> ModelSource | None:
  """The policy's model, None where it has none here."""
  if config.policy.kind == "openai":
    return None
  opened = run_policy.open_policy(config.policy)
  sources_lib.check_policy_room(config, opened, templates, scenarios)
  return opened


def run(
  config: ConfigDict, sources: Sources, workdir: pathlib.Path, interrupts: Interrupts
) -> dict[str, Any]:
  """Plays what is not played yet and returns the summary.

  Raises Interrupted when asked to stop, UserError where `workdir` cannot be written or holds what
  is damaged.
  """
  finished = _finished(workdir, sources)
  if len(finished) < len(sources.scenarios):
    _play(config, sources, workdir, finished, interrupts)
  if not processes.is_first():
    return {}
  with workdir_lib.writing(workdir):
    return _write(workdir, sources)


def describe(
  summary: dict[str, Any], config: ConfigDict, sources: Sources, workdir: pathlib.Path
) -> str:
  """The text for the terminal."""
  del config
  parts = [tables.text(board.groups(_scored(_read(workdir, sources)))), ""]
  if failed := summary["failed"]:
    parts.append(f"{failed} dialogues have no score, as a partner failed; the command goes on.")
  if cut := summary["cut_short"]:
    parts.append(
      f"{cut} dialogues ended for lack of room (sampling.max_response_tokens, "
      "simulator.cache_length)."
    )
  return "\n".join(["", *parts, f"dialogues: {workdir / DIALOGUES}"])


def _play(
  config: ConfigDict,
  sources: Sources,
  workdir: pathlib.Path,
  finished: set[str],
  interrupts: Interrupts,
) -> None:
  rules = build.build_rules(config).at(build.build_levels(config)[config.environment.level])
  waiting = [
    Dialogue(index, index, scenario, rules, greedy=not config.sampling.temperature)
    for index, scenario in enumerate(sources.scenarios)
    if scenario.id not in finished
  ]
  if processes.is_first():
    there = f" {len(finished)} of {len(sources.scenarios)} dialogues are there." if finished else ""
    print(f"Loading models and compiling ...{there}", flush=True)
  policy, simulator = (
    _build_policy(config, sources, workdir),
    build.build_simulator(config, sources),
  )
  for player in (policy, simulator):
    if (engine := getattr(player, "engine", None)) is not None:
      engine.compile()
  remote = {"": simulator} | ({_POLICYS: policy} if config.policy.kind == "openai" else {})
  played = 0

  def keep(dialogue: Dialogue) -> None:
    nonlocal played
    played += 1
    name = dialogue.scenario.id
    if not dialogue.replies and not dialogue.failed:
      raise UserError(
        f"scenario {name!r:.60} has no room for a reply, expected a larger "
        "sampling.max_prompt_tokens or simulator.cache_length (with another --workdir)."
      )
    if processes.is_first():
      with workdir_lib.writing(workdir):
        json_lines.append(workdir / DIALOGUES, records.record(dialogue))
      cli.show(
        f"{len(finished) + played}/{len(sources.scenarios)}  {name:.40}  "
        f"{len(dialogue.replies)} replies, emotion {dialogue.emotion} ({dialogue.end})"
      )

  with workdir_lib.accounted(workdir, remote):
    rollout.play(
      policy,
      simulator,
      waiting,
      slots=build.slots(config, sources.mesh),
      step=HELD_OUT_STEP,
      on_round=interrupts.check,
      on_end=keep,
    )


def _build_policy(
  config: ConfigDict, sources: Sources, workdir: pathlib.Path
) -> "Policy | RemotePolicy":
  if config.policy.kind == "openai":
    from rlver_jax.dialogue.remote import policy as remote  # late: others do without the client

    return remote.build(config, sources.templates)
  if run_policy.is_run(config.policy.path):
    folder = pathlib.Path(config.policy.path).expanduser()
    step = run_policy.pinned(workdir, folder, config.policy.step)
    model = run_policy.load(folder, sources.policy, step)
    if processes.is_first():
      print(f"The policy is that of step {step} of {folder}.", flush=True)
  else:
    seed = config.seed + trainables.POLICY_WEIGHTS
    model = model_source.load_model(sources.policy, sources.mesh, seed)
  model = partitioning.for_sampling(sources.mesh, model, config.policy.dtype)
  return build.build_policy(config, sources, model)


def _finished(workdir: pathlib.Path, sources: Sources) -> set[str]:
  """The ids of the scenarios that are played, the same in all processes.

  A line that was cut off by a kill, and dialogues in which a partner failed, are removed from the
  file.
  """

  def look() -> list[str]:
    if not (path := workdir / DIALOGUES).exists():
      return []
    with workdir_lib.writing(workdir):
      json_lines.mend(path)
      found = _read(workdir, sources)
      kept = [record for record in found if record["end"] != "failed"]
      if len(kept) < len(found):
        json_lines.write(path, kept)
    return [record["id"] for record in kept]

  return set(processes.ask_first(look))


def _read(workdir: pathlib.Path, sources: Sources) -> list[dict[str, Any]]:
  """The records of the file; UserError for one that is damaged or of other scenarios."""
  known, met = {scenario.id: scenario for scenario in sources.scenarios}, set()

  def make(record: Any) -> dict[str, Any]:
    name = field(record, "id", str)
    if name not in known or name in met:
      raise Misfit(f"the id {name!r:.60}, expected each scenario of data.path once at most")
    met.add(name)
    if field(record, "scene", str) != known[name].background:
      raise Misfit(f"another 'scene' than that of scenario {name!r:.60} in data.path")
    if field(record, "end", str) != "failed":
      transcripts.transcript(record)
    return record

  return json_lines.read(workdir / DIALOGUES, make, "the dialogues of this benchmark")


def _scored(found: Sequence[dict[str, Any]]) -> list[transcripts.Transcript]:
  """The dialogues that have a final emotion."""
  return [transcripts.transcript(record) for record in found if record["end"] != "failed"]


def _write(workdir: pathlib.Path, sources: Sources) -> dict[str, Any]:
  """Puts the dialogues into the order of the scenarios and writes the tables."""
  order = {scenario.id: i for i, scenario in enumerate(sources.scenarios)}
  found = sorted(_read(workdir, sources), key=lambda record: order[record["id"]])
  json_lines.write(workdir / DIALOGUES, found)
  scored = _scored(found)
  if not scored:
    raise UserError(
      "a partner failed in every dialogue, expected a policy and a simulated user that answer."
    )
  tables.write(board.groups(scored), workdir)
  total = scores.score(scored)
  summary = dataclasses.asdict(total) | {
    "mean": float(total.mean),
    "score": scores.rounded(total.mean),
    "interval": list(total.interval),
    "success_interval": list(total.success_interval),
    "failure_interval": list(total.failure_interval),
    "failed": len(found) - len(scored),
    "cut_short": sum(record["end"] == "length" for record in found),
  }
  return metrics_lib.save_summary(workdir, summary)
