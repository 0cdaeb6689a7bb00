"""The leaderboard's command: tables in three forms, and what it does with broken files."""

import csv
import functools
import io
import os
import subprocess
import sys

import pytest
import runs
import subprocesses
from test_transcripts import RECORD, changed, lines

from rlver_jax import cli, leaderboard


@pytest.fixture
def run(command):
  """Runs the command in this process; returns exit code, stdout and stderr."""
  return functools.partial(command, run=lambda: cli.run(leaderboard.main, operands=True))


@pytest.fixture
def files(tmp_path):
  """A better and a worse model on four scenarios."""
  low, high = changed(), changed(history__4__point=36, emo_point=36, emo_state="Emotion-C")
  high["history"][4]["planning"]["change"] = 0
  return [
    lines(tmp_path / f"{name}_result.jsonl", *(record | {"id": f"s{i}"} for i in range(4)))
    for name, record in (("worse", high), ("better", low))
  ]


def test_text_has_the_best_first_and_compares_it(run, files):
  code, out, err = run(*files)
  assert code == 0 and not err
  board, comparison = out.split("\n\n")
  assert [line.split()[:3] for line in board.splitlines()[1:]] == [
    ["better", "4", "44.0"], ["worse", "4", "36.0"],
  ]  # fmt: skip
  assert comparison.splitlines()[0].startswith("better against")
  # 2 of the 2^4 ways of swapping differ as much.
  cells = ["worse", "4", "+8.0", "+8.0", "to", "+8.0", "0.1250"]
  assert comparison.splitlines()[1].split() == cells


def test_csv_and_markdown_have_the_same_cells(run, files):
  found = {form: run(files[0], f"--format={form}", "--by=need")[1] for form in ("csv", "markdown")}
  rows = list(csv.reader(io.StringIO(found["csv"])))
  assert rows[0][:6] == ["model", "need", "dialogues", "score", "95% low", "95% high"]
  assert [row[1] for row in rows[1:]] == ["all", "emotional"]
  marked = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in found["markdown"].splitlines()
  ]
  joined = [  # of three pairs of columns the other form has one
    [*row[:4], f"{row[4]} to {row[5]}", row[6], f"{row[7]} to {row[8]}", row[9],
     f"{row[10]} to {row[11]}", *row[12:]]
    for row in rows
  ]  # fmt: skip
  assert marked[2:] == joined[1:] and set(marked[1]) == {"---", "---:"}
  heads = ["score", "95% interval", "success", "95% interval", "failure", "95% interval"]
  assert marked[0][3:9] == heads


def test_csv_is_one_table(run, files):
  models = run(*files, "--format=csv")[1].splitlines()
  assert len(models) == 3 and {line.count(",") for line in models} == {12}
  differences = run(*files, "--format=csv", "--table=differences")[1].splitlines()
  assert differences[1] == "worse,4,+8.0,+8.0,+8.0,0.1250"
  assert run(files[0], "--table=differences")[0] == 2


def test_a_broken_record_is_named_and_counted_around_only_when_asked(run, tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD, changed(id="b", emo_point=50), changed(id="c"))
  code, out, err = run(path)
  assert code == 2 and not out
  first, *_, last = err.splitlines()
  assert first == (
    f"{path}, line 2: found 50 as 'emo_point', expected 44, the emotion after the last change."
  )
  assert "the files have 1 that cannot be counted" in last and "Traceback" not in err
  code, out, err = run(path, "--skip_broken")
  assert code == 0 and out.splitlines()[1].split()[:3] == ["a", "2", "44.0"]
  assert first in err and "broken records: 1 of 3." in err


def test_a_file_without_records_is_named_and_counted_around_only_when_asked(run, tmp_path):
  good, empty = lines(tmp_path / "a.jsonl", RECORD), tmp_path / "empty.jsonl"
  empty.write_bytes(b"")
  assert run(good, empty)[0] == 2
  code, out, err = run(good, empty, "--skip_broken")
  assert code == 0 and out.splitlines()[1].startswith("a ")
  assert "empty.jsonl: no record" in err


def test_a_terminal_that_cannot_show_a_character_gets_the_rest(tmp_path, monkeypatch):
  path = lines(tmp_path / "a.jsonl", changed(character="悲\nob|c"))
  monkeypatch.setenv("PYTHONIOENCODING", "ascii")
  words = [path, "--by=character", "--format=markdown"]
  done = subprocesses.finished("-m", "rlver_jax.leaderboard", *words)
  assert done.returncode == 0 and "| ? ob\\|c |" in done.stdout


def test_scenarios_are_checked(run, tmp_path):
  path = lines(tmp_path / "a.jsonl", RECORD)
  code, _, err = run(path, "--scenarios=en")
  assert code == 2 and "the id 'bike', expected one of the 64 scenarios" in err


@pytest.mark.parametrize(
  ("words", "said"),
  [
    ([], "names no file"),
    (["{a}", "{a}"], "names a file twice"),
    (["/none.jsonl"], "/none.jsonl cannot be read"),
    (["{a}", "{folder}/./a.jsonl"], "names a file twice"),
    (["{empty}"], "the files have 1 that cannot be counted"),
    (["{bad}", "{empty}", "--skip_broken"], "no file has a record that can be counted"),
    (["{a}", "--by=colour"], "colour"),
    (["{a}", "--by=need", "--table=differences"], "--by is given"),
  ],
)
def test_a_mistake_is_one_sentence(run, tmp_path, words, said):
  paths = {
    "a": lines(tmp_path / "a.jsonl", RECORD), "empty": tmp_path / "empty.jsonl",
    "bad": lines(tmp_path / "bad.jsonl", b"?"), "folder": tmp_path,
  }  # fmt: skip
  paths["empty"].write_bytes(b"")
  code, out, err = run(*(word.format(**paths) for word in words))
  assert code == 2 and said in err.splitlines()[-1]
  assert "Traceback" not in err and not out


@pytest.mark.parametrize(
  "names", [("one/a.jsonl", "two/a.jsonl"), ("a.jsonl", "a_result.jsonl", "one/a.jsonl.txt")]
)
def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path, names):
  for i, name in enumerate(names):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    lines(tmp_path / name, *(changed(id=f"s{j}") for j in range(i + 1)))
  # In their folder, where a path may be what another file would be called.
  command = [sys.executable, "-m", "rlver_jax.leaderboard", *names, "--format=csv"]
  environment = os.environ | {"PYTHONPATH": str(runs.REPOSITORY)}
  done = subprocess.run(
    command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  found = dict(line.split(",")[:2] for line in done.stdout.splitlines()[1:])
  assert found == {name: str(i + 1) for i, name in enumerate(names)}


def test_who_reads_no_further_gets_no_traceback(files):
  command = f"{sys.executable} -m rlver_jax.leaderboard {files[0]} {files[1]}; echo $? >&2"
  done = subprocess.run(
    f"({command}) | true", shell=True, cwd=runs.REPOSITORY, capture_output=True, text=True,
    timeout=120,
  )  # fmt: skip
  assert done.stderr == "141\n"
