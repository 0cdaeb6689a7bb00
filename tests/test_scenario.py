"""Scenario files: reading, hidden intentions, prepared records and the order of steps."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue import scenario_dataset
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).parents[1]
PUBLISHED = REPOSITORY.parent / "shared" / "data" / "rlver"

TASKS = {
  "listen": (
    "You want the other person to listen attentively while you let your feelings out.",
    "你想把心里的情绪都倒出来，希望对方认真听你说",
    "你希望对方用心倾听你的情绪宣泄",
  ),
  "empathy": (
    "You want the other person to truly feel what you are going through, "
    "not to hand you quick comfort.",
    "你希望对方真正体会到你的感受，而不是随口安慰几句",
    "你希望对方深刻共情你的感受，而不是简单的安慰",
  ),
  "praise": (
    "You want the other person to sincerely praise something specific that you did in this "
    "situation.",
    "你希望对方真心夸奖你在这件事里做过的某个具体举动",
    "你希望对方真诚地夸奖你在事件中的具体行为",
  ),
  "agree": (
    "You believe you did nothing wrong in this situation and want the other person to agree "
    "with you.",
    "你觉得这件事里自己没有错，希望对方也站在你这边",
    "你认为自己在事件中没有任何责任和错误，你想要对方也认同你没有错",
  ),
  "advice": (
    "You want advice that would really help you out of the difficulty you are in.",
    "你想得到能真正帮你走出眼前困难的建议",
    "你想获得能真实帮助你解决当下困境的建议",
  ),
  "reflect": (
    "You want the other person to guide you to look at your own part in this and to grow from it.",
    "你希望对方引导你反思自己在这件事里的做法，从中成长",
    "你希望对方引导你针对事件进行自我反思，收获自我成长",
  ),
  "balance": (
    "You want the other person to weigh the different sides of what happened with you.",
    "你希望对方和你一起辩证地权衡这件事的各个方面",
    "你希望对方辩证地分析事件中的问题",
  ),
  "motives": (
    "You want to understand why the other people in this situation acted as they did.",
    "你想弄明白这件事里其他人为什么会那样做的原因",
    "你想分析事件中其他人物这么做的原因",
  ),
}


def record(**changes) -> dict:
  """A scenario as its JSON object; a change to None removes the key."""
  made = {
    "id": "a",
    "player": "Ola, 40, baker",
    "scene": "Her oven broke.",
    "main_cha": "passive",
    "cha_group": ["shy", "kind"],
    "task": TASKS["advice"][0],
  } | changes
  return {key: value for key, value in made.items() if value is not None}


def write(path: pathlib.Path, *lines: dict | str | bytes) -> pathlib.Path:
  encoded = []
  for line in lines:
    text = json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line
    encoded.append(text.encode() if isinstance(text, str) else text)
  path.write_bytes(b"\n".join(encoded) + b"\n")
  return path


def numbered(count: int, task: str = TASKS["listen"][1]) -> list[dict]:
  return [record(id=f"s{i}", player=f"人物 {i}", task=task) for i in range(count)]


def python(code: str, *arguments) -> subprocess.Popen:
  """Runs `code` in a process of its own, from the repository's root."""
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=REPOSITORY,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("intention", TASKS)
def test_tasks_give_their_intention_and_language(intention):
  english, *chinese = TASKS[intention]
  for task, language in [(english, "en"), *((task, "zh") for task in chinese)]:
    scenario = scenario_lib.parse(json.dumps(record(task=task)), "f.jsonl", 1)
    assert (scenario.intention, scenario.language) == (intention, language)


def test_intentions_are_four_emotional_and_four_rational():
  assert scenario_lib.EMOTIONAL == ("listen", "empathy", "praise", "agree")
  assert scenario_lib.RATIONAL == ("advice", "reflect", "balance", "motives")


@pytest.mark.parametrize("name", ["train_profile.jsonl", "test_profile.jsonl"])
def test_published_files(name, tmp_path):
  path = PUBLISHED / name
  if not path.exists():
    pytest.skip(f"the published scenarios are not at {PUBLISHED}")
  objects = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
  source = scenario_dataset.open_source(path, tmp_path)
  assert len(source) == len(objects) == {"train": 500, "test": 100}[name.split("_")[0]]
  intentions = {task: name for name, tasks in TASKS.items() for task in tasks}
  for scenario, expected in zip(source, objects, strict=True):
    assert scenario.id == expected["id"]
    assert scenario.persona == expected["player"]
    assert scenario.background == expected["scene"]
    assert scenario.character == expected["main_cha"]
    assert scenario.traits == tuple(expected["cha_group"])
    assert scenario.task == expected["task"]
    assert scenario.topic == ""
    assert scenario.first_message == expected.get("first_talk", "")
    assert scenario.intention == intentions[scenario.task]
    assert scenario.language == "zh"


