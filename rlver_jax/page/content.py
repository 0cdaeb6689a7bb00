"""All that a page shows, as JSON values.

  panels          the charts of curves: title, unit, bound (see `rlver_jax/curves.py`) and lines,
                  each a metric with its name
  runs            name, task, whether it has ended, how many dialogues of training are shown of how
                  many; `curves`: by metric [step, value, low, high]; `marks`: by metric the
                  held-out dialogues, {step, user, when, value, low, high}
  trajectories    for each kind of user its lines: run, when, how many dialogues, and from the
                  start on, turn by turn, [value, low, high]
  tables          title, note, head and rows of text
  scenarios       what the dialogues are about, which name them by their place
  dialogues       see `_dialogue`

Low and high bound the 95% interval, and are null where there is none.
"""

from collections.abc import Sequence
from typing import Any

from rlver_jax import curves, heldout
from rlver_jax.dialogue.dialogue import Dialogue, PolicyReply, Turn
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.page import reading, statistics, tables
from rlver_jax.page.reading import Run
from rlver_jax.page.statistics import Estimate

_LOSS = ("Loss", "nats a token", curves.FROM_ZERO, (
  ("sft/loss", "trained on", curves.BLUE, None), ("sft/held_out_loss", "held out", curves.RED, None)
))  # fmt: skip
PANELS = (*curves.PANELS, _LOSS)
BEFORE, AFTER = heldout.WHENS
TRAINING, BENCHMARK = "training", "benchmark"


def content(runs: Sequence[Run], most: int, step: int | None) -> dict[str, Any]:
  """The page's content.

  Args:
    runs: in the order of the page.
    most: dialogues of training that are shown of each run, evenly chosen.
    step: shows those of this step alone; None: of all.

  Raises:
    UserError: for files of dialogues that are damaged.
  """
  scenarios: dict[Scenario, int] = {}
  parts = [_run(number, run, most, step, scenarios) for number, run in enumerate(runs)]
  measured = {metric for told, _, _ in parts for metric in told["curves"]}
  return {
    "panels": [panel for panel in _panels() if measured & {line[0] for line in panel["lines"]}],
    "runs": [told for told, _, _ in parts],
    "trajectories": _by_user([line for _, lines, _ in parts for line in lines]),
    "tables": tables.of(runs),
    "scenarios": [_scenario(scenario) for scenario in scenarios],
    "dialogues": [dialogue for _, _, dialogues in parts for dialogue in dialogues],
  }


def _panels() -> list[dict[str, Any]]:
  """The charts; shares have one each, since their bands would hide one another."""
  found = []
  for title, unit, bound, lines in PANELS:
    about = {"title": title, "unit": unit, "bound": bound}
    if bound == curves.SHARE and len(lines) > 1:
      found += [
        about | {"title": name.capitalize(), "lines": [[metric, ""]]} for metric, name, *_ in lines
      ]
    else:
      found.append(about | {"lines": [list(line[:2]) for line in lines]})
  return found


def _run(number: int, run: Run, most: int, step: int | None, scenarios: dict[Scenario, int]):
  """What is told of a run, its trajectories, and its dialogues that are shown."""
  own, shown, lines = run.config.simulator.kind if run.config.task != "sft" else "", [], []

  def show(dialogues: Sequence[Dialogue], when: str, at: int | None, user: str) -> None:
    for dialogue in dialogues:
      place = scenarios.setdefault(dialogue.scenario, len(scenarios))
      about = {"run": number, "set": when, "step": at, "user": heldout.label(user)}
      shown.append(about | {"scenario": place} | _dialogue(dialogue))

  def draw(dialogues: Sequence[Dialogue], when: str, user: str) -> None:
    points = statistics.trajectory(dialogues)
    count = sum(not d.failed for d in dialogues)
    about = {"user": heldout.label(user), "run": number, "when": when, "count": count}
    lines.append(about | {"points": [_bounds(point) for point in points]})

  for user, whens in run.held_out.items():
    for when, dialogues in whens.items():
      show(dialogues, when, None, user)
      draw(dialogues, when, user)
  if played := [dialogue for dialogue, _ in run.benchmark]:
    show(played, BENCHMARK, None, own)
    draw(played, BENCHMARK, own)
  counts = {at: n for at, n in reading.counts(run).items() if step in (None, at)}
  wanted, first = set(statistics.evenly(sum(counts.values()), most)), 0
  estimates: dict[str, dict[int, Estimate]] = {}
  for at, dialogues in reading.training(run):
    for metric, found in statistics.outcomes([d for d in dialogues if not d.greedy]).items():
      if found is not None:
        estimates.setdefault(metric, {})[at] = found
    if at in counts:
      show([d for i, d in enumerate(dialogues, first) if i in wanted], TRAINING, at, own)
      first += len(dialogues)
  told = {
    "name": run.name,
    "task": run.config.task,
    "ended": run.ended,
    "shown": [len(wanted), sum(counts.values())],
    "curves": _curves(run, estimates),
    "marks": _marks(run),
  }
  return told, lines, shown


