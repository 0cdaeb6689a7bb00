"""Whole batches of dialogues: the same in any order and company, and how each of them ends."""

import dataclasses
import itertools

import builders
import numpy as np
import pytest

from rlver_jax.dialogue.dialogue import Rules, Stage
from rlver_jax.dialogue.levels import VANILLA, Level
from rlver_jax.dialogue.policy import Policy, PolicySettings
from rlver_jax.dialogue.rollout import rollout
from rlver_jax.dialogue.simulators.language_model import LanguageModelSimulator, SimulatorSettings
from rlver_jax.dialogue.simulators.scripted import ScriptedSimulator

RULES = Rules(max_turns=3, failure_at=-1000, success_at=1000)
# All dialogues at once; fewer slots than dialogues, and answers that take several calls.
ALL, FEW, ONE = (4, 48), (3, 5), (1, 48)


def make_policy(slots, decode_steps, think=False, model=None, **limits):
  engine = builders.text_engine("policy", slots, decode_steps).fresh(model)
  limits = {"max_new_tokens": 16, "max_prompt_tokens": 300, "max_response_tokens": 600} | limits
  return Policy(engine, builders.tokenizer(), builders.templates(), PolicySettings(think, **limits))


def scripted(seed=0):
  return ScriptedSimulator(builders.templates(), seed)


def language_model(slots, decode_steps):
  engine = builders.text_engine("simulator", slots, decode_steps).fresh()
  settings = SimulatorSettings("generate", True, 12, 12, 1)
  return LanguageModelSimulator(engine, builders.tokenizer(), builders.templates(), settings)


def scenarios(first_message=True):
  changes = {} if first_message else {"first_message": ""}
  return [builders.scenario(language, **changes) for language in ("en", "zh")]


def play(policy, simulator, slots, step=0, rules=RULES, group_size=2, given=None, **options):
  given = scenarios() if given is None else given
  return rollout(
    policy, simulator, given, group_size=group_size, rules=rules, slots=slots, step=step, **options
  )


def plain(dialogues):
  """All that a dialogue is, but for its log-probabilities."""
  return [
    (
      d.index, d.group, d.scenario, d.stage, d.end, d.emotion, d.opening, d.turns,
      [dataclasses.replace(s, logprobs=None) for s in d.segments],
    )
    for d in dialogues
  ]  # fmt: skip


