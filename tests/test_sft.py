"""Supervised training: its loss and gradients, its runs, and what a command says of mistakes."""

import functools
import json

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import subprocesses

from configs import sft as sft_configs
from rlver_jax import config as config_lib
from rlver_jax import export, flat_config, sft, trainables
from rlver_jax import metrics as metrics_lib
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.dialogue import records
from rlver_jax.dialogue.dialogue import Dialogue, Plan, PolicyReply, Rules, Stage, UserMessage
from rlver_jax.interrupt import Interrupted
from rlver_jax.models import source, weights
from rlver_jax.models.attention import tree_attention
from rlver_jax.partitioning import make_mesh
from rlver_jax.rl.rows import make_packed_rows, pack, row_length
from rlver_jax.supervised import chats as chats_lib
from rlver_jax.supervised import recorded
from rlver_jax.supervised.learner import SupervisedLearner
from rlver_jax.supervised.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections

SMALL = {
  "steps": 6,
  "data.templates": "",
  "training.rows": 2,
  "training.microbatch": 1,
  "training.row_length": 128,
  "training.logprob_chunk": 32,
  "optimizer.learning_rate": 0.003,
  "checkpoint.every": 3,
  "evaluation.every": 4,
  "log.every": 2,
  "log.tensorboard": False,
  "compilation_cache": "",
}
METRICS = """compile/from_cache compile/programs compile/seconds rows/fill rows/trained_tokens
  seconds/step sft/loss tokens/per_second update/gradient_norm update/learning_rate
  update/skipped"""


def chat(i: int) -> dict:
  return {
    "messages": [
      {"role": "user", "content": f"I lost key {i} of {7 * i % 10} today."},
      {"role": "assistant", "content": f"Oh no, key {i}? That must hurt."},
    ]
  }


def dialogue(i: int, think: bool) -> dict:
  """A record of two turns."""
  d = Dialogue(i, 0, builders.scenario(), Rules(max_turns=2))
  for turn, change in enumerate((3, -i)):
    thought = f"They feel {i}." if think else None
    d.advance(PolicyReply(f"Reply {turn} of {i}.", thought, True, True, 4))
    d.advance(Plan(change, f"says {turn}", f"fits {i}", f"mind {turn}", f"feels {turn}"))
    if d.stage is not Stage.DONE:
      d.advance(UserMessage(f"Message {turn} of {i}."))
  return records.record(d)


def write(path, values):
  path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
  return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", map(chat, range(9)))


def config(chats, **changes):
  result = sft_configs.get_config("tiny")
  fields = {"data.path": str(chats), "data.held_out": str(chats)}
  result.update_from_flattened_dict(SMALL | fields | changes)
  config_lib.validate(result)
  return result


def restored(settings, workdir, step=None):
  """The whole state of a checkpoint, the newest by default, and its metadata."""
  learner = sft.make_learner(settings, sft.open_sources(settings))
  checkpoints = Checkpoints(str(workdir / "checkpoints"), keep=None)
  return checkpoints.restore(learner.abstract_state, step)


def exported(workdir, out):
  """The weights of a run's export in float32."""
  export.export(workdir, out, None, False, "float32")
  opened = source.open_source(str(out), "policy.path", dtype="float32", param_dtype="float32")
  return weights.load(opened.directory, opened.config, make_mesh(1, -1, 1))


def assert_close(a, b, tolerance=0.0):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance, rtol=0)


# The loss and its gradients.


def examples() -> list[list]:
  """Chats, and dialogues in both views, whose thoughts and appraisals are branches."""
  tokenizer, templates = builders.tokenizer(), builders.templates()
  found = [chats_lib.segments(chat(i), tokenizer, ("assistant",)) for i in range(5)]
  for i in (1, 2):
    parsed = recorded.parse(dialogue(i, think=True))
    found.append(recorded.policy_segments(parsed, tokenizer, templates))
  parsed = recorded.parse(dialogue(3, think=False))
  return [*found, recorded.simulator_segments(parsed, tokenizer, templates, "plan")]