def _curves(run: Run, estimates: dict[str, dict[int, Estimate]]) -> dict[str, list[list]]:
  """By metric the steps in which it was measured."""
  found = {}
  for metric in (line[0] for _, _, _, lines in PANELS for line in lines):
    points = [
      [record["step"], record[metric], *_interval(estimates.get(metric, {}).get(record["step"]))]
      for record in run.metrics
      if record.get(metric) is not None
    ]
    if points:
      found[metric] = points
  return found


def _marks(run: Run) -> dict[str, list[dict[str, Any]]]:
  """By metric what held-out dialogues came to, before the first step and after the last."""
  numbers, last = heldout.numbers(run.held_out), run.metrics[-1]["step"] if run.metrics else 0
  found: dict[str, list[dict[str, Any]]] = {}
  for user, whens in run.held_out.items():
    for when, dialogues in whens.items():
      estimates = statistics.outcomes(dialogues)
      for metric, name in ((line[0], line[3]) for _, _, _, lines in PANELS for line in lines):
        if (value := numbers[user][when].get(name)) is not None:
          low, high = _interval(estimates.get(metric))
          at = 0 if when == BEFORE else last
          mark = {"step": at, "user": heldout.label(user), "when": when, "value": value}
          found.setdefault(metric, []).append(mark | {"low": low, "high": high})
  return found


def _interval(estimate: Estimate | None) -> tuple[float | None, float | None]:
  return (None, None) if estimate is None else (estimate.low, estimate.high)


def _bounds(estimate: Estimate) -> list[float | None]:
  return [estimate.value, estimate.low, estimate.high]


def _by_user(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The trajectories of each kind of user together; those without a point are left out."""
  users: dict[str, list[dict[str, Any]]] = {}
  for line in lines:
    if line["points"]:
      users.setdefault(line.pop("user"), []).append(line)
  return [{"user": user, "lines": of_user} for user, of_user in users.items()]


def _scenario(scenario: Scenario) -> dict[str, Any]:
  return {
    "id": scenario.id,
    "persona": scenario.persona,
    "background": scenario.background,
    "character": scenario.character,
    "traits": list(scenario.traits),
    "topic": scenario.topic,
    "task": scenario.task,
    "intention": scenario.intention,
    "tactic": scenario.tactic,
  }


def _dialogue(dialogue: Dialogue) -> dict[str, Any]:
  """level, why it ended, emotion at the start and the end, the opening, turns; `rest` is a last
  reply that was not appraised."""
  d = dialogue
  return {
    "level": d.rules.level.name,
    "end": d.end,
    "greedy": d.greedy,
    "start": d.rules.initial_emotion,
    "final": None if d.failed else d.emotion,
    "opening": d.opening.text if d.opening else "",
    "turns": [_turn(turn) for turn in d.turns],
    "rest": _reply(d.pending[0]) if d.pending else None,
  }


def _turn(turn: Turn) -> dict[str, Any]:
  plan = turn.plan
  return _reply(turn.reply) | {
    "emotion": turn.emotion,
    "change": plan.change,
    "plan": [plan.content, plan.completion, plan.activity, plan.feeling],
    "parsed": plan.parsed,
    "message": turn.message.text if turn.message else "",
  }


def _reply(reply: PolicyReply) -> dict[str, Any]:
  thought = {} if reply.thought is None else {"thought": reply.thought, "formed": reply.well_formed}
  return {"reply": reply.text} | thought
