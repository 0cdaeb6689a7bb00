"""Dialogues next to each other: columns that line up whatever is in them."""

import unicodedata

import builders
import hypothesis
import pytest
from hypothesis import strategies as st

from rlver_jax import side_by_side
from rlver_jax.dialogue.dialogue import Dialogue, NoRoom, Plan, PolicyReply, Rules, UserMessage


@pytest.mark.parametrize(
  ("text", "columns"),
  [
    ("", 0),
    ("abc", 3),
    ("你好", 4),
    ("a你，b", 6),
    ("e\u0301", 1),
    ("Ａ", 2),
    ("한글", 4),
    ("🚲", 2),
  ],
)
def test_the_columns_that_a_text_takes(text, columns):
  assert side_by_side.width(text) == columns


def test_lines_end_at_spaces_and_between_wide_characters():
  assert side_by_side.wrap("My brother sold my  bike\ntoday.", 10) == [
    "My brother", "sold my", "bike", "today.",
  ]  # fmt: skip
  assert side_by_side.wrap("我弟把我的车卖了", 7) == ["我弟把", "我的车", "卖了"]
  assert side_by_side.wrap("叫Mara来", 7) == ["叫Mara", "来"]
  assert side_by_side.wrap("unbelievable", 5) == ["unbel", "ievab", "le"]
  assert side_by_side.wrap("", 5) == [""]


TEXTS = st.text(st.sampled_from("ab .,\n你，🚲éо\u0301\u200d\x1b\x00"), max_size=60) | st.text(
  max_size=60
)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(TEXTS, st.integers(2, 30))
def test_any_text_is_whole_and_within_the_columns(text, columns):
  lines = side_by_side.wrap(text, columns)
  assert all(side_by_side.width(line) <= columns for line in lines)
  shown = "".join("".join(lines).split())
  assert shown == "".join(side_by_side.plain(text).split())
  assert not {"Cc", "Cf", "Cs"}.intersection(map(unicodedata.category, shown))


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(TEXTS, st.integers(2, 30))
def test_a_text_is_cut_only_where_it_is_too_long(text, most):
  short = side_by_side.shortened(text, most)
  assert side_by_side.width(short) <= most
  if side_by_side.width(side_by_side.plain(text)) <= most:
    assert short == side_by_side.plain(text)
  else:
    assert short.endswith("…") and side_by_side.plain(text).startswith(short[:-1])


def played(language="en", *, changes, thought=None, reply="I see.", end=None) -> Dialogue:
  """A dialogue whose replies change the emotion so; `end`: what comes after them."""
  d = Dialogue(0, 0, builders.scenario(language), Rules(max_turns=len(changes) + (end is not None)))
  for i, change in enumerate(changes):
    d.advance(PolicyReply(f"{reply} {i}", thought, True, True, 3))
    d.advance(Plan(change))
    if d.end == "":
      d.advance(UserMessage(f"And {i}?"))
  if end is not None:
    for answer in end:
      d.advance(answer)
  assert d.end
  return d


def test_turns_stand_at_the_same_height():
  before = played(changes=[-5, 2])
  thoughtful = played(changes=[7], thought="She wants\nto be heard.", end=[NoRoom()])
  lines = side_by_side.dialogues(("before", before), ("after", thoughtful))
  expected = [
    ("BEFORE: emotion 30 -> 27 (the last turn)", "AFTER: emotion 30 -> 37 (no room for more)"),
    ("-" * 48, "-" * 48),
    ("USER: My brother sold my bike.", "USER: My brother sold my bike."),
    ("POLICY: I see. 0", "POLICY: (thinks: She wants to be heard.) I see."),
    ("[emotion 25 (-5)]", "0"),
    ("", "[emotion 37 (+7)]"),
    ("", ""),
    ("USER: And 0?", "USER: And 0?"),
    ("POLICY: I see. 1", ""),
    ("[emotion 27 (+2)]", ""),
    ("", ""),
  ]
  assert lines == [f"{left:<48} | {right}".rstrip() for left, right in expected]


def test_a_reply_that_was_not_appraised_has_no_emotion():
  last = PolicyReply("Hm.", None, True, True, 1)
  d = played(changes=[3], end=[last, NoRoom()])
  lines = side_by_side.dialogues(("a", d), ("b", d))
  assert lines[-3:-1] == [
    "USER: And 0?" + " " * 36 + " | USER: And 0?",
    "POLICY: Hm." + " " * 37 + " | POLICY: Hm.",
  ]


def test_long_chinese_replies_and_controls_keep_the_bar_in_place():
  chinese = played("zh", changes=[1, 2], reply="我在听，慢慢说。" * 60)
  hostile = played(changes=[1, 2, 3], reply="\x1b[2J\x1b[31mred\x07" + "e\u0301" * 700)
  lines = side_by_side.dialogues(("before", chinese), ("after", hostile))
  for line in lines:
    assert side_by_side.width(line) <= side_by_side.WIDTH <= 100
    left = line.rpartition(" | ")[0] if " | " in line else None
    if left is not None:
      assert side_by_side.width(left) == side_by_side.COLUMN
  text = "\n".join(lines)
  assert "\x1b" not in text and "\x07" not in text and "…" in text