def whole_passes(documents) -> tuple[np.ndarray, np.ndarray]:
  """A row [T] for each trained segment: all that it comes after, then itself, as plain text.

  Returns their ids [N, T] and which of them are learned."""
  found = []
  for segments in documents:
    for at, segment in enumerate(segments):
      if segment.logprobs is not None:
        own = (0, segment.branch)
        before = [i for s in segments[:at] if s.branch in own for i in s.ids]
        found.append((before, list(segment.ids)))
  T = max(len(before) + len(ids) for before, ids in found)
  ids_NT, mask_NT = np.zeros((len(found), T), np.int32), np.zeros((len(found), T), bool)
  for n, (before, ids) in enumerate(found):
    ids_NT[n, : len(before) + len(ids)] = before + ids
    mask_NT[n, len(before) : len(before) + len(ids)] = True
  return ids_NT, mask_NT


def whole_logits(model, ids_NT):
  positions_NT = jnp.broadcast_to(jnp.arange(ids_NT.shape[1]), ids_NT.shape)
  hidden_NTD, _ = model(ids_NT, positions_NT, tree_attention(jnp.zeros_like(ids_NT)))
  return hidden_NTD @ model.unembedding().T


def reference_loss(model, documents) -> float:
  """The mean negative log-likelihood of what is learned, in float64 from the logits on."""
  ids, mask = whole_passes(documents)
  logprobs = builders.log_softmax(np.asarray(jax.jit(whole_logits)(model, ids))[:, :-1])
  picked = np.take_along_axis(logprobs, ids[:, 1:, None], -1)[..., 0]
  return -np.sum(picked * mask[:, 1:]) / np.sum(mask)


@jax.jit
def reference_gradients(model, ids_NT, mask_NT):
  """Of the mean negative log-likelihood, with all logits at once."""

  def loss(model):
    logprobs = jax.nn.log_softmax(whole_logits(model, ids_NT)[:, :-1])
    picked = jnp.take_along_axis(logprobs, ids_NT[:, 1:, None], -1)[..., 0]
    return -jnp.sum(picked * mask_NT[:, 1:]) / jnp.sum(mask_NT)

  return jax.grad(loss)(model)


