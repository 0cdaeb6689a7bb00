"""Dialogues of the embedded world: the scripted helper talks with the scripted user.

Each is played by the same state machine as any dialogue of a run and is kept in the same format
(`dialogue/records.py`), so that `sft.py` reads them like recorded dialogues of any other origin.
"""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable

from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, PolicyReply, Rules, Stage
from rlver_jax.dialogue.dialogue import Plan as Appraisal
from rlver_jax.dialogue.simulators.appraisal import LEVELS
from rlver_jax.dialogue.simulators.scripted import details
from rlver_jax.embedded import helper
from rlver_jax.embedded.helper import Habits
from rlver_jax.embedded.scenarios import between, detail, generator, scenario, scripted_user


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a set of dialogues is like.

  split: of the scenarios; thinking: share of dialogues whose helper thinks before it speaks;
  emotions: the lowest and the highest at the start; turns: the fewest and the most; unopened:
  share of dialogues in which the user words the opening itself (else the scenario has it); coined:
  share of the words of details that mean nothing; strange: of these, the share that is put together
  from any letters or parts of any words; patient: the user takes each reply for a part of what it
  wants, so that a dialogue has all its turns, however well or badly it goes; able: share of
  dialogues whose helper has the habits `helper.ABLE`, whatever those of the others are.
  """

  split: str
  habits: Habits
  thinking: float
  emotions: tuple[int, int] = (30, 30)
  turns: tuple[int, int] = (8, 8)
  unopened: float = 0.0
  coined: float = 0.0
  strange: float = 0.0
  patient: bool = False
  able: float = 0.0


def play(plan: Plan, number: int, seed: int) -> Dialogue:
  """Dialogue `number` of a set, on the scenario of that number, a function of its arguments."""
  rng = generator("dialogue", seed, plan.split, number)
  opened = rng.random() >= plan.unopened
  rules = Rules(between(rng, plan.emotions), between(rng, plan.turns))
  thinks = rng.random() < plan.thinking
  if plan.able and rng.random() < plan.able:
    plan = dataclasses.replace(plan, habits=helper.ABLE)
  told = scenario(plan.split, number, seed, opened, plan.coined, plan.strange)
  dialogue = Dialogue(number, number, told, rules)
  return finish(dialogue, seed, lambda d: _reply(plan, d, thinks, rng), plan.patient)


def finish(
  dialogue: Dialogue, seed: int, reply: Callable[[Dialogue], PolicyReply], patient: bool = False
) -> Dialogue:
  """Plays a dialogue with the scripted user to its end; returns it. patient: as `Plan` has it."""
  user = scripted_user(seed)
  while dialogue.stage is not Stage.DONE:
    if dialogue.stage is Stage.POLICY:
      dialogue.advance(reply(dialogue))
    elif dialogue.stage is Stage.PLAN and patient:
      dialogue.advance(Appraisal(LEVELS["partly"]))
    else:
      user.submit(0, dialogue)
      dialogue.advance(user.poll()[0])
  return dialogue


def _reply(plan: Plan, dialogue: Dialogue, thinks: bool, rng: random.Random) -> PolicyReply:
  named = details(dialogue.scenario)
  messages = [message.casefold() for message in reversed(dialogue.user_messages)]
  told = [d for message in messages for d in named if d.casefold() in message]
  # What was said last is the nearest at hand.
  near = told[:1] * 3 + told[1:] or ["it"]
  earlier = [turn.reply.text for turn in dialogue.turns]
  untold = functools.partial(detail, plan.split, coined=plan.coined, strange=plan.strange)
  made = helper.reply(plan.habits, dialogue.scenario.intention, near, earlier, untold, rng)
  return PolicyReply(made.text, made.thought if thinks else None, True, True, 0)


def write(path: pathlib.Path, plan: Plan, count: int, seed: int) -> None:
  """Writes the first `count` dialogues of a set as records, all or nothing."""
  records.write(path, [play(plan, number, seed) for number in range(count)])
