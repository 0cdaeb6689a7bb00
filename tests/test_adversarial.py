"""Difficult users: their scenarios, and the tactic on its way from there to the tables."""

import collections
import dataclasses
import json
import re

import builders
import pytest
import remote_server
import test_capabilities
from test_benchmark import config, play, read, remotely
from test_transcripts import changed, lines

from rlver_jax.dialogue import records, rollout
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.dialogue import SILENCE, Dialogue, Plan, PolicyReply, Rules, UserMessage
from rlver_jax.errors import UserError
from rlver_jax.evaluation import scores, transcripts

SECTIONS = (
  "## What happened", "## Timeline", "## Conflict", "## Reactions", "- Emotion high: ",
  "- Emotion middle: ", "- Emotion low: ", "## What raises emotion", "## What lowers emotion",
  "## Hidden intention",
)  # fmt: skip
PERSONA = ("Name", "Age", "Occupation", "Hobbies", "Habits", "Speaking style")


def package(name):
  return scenario_lib.read(scenario_lib.resolve(name))[0]


def sentences(scenario):
  text = "\n".join((scenario.persona, scenario.background, scenario.first_message))
  found = re.split(r"(?<=[.!?])\s+|\n", text)
  return {s.strip(" -*") for s in found if len(s.split()) > 3 and not s.startswith("#")}


def test_each_tactic_has_its_scenarios():
  found = package("adversarial")
  assert len(found) >= 24
  count = collections.Counter(s.tactic for s in found)
  assert set(count) == set(scenario_lib.TACTICS) and min(count.values()) >= 4
  assert all(s.id.startswith(f"adv-{s.tactic}-") for s in found)
  # Any first scenarios have as many of one tactic as of another, give or take one.
  assert [s.tactic for s in found[:6]] == list(scenario_lib.TACTICS)
  assert {s.intention for s in found} == {*scenario_lib.EMOTIONAL, *scenario_lib.RATIONAL}
  assert {s.character for s in found} == {"negative", "passive", "avoidant"}


def test_each_is_complete():
  for s in package("adversarial"):
    assert s.language == "en" and s.topic and s.first_message and len(s.traits) >= 3, s.id
    places = [s.background.find(part) for part in SECTIONS]
    assert places == sorted(places) and places[0] == 0, s.id
    for name, text in zip(PERSONA, s.persona.splitlines(), strict=True):
      assert re.fullmatch(rf"\* {name}: .+", text), s.id
    # The task is published; what is wanted here is said in the scenario's own words.
    assert s.task not in s.background and len(s.background) > 1200, s.id


def test_no_two_are_alike():
  ours, others = package("adversarial"), package("en")
  count = collections.Counter(text for s in (*ours, *others) for text in sentences(s))
  assert [text for text, n in count.items() if n > 1] == []
  names = [re.search(r"Name: (\S+)", s.persona)[1] for s in (*ours, *others)]
  assert len(set(names)) == len(names)
  assert len({s.topic for s in ours}) == len({s.first_message for s in ours}) == len(ours)


def line(**changes):
  record = {"id": "a", "player": "Ola", "scene": "Her oven broke.", "main_cha": "passive",
            "cha_group": ["shy"], "task": "You want advice."}  # fmt: skip
  return json.dumps(record | changes)


@pytest.mark.parametrize("tactic", ["shouting", "", "Silence", 3, None, ["silence"]])
def test_an_unknown_tactic_is_named(tmp_path, tactic):
  (tmp_path / "a.jsonl").write_text(line() + "\n" + line(id="b", tactic=tactic) + "\n")
  with pytest.raises(UserError) as error:
    scenario_lib.read(tmp_path / "a.jsonl")
  assert str(error.value) == (
    f"{tmp_path / 'a.jsonl'}, line 2: field 'tactic' is {json.dumps(tactic)}, expected one of "
    "gaslighting, escalation, validation, contradiction, baiting, silence."
  )
  broken, good = transcripts.read(lines(tmp_path / "b", changed(tactic=tactic), changed(id="b")))
  assert broken.line == 1 and f"'tactic' is {json.dumps(tactic)}, expected one" in broken.found
  assert good.tactic == ""


def test_a_tactic_comes_back_as_written():
  for tactic in ("", "silence"):
    scenario = builders.scenario(tactic=tactic)
    record = scenario_lib.as_record(scenario)
    assert scenario_lib.parse(json.dumps(record), "f", 1) == scenario
    assert ("tactic" in record) == bool(tactic)
    written = records.record(Dialogue(0, 0, scenario, Rules()))
    assert written.get("tactic", "") == records.scenario_of(written).tactic == tactic
    assert ("tactic" in written) == bool(tactic)


def test_dialogues_without_a_tactic_are_in_no_group():
  found = [
    transcripts.transcript(changed(id=str(i), **({"tactic": t} if t else {})))
    for i, t in enumerate(("silence", None, "baiting", "silence"))
  ]
  grouped = scores.grouped(found, "tactic")
  assert {name: [t.id for t in some] for name, some in grouped.items()} == {
    "baiting": ["2"], "silence": ["0", "3"],
  }  # fmt: skip
  assert scores.grouped(found[1:2], "tactic") == {}