@pytest.mark.parametrize(("name", "least"), [("en", 64), ("zh", 32)])
def test_package_scenarios(name, least):
  scenarios, _ = scenario_lib.read(scenario_lib.resolve(name))
  assert len(scenarios) >= least
  assert {s.language for s in scenarios} == {name}
  assert {s.intention for s in scenarios} == set(TASKS)
  characters = {"en": {"negative", "passive", "avoidant"}, "zh": {"负面型", "被动型", "回避型"}}
  assert {s.character for s in scenarios} == characters[name]
  sections = {
    "en": (
      *("## What happened", "## Timeline", "## Conflict", "## Reactions"),
      *("Emotion high", "Emotion middle", "Emotion low"),
      *("## What raises emotion", "## What lowers emotion", "## Hidden intention"),
    ),
    "zh": (
      *("## 发生了什么", "## 时间线", "## 矛盾", "## 不同情绪下的反应"),
      *("情绪高", "情绪中", "情绪低"),
      *("## 什么会让情绪上升", "## 什么会让情绪下降", "## 隐藏意图"),
    ),
  }
  for scenario in scenarios:
    missing = [part for part in sections[name] if part not in scenario.background]
    assert not missing, scenario.id
    assert scenario.topic, scenario.id
    assert scenario.first_message, scenario.id
    assert scenario.traits, scenario.id
  assert len({s.background for s in scenarios}) == len(scenarios)


def test_resolve_takes_names_and_paths(tmp_path):
  assets = REPOSITORY / "rlver_jax" / "assets" / "scenarios"
  assert scenario_lib.resolve("en") == assets / "en.jsonl"
  assert scenario_lib.resolve("zh") == assets / "zh.jsonl"
  assert scenario_lib.resolve(f"{tmp_path}/en") == tmp_path / "en"
  assert scenario_lib.resolve("~/own.jsonl") == pathlib.Path.home() / "own.jsonl"


def test_optional_fields_and_other_keys():
  line = json.dumps(record(topic="oven", first_talk="Hello.", difficulty=3))
  scenario = scenario_lib.parse(line, "f.jsonl", 1)
  assert (scenario.topic, scenario.first_message) == ("oven", "Hello.")
  scenario = scenario_lib.parse(json.dumps(record()), "f.jsonl", 1)
  assert (scenario.topic, scenario.first_message) == ("", "")