def assert_same(dialogues, others):
  assert plain(dialogues) == plain(others)
  for d, other in zip(dialogues, others, strict=True):
    for segment, same in zip(d.segments, other.segments, strict=True):
      assert (segment.logprobs is None) == (same.logprobs is None)
      if segment.logprobs is not None:
        np.testing.assert_allclose(segment.logprobs, same.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def with_language_model():
  return play(make_policy(*ALL), language_model(*ALL), ALL[0], given=scenarios(False))


@pytest.fixture(scope="module")
def with_scripted():
  return play(make_policy(*ALL), scripted(), ALL[0])


OTHERS = (
  FEW,
  pytest.param(ONE, marks=pytest.mark.slow),
  pytest.param((4, 5), marks=pytest.mark.slow),
  pytest.param((1, 5), marks=pytest.mark.slow),
)


@pytest.mark.parametrize("sizes", OTHERS, ids=str)
def test_slots_and_steps_change_nothing_with_a_language_model(with_language_model, sizes):
  dialogues = play(make_policy(*sizes), language_model(*sizes), sizes[0], given=scenarios(False))
  assert_same(with_language_model, dialogues)
  emotions = [turn.emotion for d in dialogues for turn in d.turns]
  assert len(set(emotions)) > 3
  assert len({text for d in dialogues for text in d.user_messages}) > 8


@pytest.mark.parametrize("sizes", OTHERS, ids=str)
def test_slots_and_steps_change_nothing_with_a_scripted_user(with_scripted, sizes):
  dialogues = play(make_policy(*sizes), scripted(), sizes[0])
  assert_same(with_scripted, dialogues)
  assert len({turn.reply.text for d in dialogues for turn in d.turns}) == 12


def test_a_batch_can_be_played_again(with_scripted):
  """By the same objects, whatever they did in between."""
  policy, simulator = make_policy(*ALL), scripted()
  play(policy, simulator, ALL[0], step=7)
  assert_same(with_scripted, play(policy, simulator, ALL[0]))


def test_another_step_or_seed_is_another_batch(with_scripted):
  others = [play(make_policy(*ALL), scripted(), ALL[0], step=1)]
  policy = make_policy(*ALL)
  seeded = type(policy.engine)(
    policy.engine.model,
    builders.mesh(),
    policy.engine.settings,
    builders.Sampling(),
    builders.tokenizer().chat.stop_ids,
    seed=1,
  )
  seeded.programs.compiled = policy.engine.programs.compiled  # no program depends on the seed
  policy.engine = seeded
  others.append(play(policy, scripted(), ALL[0]))
  replies = [
    {turn.reply.text for d in batch for turn in d.turns} for batch in (with_scripted, *others)
  ]
  assert all(len(texts) == 12 for texts in replies)
  assert not any(a & b for a, b in itertools.combinations(replies, 2))


def test_dialogues_stand_in_the_order_of_their_scenarios(with_scripted):
  assert [d.index for d in with_scripted] == [0, 1, 2, 3]
  assert [d.group for d in with_scripted] == [0, 0, 1, 1]
  assert [d.scenario.id for d in with_scripted] == ["bike", "bike", "自行车", "自行车"]
  assert [d.scenario.language for d in with_scripted] == ["en", "en", "zh", "zh"]
  first, second, *_ = with_scripted
  assert first.opening == second.opening
  assert first.turns[0].reply.text != second.turns[0].reply.text


def test_a_group_shares_its_level(with_scripted):
  levels = [Level("challenging", emotion_offset=-10, hints=-1.0, leniency=-3), VANILLA]
  dialogues = play(make_policy(*ALL), scripted(), ALL[0], levels=levels)
  assert [d.rules for d in dialogues] == [RULES.at(level) for level in levels for _ in range(2)]
  first, second = ([d.turns[0].emotion for d in batch[:2]] for batch in (dialogues, with_scripted))
  assert all(0 <= b - 10 - a <= 3 for a, b in zip(first, second, strict=True)) and first != second
  assert_same(dialogues[2:], with_scripted[2:])  # others' levels change nothing


# Baselines, and groups played in addition.


@pytest.fixture(scope="module")
def with_baselines():
  """Two sampled dialogues and a greedy one on each of two scenarios, with the policy that did."""
  policy = make_policy(*ALL)
  dialogues = play(policy, scripted(), ALL[0], baselines=True)
  return dialogues, list(policy.engine.greedy), policy.engine.first_model


def gap(model, dialogue):
  """How far a sampled token was at most from the most probable one, in nats."""
  gaps = [0.0]
  for i, segment in enumerate(dialogue.segments):
    if segment.logprobs is not None:
      context = [t for s in dialogue.segments[:i] if s.branch == 0 for t in s.ids]
      gaps += (builders.best_logprobs(model, context, segment.ids) - segment.logprobs).tolist()
  return max(gaps)


def test_each_group_ends_with_one_greedy_dialogue(with_baselines):
  dialogues, asked_greedily, model = with_baselines
  assert [d.index for d in dialogues] == [0, 1, 2, 3, 4, 5]
  assert [d.group for d in dialogues] == [0, 0, 0, 1, 1, 1]
  assert [d.scenario.language for d in dialogues] == ["en"] * 3 + ["zh"] * 3
  assert [d.greedy for d in dialogues] == [False, False, True] * 2
  assert all(d.stage is Stage.DONE and d.turn == 3 for d in dialogues)
  assert {numbers[1] for numbers in asked_greedily} == {2, 5}
  assert len(asked_greedily) == 6
  for d in dialogues:
    assert (gap(model, d) < 1e-4) == d.greedy


def test_slots_and_steps_change_nothing_with_baselines(with_baselines):
  assert_same(with_baselines[0], play(make_policy(*FEW), scripted(), FEW[0], baselines=True))


def test_what_a_dialogue_says_follows_from_its_index_whoever_is_greedy_beside_it(with_baselines):
  """With a third sampled dialogue in place of the greedy one, the others are the same."""
  sampled = play(make_policy(*ALL), scripted(), ALL[0], group_size=3)
  others = [with_baselines[0][i] for i in (0, 1, 3, 4)]
  assert_same(others, [sampled[i] for i in (0, 1, 3, 4)])
  assert plain(sampled)[2] != plain(with_baselines[0])[2]


def test_the_first_group_offsets_indices_and_with_them_all_that_is_said(with_scripted):
  """Group 1 by itself is what it is as the second of two groups."""
  later = play(make_policy(*ALL), scripted(), ALL[0], first_group=1, given=scenarios()[1:])
  assert [(d.index, d.group) for d in later] == [(2, 1), (3, 1)]
  assert_same(with_scripted[2:], later)
  far = play(make_policy(*ALL), scripted(), ALL[0], first_group=6)
  assert [d.index for d in far] == [12, 13, 14, 15]
  assert [d.group for d in far] == [6, 6, 7, 7]
  said = [{t.reply.text for d in batch for t in d.turns} for batch in (with_scripted, far)]
  assert not said[0] & said[1]


def test_the_first_group_counts_the_greedy_dialogues_too(with_baselines):
  later = play(
    make_policy(*ALL), scripted(), ALL[0], first_group=1, baselines=True, given=scenarios()[1:]
  )
  assert [d.index for d in later] == [3, 4, 5]
  assert_same(with_baselines[0][3:], later)


def test_prefixes_are_read_once_for_their_group():
  policy, simulator = make_policy(*ALL), language_model(*ALL)
  dialogues = play(policy, simulator, ALL[0])
  systems = {d.segments[0].ids for d in dialogues}
  assert policy.engine.take_stats().prefilled == sum(map(len, systems))
  personas = simulator.engine.take_stats().prefilled
  one = play(make_policy(*ALL), simulator, ALL[0], group_size=1)
  assert simulator.engine.take_stats().prefilled == personas
  assert len(one) == 2


def test_prompts_that_no_group_shares_are_read_once_a_batch(with_scripted):
  """Each position of a dialogue is read or drawn once, and only thoughts are read twice."""
  policy = make_policy(*ALL)
  dialogues = play(policy, scripted(), ALL[0])
  assert_same(with_scripted, dialogues)
  stats = policy.engine.take_stats()
  assert stats.drawn == sum(t.reply.sampled_tokens for d in dialogues for t in d.turns)
  systems = {d.segments[0].ids for d in dialogues}
  assert stats.prefilled == sum(map(len, systems))
  new = [s.ids for d in dialogues for s in d.segments[1:] if s.logprobs is None]
  # The last token of a context is read by the draw, which leaves its own last one unread until
  # the next turn; a dialogue's last such token, and what closes its last reply, never are.
  closing = sum(len(d.segments[-1].ids) for d in dialogues)
  turns = sum(d.turn for d in dialogues)
  assert stats.extended == sum(map(len, new)) - closing - turns + turns - len(dialogues)


# Ends.


@pytest.fixture(scope="module")
def listener():
  """A model that listens, in English."""
  chat = builders.tokenizer().chat
  said = builders.ids("I", " hear", " you", ".", " Tell", " me", " more", "!")
  assert len(set(said)) == len(said)
  return builders.chain_model((20.0, [chat.assistant_start[-1], *said, chat.assistant_end[0]]))


def ends(dialogues):
  assert all(d.stage is Stage.DONE for d in dialogues)
  return [d.end for d in dialogues]


def test_all_turns_are_played(with_scripted):
  assert ends(with_scripted) == ["turns"] * 4
  for d in with_scripted:
    assert d.turn == 3
    assert len(d.user_messages) == 3
    assert d.turns[-1].message is None
    assert len([s for s in d.segments if s.logprobs is not None]) == 3


def test_success(listener):
  """A good reply lifts the emotion by a point at least, which is all that is asked for."""
  policy = make_policy(*ALL, model=listener)
  rules = Rules(initial_emotion=30, failure_at=0, success_at=31)
  dialogues = play(policy, scripted(), 4, rules=rules, given=scenarios()[:1])
  assert ends(dialogues) == ["success"] * 2
  for d in dialogues:
    assert d.turns[0].reply.text == "I hear you. Tell me more!"
    assert d.emotion == 30 + d.turns[0].plan.change >= 31


def test_failure():
  """What a random model says does not help."""
  rules = Rules(initial_emotion=30, failure_at=29, success_at=100)
  dialogues = play(make_policy(*ALL), scripted(), 4, rules=rules, given=scenarios()[:1])
  assert ends(dialogues) == ["failure"] * 2
  assert all(d.emotion <= 29 and d.turn >= 1 for d in dialogues)


def test_goodbye():
  """At a low emotion the scripted user leaves, sooner or later."""
  rules = Rules(initial_emotion=5, max_turns=8, failure_at=-1000, success_at=1000)
  dialogues = play(make_policy(*ALL), scripted(), 4, rules=rules, group_size=4)
  assert set(ends(dialogues)) <= {"goodbye", "turns"}
  left = [d for d in dialogues if d.end == "goodbye"]
  assert len(left) > 4
  assert len({d.turn for d in left}) > 1  # freed slots are used by others at different times
  for d in left:
    assert d.turns[-1].message.goodbye
    assert not any(turn.message.goodbye for turn in d.turns[:-1])


def test_length():
  rules = dataclasses.replace(RULES, max_turns=50, initial_emotion=60)  # nobody leaves so soon
  policy = make_policy(*ALL, max_response_tokens=120)
  dialogues = play(policy, scripted(), 4, rules=rules)
  assert ends(dialogues) == ["length"] * 4
  assert all(0 < d.turn < 10 for d in dialogues)
  none = play(make_policy(*ALL, max_prompt_tokens=10), scripted(), 4)
  assert ends(none) == ["length"] * 4
  assert all(d.turn == 0 and d.emotion == 30 for d in none)


def test_thoughts_hang_off_the_context_and_are_dropped(listener):
  """In think mode each answer is a branch; a reply without a thought is no well-formed one."""
  dialogues = play(make_policy(*ALL, think=True, model=listener), scripted(), 4)
  for d in dialogues:
    branches = [s.branch for s in d.segments if s.logprobs is not None]
    assert branches == [1, 2, 3]
    assert all(s.branch == 0 for s in d.segments if s.logprobs is None)
    assert not any(turn.reply.well_formed for turn in d.turns)


# The loop.


class OneAtATime:
  """The scripted user as one that is far away: one answer a call, the latest question first."""

  def __init__(self):
    self._user, self._asked = scripted(), {}

  def start(self, step):
    self._user.start(step)

  def open(self, placed):
    self._user.open(placed)

  def submit(self, slot, dialogue):
    self._asked[slot] = dialogue

  def poll(self, wait=False):
    if not self._asked:
      return {}
    self._user.submit(*self._asked.popitem())
    return self._user.poll()


@pytest.mark.parametrize("slots", (4, 2))
def test_answers_may_come_late_and_in_any_order(with_scripted, slots):
  assert_same(with_scripted, play(make_policy(*ALL), OneAtATime(), slots))


def test_a_batch_that_is_ended_from_outside_leaves_nothing_behind(with_language_model):
  class Stop(Exception):
    pass

  rounds = itertools.count()

  def on_round():
    if next(rounds) == 3:
      raise Stop

  policy, simulator = make_policy(*FEW), language_model(*FEW)
  with pytest.raises(Stop):
    play(policy, simulator, 3, step=5, given=scenarios(False), on_round=on_round)
  assert_same(with_language_model, play(policy, simulator, 3, given=scenarios(False)))


def test_no_scenarios_no_dialogues():
  assert play(make_policy(*ALL), scripted(), 4, given=[]) == []