@pytest.mark.slow
def test_the_benchmark_has_a_row_for_each_tactic(tmp_path):
  """The embedded policy and the scripted user on one scenario of each tactic."""
  changes = {"data.path": "adversarial", "data.scenarios": 6, "sampling.max_prompt_tokens": 512}
  summary, text = play(config(**changes), tmp_path)
  found = read(tmp_path)
  assert [r["tactic"] for r in found] == list(scenario_lib.TACTICS) and summary["dialogues"] == 6
  rows = [row.split(",") for row in (tmp_path / "table.csv").read_text().splitlines()]
  of = {row[0]: row[1:3] for row in rows if row[0].startswith("tactic: ")}
  assert of == {f"tactic: {r['tactic']}": ["1", f"{max(0, r['emo_point'])}.0"] for r in found}
  assert "tactic: silence" in text
  # The silent user's first line is nothing but dots, which is a message as any other.
  assert found[5]["history"][0]["content"] == "..." and len(found[5]["history"]) >= 3
  assert all(t.tactic for t in transcripts.read(tmp_path / "dialogues.jsonl"))


def test_from_the_scenarios_to_the_consistency_by_tactic(server, tmp_path):
  """Both commands: a policy at a server that takes all for joy from the second reply on."""
  texts = {2: "That must hurt, I hear how angry you are. Tell me more.", 4: "You must be so happy!"}
  server.decide = lambda call: remote_server.Answer(texts.get(len(call.messages), "Hm?"))
  changes = {"data.path": "adversarial", "data.scenarios": 12}
  play(remotely(server, **changes), tmp_path / "played")
  found = read(tmp_path / "played")
  assert [r["tactic"] for r in found] == 2 * list(scenario_lib.TACTICS)
  table = (tmp_path / "played" / "table.csv").read_text()
  rows = [row.split(",")[:3] for row in table.splitlines() if row.startswith("tactic: ")]
  finals = {tactic: [] for tactic in sorted(scenario_lib.TACTICS)}
  for record in found:
    finals[record["tactic"]].append(max(0, record["emo_point"]))
  assert rows == [[f"tactic: {t}", "2", f"{sum(f) / 2:.1f}"] for t, f in finals.items()]
  judge = test_capabilities.config([tmp_path / "played" / "dialogues.jsonl"])
  summary, text = test_capabilities.play(judge, tmp_path / "judged")
  told = summary["consistency"]["tactics"]
  assert list(told) == sorted(scenario_lib.TACTICS) and "gaslighting" in text
  for tactic, numbers in told.items():
    emotions = [
      (message["emotion-point"], reply["content"])
      for record in found if record["tactic"] == tactic
      for message, reply in zip(record["history"][::2], record["history"][1::2], strict=False)
    ]  # fmt: skip
    said = [4 - min(4, e // 20) if "happy" in text else 1 - e // 20 for e, text in emotions]
    assert numbers["replies"] == numbers["said"] == len(said)
    assert numbers["difference"] == pytest.approx(sum(said) / len(said))
    assert numbers["consistent"] == sum(abs(d) <= 1 for d in said) / len(said)


# Users who say nothing.


class Silent:
  """A simulated user whose every message is empty; see `simulators/base.py`."""

  def __init__(self):
    self.waiting = {}

  def start(self, step): ...

  def open(self, placed): ...

  def submit(self, slot, dialogue):
    self.waiting[slot] = Plan(1) if dialogue.stage.value == "plan" else UserMessage(" \n")

  def poll(self, wait=False):
    answers, self.waiting = self.waiting, {}
    return answers


class Patient(Silent):
  """A policy that notes what it was shown last."""

  def __init__(self):
    super().__init__()
    self.heard = []

  def submit(self, slot, dialogue):
    self.heard.append(dialogue.user_messages[-1])
    self.waiting[slot] = PolicyReply("I'm here.", None, True, True, 3)


def test_a_user_who_says_nothing_is_silent_and_stays(tmp_path):
  scenario = builders.scenario(first_message="", tactic="silence")
  dialogue, policy = Dialogue(0, 0, scenario, Rules(max_turns=3)), Patient()
  rollout.play(policy, Silent(), [dialogue], slots=1, step=0)
  assert dialogue.end == "turns" and policy.heard == [SILENCE] * 3
  records.write(tmp_path / "a.jsonl", [dialogue])
  record = json.loads((tmp_path / "a.jsonl").read_text("utf-8"))
  said = [entry["content"] for entry in record["history"][::2]]
  assert said == [SILENCE] * 3 + [""]  # the last one never came to be asked for
  opening, _, turns = records.exchange(record)
  assert opening.text == SILENCE
  assert [turn.message and turn.message.text for turn in turns] == [*said[1:3], None]
  (found,) = transcripts.read(tmp_path / "a.jsonl")
  assert found.replies == 3 and found.tactic == "silence"


@pytest.mark.parametrize("text", ["", " ", "\n\t", "　"])
def test_blanks_are_silence_and_dots_are_a_message(text):
  assert UserMessage(text).text == SILENCE
  assert dataclasses.replace(UserMessage("Hm."), text=text).text == SILENCE
  for said in ("...", "…", ".", " 02:17."):
    assert UserMessage(said).text == said
