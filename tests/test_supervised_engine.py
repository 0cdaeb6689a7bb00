"""Examples of recorded dialogues against what engines are asked when such a dialogue is played."""

import json

import builders
import numpy as np
import pytest

from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Rules
from rlver_jax.dialogue.policy import Policy, PolicySettings
from rlver_jax.dialogue.rollout import rollout
from rlver_jax.dialogue.simulators.language_model import LanguageModelSimulator, SimulatorSettings
from rlver_jax.rl.rows import make_rows, row_length
from rlver_jax.supervised import recorded

RULES = Rules(max_turns=2, failure_at=-1000, success_at=1000)
PLAN_CALL = 2
CHANGES = {0: 4, 1: -10}  # by turn
# The first has an opening that is given, the other's is the user's own.
SCENARIOS = [builders.scenario("en"), builders.scenario("zh", first_message="")]
SETTINGS = {
  "plan": SimulatorSettings("generate", True, 48, 16, 0),
  "choice": SimulatorSettings("choice", False, 48, 16, 0),
}


def reply(numbers, think):
  _, index, turn, _ = numbers
  thought = f"<think>They are sad, {index}.</think>" if think else ""
  return f"{thought}I hear you. And then? {turn}"


def user_text(numbers):
  """An appraisal in exactly the lines that are asked for, or a message."""
  _, index, turn, call = numbers
  templates = builders.templates()["en" if index < 2 else "zh"]
  if call != PLAN_CALL:
    return f"It hurts {index}. 难过 {turn}"
  *labels, change = templates.labels.values()
  lines = [f"{label}: word {i}" for i, label in enumerate(labels)]
  return "\n".join([*lines, f"{change}: {CHANGES[turn]}"])


def play(form, think=False):
  """Two dialogues of each scenario, read back from their records, with the user's engine."""
  tokenizer, templates = builders.tokenizer(), builders.templates()
  speaker = builders.text_engine("policy").fresh()
  speaker.write = lambda numbers: reply(numbers, think)
  user = builders.text_engine("simulator").fresh()
  user.write = user_text
  policy = Policy(speaker, tokenizer, templates, PolicySettings(think, 48, 300, 600))
  simulator = LanguageModelSimulator(user, tokenizer, templates, SETTINGS[form])
  dialogues = rollout(policy, simulator, SCENARIOS, group_size=2, rules=RULES, slots=4, step=0)
  assert [d.end for d in dialogues] == ["turns"] * 4
  read = [recorded.parse(json.loads(json.dumps(records.record(d)))) for d in dialogues]
  return dialogues, read, user


def questions(segments):
  """Of each trained segment: the ids before it that it sees, and its own."""
  return [
    (tuple(i for t in segments[:n] if t.branch in (0, s.branch) for i in t.ids), s.ids)
    for n, s in enumerate(segments)
    if s.logprobs is not None
  ]


@pytest.mark.parametrize("think", (False, True))
def test_the_policys_rows_are_those_of_the_dialogues_that_were_played(think):
  dialogues, read, _ = play("plan", think)
  for d, r in zip(dialogues, read, strict=True):
    segments = recorded.policy_segments(r, builders.tokenizer(), builders.templates())
    length = row_length(d.segments)
    assert row_length(segments) == length
    played, learned = make_rows([d.segments], length), make_rows([segments], length)
    assert learned.mask.any() and not learned.logprobs.any()
    for name in ("tokens", "positions", "branch", "mask"):
      np.testing.assert_array_equal(getattr(learned, name), getattr(played, name), err_msg=name)


def test_a_reply_without_its_form_is_read_and_not_learned():
  dialogues, _, _ = play("plan", think=True)
  record = records.record(dialogues[0])
  record["history"][1] |= {"well_formed": False, "thinking": ""}
  parsed = recorded.parse(record)
  segments = recorded.policy_segments(parsed, builders.tokenizer(), builders.templates())
  assert [s.branch for s in segments if s.logprobs is not None] == [2]
  text = builders.tokenizer().decode([i for s in segments if s.branch == 0 for i in s.ids])
  assert record["history"][1]["content"] in text


