"""A file of examples, read and checked, and the order in which a run takes them.

Examples are packed into rows, as many as fit. The rows of a run are one endless stream: epoch
after epoch, each a permutation of the examples that is a function of (seed, epoch).
"""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlver_jax import json_lines
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.dialogue import Segment
from rlver_jax.errors import UserError
from rlver_jax.json_lines import Misfit
from rlver_jax.permutation import permutation
from rlver_jax.rl.rows import pack, row_length
from rlver_jax.supervised import chats, recorded
from rlver_jax.tokenizer import Tokenizer

Example = list[Segment]


def read(path: str, config: ConfigDict, tokenizer: Tokenizer) -> list[Example]:
  """The examples of a file, as the configuration's section `data` says.

  Recorded dialogues in which nothing is learned are left out. Raises UserError, with file and
  line, for a line that is no such example or longer than a row.
  """
  data, longest = config.data, config.training.row_length
  templates = _Templates(data.templates)

  def segments(record: Any) -> Example:
    if data.kind == "chat":
      return chats.segments(record, tokenizer, data.roles)
    parsed = recorded.parse(record)
    if data.kind == "policy":
      return recorded.policy_segments(parsed, tokenizer, templates)
    return recorded.simulator_segments(parsed, tokenizer, templates, data.form, data.answers)

  def make(record: Any) -> Example:
    example = segments(record)
    if (length := row_length(example)) > longest:
      raise Misfit(f"{length} tokens, expected at most training.row_length, which is {longest}")
    return example

  what = "a chat" if data.kind == "chat" else "a recorded dialogue"
  examples = json_lines.read(pathlib.Path(path).expanduser(), make, what)
  examples = [example for example in examples if row_length(example)]
  if not examples:
    raise UserError(f"{path} has nothing to learn, expected at least one example in it.")
  return examples


class _Templates(dict):
  """The templates of a folder by language, each read when the first record of it comes."""

  def __init__(self, folder: str):
    super().__init__()
    self._folder = folder

  def __missing__(self, language: str) -> templates_lib.Templates:
    self[language] = templates_lib.load(language, self._folder)
    return self[language]


def digest(examples: Sequence[Example]) -> str:
  """A short fingerprint of examples in their order."""
  found = hashlib.sha256()
  for example in examples:
    for segment in example:
      numbers = [len(segment.ids), segment.branch, segment.logprobs is not None, *segment.ids]
      found.update(np.array(numbers, np.int64).tobytes())
  return found.hexdigest()[:16]


def stream(
  lengths: Sequence[int], seed: int, row: int, rows: int, first: int = 0
) -> Iterator[list[list[int]]]:
  """For each step from `first` on: which examples are in each of its `rows` rows of `row` tokens.

  lengths: tokens of each example.
  """
  epochs = (permutation(len(lengths), seed, epoch).tolist() for epoch in itertools.count())
  packed = pack(itertools.chain.from_iterable(epochs), lengths, row)
  packed = itertools.islice(packed, first * rows, None)
  while True:
    yield list(itertools.islice(packed, rows))
