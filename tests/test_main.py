"""The command line: a mistake is one sentence and exit code 2, before anything is loaded."""

import io
import json
import os
import sys

import pytest
import runs
import subprocesses
from absl import flags

from configs import grpo
from rlver_jax import cli, errors, main, train, workdir
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, UserMessage
from rlver_jax.interrupt import Interrupted
from rlver_jax.models import source
from rlver_jax.sources import Sources

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
GRPO = "--config=configs/grpo.py"


class Loaded(Exception):
  """A model was about to be loaded."""


@pytest.fixture
def run_main(command, monkeypatch):
  """Runs the command line in this process; returns exit code, stdout and stderr."""

  def load(*_):
    raise Loaded

  monkeypatch.setattr(source, "load_model", load)
  return command


def refusal(run, *arguments: str) -> str:
  """The one line on stderr of a command that ends with exit code 2 and prints nothing else."""
  code, out, err = run(*arguments)
  assert (code, out) == (2, "")
  assert err.startswith("rlver_jax: ") and err.endswith("\n") and err.count("\n") == 1, err
  return err.removeprefix("rlver_jax: ").removesuffix("\n")


FLAGS = [
  ([GRPO, "--config.policy.pth=x"], "'pth', which does not exist, expected 'path'."),
  ([GRPO, "--config.polcy.path=x"], "'polcy', which does not exist, expected 'policy'."),
  ([GRPO, "--config.policy.pth", "x"], "'pth', which does not exist, expected 'path'."),
  ([GRPO, "--config.zzz=1"], "'zzz', which does not exist, expected one of the config file."),
  ([GRPO, "--config.steps=many"], "flag --config.steps=many: invalid literal for int()"),
  ([GRPO, "--config.seed=1.5"], "flag --config.seed=1.5: invalid literal for int()"),
  ([GRPO, "--config.simulator.appraise=perhaps"], "flag --config.simulator.appraise=perhaps"),
  ([GRPO, "--config.dialogue=3"], "flag --config.dialogue=3"),
  ([GRPO, "--config.steps"], "Missing value for flag --config.steps"),
  ([f"{GRPO}:qwen3"], "preset is 'qwen3', expected one of: tiny, qwen2.5-0.5b"),
  (["--config=configs/eval.py:fidelty"], "qwen2.5-7b, fidelity, capabilities, retention."),
  (["--config=configs/none.py"], "--config is configs/none.py, which cannot be read"),
  (["--config=configs"], "--config is configs, which cannot be read"),
  (["--confg=configs/grpo.py"], "Unknown command line flag 'confg'. Did you mean: config ?"),
  (["--config.steps=3", GRPO], "Found --config.steps=3 in argv before a value for --config"),
  ([GRPO, "train"], "the command line has 'train', expected flags only."),
]


@pytest.mark.parametrize(("arguments", "expected"), FLAGS)
def test_a_wrong_flag_is_named(run_main, arguments, expected):
  assert expected in refusal(run_main, *arguments)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("import nothing_there\n", "fails with ModuleNotFoundError (No module named 'nothing_there')"),
    ("def get_config(:\n", "fails with SyntaxError ("),
    ("steps = 3\n", "fails with AttributeError ("),
    ("def get_config():\n  return {}['steps']\n", "fails with KeyError ('steps')"),
    ("def get_config():\n  return 5\n", "which cannot be read, expected a configuration file."),
    (
      "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({'a': 1})\n",
      "task is missing, expected a configuration with all of configs/grpo.py.",
    ),
  ],
)
def test_a_broken_config_file_is_named(run_main, tmp_path, text, expected):
  (tmp_path / "mine.py").write_text(text)
  assert expected in refusal(run_main, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"dialogue.group_size": 3}, "training.microbatch is 4, expected a divisor of the 6 dialogues"),
    ({"training.microbatch": 3}, "training.microbatch is 3, expected a divisor of the 4 dialogues"),
    ({"dialogue.group_size": 1, "training.microbatch": 2}, "group_size is 1, expected at least 2"),
    ({"simulator.kind": "oracle"}, "simulator.kind is 'oracle', expected one of: language_model"),
    ({"mesh.tensor": 3}, "whose product must be the 1 available device(s)"),
    ({"sampling.max_prompt_tokens": 9000}, "8192 positions of the policy model."),
    (
      runs.LANGUAGE_MODEL | {"simulator.cache_length": 9000},
      "simulator.cache_length is 9000, expected at most the 8192 positions of the simulator model.",
    ),
    ({"data.path": "/none"}, "/none: cannot be read (No such file or directory)"),
    ({"simulator.templates": "/none"}, "/none/en.txt"),
    ({"policy.path": "configs"}, "configs/config.json is missing, expected a model directory"),
  ],
)
def test_a_configuration_that_cannot_work_is_named(run_main, tmp_path, changes, expected):
  path = tmp_path / "run"
  changes = {"training.microbatch": 4} | changes
  assert expected in refusal(run_main, GRPO, f"--workdir={path}", *runs.flags(**changes))
  assert not path.exists()


