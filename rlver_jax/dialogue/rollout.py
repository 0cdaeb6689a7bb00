"""Plays a batch of dialogues: gathers what they ask for, and hands the answers back.

The loop knows slots and stages only. While some dialogues wait for a user who is far away, the
others go on. In which order answers arrive, how many dialogues are under way at once and which
slot one occupies change nothing in what a dialogue says.
"""

import collections
from collections.abc import Callable, Sequence

from rlver_jax.dialogue.dialogue import Answer, Dialogue, Rules, Stage
from rlver_jax.dialogue.levels import Level
from rlver_jax.dialogue.policy import Policy
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.simulators.base import Simulator


def rollout(
  policy: Policy,
  simulator: Simulator,
  scenarios: Sequence[Scenario],
  *,
  group_size: int,
  rules: Rules,
  slots: int,
  step: int,
  first_group: int = 0,
  baselines: bool = False,
  levels: Sequence[Level] | None = None,
  on_round: Callable[[], None] = lambda: None,
) -> list[Dialogue]:
  """Plays `group_size` dialogues for each scenario to their ends.

  Args:
    slots: dialogues under way at once; a finished one's slot goes to the next in line.
    step: enters the randomness, with the seed that the engines hold.
    first_group: number of the first group; it enters the randomness by way of `Dialogue.index`.
    baselines: play one more dialogue of each group, last of its group, in which the policy is
      greedy.
    levels: how hard the user of each scenario is; None: as `rules` say.
    on_round: called once a round; what it raises ends the rollout.

  Returns:
    The dialogues in batch order: those of one scenario are neighbours.
  """
  rules_of = [rules] * len(scenarios) if levels is None else [rules.at(level) for level in levels]
  size = group_size + baselines
  dialogues = [
    Dialogue(group * size + i, group, scenario, own_rules, greedy=i == group_size)
    for group, (scenario, own_rules) in enumerate(
      zip(scenarios, rules_of, strict=True), first_group
    )
    for i in range(size)
  ]
  play(policy, simulator, dialogues, slots=slots, step=step, on_round=on_round)
  return dialogues


def play(
  policy: Policy,
  simulator: Simulator,
  dialogues: Sequence[Dialogue],
  *,
  slots: int,
  step: int,
  on_round: Callable[[], None] = lambda: None,
  on_end: Callable[[Dialogue], None] = lambda dialogue: None,
) -> None:
  """Plays dialogues that have not begun, whose indices differ, to their ends.

  Args:
    slots, step, on_round: as in `rollout`.
    on_end: called with each dialogue when it has ended, in no fixed order.
  """
  policy.start(step)
  simulator.start(step)
  waiting = collections.deque(dialogues)
  free = list(range(slots))
  active: dict[int, Dialogue] = {}
  idle = False
  while waiting or active:
    on_round()
    placed = {}
    while waiting and free:
      placed[free.pop(0)] = waiting.popleft()
    if placed:
      policy.open(placed)
      simulator.open(placed)
      active |= placed
      for slot, dialogue in placed.items():
        _ask(policy, simulator, slot, dialogue)
    answered = 0
    for player in (policy, simulator):
      answers = _poll(player, policy, simulator, active, idle)
      answered += len(answers)
      for slot, answer in answers.items():
        dialogue = active[slot]
        dialogue.advance(answer)
        if dialogue.stage is Stage.DONE:
          del active[slot]
          free.append(slot)
          on_end(dialogue)
        else:
          _ask(policy, simulator, slot, dialogue)
    idle = not answered


def _poll(
  player: Policy | Simulator,
  policy: Policy,
  simulator: Simulator,
  active: dict[int, Dialogue],
  idle: bool,
) -> dict[int, Answer]:
  """The answers that are ready; a player may take a moment where nobody else has anything to do.

  That is decided from the dialogues, which are the same in all processes. Of two players who are
  far away none has: then a round that brought nothing (`idle`) is followed by one that waits.
  """
  alone = all((d.stage is Stage.POLICY) == (player is policy) for d in active.values())
  return player.poll(wait=alone or (idle and policy.far and simulator.far))


def _ask(policy: Policy, simulator: Simulator, slot: int, dialogue: Dialogue) -> None:
  """Puts the dialogue's question to whoever answers questions of its stage."""
  player = policy if dialogue.stage is Stage.POLICY else simulator
  player.submit(slot, dialogue)
