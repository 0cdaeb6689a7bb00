"""The task `retention`: the harness's scores over our engine, before and after, and going on."""

import importlib.resources
import json
import random
import shutil

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import harness_tasks
import runs
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from configs import eval as eval_config
from rlver_jax import tokenizer
from rlver_jax.errors import UserError
from rlver_jax.evaluation import harness, retention
from rlver_jax.interrupt import Interrupted
from rlver_jax.sampling.sampler import Sampling

ASSETS = importlib.resources.files("rlver_jax") / "assets"
LENGTH = 224  # shorter than the long texts, which take several windows
SMALL = {
  "harness.tasks": ",".join(harness_tasks.TASKS), "policy.path": "tiny-policy",
  "policy.dtype": "float32", "cpu_devices": 1, "mesh.data": 1, "mesh.fsdp": -1,
  "sampling.slots": 3, "sampling.cache_length": LENGTH, "sampling.decode_steps": 4,
  "sampling.smallest_window": 256, "sampling.extend_buckets": (16, 64), "compilation_cache": "",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With two tasks more, one without its data and one that runs what it is answered."""
  folder = harness_tasks.write(tmp_path_factory.mktemp("harness") / "tasks")
  body = (folder / "local_answer.yaml").read_text("utf-8")
  texts = {"broken": body.replace("questions.jsonl", "nothing.jsonl"), "unsafe": body}
  for name, text in texts.items():
    more = "unsafe_code: true\n" if name == "unsafe" else ""
    text = text.replace("task: local_answer", f"task: {name}")
    (folder / f"{name}.yaml").write_text(text + more, "utf-8")
  return folder


def config(folder, **changes):
  made = eval_config.get_config("retention")
  made.update_from_flattened_dict(SMALL | {"harness.folder": str(folder)} | changes)
  return made


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("retention")
  return workdir, *runs.evaluate(retention, config(folder), workdir)


def read(workdir, name):
  return json.loads((workdir / f"{name}.json").read_text("utf-8"))


@pytest.mark.slow
def test_scores_are_those_of_the_harness_own_backend(finished, folder):
  """PyTorch on the same weights: the same answers, likelihoods to the fourth digit."""
  pytest.importorskip("torch")
  pytest.importorskip("accelerate")
  from lm_eval.models.huggingface import HFLM

  path = str(ASSETS / "tiny-policy")
  theirs = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=1, max_length=LENGTH)
  found = simple_evaluate(
    theirs, tasks=list(harness_tasks.TASKS), task_manager=TaskManager(include_path=str(folder)),
    apply_chat_template=True, bootstrap_iters=0,
  )  # fmt: skip
  theirs, ours = retention.told(found), read(finished[0], "after")
  assert theirs["questions"] == ours["questions"]
  for task, values in theirs["results"].items():
    assert values["questions"] == len(harness_tasks.QUESTIONS)
    assert values["metrics"].keys() == ours["results"][task]["metrics"].keys()
    for metric, value in values["metrics"].items():
      np.testing.assert_allclose(ours["results"][task]["metrics"][metric], value, rtol=1e-4)
  assert 0 < ours["results"]["local_choice"]["metrics"]["acc,none"] < 1


@pytest.mark.slow
def test_the_table_has_a_row_for_each_metric(finished):
  workdir, summary, text = finished
  assert set(summary) == {"after"} and set(summary["after"]) == set(harness_tasks.TASKS)
  assert "local_choice" in text and "word_perplexity" in text and "difference" not in text
  rows = (workdir / "table.csv").read_text("utf-8").splitlines()
  assert rows[0] == "task,metric,questions,after" and len(rows) == 6


@pytest.mark.slow
def test_a_finished_one_is_not_measured_again(finished, folder, monkeypatch):
  monkeypatch.setattr(retention, "_measure", None)
  assert runs.evaluate(retention, config(folder), finished[0])[1:] == finished[1:][1:]


@pytest.mark.slow
def test_an_interrupted_one_goes_on_with_what_is_not_answered(finished, folder, tmp_path):
  """Fourteen likelihoods, three at a time, of which the first two rounds are kept."""
  settings = config(folder, **{"harness.tasks": "local_choice"})
  with pytest.raises(Interrupted):
    runs.evaluate(retention, settings, tmp_path, runs.Quiet(rounds=2))
  assert not (tmp_path / "after.json").exists()
  rest = runs.Quiet(rounds=99)
  runs.evaluate(retention, settings, tmp_path, rest)
  assert 99 - rest.rounds == 2
  kept = read(finished[0], "after")["questions"]["local_choice"]
  assert read(tmp_path, "after")["questions"]["local_choice"] == kept


@pytest.mark.slow
def test_a_run_is_measured_before_and_after(folder, tmp_path):
  settings = runs.config(**{"steps": 1, "optimizer.learning_rate": 3e-2})
  runs.play(settings, tmp_path / "run")
  changes = {"policy.path": str(tmp_path / "run"), "harness.tasks": "local_choice,local_text"}
  summary, text = runs.evaluate(retention, config(folder, **changes), tmp_path / "out")
  assert list(summary) == ["after", "before"] or list(summary) == ["before", "after"]
  before, after = (read(tmp_path / "out", name) for name in ("before", "after"))
  perplexity = [
    x["results"]["local_text"]["metrics"]["bits_per_byte,none"] for x in (before, after)
  ]
  assert perplexity[0] != perplexity[1]
  asked = [x["questions"]["local_choice"]["acc,none"] for x in (before, after)]
  mean = np.mean([asked[1][key] - asked[0][key] for key in asked[0]])
  assert "difference" in text and f"{mean:+.4f}" in text
  start = {"policy.path": "tiny", "harness.tasks": "local_choice,local_text"}
  runs.evaluate(retention, config(folder, **start), tmp_path / "start")
  assert read(tmp_path / "start", "after") == before


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"harness.tasks": "local_choice,nothing"}, "harness.tasks names 'nothing', expected tasks"),
    ({"harness.tasks": ""}, "harness.tasks names '', expected tasks that lm-eval knows"),
    ({"harness.tasks": "broken"}, "harness.tasks names 'broken', which lm-eval cannot load"),
    ({"harness.tasks": "unsafe"}, "harness.tasks names 'unsafe', which runs what the model writes"),
    ({"harness.folder": "/nowhere/at/all"}, "harness.folder is '/nowhere/at/all', expected a fold"),
    ({"policy.step": 3}, "policy.step is 3, expected 0 where policy.path"),
    ({"sampling.cache_length": 10**6}, "sampling.cache_length is 1000000, expected at most the"),
    (
      {"sampling.cache_length": 20},
      "sampling.cache_length is 20, expected more than the 24 tokens",
    ),
  ],
)
def test_what_cannot_be_measured_is_told(folder, tmp_path, changes, found):
  tasks = {"harness.tasks": "local_answer"}
  with pytest.raises(UserError, match="^" + found):
    runs.evaluate(retention, config(folder, **tasks | changes), tmp_path)


@pytest.mark.slow
def test_a_damaged_result_is_named(finished, folder, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "copy")
  (workdir / "after.json").write_text("{", "utf-8")
  with pytest.raises(UserError, match=r"after\.json cannot be read, expected what this evaluation"):
    runs.evaluate(retention, config(folder), workdir)


@pytest.fixture(scope="module")
def model(folder):
  settings = config(folder)
  sources = retention.open_sources(settings)
  weights = retention._weights(settings, sources, None, "after")
  return harness.HarnessModel(
    lambda sampling: retention._engine(settings, sources, weights, sampling),
    tokenizer.read_files(sources.opened.directory),
    sources.opened.tokenizer.chat.stop_ids,
    16,
    lambda done, total: None,
  )


def generate(model, *asked):
  requests = [Instance("generate_until", {}, arguments, 0) for arguments in asked]
  return model.generate_until(requests)


def test_answers_end_before_a_stop_string_and_within_the_budget(model, monkeypatch):
  drawn, text_of = [], model._text  # ids, not their texts, which encoded again may be more
  monkeypatch.setattr(model, "_text", lambda ids: (drawn.append(list(ids)), text_of(ids))[1])
  long = {"until": [], "max_gen_toks": 24, "do_sample": False}
  (whole,) = generate(model, ("The bike is", long))
  ids = drawn[-1]
  assert 3 < len(ids) <= 24 and whole == text_of(ids) and len(whole) > 8
  stop = whole[4:6]
  short, same, other = generate(
    model, ("The bike is", long | {"until": stop}), ("The bike is", long),
    ("The bike is", long | {"max_gen_toks": 3}),
  )  # fmt: skip
  assert short == whole[: whole.index(stop)] and same == whole
  assert other == text_of(ids[:3]) and whole.startswith(other) and len(other) < len(whole)


def test_a_task_may_want_answers_that_are_drawn(model):
  drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
  first, second = generate(model, ("The bike is", drawn), ("The bike is", drawn))
  assert first != second
  assert [first, second] == generate(model, ("The bike is", drawn), ("The bike is", drawn))
  assert harness.sampling_of({"temperature": 0.7, "top_p": 0.9}) == Sampling(0.7, 0, 0.9)
  assert harness.sampling_of({"do_sample": False, "temperature": 0.7}) == Sampling(0.0)


def test_likelihoods_come_in_the_order_of_the_requests_and_add_up(model):
  asked = [(f"Number {n} is", f" {word}") for n in range(4) for word in ("red", "green and blue")]
  random.Random(0).shuffle(asked)
  found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
  for pair, (logprob, _) in zip(asked, found, strict=True):
    ((alone, _),) = model.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    np.testing.assert_allclose(logprob, alone, atol=1e-4)
  text = "The red ladder is gone."
  (whole,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
  ((again, _),) = model.loglikelihood([Instance("loglikelihood", {}, ("", text), 0)])
  np.testing.assert_allclose(whole, again, atol=1e-4)