def test_a_workdir_that_cannot_be_used_is_named(run_main, tmp_path):
  (tmp_path / "file").write_text("")
  text = refusal(run_main, GRPO, f"--workdir={tmp_path}/file/run", *runs.flags())
  assert text.startswith(f"workdir {tmp_path}/file/run cannot be used (Not a directory)")
  text = refusal(run_main, GRPO, "--workdir=README.md", *runs.flags())
  assert text.startswith("workdir README.md cannot be used (File exists)")


def test_the_workdir_of_another_configuration_is_named(run_main, tmp_path):
  workdir.claim(str(tmp_path), runs.config(seed=1))
  text = refusal(run_main, GRPO, f"--workdir={tmp_path}", *runs.flags())
  assert "belongs to a run with seed = 1, found 0" in text


def test_what_is_fine_is_loaded(run_main, tmp_path):
  """So that the tests above would notice a model that is loaded too early."""
  with pytest.raises(Loaded):
    run_main(GRPO, f"--workdir={tmp_path}", *runs.flags())


@pytest.mark.parametrize(
  ("outcome", "code", "out", "err"),
  [
    (Interrupted(15), 143, "stopped by SIGTERM; the same command goes on.", ""),
    (Interrupted(2), 130, "stopped by SIGINT; the same command goes on.", ""),
    (errors.Diverged("It diverged."), 1, "", "rlver_jax: It diverged.\n"),
    (errors.BudgetSpent("It is spent."), 1, "", "rlver_jax: It is spent.\n"),
  ],
)
def test_how_a_run_ends_is_its_exit_code(run_main, tmp_path, monkeypatch, outcome, code, out, err):
  def fail(*_):
    raise outcome

  monkeypatch.setattr(train, "train", fail)
  found = run_main(GRPO, f"--workdir={tmp_path}", *runs.flags())
  assert found[0] == code and found[2] == err
  assert found[1].splitlines() == [f"1 cpu device(s), workdir {tmp_path}", *filter(None, [out])]


def test_a_run_ends_with_its_summary_and_its_report(run_main, tmp_path, monkeypatch):
  def finished(config, sources, folder, interrupts):
    (folder / "metrics.jsonl").write_text('{"step": 1, "emotion/final_mean": 31.0}\n')
    for when, emotion in (("before", 29), ("after", 34)):
      quiet = Dialogue(0, 0, sources.heldout[0], Rules(max_turns=1))
      if not quiet.opening:
        quiet.advance(UserMessage("Hello."))
      quiet.advance(PolicyReply("Tell me.", None, True, True, 2))
      quiet.advance(Plan(emotion - 30))
      records.write(folder / "evaluation" / f"{when}.jsonl", [quiet])
    return train.finish(config, sources, folder)

  monkeypatch.setattr(train, "train", finished)
  changes = {"evaluation.path": str(runs.held_out(tmp_path, 1))}
  code, out, err = run_main(GRPO, f"--workdir={tmp_path}/run", *runs.flags(**changes))
  assert (code, err) == (0, "")
  lines = out.splitlines()
  assert lines[1] == "steps        1 in 0:00:00, 0 tokens"
  assert lines[4] == f"checkpoints  {tmp_path}/run/checkpoints" and lines[5] == ""
  assert lines[6] == "1 held-out scenarios, before -> after training:"
  assert lines[8].startswith("scripted user  29.0 -> 34.0  ")
  assert "BEFORE: emotion 30 -> 29 (the last turn)         | AFTER: emotion 30 -> 34" in out
  assert lines[-1] == f"curves: {tmp_path}/run/curves.png"


