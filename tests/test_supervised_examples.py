"""Files of examples and the order in which a run takes them."""

import itertools
import json
import pathlib

import builders
import pytest

from configs import sft
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, Segment, UserMessage
from rlver_jax.errors import UserError
from rlver_jax.rl.rows import row_length
from rlver_jax.supervised import examples

LENGTHS = [30, 50, 70, 20, 60, 10, 40]


def taken(count: int, seed=3, row=100, rows=2, first=0, lengths=LENGTHS) -> list[list[list[int]]]:
  """What the first `count` steps take."""
  return list(itertools.islice(examples.stream(lengths, seed, row, rows, first), count))


def order(steps) -> list[int]:
  return [i for step in steps for row in step for i in row]


def test_each_epoch_is_a_permutation_of_its_own():
  flat = order(taken(40))
  epochs = [tuple(flat[at : at + 7]) for at in range(0, len(flat) - 6, 7)]
  assert len(epochs) > 15
  assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
  assert len(set(epochs)) > len(epochs) - 3


def test_rows_are_full_steps_of_whole_examples():
  for step in taken(40):
    assert len(step) == 2
    for row in step:
      assert row and sum(LENGTHS[i] for i in row) <= 100


def test_the_order_is_a_function_of_the_seed_and_not_of_the_rows():
  assert taken(9) == taken(9)
  assert taken(9) != taken(9, seed=4)
  narrow, wide = order(taken(30, row=70, rows=1)), order(taken(9, row=400, rows=3))
  assert len(wide) > 7 * 8
  shared = min(len(narrow), len(wide))
  assert narrow[:shared] == wide[:shared]


@pytest.mark.parametrize("first", [1, 4, 17])
def test_a_later_step_takes_what_it_would_have_taken(first):
  assert taken(5, first=first) == taken(first + 5)[first:]


def test_one_example_is_taken_again_and_again():
  assert taken(3, lengths=[60], rows=2) == [[[0], [0]]] * 3


def test_examples_that_fill_a_row_are_alone_in_it():
  assert all(len(row) == 1 for step in taken(9, lengths=[100] * 5) for row in step)


def chat(i: int) -> dict:
  said = {"role": "user", "content": f"I lost key {i}. " * (i + 1)}
  return {"messages": [said, {"role": "assistant", "content": f"Oh no, key {i}?"}]}


def dialogue(turns=1) -> dict:
  """A record of so many turns."""
  d = Dialogue(0, 0, builders.scenario(), Rules(max_turns=9))
  for turn in range(turns):
    d.advance(PolicyReply(f"Reply {turn}.", None, True, True, 4))
    d.advance(Plan(turn, "says", "fits", "hm", "fine"))
    d.advance(UserMessage(f"Message {turn}."))
  return records.record(d)


@pytest.fixture
def read(tmp_path):
  """Reads values as a file of examples; changes are of the configuration."""
  file = tmp_path / "some.jsonl"

  def call(values, **changes):
    if isinstance(values, bytes):
      file.write_bytes(values)
    else:
      file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    config = sft.get_config()
    config.update_from_flattened_dict({"data.templates": "", **changes})
    return examples.read(str(file), config, builders.tokenizer())

  call.file = file
  return call


def refusal(call, *args, **changes) -> str:
  with pytest.raises(UserError) as raised:
    call(*args, **changes)
  assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
  return str(raised.value)


def test_every_line_is_an_example_in_the_files_order(read):
  found = read([chat(i) for i in range(5)])
  assert len(found) == 5
  for i, segments in enumerate(found):
    text = builders.tokenizer().decode([t for s in segments for t in s.ids])
    assert f"I lost key {i}." in text and f"Oh no, key {i}?" in text


@pytest.mark.parametrize("kind", ["policy", "simulator"])
def test_dialogues_in_which_nothing_is_learned_are_left_out(read, kind):
  silent = dialogue(0) | {"history": []}
  changes = {"data.kind": kind, "training.row_length": 2048}
  found = read([dialogue(1), silent, dialogue(2)], **changes)
  trained = [sum(s.logprobs is not None for s in segments) for segments in found]
  # The user's opening, and an appraisal and a message of each turn.
  assert trained == ([1, 2] if kind == "policy" else [3, 5])
  assert "nothing to learn" in refusal(read, [silent], **{"data.kind": kind})


