"""The notebooks: executed on small runs, and kept with what full ones gave."""

import ast
import base64
import itertools
import json
import pathlib
import re
import statistics

import pytest

pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")

import nbformat
import runs
from test_closing import played

from configs import eval as eval_config
from rlver_jax import workdir
from rlver_jax.dialogue import records, scenario
from rlver_jax.evaluation import replay

FOLDER = runs.REPOSITORY / "notebooks"
MISSING = "missing"
EXPLORE, COMPARE, FIDELITY = "01_explore_a_run", "02_compare_policies", "03_simulator_fidelity"
PICTURES = {EXPLORE: 4, COMPARE: 8, FIDELITY: 3}
VARIABLES = {EXPLORE: "RLVER_RUN", COMPARE: "RLVER_RUNS", FIDELITY: "RLVER_FIDELITY"}
# One run is played; of the others, which 02 compares with it, files are written: what is changed
# in the configuration, and of each reply the change of emotion after training.
OTHERS = {
  "grpo-think-0": ({"dialogue.mode": "think"}, (6, 2)),
  "ppo-direct-0": ({"algorithm.advantage": "gae"}, (-3, 9)),
  "ppo-think-0": ({"algorithm.advantage": "gae", "dialogue.mode": "think"}, (7, -1)),
  "grpo-easy-0": ({"environment.level": "easy"}, (4, 4)),
  "grpo-challenging-0": ({"environment.level": "challenging"}, (-5, 1)),
}
RUNS = ("grpo-direct-0", *OTHERS)