def test_what_a_terminal_cannot_show_does_not_end_the_run(monkeypatch):
  terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
  monkeypatch.setattr(sys, "stdout", terminal)
  cli.show("é 你 \ud800")
  assert terminal.buffer.getvalue() == "é ? ?\n".encode("latin-1")


def test_flags_of_the_compiler_are_added_to_those_of_the_user(monkeypatch):
  with runs.command_settings(monkeypatch):
    for given, expected in (
      ("", cli.XLA_FLAG),
      ("--xla_dump_to=here", f"--xla_dump_to=here {cli.XLA_FLAG}"),
      ("--xla_cpu_use_fusion_emitters=true", "--xla_cpu_use_fusion_emitters=true"),
    ):
      monkeypatch.setenv("XLA_FLAGS", given)
      for _ in range(2):
        cli.configure_jax(runs.config())
        assert os.environ["XLA_FLAGS"] == expected


def test_overrides_reach_the_run(run_main, tmp_path, monkeypatch):
  seen = []

  def record(config, sources, folder, interrupts):
    seen.append((config, sources, folder))
    raise Interrupted(15)

  monkeypatch.setattr(train, "train", record)
  run_main(GRPO, f"--workdir={tmp_path}", *runs.flags(**{"algorithm.whiten": True}))
  [(config, sources, folder)] = seen
  assert config.to_dict() == runs.config(**{"algorithm.whiten": True}).to_dict()
  assert isinstance(sources, Sources) and folder == tmp_path
  assert config.is_locked
  assert json.loads((tmp_path / "config.json").read_text())["algorithm.whiten"] is True


@pytest.mark.parametrize(
  ("config", "folder"),
  [
    ("configs/grpo.py", "runs/grpo-tiny"),
    ("configs/grpo.py:qwen2.5-7b", "runs/grpo-qwen2.5-7b"),
    ("/elsewhere/mine.py:tiny", "runs/mine-tiny"),
  ],
)
def test_the_default_workdir_is_named_after_config_and_preset(config, folder, monkeypatch):
  monkeypatch.setattr(flags.FLAGS["config"], "_config_filename", config)
  assert str(main.default_workdir()) == folder


def run_process(*arguments: str) -> tuple[int, str, str]:
  """Runs the command line in a process of its own; returns as `run_main`."""
  done = subprocesses.finished("-m", "rlver_jax.main", *arguments)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [[], [GRPO, "--config.policy.pth=x"]])
def test_a_real_process_prints_one_line_and_exits_with_2(arguments):
  refusal(run_process, *arguments)


def test_a_cpu_is_split_into_as_many_devices_as_asked_for():
  """Which also shows that a real process that has begun with JAX ends with one line."""
  text = refusal(run_process, GRPO, *runs.flags(**{"cpu_devices": 2, "mesh.tensor": 3}))
  assert "whose product must be the 2 available device(s)" in text


def test_help_names_the_flags():
  _, out, err = run_process("--help")
  assert "--workdir" in out and "--config" in out
  assert "Traceback" not in out + err


def test_the_package_has_the_default_config_of_the_first_command():
  assert grpo.get_config().policy.path == "tiny-policy"