def test_the_forms_of_an_appraisal_are_those_asked_for(read):
  plan, choice = (
    read([dialogue()], **{"data.kind": "simulator", "data.form": form})[0]
    for form in ("plan", "choice")
  )
  answers = [
    builders.tokenizer().decode(next(s.ids for s in found if s.branch and s.logprobs))
    for found in (plan, choice)
  ]
  appraisal = "Content: says\nCompletion: fits\nActivity: hm\nFeeling: fine\nChange: 0"
  assert answers == [appraisal, "0"]


def test_an_example_fills_a_row_at_most(read):
  short, long = read([chat(0), chat(9)])
  assert row_length(short) < row_length(long)
  read([chat(0), chat(9)], **{"training.row_length": row_length(long)})
  text = refusal(read, [chat(0), chat(9)], **{"training.row_length": row_length(long) - 1})
  assert text == (
    f"{read.file}, line 2: found {row_length(long)} tokens, expected at most training.row_length, "
    f"which is {row_length(long) - 1}."
  )


@pytest.mark.parametrize(
  ("content", "found"),
  [
    (b"", " has nothing to learn, expected at least one example in it."),
    (b"{", ", line 1: found no JSON, expected a chat."),
    (b"\n", ", line 1: found no JSON, expected a chat."),
    (b'{"messages": 3}\n', ", line 1: found 3 as 'messages', expected list."),
    (b"[" * 100_000 + b"\n", ", line 1: found no JSON, expected a chat."),
    (b"\xff\xfe", " cannot be read ("),
  ],
)
def test_a_file_that_holds_no_examples_is_told(read, content, found):
  assert refusal(read, content).startswith(f"{read.file}{found}")


def test_the_first_broken_line_is_named(read):
  good = json.dumps(chat(0)).encode()
  assert ", line 3: found no JSON" in refusal(read, b"\n".join([good, good, b"{]", b"{]"]))
  text = refusal(read, [chat(0), dialogue()])
  assert text.endswith("line 2: found no 'messages', expected list.")
  for kind in ("policy", "simulator"):
    text = refusal(read, [dialogue(), chat(0)], **{"data.kind": kind})
    assert text.endswith("line 2: found no 'id', expected str.")


def test_line_ends_are_those_of_any_system_and_separators_are_text(read):
  lines = [json.dumps(chat(i)).encode() for i in range(2)]
  odd = {"messages": [{"role": "assistant", "content": "a\u2028b\x85c"}]}
  lines.append(json.dumps(odd, ensure_ascii=False).encode())
  assert [len(read(end.join([*lines, b""]))) for end in (b"\n", b"\r\n")] == [3, 3]


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
  config, tokenizer = sft.get_config(), builders.tokenizer()
  for path in (tmp_path / "none.jsonl", tmp_path):
    text = refusal(examples.read, str(path), config, tokenizer)
    assert text.startswith(f"{path} cannot be read (") and text.endswith("expected a chat.")
  monkeypatch.setenv("HOME", str(tmp_path))
  pathlib.Path(tmp_path, "mine.jsonl").write_text(json.dumps(chat(0)))
  assert len(examples.read("~/mine.jsonl", config, tokenizer)) == 1


def test_templates_that_are_not_there_are_named(read, tmp_path):
  changes = {"data.kind": "policy", "data.templates": str(tmp_path / "none")}
  with pytest.raises(UserError, match=r"the prompt templates .*none/en.txt cannot be read"):
    read([dialogue()], **changes)


def test_a_fingerprint_tells_examples_apart():
  def made(ids=(1, 2), branch=0, learned=True, more=()):
    return [[Segment((7,)), Segment(ids, branch, (0.0,) * len(ids) if learned else None), *more]]

  others = [
    made(ids=(1, 3)),
    made(branch=1),
    made(learned=False),
    made(more=[Segment((4,))]),
    [*made(), *made()],
    [[Segment((7, 1)), Segment((2,), 0, (0.0,))]],
    [[Segment((7, 0, 1, 1, 2))]],
    [],
  ]
  found = [examples.digest(one) for one in (made(), *others)]
  assert len(set(found)) == len(found)
  assert examples.digest(made()) == found[0]
  assert examples.digest([*made(), *made(ids=(5,))]) != examples.digest([*made(ids=(5,)), *made()])
