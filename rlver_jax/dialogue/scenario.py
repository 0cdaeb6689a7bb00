"""Scenarios: who the simulated user is, what happened, and what the user secretly wants.

A scenario file holds one JSON object a line, in the format of RLVER's published profiles:
`id`, `player` (persona), `scene` (background), `main_cha` (character type), `cha_group`
(traits), `task` (hidden intention), and optionally `topic` and `first_talk` (opening line). Ours
may have a `tactic` besides, one of `TACTICS`: how a difficult user tries the helper. Other keys are
allowed and left alone. `scenario_dataset.py` turns a file into records;
`batch_indices` says which of them a training step uses.
"""

import codecs
import dataclasses
import hashlib
import importlib.resources
import json
import pathlib
import re
from typing import Any

from rlver_jax.errors import UserError
from rlver_jax.json_lines import Misfit
from rlver_jax.permutation import permutation

EMOTIONAL = ("listen", "empathy", "praise", "agree")
RATIONAL = ("advice", "reflect", "balance", "motives")
PACKAGE_FILES = ("en", "zh", "adversarial", "tiny", "tiny-held-out")
# What a difficult user does: deny what was said; grow angrier with every turn; accept nothing but
# unconditional approval; say the opposite of before; ask for a blessing on harm; say next to
# nothing.
TACTICS = ("gaslighting", "escalation", "validation", "contradiction", "baiting", "silence")

# What tells the eight hidden intentions apart in the text of a task.
_INTENTION_PATTERNS = {
  "listen": r"\blisten|倾听|宣泄|听你说",
  "empathy": r"\bempath|\btruly feel|共情|体会",
  "praise": r"\bprais|夸奖|表扬|称赞",
  "agree": r"\bagree|nothing wrong|没有错|认同你",
  "advice": r"\badvice|建议",
  "reflect": r"\breflect|your own part|反思",
  "balance": r"\bbalance|\bweigh|different sides|辩证|权衡",
  "motives": r"\bmotive|why the other|原因|动机",
}
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_JSON_KEYS = {
  "id": "id",
  "persona": "player",
  "background": "scene",
  "character": "main_cha",
  "traits": "cha_group",
  "task": "task",
  "topic": "topic",
  "first_message": "first_talk",
  "tactic": "tactic",
}
_OPTIONAL = ("topic", "first_message")


@dataclasses.dataclass(frozen=True)
class Scenario:
  """One simulated user in one situation; all texts are in `language`."""

  id: str
  persona: str
  background: str
  character: str  # character type: negative, passive or avoidant, in the file's language
  traits: tuple[str, ...]
  task: str  # the hidden intention as a sentence
  topic: str = ""
  first_message: str = ""  # "": the simulator writes the opening line
  tactic: str = ""  # one of TACTICS, "" for a user who plays none

  @property
  def language(self) -> str:
    """As `language_of` has it."""
    return language_of(self.task)

  @property
  def intention(self) -> str:
    """The hidden intention's name, one of `EMOTIONAL` or `RATIONAL`.

    Raises:
      UserError: if `task` says none of them, or several.
    """
    return _intention(self.task, f"scenario {self.id!r}")


def language_of(task: str) -> str:
  """The language of a hidden intention: "zh" where it has Chinese characters, else "en"."""
  return "zh" if _CJK.search(task) else "en"


def intention_of(task: str) -> str:
  """The name of a hidden intention, one of `EMOTIONAL` or `RATIONAL`.

  Raises:
    Misfit: if the text says none of them, or several.
  """
  found = [name for name, pattern in _INTENTION_PATTERNS.items() if re.search(pattern, task, re.I)]
  if len(found) != 1:
    reading = f"could mean {' or '.join(found)}" if found else "names no known intention"
    raise Misfit(
      f"field 'task' is {_short(task)}, which {reading}, expected a wish for one of: to be "
      "listened to, empathy, praise, someone to agree, advice, to reflect on oneself, a balanced "
      "view, the motives of others"
    )
  return found[0]


def tactic_of(record: dict) -> str:
  """The tactic of a scenario or a recorded dialogue, one of `TACTICS`; "" where it has none.

  Raises:
    Misfit: if it has another.
  """
  tactic = record.get("tactic", "")
  if "tactic" in record and tactic not in TACTICS:
    raise Misfit(f"field 'tactic' is {_short(tactic)}, expected one of {', '.join(TACTICS)}")
  return tactic


def resolve(path: str) -> pathlib.Path:
  """The scenario file that a config means: a name in `PACKAGE_FILES`, or a file path."""
  if path in PACKAGE_FILES:
    assets = importlib.resources.files("rlver_jax") / "assets" / "scenarios"
    return pathlib.Path(str(assets / f"{path}.jsonl"))
  return pathlib.Path(path).expanduser()


