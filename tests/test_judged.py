"""What judgements come to: quotations that stand in a reply or do not."""

import pytest

from rlver_jax.evaluation.judged import quotes

REPLIES = ["That must hurt a lot, and nobody asked you.", "你弟弟没有打招呼，\n换了谁都会生气。"]


@pytest.mark.parametrize(
  ("reason", "found"),
  [
    ('It says "that must hurt a lot," which is near.', True),
    ("It says “THAT  must\nhurt a lot.”", True),
    ("它说「你弟弟没有打招呼， 换了谁都会生气」。", True),
    ("它说“换了谁都会生气。”，很对", True),
    ('A "so" called reply: "nobody asked you"', True),  # the longest decides
    ('It says "that must have hurt a lot".', False),
    ('It says "nobody asked you" and "nothing of the kind, ever, at all".', False),
    ("It says that must hurt a lot.", False),
    ('It says "a lo".', True),
    ('It says "lot".', False),
    ('It says "...." and "".', False),
    ("", False),
  ],
)
def test_a_reason_quotes_a_reply_to_the_letter(reason, found):
  assert quotes(reason, REPLIES) is found
