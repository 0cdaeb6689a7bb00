"""The folder of a run: made, recognised, refused."""

import json
import os

import jax
import pytest
import runs

from rlver_jax import flat_config, workdir
from rlver_jax.errors import UserError


def refusal(path, config) -> str:
  """What `claim` says, in one line."""
  with pytest.raises(UserError) as raised:
    workdir.claim(path, config)
  assert "\n" not in str(raised.value)
  return str(raised.value)


def test_a_new_folder_gets_the_configuration_and_nothing_else(tmp_path):
  config = runs.config()
  folder = workdir.claim(str(tmp_path / "a" / "b"), config)
  assert folder == tmp_path / "a" / "b"
  assert [file.name for file in folder.iterdir()] == ["config.json"]
  assert json.loads((folder / "config.json").read_text()) == flat_config.flatten(config)


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.claim("~/run", runs.config()) == tmp_path / "run"


def test_the_same_configuration_comes_back_and_free_fields_are_brought_up_to_date(tmp_path):
  path = str(tmp_path / "run")
  workdir.claim(path, runs.config(steps=2))
  (tmp_path / "run" / "metrics.jsonl").write_text("")
  later = runs.config(**{"steps": 9, "checkpoint.every": 3})
  workdir.claim(path, later)
  kept = json.loads((tmp_path / "run" / "config.json").read_text())
  assert kept == flat_config.flatten(later)


def test_another_configuration_is_refused_by_field_and_changes_nothing(tmp_path):
  path = tmp_path / "run"
  workdir.claim(str(path), runs.config())
  before = (path / "config.json").read_bytes()
  text = refusal(str(path), runs.config(**{"steps": 9, "algorithm.clip_low": 0.3}))
  assert text == (
    f"workdir {path} belongs to a run with algorithm.clip_low = 0.2, found 0.3, expected the same "
    "configuration or another --workdir."
  )
  assert (path / "config.json").read_bytes() == before


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("x")
  assert "holds files but no config.json" in refusal(str(tmp_path), runs.config())
  assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_left_of_writing_the_configuration_is_no_obstacle(tmp_path):
  (tmp_path / ".config.json.tmp").write_text("{")
  workdir.claim(str(tmp_path), runs.config())
  assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_file_in_the_way_is_named(tmp_path, below):
  (tmp_path / "file").write_text("x")
  path = tmp_path / "file" / below
  text = refusal(str(path), runs.config())
  assert text.startswith(f"workdir {path} cannot be used (")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b"\xff\xfe{}"])
def test_a_broken_config_json_is_named(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  assert refusal(str(tmp_path), runs.config()).startswith(
    f"{tmp_path}/config.json is not a JSON object ("
  )
  assert (tmp_path / "config.json").read_bytes() == content


def test_what_a_run_has_spent_is_kept(tmp_path):
  assert workdir.read_spent(tmp_path) == {}
  workdir.write_spent(tmp_path, {})
  assert not list(tmp_path.iterdir())  # nothing is spent on a simulated user on this machine
  workdir.write_spent(tmp_path, {"prompt_tokens": 3, "failures": 0})
  assert workdir.read_spent(tmp_path) == {"prompt_tokens": 3, "failures": 0}
  wrong = ('"many"', "null", "-1", "1.5", "Infinity", "true")
  for content in ("{", "[1]", *(f'{{"failures": {value}}}' for value in wrong)):
    (tmp_path / "spent.json").write_text(content)
    with pytest.raises(UserError, match=r"spent\.json cannot be read"):
      workdir.read_spent(tmp_path)


def test_the_configuration_of_a_run_is_read_back(tmp_path):
  config = runs.config(**{"lora.policy_rank": 3, "algorithm.advantage": "rloo"})
  workdir.claim(str(tmp_path / "run"), config)
  back = workdir.read_config(tmp_path / "run")
  assert flat_config.flatten(back) == flat_config.flatten(config)
  assert (back.lora.policy_rank, back.algorithm.advantage) == (3, "rloo")
  assert back.sampling.extend_buckets == [128]


def unreadable(path) -> str:
  """What `read_config` says, in one line."""
  with pytest.raises(UserError) as raised:
    workdir.read_config(path)
  assert "\n" not in str(raised.value)
  return str(raised.value)


def test_a_folder_without_a_run_is_named(tmp_path):
  for folder in (tmp_path / "none", tmp_path):
    assert unreadable(folder) == (
      f"{folder}/config.json cannot be read (No such file or directory), expected the folder of a "
      "run."
    )


@pytest.mark.parametrize(
  "content", [b"", b"{", b"[1, 2]", b"3", b"\xff\xfe{}", b'{"policy": 3, "policy.dtype": "x"}']
)
def test_what_is_no_configuration_of_a_run_is_named(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  text = unreadable(tmp_path)
  assert text.startswith(f"{tmp_path}/config.json is not the configuration of a run (")
  assert text.endswith("), expected one that rlver_jax.main wrote.")


@pytest.mark.parametrize("field", ["steps", "critic.value_clip", "algorithm.loss"])
def test_a_configuration_of_a_run_that_lacks_a_field_is_named_by_file_and_field(tmp_path, field):
  """As one is that an earlier version wrote."""
  flat = flat_config.flatten(runs.config())
  del flat[field]
  (tmp_path / "config.json").write_text(json.dumps(flat))
  assert unreadable(tmp_path).startswith(f"{tmp_path}/config.json: {field} is missing, expected ")


def test_of_several_processes_only_the_first_one_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert workdir.claim(str(tmp_path / "run"), runs.config()) == tmp_path / "run"
  assert not (tmp_path / "run").exists()


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  file = tmp_path / "a.json"
  workdir.write_json(file, {"b": [1], "a": "ä"})
  assert json.loads(file.read_text(encoding="utf-8")) == {"a": "ä", "b": [1]}

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    workdir.write_json(file, {"a": 2})
  assert json.loads(file.read_text(encoding="utf-8")) == {"a": "ä", "b": [1]}