@pytest.fixture(scope="module")
def learner():
  """One whose update takes the gradients away from the weights, as they are."""
  model = builders.text_model()
  make = functools.partial(SupervisedLearner, builders.mesh(), optax.sgd(1.0), model)
  return make(microbatch=2, chunk=200, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def reference():
  """Model, examples, and the loss and gradients of the examples from whole passes."""
  model, documents = builders.text_model(), examples()
  gradients = reference_gradients(model, *whole_passes(documents))
  return model, documents, reference_loss(model, documents), gradients


def gradients_of(learner, model, rows):
  """(loss, gradients, metrics) of an update on these rows."""
  placed = learner.place(rows)
  state = learner.init(jax.tree.map(jnp.copy, model))
  loss = float(learner.score(state, None, placed))
  state, numbers = learner.learn(state, None, placed)
  return loss, jax.tree.map(lambda a, b: a - b, model, state.policy.model), numbers


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one a row"])
def test_loss_and_gradients_are_those_of_every_example_by_itself(learner, reference, packed):
  model, documents, wanted, gradients = reference
  lengths, length = [row_length(document) for document in documents], 1280
  assert max(lengths) <= length
  if packed:
    placed = list(pack(range(len(documents)), lengths, length))
    assert len(placed) < 4 and max(map(len, placed)) > 4
  else:
    placed = [[i] for i in range(len(documents))]
  rows = [[documents[i] for i in row] for row in placed]
  rows += [[]] * (8 - len(rows))  # the same program for both
  loss, found, numbers = gradients_of(learner, model, make_packed_rows(rows, length))
  assert loss == pytest.approx(wanted, abs=1e-5)
  assert float(numbers["loss"]) == pytest.approx(wanted, abs=1e-5)
  assert_close(found, gradients, 1e-5)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
  assert float(numbers["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
  assert norm > 0.1
  trained = sum(len(s.ids) for d in documents for s in d if s.logprobs is not None)
  assert int(numbers["tokens"]) == trained and float(numbers["skipped"]) == 0


# Runs.


@pytest.fixture(scope="module")
def watched(chats, tmp_path_factory):
  """A run on chats, as in `finished`, and the fields of its configuration that it read."""
  settings, workdir = config(chats), tmp_path_factory.mktemp("sft") / "run"
  runs.claim(str(workdir), settings)  # which `fields_read` leaves out
  summaries = []

  def play(settings, workdir):
    summaries.append(runs.play_supervised(settings, workdir))

  read = runs.fields_read(settings, workdir, play)
  return (settings, workdir, *summaries), read


@pytest.fixture(scope="module")
def finished(watched):
  """A run on chats: its configuration, its folder, its summary."""
  return watched[0]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """A run that trains adapters on a simulated user's dialogues: configuration, folder, and the
  fields that it read."""
  folder = tmp_path_factory.mktemp("adapted")
  file = write(folder / "dialogues.jsonl", [dialogue(i, think=False) for i in range(4)])
  changes = {
    "data.kind": "simulator",
    "training.row_length": 1280,
    "lora.policy_rank": 3,
    "lora.alpha": 6.0,
    "lora.targets": ("q", "o", "down"),
    "steps": 2,
    "checkpoint.every": 2,
    "optimizer.learning_rate": 0.02,
  }
  settings = config(file, **changes)
  runs.claim(str(folder / "run"), settings)  # which `fields_read` leaves out
  return settings, folder / "run", runs.fields_read(settings, folder / "run", runs.play_supervised)


def test_a_run_learns_and_leaves_metrics(finished):
  _, workdir, summary = finished
  lines = runs.metrics(workdir)
  assert [line["step"] for line in lines] == [2, 3, 4, 6]
  for line in lines:
    evaluated = line["step"] in (4, 6)
    extra = {"sft/held_out_loss", "seconds/evaluation"} if evaluated else set()
    stages = {name for name in line if name == "seconds/checkpoint"}
    assert line.keys() - stages == {"step", *METRICS.split()} | extra
    assert all(isinstance(value, int | float) for value in line.values())
    assert line["update/skipped"] == 0 and 0 < line["rows/fill"] <= 1
  assert lines[-1]["sft/held_out_loss"] < lines[0]["sft/loss"] - 0.5
  assert summary == json.loads((workdir / "summary.json").read_text())
  assert summary["steps"] == 6 and summary["held_out_loss"] == lines[-1]["sft/held_out_loss"]


def test_the_metrics_are_those_of_the_rows_and_the_schedule(finished):
  settings, workdir, _ = finished
  sources = sft.open_sources(settings)
  order = sft.examples_lib.stream([row_length(e) for e in sources.examples], settings.seed, 128, 2)
  steps = [[[sources.examples[i] for i in row] for row in next(order)] for _ in range(6)]

  def mean(first, last, number):
    return np.mean([number(step) for step in steps[first:last]])

  def trained(step):
    return sum(len(s.ids) for row in step for e in row for s in e if s.logprobs is not None)

  for line, first in zip(runs.metrics(workdir), (0, 2, 3, 4), strict=True):
    last = line["step"]
    fill = mean(first, last, lambda step: sum(row_length(e) for row in step for e in row) / 256)
    assert line["rows/fill"] == pytest.approx(fill)
    assert line["rows/trained_tokens"] == pytest.approx(mean(first, last, trained))
    # Warm-up takes no whole step of 6; then the cosine, at the last update of the line.
    rate = 0.003 * 0.5 * (1 + np.cos(np.pi * (last - 1) / 6))
    assert line["update/learning_rate"] == pytest.approx(rate, rel=1e-5)


def test_no_program_is_compiled_after_the_first_line(finished):
  programs = [r["compile/programs"] + r["compile/from_cache"] for r in runs.metrics(finished[1])]
  assert len(programs) == 4 and programs[0] > 0
  assert programs[1:] == programs[:1] * 3


def test_a_stopped_and_resumed_run_is_the_same_run(finished, tmp_path, capsys):
  """Parameters, moments and lines, however often it is stopped."""
  settings, whole, _ = finished
  done = 0
  for n in (2, 1, 1):
    with pytest.raises(Interrupted):
      runs.play_supervised(settings, tmp_path / "run", functools.partial(runs.StopAt, n))
    done += n
    assert runs.metrics(tmp_path / "run")[-1]["step"] == done
  runs.play_supervised(settings, tmp_path / "run")
  assert f"Going on after step {done}." in capsys.readouterr().out
  assert_close(restored(settings, whole)[0], restored(settings, tmp_path / "run")[0], 1e-6)
  # It stopped where a line was due: all of them are the same.
  for ours, theirs in zip(runs.metrics(tmp_path / "run"), runs.metrics(whole), strict=True):
    assert runs.reproducible(ours) == pytest.approx(runs.reproducible(theirs), rel=1e-6)


def test_a_finished_run_is_left_alone(finished, capsys):
  settings, workdir, summary = finished
  before = runs.metrics(workdir)
  assert runs.play_supervised(settings, workdir) == summary
  assert "has all its 6 steps" in capsys.readouterr().out
  assert runs.metrics(workdir) == before


def test_an_export_is_what_was_trained(finished, tmp_path):
  settings, workdir, _ = finished
  state, metadata = restored(settings, workdir)
  assert metadata["step"] == int(state.policy.updates) == 6
  model = exported(workdir, tmp_path / "out")
  assert_close(model, state.policy.model)
  loss = runs.metrics(workdir)[-1]["sft/held_out_loss"]
  assert loss == pytest.approx(reference_loss(model, sft.open_sources(settings).held_out), abs=1e-5)
  first = restored(settings, workdir, 3)[0].policy.model
  changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first, state.policy.model)
  assert min(jax.tree.leaves(changes)) > 1e-5


@pytest.mark.slow
def test_an_export_can_be_trained_on(finished, chats, tmp_path):
  _, workdir, _ = finished
  first = exported(workdir, tmp_path / "exported")
  changes = {"policy.path": str(tmp_path / "exported"), "policy.from_scratch": False, "steps": 1}
  settings = config(chats, **changes | {"optimizer.learning_rate": 0.0})
  runs.play_supervised(settings, tmp_path / "run")
  assert_close(first, exported(tmp_path / "run", tmp_path / "again"))


@pytest.mark.slow
def test_adapters_are_exported_as_the_weights_that_they_make(adapted, tmp_path):
  """W + alpha / rank * A B for each adapted map, whose axes are flattened to a matrix here."""
  settings, workdir, _ = adapted
  adapters = restored(settings, workdir)[0].policy.model
  assert set(adapters) == {"q", "o", "down"}
  ours = exported(workdir, tmp_path / "out")
  opened = source.open_source(
    "tiny", "policy.path", dtype="float32", param_dtype="float32", from_scratch=True
  )
  base = source.load_model(opened, make_mesh(1, -1, 1), settings.seed + trainables.POLICY_WEIGHTS)
  runs.assert_merged(ours, base, adapters)
  np.testing.assert_array_equal(ours.embed[...], base.embed[...])


@pytest.mark.slow
def test_every_field_of_the_configuration_is_read(watched, adapted):
  (settings, *_), read = watched
  # In `main`.
  unread = {"task", "cpu_devices", "compilation_cache"}
  assert set(flat_config.flatten(settings)) - read - adapted[2] == unread


def test_the_loss_of_a_line_is_a_mean_over_the_tokens_of_its_steps(chats, tmp_path):
  progress = Progress(config(chats), tmp_path, metrics_lib.CompileCounter())
  progress.start(0, 0)
  for loss, norm, tokens in ((1.0, 2.0, 10), (4.0, 6.0, 20)):
    numbers = {"loss": loss, "gradient_norm": norm, "skipped": 0.0, "tokens": tokens}
    progress.add(make_packed_rows([[]], 8), jax.tree.map(np.float32, numbers))
  progress.write(2, {})
  progress.close()
  (line,) = runs.metrics(tmp_path)
  assert line["sft/loss"] == pytest.approx((1 * 10 + 4 * 20) / 30)
  assert (line["update/gradient_norm"], line["rows/trained_tokens"]) == (4, 15)


def test_a_checkpoint_is_compared_by_the_loss_of_its_own_step(chats, tmp_path):
  """On the examples kept apart where there are any; one that was not measured is never best."""
  numbers = {name: np.float32(1) for name in ("loss", "gradient_norm", "skipped", "tokens")}
  rows = make_packed_rows([[]], 8)
  found = {}
  for held_out in (str(chats), ""):
    settings = config(chats, **{"data.held_out": held_out, "training.max_nonfinite": 9})
    folder = tmp_path / (held_out and "measured")
    progress = Progress(settings, folder, metrics_lib.CompileCounter())
    progress.start(0, 0)
    losses = []
    for step, extra in enumerate(({"sft/held_out_loss": 2.0}, {}, {"sft/held_out_loss": 3.0}), 1):
      progress.add(rows, numbers)
      progress.write(step, extra if held_out else {})
      losses.append(progress.loss)
    progress.close()
    found[bool(held_out)] = losses
  assert found[False] == [1, 1, 1]
  np.testing.assert_array_equal(found[True], [2, np.nan, 3])


# Mistakes.


@pytest.fixture
def run_main(command):
  """Runs the command line in this process; returns exit code, stdout and stderr."""

  def call(*overrides, **changes):
    fields = SMALL | changes
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return command("--config=configs/sft.py", *flags, *overrides)

  return call


GOOD = json.dumps(chat(0))
TOOL = json.dumps({"messages": [{"role": "tool", "content": "x"}]})
RECORD = json.dumps(dialogue(1, think=False))
LINES = "data.jsonl, line 2: found "


@pytest.mark.parametrize(
  ("lines", "changes", "words"),
  [
    (None, {}, "data.jsonl cannot be read (No such file or directory), expected a chat."),
    ("", {}, "data.jsonl has nothing to learn, expected at least one example in it."),
    (f'{GOOD}\n{{"messages"', {}, f"{LINES}no JSON, expected a chat."),
    (f"{GOOD}\n{TOOL}", {}, f"{LINES}the role 'tool' in message 1, expected one of system"),
    (f"{GOOD}\n{RECORD}", {}, f"{LINES}no 'messages', expected list."),
    (f"{RECORD}\n{GOOD}", {"data.kind": "policy"}, f"{LINES}no 'id', expected str."),
    (GOOD, {"data.kind": "chats"}, "data.kind is 'chats', expected one of: chat, policy, sim"),
    (GOOD, {"data.roles": "('helper',)"}, "data.roles is ('helper',), expected some of: system"),
    (GOOD, {"data.form": "score"}, "data.form is 'score', expected one of: plan, choice."),
    (GOOD, {"data.held_out": "/none"}, "/none cannot be read (No such file or directory)"),
    (GOOD, {"training.microbatch": 3}, "training.microbatch is 3, expected a divisor of training"),
    (GOOD, {"training.rows": 0}, "training.rows is 0, expected at least 1."),
    (GOOD, {"training.row_length": 9000}, "expected at most the 8192 positions of the policy mo"),
    (
      GOOD,
      {"training.row_length": 12},
      "tokens, expected at most training.row_length, which is 12",
    ),
    (
      GOOD,
      {"task": "dpo"},
      "task is 'dpo', expected one of: rl, sft, benchmark, fidelity, ",
    ),
    (GOOD, {"policy.path": "configs"}, "configs/config.json is missing, expected a model direct"),
    (RECORD, {"data.kind": "policy", "data.templates": "/none"}, "/none/en.txt cannot be read"),
  ],
)
def test_a_mistake_is_one_sentence_and_code_2(run_main, tmp_path, lines, changes, words):
  file = tmp_path / "data.jsonl"
  if lines is not None:
    file.write_text(lines)
  code, out, err = run_main(f"--workdir={tmp_path}/run", **{"data.path": file} | changes)
  assert (code, out) == (2, "")
  assert words in err
  assert err.startswith("rlver_jax: ") and err.endswith("\n") and err.count("\n") == 1, err
  assert not (tmp_path / "run").exists()


def test_examples_have_no_default(run_main, tmp_path):
  code, out, err = run_main(f"--workdir={tmp_path}/run")
  assert (code, out) == (2, "")
  assert err.startswith("rlver_jax: data.path is empty, expected a file of examples, as in")


def test_the_folder_of_another_run_is_refused(run_main, finished, chats):
  _, workdir, _ = finished
  fields = {"data.path": chats, "data.held_out": chats}
  code, out, err = run_main(f"--workdir={workdir}", **fields | {"seed": 1})
  assert (code, out) == (2, "")
  assert err.startswith(f"rlver_jax: workdir {workdir} belongs to a run with seed = 0, found 1")
  code, _, err = run_main(f"--workdir={workdir.parent}", **fields)
  assert code == 2 and "holds files but no config.json" in err


def test_a_run_does_not_go_on_with_other_examples(run_main, finished, chats):
  _, workdir, _ = finished
  text, before = chats.read_text(), runs.metrics(workdir)
  fields = {"data.path": chats, "data.held_out": chats, "steps": 7}
  try:
    chats.write_text(text.replace("key 3", "key 33"))
    code, _, err = run_main(f"--workdir={workdir}", **fields)
  finally:
    chats.write_text(text)
    runs.claim(str(workdir), finished[0])
  assert code == 2 and err.count("\n") == 1
  assert err.startswith(f"rlver_jax: data.path is {chats}, which gives other examples than the run")
  assert runs.metrics(workdir) == before


def poison(model):
  """One parameter that is no number makes every log-probability none."""
  model.norm[...] = model.norm[...].at[0].set(jnp.nan)


@pytest.mark.slow
def test_updates_that_are_not_finite_end_the_run_and_the_state_is_saved(run_main, chats, tmp_path):
  path, workdir = runs.save_model(tmp_path / "policy", poison), tmp_path / "run"
  changes = {"policy.path": str(path), "policy.from_scratch": False, "training.max_nonfinite": 2}
  fields = changes | {"data.path": str(chats), "data.held_out": str(chats)}
  code, out, err = run_main(f"--workdir={workdir}", **fields)
  assert code == 1 and "step 2/6" in out
  assert err == (
    "rlver_jax: 2 updates in a row had a loss or gradient that is not finite "
    "(training.max_nonfinite); the state before them is saved as step 2.\n"
  )
  (line,) = runs.metrics(workdir)
  assert (line["step"], line["update/skipped"], line["sft/loss"]) == (2, 1, None)
  settings = config(chats, **changes)
  state, metadata = restored(settings, workdir)
  assert (int(state.policy.updates), metadata["step"], metadata["nonfinite"]) == (0, 2, 2)
  before = weights.load(path, state.policy.model.config, sft.open_sources(settings).mesh)
  assert_close(state.policy.model, before)
  assert all(not np.any(x) for x in jax.tree.leaves(state.policy.opt_state))
  # The count goes on where it was.
  code, _, err = run_main(f"--workdir={workdir}", **fields | {"log.every": 1})
  assert code == 1 and err.startswith("rlver_jax: 3 updates in a row") and "step 3.\n" in err


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own(chats, tmp_path):
  program = ["-m", "rlver_jax.main", "--config=configs/sft.py"]
  flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
  command = functools.partial(subprocesses.finished, *program, *flags)

  broken = command(f"--workdir={tmp_path}/a", "--config.data.path=/none.jsonl")
  assert (broken.returncode, broken.stdout) == (2, "")
  assert broken.stderr.startswith("rlver_jax: /none.jsonl") and broken.stderr.count("\n") == 1
  fine = command(f"--workdir={tmp_path}/b", f"--config.data.path={chats}")
  assert (fine.returncode, fine.stderr) == (0, "")
  assert "step 6/6" in fine.stdout and "loss" in fine.stdout.splitlines()[-2]