@pytest.mark.parametrize("form", SETTINGS)
def test_the_user_learns_what_its_engine_was_asked_and_answered(form):
  _, read, engine = play(form)
  end = builders.tokenizer().chat.assistant_end[0]
  for slot, r in enumerate(read):
    asked = [ids for at, ids, *_ in engine.asked if at == slot]
    answers = [tuple(sample.ids) for at, sample in engine.samples if at == slot]
    wanted = list(zip(asked, answers, strict=True))
    changes = [str(turn.plan.change) for turn in r.turns]
    assert form == "choice" or changes == ["4", "-10"]
    scored = [context for at, context, _ in engine.scored if at == slot]
    if form == "choice":
      chosen = [(*builders.tokenizer().encode(change), end) for change in changes]
      wanted += zip(scored, chosen, strict=True)
    segments = recorded.simulator_segments(r, builders.tokenizer(), builders.templates(), form)
    learned = questions(segments)
    if slot < 2:  # an opening that was given is learned as if the user had been asked for it
      question, answer = learned.pop(0)
      assert builders.tokenizer().decode(answer) == SCENARIOS[0].first_message
      assert answer[-1] == end and all(ids[: len(question)] == question for ids in asked)
    # Two turns, the last without a message: an opening of its own, two appraisals, a message.
    assert len(learned) == (3 if slot < 2 else 4)
    assert sorted(learned) == sorted(wanted)


@pytest.mark.parametrize("form", SETTINGS)
def test_a_trained_token_stands_where_it_stood_in_the_chat(form):
  """The tokens that one sees, itself included, have the positions 0, 1, 2 ..."""
  _, read, _ = play(form)
  for r in read:
    segments = recorded.simulator_segments(r, builders.tokenizer(), builders.templates(), form)
    length = row_length(segments)
    rows = make_rows([segments], length)
    branch, positions = rows.branch[0], rows.positions[0]
    for t in np.flatnonzero(rows.mask[0]):
      seen = [s for s in range(t + 1) if branch[s] in (0, branch[t])]
      assert positions[seen].tolist() == list(range(len(seen)))


def test_an_appraisal_that_could_not_be_read_is_left_out_and_the_chat_goes_on():
  dialogues, read, _ = play("plan")
  record = records.record(dialogues[3])
  record["history"][2]["planning"]["parsed"] = False
  tokenizer, templates = builders.tokenizer(), builders.templates()
  whole, cut = (
    recorded.simulator_segments(r, tokenizer, templates, "plan")
    for r in (read[3], recorded.parse(record))
  )
  assert [s for s in whole if s.branch != 1] == cut
  assert len(questions(cut)) == len(questions(whole)) - 2


def test_ids_of_another_tokenizer_are_made_anew_from_the_text():
  """So that a user can be distilled into a model with other tokens."""
  dialogues, _, _ = play("plan")
  record = records.record(dialogues[3])
  tokenizer, templates = builders.tokenizer(), builders.templates()
  found = []
  for ids in ([10**6], [1, 2, 3], None):
    entry = record["history"][2]
    entry.pop("ids")
    entry |= {} if ids is None else {"ids": ids}
    parsed = recorded.parse(record)
    found.append(recorded.simulator_segments(parsed, tokenizer, templates, "plan"))
    record["history"][2]["ids"] = []
  assert found[0] == found[1] == found[2]
  # Letter by letter, they are another spelling of the same text, and are kept.
  text = record["history"][2]["content"]
  letters = [i for letter in text for i in tokenizer.encode(letter)]
  assert letters != tokenizer.encode(text) and tokenizer.decode(letters) == text
  record["history"][2]["ids"] = letters
  kept = recorded.simulator_segments(recorded.parse(record), tokenizer, templates, "plan")
  assert any(s.ids == (*letters, tokenizer.chat.assistant_end[0]) for s in kept)