BROKEN = {
  "not JSON": ("{'id': 1}", "not valid JSON"),
  "cut short": (json.dumps(record())[:-5], "not valid JSON"),
  "deeply nested": ("[" * 100_000, "not valid JSON"),
  "a list": ("[1, 2]", "found [1, 2], expected a JSON object."),
  "missing text": (record(task=None), "field 'task' is missing, expected a string."),
  "missing traits": (record(cha_group=None), "field 'cha_group' is missing, expected a list"),
  "number for text": (record(player=7), "field 'player' is 7, expected a string."),
  "null for text": ('{"id": null}', "field 'id' is null, expected a string."),
  "text for traits": (record(cha_group="shy"), "'cha_group' is \"shy\", expected a list"),
  "number in traits": (record(cha_group=["a", 2]), "item 2 of field 'cha_group' is 2, expected"),
  "number for option": (record(topic=1), "field 'topic' is 1, expected a string."),
  "empty text": (record(scene=" \n"), "field 'scene' is empty, expected a text."),
  "lone surrogate": (json.dumps(record(id="x\ud800")), "lone surrogate U+D800"),
  "unknown task": (
    record(task="You want a sandwich."),
    "names no known intention, expected a wish for one of",
  ),
  "two tasks in one": (record(task="You want advice and praise."), "praise or advice"),
  "invalid UTF-8": (b'{"id": "\xff"}', "byte 9 is 0xff, expected text in UTF-8."),
  "UTF-16": ("{}".encode("utf-16"), "byte 1 is 0xff, expected text in UTF-8."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named(case, tmp_path):
  broken, message = BROKEN[case]
  # A blank line and a line separator inside a string must not shift the numbers.
  first = record(id="first", scene="one\u2028two\x85three")
  path = write(tmp_path / "own.jsonl", first, "", broken, record(id="last"))
  with pytest.raises(UserError) as caught:
    scenario_dataset.open_source(path, tmp_path / "cache")
  assert str(caught.value).startswith(f"{path}, line 3: ")
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "cache").exists()


def test_an_id_used_twice_names_both_lines(tmp_path):
  path = write(tmp_path / "own.jsonl", record(id="a"), record(id="b"), "", record(id="a"))
  with pytest.raises(UserError, match=r"line 4: field 'id' is \"a\" as in line 1,"):
    scenario_lib.read(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_scenarios(content, tmp_path):
  path = tmp_path / "own.jsonl"
  path.write_bytes(content)
  with pytest.raises(UserError, match="the file is empty, expected at least one scenario"):
    scenario_lib.read(path)


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_a_file_that_cannot_be_read(name, tmp_path):
  with pytest.raises(UserError, match=r"cannot be read .*, expected a file of JSON lines"):
    scenario_dataset.open_source(tmp_path / name, tmp_path / "cache")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
  path = tmp_path / "own.jsonl"
  lines = [json.dumps(record(id=name)) for name in "ab"]
  path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
  assert [s.id for s in scenario_lib.read(path)[0]] == ["a", "b"]


def test_records_come_back_as_written(tmp_path):
  odd = record(id="odd\x00", player="a\nb\u2028", scene="🙂 你好", cha_group=[], first_talk=" ")
  path = write(tmp_path / "own.jsonl", odd, *numbered(30))
  source = scenario_dataset.open_source(path, tmp_path / "cache")
  assert source[0] == Scenario(
    "odd\x00", "a\nb\u2028", "🙂 你好", "passive", (), odd["task"], "", " "
  )
  assert [source[i].id for i in range(1, 31)] == [f"s{i}" for i in range(30)]
  assert source[-1] == source[30]
  for outside in (31, -32):
    with pytest.raises(IndexError):
      source[outside]


def test_a_changed_file_is_prepared_again_and_equal_files_share(tmp_path):
  path = write(tmp_path / "own.jsonl", *numbered(3))
  scenario_dataset.open_source(path, tmp_path / "cache")
  copy = write(tmp_path / "copy.jsonl", *numbered(3))
  scenario_dataset.open_source(copy, tmp_path / "cache")
  assert len(list((tmp_path / "cache").iterdir())) == 1
  write(path, *numbered(5))
  assert len(scenario_dataset.open_source(path, tmp_path / "cache")) == 5
  assert len(scenario_dataset.open_source(copy, tmp_path / "cache")) == 3


def test_prepared_records_are_used_and_not_written_again(tmp_path, monkeypatch):
  path = write(tmp_path / "own.jsonl", *numbered(3))
  scenario_dataset.open_source(path, tmp_path / "cache")
  monkeypatch.delattr(scenario_dataset.ScenarioDataset, "_generate_examples")
  assert len(scenario_dataset.open_source(path, tmp_path / "cache")) == 3


@pytest.mark.parametrize("below", ["", "below"])
def test_a_cache_that_cannot_be_written(below, tmp_path):
  path = write(tmp_path / "own.jsonl", *numbered(2))
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"^data\.cache_dir: .* cannot be written to \(.*expected"):
    scenario_dataset.open_source(path, tmp_path / "file" / below)


@pytest.mark.parametrize("damage", ["cut", "removed", "emptied"])
def test_damaged_records_are_named(damage, tmp_path):
  path = write(tmp_path / "own.jsonl", *numbered(200))
  scenario_dataset.open_source(path, tmp_path / "cache")
  (records,) = (tmp_path / "cache").glob("*/*/*/*array_record*")
  if damage == "cut":
    os.truncate(records, records.stat().st_size // 2)
  elif damage == "removed":
    records.unlink()
  else:
    (records.parent / "dataset_info.json").write_bytes(b"")
  with pytest.raises(UserError, match="prepared scenarios are damaged") as caught:
    scenario_dataset.open_source(path, tmp_path / "cache")
  assert str(records.parent) in str(caught.value)


NO_TENSORFLOW = """
import socket, sys
def refuse(*arguments):
  raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from rlver_jax.dialogue import scenario_dataset
source = scenario_dataset.open_source(sys.argv[1], sys.argv[2])
assert [s.id for s in source] == [f"s{i}" for i in range(40)]
assert "tensorflow" not in sys.modules
"""


def test_no_tensorflow_no_network_no_noise_no_litter(tmp_path, monkeypatch):
  path = write(tmp_path / "own.jsonl", *numbered(40))
  (tmp_path / "tmp").mkdir()
  monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
  monkeypatch.setenv("HOME", str(tmp_path / "tmp"))
  process = python(NO_TENSORFLOW, path, tmp_path / "cache")
  assert process.communicate(timeout=60) == ("", "")
  assert process.returncode == 0
  assert list((tmp_path / "tmp").iterdir()) == []


KILLED = """
import os, signal, sys
from rlver_jax.dialogue import scenario_dataset
whole = scenario_dataset.ScenarioDataset._generate_examples
def dies(self):
  for index, example in whole(self):
    if index == 5:
      os.kill(os.getpid(), signal.SIGKILL)
    yield index, example
scenario_dataset.ScenarioDataset._generate_examples = dies
scenario_dataset.open_source(sys.argv[1], sys.argv[2])
"""


def test_a_kill_while_preparing_leaves_nothing_that_is_read(tmp_path):
  path = write(tmp_path / "own.jsonl", *numbered(10))
  process = python(KILLED, path, tmp_path / "cache")
  process.communicate(timeout=60)
  assert process.returncode == -9
  assert list((tmp_path / "cache").glob("*/scenario_dataset/incomplete.*"))
  source = scenario_dataset.open_source(path, tmp_path / "cache")
  assert [s.id for s in source] == [f"s{i}" for i in range(10)]


def test_losing_the_race_to_prepare_is_no_error(tmp_path, monkeypatch):
  path = write(tmp_path / "own.jsonl", *numbered(10))
  whole = scenario_dataset.ScenarioDataset._generate_examples
  winners = []

  def overtaken(self):
    """While these records are written, another preparation begins and ends."""
    monkeypatch.setattr(scenario_dataset.ScenarioDataset, "_generate_examples", whole)
    winners.append(scenario_dataset.open_source(path, tmp_path / "cache"))
    yield from whole(self)

  monkeypatch.setattr(scenario_dataset.ScenarioDataset, "_generate_examples", overtaken)
  loser = scenario_dataset.open_source(path, tmp_path / "cache")
  assert list(loser) == list(winners[0]) == scenario_lib.read(path)[0]
  assert not list((tmp_path / "cache").glob("**/incomplete.*"))


RACER = """
import pathlib, sys, time
from rlver_jax.dialogue import scenario_dataset
path, cache, number = sys.argv[1:]
pathlib.Path(f"{path}.ready{number}").touch()
while not pathlib.Path(f"{path}.go").exists():
  time.sleep(0.001)
print(*(s.id for s in scenario_dataset.open_source(path, cache)))
"""


def test_processes_that_prepare_at_once_all_succeed(tmp_path):
  path = write(tmp_path / "own.jsonl", *numbered(100))
  racers = [python(RACER, path, tmp_path / "cache", number) for number in range(3)]
  while len(list(tmp_path.glob("*.ready*"))) < len(racers):
    assert all(racer.poll() is None for racer in racers)
  (tmp_path / "own.jsonl.go").touch()
  for racer in racers:
    assert racer.communicate(timeout=60) == (" ".join(f"s{i}" for i in range(100)) + "\n", "")


def philox_words(key: tuple[int, int], count: int) -> list[int]:
  """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
  mask, words = 2**64 - 1, []
  for counter in range(1, count // 4 + 2):  # NumPy's stream begins at counter 1
    (x0, x1, x2, x3), (k0, k1) = (counter, 0, 0, 0), key
    for _ in range(10):
      p0, p2 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
      x0, x1, x2, x3 = (p2 >> 64) ^ x1 ^ k0, p2 & mask, (p0 >> 64) ^ x3 ^ k1, p0 & mask
      k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    words += [x0, x1, x2, x3]
  return words[:count]


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 2), (50, 1)])
def test_steps_cut_a_stream_of_shuffled_epochs(length, batch_size):
  seed, epochs = 2**63 + 11, 4
  stream = []
  for epoch in range(epochs):
    words = philox_words((seed, epoch), length)
    stream += sorted(range(length), key=words.__getitem__)
  steps = range(len(stream) // batch_size)
  found = {
    step: scenario_lib.batch_indices(length, step, batch_size, seed) for step in reversed(steps)
  }
  for step in steps:
    assert found[step] == stream[step * batch_size : (step + 1) * batch_size]
    assert all(type(index) is int for index in found[step])


def test_each_epoch_is_a_uniformly_drawn_permutation():
  counts = np.zeros((5, 5))
  for seed in range(2000):
    order = scenario_lib.batch_indices(5, 0, 5, seed)
    assert sorted(order) == [0, 1, 2, 3, 4]
    counts[np.arange(5), order] += 1
  # Binomial(2000, 1/5): mean 400, standard deviation 18; five of them either way.
  assert np.all(np.abs(counts - 400) < 90)


def test_epochs_and_seeds_differ():
  orders = {
    tuple(scenario_lib.batch_indices(100, epoch, 100, seed))
    for seed in (-1, 0, 1)
    for epoch in range(3)
  }
  assert len(orders) == 9
