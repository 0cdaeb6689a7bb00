"""Before and after: dialogues on held-out scenarios, with the policy as it starts and as it ends.

A run with `evaluation.path` plays them before its first step and after its last, each time with
its own simulated user and with the scripted one, which no simulator's quirk can please. The policy
samples as in training, at level vanilla; the random numbers are those of a step that no training
step is, the same before and after. What was played is in files of the run's folder:

  evaluation/before.jsonl, after.jsonl                       with the run's own user
  evaluation/before_scripted.jsonl, after_scripted.jsonl     with the scripted user

A file that is there is not played again; `forget_after` removes those that more steps outdate.
"""

import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlver_jax import json_lines, processes
from rlver_jax import workdir as workdir_lib
from rlver_jax.build import Run, build_rules
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import HELD_OUT_STEP, Dialogue
from rlver_jax.dialogue.rollout import rollout
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator
from rlver_jax.dialogue.statistics import dialogue_metrics
from rlver_jax.errors import UserError
from rlver_jax.json_lines import Misfit
from rlver_jax.sources import Sources

FOLDER = "evaluation"
WHENS = ("before", "after")
SCRIPTED = "scripted"
# What is compared: name -> metric.
NUMBERS = {
  "final_emotion": "emotion/final_mean",
  "success": "emotion/success_rate",
  "failure": "emotion/failure_rate",
  "turns": "dialogue/turns_mean",
  "reply_tokens": "tokens/reply_mean",
  "distinct_1": "dialogue/distinct_1",
  "distinct_2": "dialogue/distinct_2",
  "repeated": "dialogue/repeated_rate",
  "strategies": "strategies/distinct",
  "matched": "strategies/matched",
}

Played = dict[str, dict[str, list[Dialogue]]]  # by kind of user, then by WHENS


def users(config: ConfigDict) -> list[str]:
  """The kinds of simulated user that held-out dialogues are played with, the run's own first."""
  return list(dict.fromkeys((config.simulator.kind, SCRIPTED)))


def check(config: ConfigDict, sources: Sources, workdir: pathlib.Path) -> None:
  """Raises UserError, in all processes, where the folder's files are not of these scenarios."""
  processes.check_in_first(lambda: read(config, sources, workdir))


def missing(config: ConfigDict, sources: Sources, workdir: pathlib.Path, when: str) -> list[str]:
  """The users whose dialogues of `when` are still to be played, the same in all processes."""
  files = {user: file(config, workdir, when, user) for user in users(config)}
  return processes.ask_first(
    lambda: [user for user, file in files.items() if sources.heldout and not file.exists()]
  )


def forget_after(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Removes what was played after a step that is no longer the last."""
  if jax.process_index() == 0:
    for user in users(config):
      file(config, workdir, "after", user).unlink(missing_ok=True)


def play(
  config: ConfigDict,
  sources: Sources,
  run: Run,
  workdir: pathlib.Path,
  when: str,
  on_round: Callable[[], None],
) -> None:
  """Plays what is missing of `when` with the policy as it is, and writes it.

  The numbers of training do not change by it, nor do its metrics. on_round: as in `rollout`.
  """
  for user in missing(config, sources, workdir, when):
    started = time.perf_counter()
    own = user == config.simulator.kind
    dialogues = rollout(
      run.policy,
      run.simulator if own else ScriptedSimulator(sources.templates, config.seed),
      sources.heldout,
      group_size=1,
      rules=run.rules,
      slots=run.slots,
      step=HELD_OUT_STEP,
      on_round=on_round,
    )
    if jax.process_index() == 0:
      with workdir_lib.writing(workdir):
        records.write(file(config, workdir, when, user), dialogues)
      seconds = time.perf_counter() - started
      emotion = np.mean([d.emotion for d in dialogues if not d.failed] or [math.nan])
      print(
        f"held out, {when}: {len(dialogues)} dialogues judged by {label(user)} in {seconds:.0f} s, "
        f"emotion {emotion:.1f}",
        flush=True,
      )
  for _, engine in run.engines():
    engine.take_stats()
  run.simulator.take_metrics()


def label(user: str) -> str:
  """What a kind of simulated user is called in reports."""
  labels = {"language_model": "language model", "openai": "remote model", SCRIPTED: "scripted user"}
  return labels[user]


def read(config: ConfigDict, sources: Sources, workdir: pathlib.Path) -> Played:
  """The dialogues that the folder holds; a file that it lacks has no entry.

  Raises UserError for a file that is damaged, or of other scenarios than `sources.heldout`.
  """
  every = users(config) if sources.heldout else []
  return {user: read_of(user, config, sources, workdir) for user in every}


def read_of(
  user: str, config: ConfigDict, sources: Sources, workdir: pathlib.Path
) -> dict[str, list[Dialogue]]:
  """As `read`, those with one kind of user."""
  files = {when: file(config, workdir, when, user) for when in WHENS}
  return {when: _read(file, sources, config) for when, file in files.items() if file.exists()}


def _read(path: pathlib.Path, sources: Sources, config: ConfigDict) -> list[Dialogue]:
  rules, scenarios = build_rules(config), {s.id: s for s in sources.heldout}

  def make(record: Any) -> Dialogue:
    name = json_lines.field(record, "id", str)
    if name not in scenarios:
      raise Misfit(f"the scenario {name!r:.60}, expected one of the first of evaluation.path")
    return records.dialogue_of(record, scenarios[name], rules)

  dialogues = json_lines.read(path, make, "the dialogues that a run wrote")
  if [d.scenario.id for d in dialogues] != list(scenarios):
    raise UserError(
      f"{path} holds {len(dialogues)} dialogues of other scenarios than the first "
      f"{len(sources.heldout)} of evaluation.path, expected those that the run began with."
    )
  return dialogues


def file(config: ConfigDict, workdir: pathlib.Path, when: str, user: str) -> pathlib.Path:
  """Where the dialogues of `when` with a kind of user are, or would be."""
  suffix = "" if user == config.simulator.kind else f"_{user}"
  return workdir / FOLDER / f"{when}{suffix}.jsonl"


def numbers(played: Played) -> dict[str, Any]:
  """What is compared, as JSON values: for each user NUMBERS before and after, and the gain.

  The gain is the mean, over the scenarios, of the change of final emotion, with its standard error
  (both None where there is nothing to compare; the error also for a single scenario).
  """
  out: dict[str, Any] = {}
  for user, whens in played.items():
    out[user] = {}
    for when, dialogues in whens.items():
      metrics = dialogue_metrics(dialogues)
      out[user][when] = {name: _finite(metrics[metric]) for name, metric in NUMBERS.items()}
    if len(whens) == len(WHENS):
      found = [gain for gain in gains(*whens.values()) if gain is not None]
      error = np.std(found, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
      mean = np.mean(found) if found else math.nan
      out[user]["gain"] = {"mean": _finite(mean), "standard_error": _finite(error)}
  return out


def gains(before: Sequence[Dialogue], after: Sequence[Dialogue]) -> list[int | None]:
  """The change of final emotion on each scenario, None where a user failed."""
  pairs = zip(before, after, strict=True)
  return [None if b.failed or a.failed else a.emotion - b.emotion for b, a in pairs]


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None
