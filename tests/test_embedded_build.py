"""How models of the embedded world are made: by a recipe of two short stages."""

import json
import os
import re

import pytest
import runs
import subprocesses

from rlver_jax.embedded import build, drill, scenarios
from rlver_jax.embedded.build import Stage
from rlver_jax.errors import UserError

RECIPES = {
  "policy": (Stage("repeat", 40, 2, 2, 256, 1e-3), Stage(build._HELPFUL, 12, 2, 2, 1152, 1e-3))
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(build, "STAGES", RECIPES)
  monkeypatch.setattr(build, "HELD_OUT", 4)
  monkeypatch.setattr(build, "measure", lambda model, path: {"measured": {"of": model}})


@pytest.mark.slow
def test_a_build_is_a_function_of_its_seeds_and_goes_on_where_it_was(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))  # for its compilation cache
  with runs.command_settings(monkeypatch), runs.signals_restored():
    first = build.train("policy", tmp_path / "first")
    found = json.loads((first / build.MANIFEST).read_text("utf-8"))
    assert found["files"] == build.digests(first) and "model.safetensors" in found["files"]
    assert found["held_out"].keys() == {"loss", "measured"}
    # Stopped before its second stage, and gone on with.
    with monkeypatch.context() as patch:
      patch.setattr(build, "STAGES", {"policy": RECIPES["policy"][:1]})
      build.train("policy", tmp_path / "second")
    second = build.train("policy", tmp_path / "second")
    assert build.digests(second) == found["files"]


# Arguments: whether on one core alone, and where the model goes.
BUILD = """
import os, pathlib, sys
if sys.argv.pop(1) == "one":
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from rlver_jax import cli
from rlver_jax.embedded import build
build.ASSETS, build.HELD_OUT = pathlib.Path(sys.argv.pop(1)), 4
build.STAGES = {"policy": (build.Stage("repeat", 40, 3, 2, 512, 3e-3),)}
build.measure = lambda model, path: {}
cli.run(build.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_a_build_does_not_depend_on_the_number_of_cores(tmp_path):
  made = []
  for cores in ("one", "all"):
    out = tmp_path / cores
    flags = ("--model=policy", f"--workdir={out / 'work'}")
    done = subprocesses.finished("-c", BUILD, cores, out, *flags)
    assert done.returncode == 0, done.stderr
    made.append(build.digests(out / "tiny-policy"))
  assert made[0] == made[1]


def test_a_folder_of_another_recipe_is_refused(tmp_path):
  repeat, able = RECIPES["policy"]
  build.check_stage(tmp_path / "stage1.json", repeat)
  build.check_stage(tmp_path / "stage1.json", repeat)
  with pytest.raises(UserError, match=r"stage1\.json holds another recipe .*, expected the same"):
    build.check_stage(tmp_path / "stage1.json", able)


def test_files_are_installed_with_the_manifest_last(tmp_path, monkeypatch):
  made, order = tmp_path / "made", []
  made.mkdir()
  for name in (build.MANIFEST, "a", "z"):
    (made / name).write_text(name)
  replace = build.os.replace
  monkeypatch.setattr(
    build.os, "replace", lambda old, new: (order.append(new.name), replace(old, new))
  )
  build.install(made, tmp_path / "out")
  assert order == ["a", "z", build.MANIFEST]
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(order)


@pytest.mark.parametrize("exercise", drill.EXERCISES)
def test_an_exercise_is_a_function_of_its_seed_and_is_about_its_split(tmp_path, exercise):
  for name, split, seed in (("a", "train", 1), ("b", "train", 1), ("c", "held_out", 1)):
    drill.write(tmp_path / name, exercise, split, 6, seed)
  a, b, c = ((tmp_path / name).read_text("utf-8") for name in "abc")
  assert a == b != c
  held_out = set(scenarios.word_lists("held_out"))
  assert held_out & set(re.findall("[a-z]+", c)) and not held_out & set(re.findall("[a-z]+", a))
  for line in a.splitlines():
    chat = json.loads(line)["messages"]
    learned = [m["content"] for m in chat if m["role"] == "assistant" and m.get("train", True)]
    if exercise == "repeat":
      assert learned == [" ".join([chat[1]["content"]] * drill.TIMES)]
    else:
      assert len(learned) == drill.REPLIES and all(text.startswith("Says: ") for text in learned)
      whole = [re.search(r"\nChange: -?\d+$", text) is not None for text in learned]
      assert whole == [exercise != "recognise"] * drill.REPLIES