def read(path: pathlib.Path) -> tuple[list[Scenario], str]:
  """All scenarios of a file in its order, and the SHA-256 of its bytes in hexadecimal.

  Blank lines are passed over. The whole file is checked before anything is returned.

  Raises:
    UserError: if the file can't be read, has no scenario, or a line is broken.
  """
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError as error:
    names = ", ".join(repr(name) for name in PACKAGE_FILES)
    raise UserError(
      f"{path}: cannot be read ({error.strerror}), expected a file of JSON lines, or {names} "
      "for the package's own scenarios."
    ) from error

  scenarios, line_of_id = [], {}
  # Not `splitlines`: JSON strings may hold other line separators, such as U+2028.
  lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
  for number, raw in enumerate(lines, start=1):
    if not raw.strip():
      continue
    try:
      line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise UserError(
        f"{path}, line {number}: byte {error.start + 1} is 0x{raw[error.start]:02x}, "
        "expected text in UTF-8."
      ) from error
    scenario = parse(line, path, number)
    if scenario.id in line_of_id:
      raise UserError(
        f"{path}, line {number}: field 'id' is {_short(scenario.id)} as in line "
        f"{line_of_id[scenario.id]}, expected an id of its own for each scenario."
      )
    line_of_id[scenario.id] = number
    scenarios.append(scenario)
  if not scenarios:
    raise UserError(f"{path}: the file is empty, expected at least one scenario a JSON line.")
  return scenarios, hashlib.sha256(content).hexdigest()


def parse(line: str, path: str | pathlib.Path, number: int) -> Scenario:
  """The scenario in one JSON line; `path` and `number` (from 1) are named in errors.

  Raises:
    UserError: if the line is no JSON object, a field is missing, empty or of another type, or
      the task is none of the eight intentions.
  """
  where = f"{path}, line {number}"
  try:
    record = json.loads(line)
  # ValueError covers numbers of absurd length too, RecursionError absurd nesting.
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where}: not valid JSON ({error}), expected one JSON object.") from error
  if not isinstance(record, dict):
    raise UserError(f"{where}: found {_short(record)}, expected a JSON object.")

  fields = {}
  for name, key in _JSON_KEYS.items():
    if name == "traits":
      fields[name] = _traits(record, key, where)
    elif name == "tactic":
      fields[name] = _tactic(record, where)
    elif key in record or name not in _OPTIONAL:
      fields[name] = _text(record, key, where, may_be_empty=name in _OPTIONAL)
  _intention(fields["task"], where)
  return Scenario(**fields)


def as_record(scenario: Scenario) -> dict[str, Any]:
  """The scenario in the published format, of which `parse` reads one line."""
  values = {key: getattr(scenario, name) for name, key in _JSON_KEYS.items()}
  if not scenario.tactic:
    del values["tactic"]
  return values | {_JSON_KEYS["traits"]: list(scenario.traits)}


def batch_indices(length: int, step: int, batch_size: int, seed: int) -> list[int]:
  """Which scenarios step `step` (from 0) uses: `batch_size` indices in 0..length-1.

  The steps cut an endless stream into pieces: epoch after epoch, each a permutation that is a
  function of (seed, epoch) alone. No tail is dropped, so a batch may straddle epochs and then
  repeat a scenario. Any step is found without going through those before it.

  `seed` is taken modulo 2**64.
  """
  position = step * batch_size
  indices = []
  while len(indices) < batch_size:
    epoch, start = divmod(position + len(indices), length)
    order = permutation(length, seed, epoch)
    indices += order[start : start + batch_size - len(indices)].tolist()
  return indices


def _intention(task: str, where: str) -> str:
  try:
    return intention_of(task)
  except Misfit as misfit:
    raise UserError(f"{where}: {misfit}.") from misfit


def _tactic(record: dict, where: str) -> str:
  try:
    return tactic_of(record)
  except Misfit as misfit:
    raise UserError(f"{where}: {misfit}.") from misfit


def _text(record: dict, key: str, where: str, may_be_empty: bool = False) -> str:
  if key not in record:
    raise UserError(f"{where}: field {key!r} is missing, expected a string.")
  return _checked_text(record[key], f"{where}: field {key!r}", may_be_empty)


def _traits(record: dict, key: str, where: str) -> tuple[str, ...]:
  if key not in record:
    raise UserError(f"{where}: field {key!r} is missing, expected a list of strings.")
  if not isinstance(record[key], list):
    raise UserError(f"{where}: field {key!r} is {_short(record[key])}, expected a list of strings.")
  return tuple(
    _checked_text(trait, f"{where}: item {i} of field {key!r}")
    for i, trait in enumerate(record[key], start=1)
  )


def _checked_text(value, what: str, may_be_empty: bool = False) -> str:
  if not isinstance(value, str):
    raise UserError(f"{what} is {_short(value)}, expected a string.")
  if not value.strip() and not may_be_empty:
    raise UserError(f"{what} is empty, expected a text.")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
    raise UserError(
      f"{what} has the lone surrogate U+{ord(value[error.start]):04X}, expected Unicode text."
    ) from error
  return value


def _short(value) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else text[:57] + "..."