def load(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def codes(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
  return [output for cell in codes(notebook) for output in cell.outputs]


def pictures(notebook):
  found = [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
  return [base64.b64decode(picture) for picture in found]


def tables(notebook):
  """By their heads the rows of the tables that are shown, each by its head."""
  found = []
  for output in outputs(notebook):
    text = output.get("data", {}).get("text/markdown", "")
    rows = [
      [cell.strip() for cell in line.strip("|").split("|")]
      for line in text.splitlines()
      if line.startswith("|")
    ]
    if rows:
      found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
  return found


def lines_of(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def evaluation(folder, when):
  return folder / "evaluation" / f"{when}.jsonl"


# What is kept.


@pytest.mark.parametrize("name", PICTURES)
def test_notebooks_are_kept_as_they_were_executed(name):
  notebook = load(name)
  cells = codes(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  kinds = {(o.output_type, o.get("name")) for o in outputs(notebook)}
  assert kinds <= {("execute_result", None), ("display_data", None), ("stream", "stdout")}
  assert len(pictures(notebook)) == PICTURES[name]
  assert all(re.search(r"[0-9]", row[key]) for t in tables(notebook) for row in t for key in row
             if key in ("scenarios", "dialogues", "steps"))  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_notebooks_name_no_place_of_a_machine(name):
  notebook = load(name)
  for output in outputs(notebook):
    output.get("data", {}).pop("image/png", None)
  text = json.dumps(notebook)
  assert not re.search(r"(?<![\w.:/])/(tmp|root|home|work|Users|usr|var|opt|mnt)\b", text)
  assert "site-packages" not in text and "localhost" not in text


@pytest.mark.parametrize("name", PICTURES)
def test_notebooks_only_call_the_package(name):
  for cell in codes(load(name)):
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
    for node in ast.walk(ast.parse(source)):
      assert not isinstance(
        node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
      )
      assert not isinstance(node, ast.Compare | ast.AugAssign | ast.If | ast.IfExp | ast.While)
      assert not isinstance(node, ast.BinOp) or isinstance(node.op, ast.Div)  # of a path
      modules = [node.module] if isinstance(node, ast.ImportFrom) else []
      modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      assert {module.split(".")[0] for module in modules} <= {
        "os", "pathlib", "IPython", "rlver_jax"
      }  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_notebooks_say_where_they_read(name):
  notebook = load(name)
  assert notebook.cells[0].cell_type == "markdown" and "**Reads**" in notebook.cells[0].source
  assert notebook.cells[1].metadata.tags == ["parameters"]
  assert VARIABLES[name] in notebook.cells[0].source
  assert VARIABLES[name] in notebook.cells[1].source


# What they do.


def write_run(folder, scenarios, config, changes):
  """A run of two steps as if it had been trained."""
  workdir.claim(str(folder), config)
  for when, steps in (("before", (1, -2)), ("after", changes)):
    dialogues = [played(s, i, *steps, i, 3 - i) for i, s in enumerate(scenarios)]
    records.write(evaluation(folder, when), dialogues)
  lines = []
  for step in (1, 2):
    dialogues = [played(s, i, *changes, step * i) for i, s in enumerate(scenarios)]
    records.write(folder / "dialogues" / f"step_{step:06d}.jsonl", dialogues)
    names = ("emotion/success_rate", "emotion/failure_rate", "update/entropy")
    lines.append({"step": step, **dict.fromkeys(names, 0.1), "dialogue/distinct_2": 0.5})
    lines[-1]["emotion/final_mean"] = statistics.mean(d.emotion for d in dialogues)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Where each notebook reads: a run, a folder with six of them, and a replay."""
  folder = tmp_path_factory.mktemp("runs")
  path = runs.held_out(folder, 3)
  # As in test_heldout.py, so that whichever comes second finds its programs compiled.
  config = runs.config(**{"evaluation.path": str(path)})
  run = folder / RUNS[0]
  runs.play(config, run)
  for name, (fields, changes) in OTHERS.items():
    config.update_from_flattened_dict(fields)
    write_run(folder / name, scenario.read(path)[0], config, changes)
  replayed = eval_config.get_config("fidelity")
  recorded = [evaluation(folder / "ppo-think-0", when) for when in ("before", "after")]
  replayed.update_from_flattened_dict({
    "simulator.kind": "scripted", "cpu_devices": 1, "mesh.data": 1, "mesh.fsdp": -1,
    "data.recorded": ",".join(map(str, recorded)), "compilation_cache": "",
  })  # fmt: skip
  runs.evaluate(replay, replayed, folder / "fidelity")
  return {EXPLORE: run, COMPARE: folder, FIDELITY: folder / "fidelity"}


@pytest.fixture(scope="module")
def executed(folders, tmp_path_factory):
  """The notebooks by name, and under MISSING their first two cells without a folder.

  One kernel, which loads the package once, forgets all names from one notebook to the next.
  """
  nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
  pytest.importorskip("ipykernel", reason="the extra `notebooks` is not installed")
  parts = {name: load(name).cells for name in PICTURES}
  for name, cells in parts.items():
    cells[:0] = setting(**{VARIABLES[name]: str(folders[name])})
  parts[MISSING] = setting(**dict.fromkeys(VARIABLES.values(), "no-such-folder"))
  parts[MISSING] += [cell for name in PICTURES for cell in codes(load(name))[:2]]
  together = [cell for cells in parts.values() for cell in cells]
  for number, cell in enumerate(together):
    cell.id = f"cell-{number}"  # which the notebooks count each for itself
  whole = nbformat.v4.new_notebook(cells=together)
  own = tmp_path_factory.mktemp("jupyter")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(runs.REPOSITORY))
    patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this interpreter's kernel,
    patch.delenv("JUPYTER_PATH", raising=False)
    patch.delenv("MPLBACKEND", raising=False)
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
      patch.setenv(name, str(own / name))  # with no setting of the user's
    client = nbclient.NotebookClient(
      whole, kernel_name="python3", timeout=600, allow_errors=True,
      resources={"metadata": {"path": str(FOLDER)}},
    )  # fmt: skip
    client.execute()
  return {name: nbformat.v4.new_notebook(cells=cells[2:]) for name, cells in parts.items()}


def setting(**variables):
  """Cells that forget all names and set environment variables."""
  sources = "%reset -f", f"import os\n\nos.environ |= {variables!r}"
  return [nbformat.v4.new_code_cell(source) for source in sources]


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_no_cell_fails_and_every_picture_is_drawn(executed, name):
  found = executed[name]
  assert [o for o in outputs(found) if o.output_type == "error"] == []
  assert len(pictures(found)) == PICTURES[name]
  for picture in pictures(found):
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert picture.startswith(b"\x89PNG") and width > 400 and height > 150
  # As those that are kept: the same cells give outputs of the same kinds.
  kinds = [[sorted(o.get("data", {})) for o in cell.outputs if o.output_type != "stream"]
           for cell in codes(found)]  # fmt: skip
  assert kinds == [
    [sorted(o.get("data", {})) for o in cell.outputs if o.output_type != "stream"]
    for cell in codes(load(name))
  ]


@pytest.mark.slow
def test_a_run_is_shown_as_its_files_tell(executed, folders):
  run, shown = folders[EXPLORE], executed[EXPLORE]
  training, held_out = tables(shown)
  final = [line["emotion/final_mean"] for line in runs.metrics(run)]
  assert (training[0]["run"], training[0]["steps"]) == (RUNS[0], "4 of 4")
  assert training[0]["emotion, first"] == f"{final[0]:.1f}"
  assert training[0]["last"] == f"{final[-1]:.1f}"
  before, after = (
    [d["emo_point"] for d in lines_of(evaluation(run, when))] for when in ("before", "after")
  )
  means = [statistics.mean(before), statistics.mean(after)]
  (row,) = held_out
  assert row["emotion"] == f"{means[0]:.1f} → {means[1]:.1f}"
  assert row["change of emotion"].startswith(f"{means[1] - means[0]:+.1f} [")
  gains = sorted((a - b, i) for i, (b, a) in enumerate(zip(before, after, strict=True)))
  texts = [o.text for o in outputs(shown) if o.get("name") == "stdout"]
  for text, gain, place in zip(texts, (1, 2, 0), ("median", "highest", "lowest"), strict=True):
    flat = " ".join(text.split())
    assert f"change of emotion, {gains[gain][0]:+d}, is the {place} of all." in flat
    assert re.search(rf"AFTER: emotion 30 -> {after[gains[gain][1]]}\b", text)


@pytest.mark.slow
def test_policies_are_compared_as_their_files_tell(executed, folders):
  shown, folder = tables(executed[COMPARE]), folders[COMPARE]
  final = {
    run: {
      when: {d["id"]: d["emo_point"] for d in lines_of(evaluation(folder / run, when))}
      for when in ("before", "after")
    }
    for run in RUNS
  }
  pairs = {
    "GRPO, think − GRPO, direct": ("grpo-think-0", "grpo-direct-0"),
    "PPO, think − PPO, direct": ("ppo-think-0", "ppo-direct-0"),
    "PPO, direct − GRPO, direct": ("ppo-direct-0", "grpo-direct-0"),
    "PPO, think − GRPO, think": ("ppo-think-0", "grpo-think-0"),
    "GRPO, easy user − GRPO, direct": ("grpo-easy-0", "grpo-direct-0"),
    "GRPO, challenging user − GRPO, direct": ("grpo-challenging-0", "grpo-direct-0"),
  }
  rows = [row for table in shown for row in table if "runs" in row]
  assert [row["runs"] for row in rows] == list(pairs)
  for row in rows:
    one, other = (final[run] for run in pairs[row["runs"]])
    for when in ("before", "after"):
      mean = statistics.mean(one[when][i] - other[when][i] for i in one[when])
      assert row[when].startswith(f"{mean:+.1f} [")
  (course,) = (table for table in shown if "lost since the best" in table[0])
  assert sorted(row["run"] for row in course) == [
    "GRPO, direct", "GRPO, think", "PPO, direct", "PPO, think"
  ]  # fmt: skip
  for row in course:
    run = f"{row['run'].lower().replace(', ', '-')}-0"
    curve = [line["emotion/final_mean"] for line in runs.metrics(folder / run)]
    best = max(curve)
    assert row["best (step)"] == f"{best:.1f} ({1 + curve.index(best)})"
    assert row["lost since the best"] == f"{best - curve[-1]:.1f}"
    jumps = [abs(b - a) for a, b in itertools.pairwise(curve)]
    assert row["from step to step"] == f"{statistics.mean(jumps):.1f}"


@pytest.mark.slow
def test_a_simulated_user_is_compared_as_its_files_tell(executed, folders):
  board, finals = tables(executed[FIDELITY])
  lines = lines_of(folders[FIDELITY] / "replayed.jsonl")
  assert [row["dialogues of"] for row in board] == ["before", "after", "all"]
  for row, end in zip(board, ("before.jsonl", "after.jsonl", ""), strict=True):
    some = [line for line in lines if line["file"].endswith(end)]
    pairs = [pair for line in some for pair in zip(line["recorded"], line["found"], strict=True)]
    assert row["turns"] == str(len(pairs))
    assert row["error"] == f"{statistics.mean(abs(a - b) for a, b in pairs):.2f}"
    signs = [((a > 0) - (a < 0)) == ((b > 0) - (b < 0)) for a, b in pairs]
    assert row["sign"] == f"{statistics.mean(signs):.1%}"
  for row in finals:
    some = [line for line in lines if line["file"].endswith(f"{row['dialogues of']}.jsonl")]
    for cell, name in (("recorded", "recorded_final"), ("found", "found_final")):
      assert row[cell] == f"{statistics.mean(line[name] for line in some):.1f}"


@pytest.mark.slow
def test_a_folder_that_is_not_there_is_named_in_one_sentence(executed):
  errors = [o for o in outputs(executed[MISSING]) if o.output_type == "error"]
  places = ["no-such-folder", "no-such-folder/grpo-direct-0", "no-such-folder"]
  for error, place in zip(errors, places, strict=True):
    sentence = f"{pathlib.Path(place) / 'config.json'} cannot be read (No such file or directory), "
    sentence += "expected the folder of a run."
    assert (error.ename, error.evalue) == ("UserError", sentence)
    assert error.traceback == [f"UserError: {sentence}"]
