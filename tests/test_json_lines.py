"""Files of JSON lines: what is read, and the sentence for what cannot be."""

import functools

import pytest

from rlver_jax import json_lines
from rlver_jax.errors import UserError
from rlver_jax.json_lines import Misfit, field

BREAK = "\u2028"  # a line separator for Python, none for JSON


def name(value):
  return field(value, "name", str)


def refusal(path, make=name) -> str:
  with pytest.raises(UserError) as raised:
    json_lines.read(path, make, "a named thing")
  assert "\n" not in str(raised.value)
  return str(raised.value)


def test_values_come_back_as_they_were_written(tmp_path):
  values = [{"name": "难过"}, {"name": f"a{BREAK}b\n"}, {"name": "", "more": [1.5, None]}]
  path = tmp_path / "new" / "things.jsonl"
  json_lines.write(path, values)
  assert json_lines.read(path, lambda x: x, "a thing") == values
  path.write_text(f'{{"name": "a{BREAK}b"}}\n{{"name": "c"}}', "utf-8")
  assert json_lines.read(path, name, "a thing") == [f"a{BREAK}b", "c"]
  json_lines.write(path, [])
  assert json_lines.read(path, name, "a thing") == []


@pytest.mark.parametrize(
  ("line", "found"),
  [
    ("{", "no JSON, expected a named thing"),
    ("", "no JSON, expected a named thing"),
    ("[" * 100_000, "no JSON, expected a named thing"),
    ("3", "3, expected a JSON object"),
    ("{}", "no 'name', expected str"),
    ('{"name": null}', "None as 'name', expected str"),
    ('{"name": true}', "True as 'name', expected str"),
    ('{"name": ["' + "x" * 100 + '"]}', "['" + "x" * 58 + " as 'name', expected str"),
  ],
)
def test_the_first_line_that_does_not_fit_is_named(tmp_path, line, found):
  path = tmp_path / "things.jsonl"
  path.write_text(f'{{"name": "a"}}\n{line}\n{{', "utf-8")
  assert refusal(path) == f"{path}, line 2: found {found}."


def test_a_number_is_not_a_truth_value():
  assert field({"n": 1}, "n", int) == 1
  with pytest.raises(Misfit, match="True as 'n', expected int"):
    field({"n": True}, "n", int)


def test_files_that_cannot_be_read_are_named(tmp_path):
  assert refusal(tmp_path / "none") == (
    f"{tmp_path}/none cannot be read (No such file or directory), expected a named thing."
  )
  (tmp_path / "bytes").write_bytes(b"\xff\xfe")
  assert refusal(tmp_path / "bytes").startswith(f"{tmp_path}/bytes cannot be read ('utf-8' codec")


def test_a_value_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
  path = tmp_path / "things.jsonl"
  json_lines.write(path, [{"name": "a"}])
  with pytest.raises(TypeError):
    json_lines.write(path, [{"name": "b"}, {"name": object()}])
  assert json_lines.read(path, name, "a thing") == ["a"]


def test_the_end_of_a_file_that_grows_may_be_cut(tmp_path):
  path = tmp_path / "f.jsonl"

  def read():
    make = functools.partial(json_lines.field, name="a", kind=int)
    return json_lines.read(path, make, "numbers", growing=True)

  for text, found in (('{"a": 1}\n{"a"', [1]), ('{"a": 1}\n', [1]), ('{"a', []), ("", [])):
    path.write_text(text)
    assert read() == found
  path.write_text('{"a"\n{"a": 1}\n')
  with pytest.raises(UserError, match="line 1: found no JSON"):
    read()
