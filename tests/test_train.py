"""The loop as a whole: what a run leaves, that it can be stopped anywhere, and how it diverges."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from rlver_jax import errors, flat_config, trainables
from rlver_jax.build import build_environment
from rlver_jax.checkpoint import Checkpoints
from rlver_jax.dialogue.simulators.appraisal import repeats
from rlver_jax.errors import UserError
from rlver_jax.interrupt import Interrupted
from rlver_jax.models import source, weights
from rlver_jax.sources import open_sources

# Of every run, whatever its simulator.
METRICS = {
  "compile": "from_cache programs seconds",
  "dialogue": "end_failed end_failure end_goodbye end_length end_success end_turns turns_mean"
  " distinct_1 distinct_2 repeated_rate said_again_rate",
  "environment": "vanilla_accepted vanilla_dialogues vanilla_final_mean vanilla_spread",
  "emotion": "failure_rate final_max final_mean final_min success_rate turn_01 turn_02",
  "format": "failure_rate truncated_rate",
  "advantage": "largest mean",
  "reward": "groups_replaced groups_without_signal mean std",
  "rows": "length longest trained_tokens",
  "sampler": "policy_drawn policy_extended policy_prefilled policy_seconds"
  " policy_tokens_per_second",
  "seconds": "prepare rollout step update write",
  "simulator": "parse_failure_rate retry_rate",
  "strategies": "advice balance distinct feeling guide invite matched motives praise side",
  "tokens": "per_second policy reply_mean simulator",
  "update": "clip_fraction entropy gradient_norm kl_sampler learning_rate loss policy_loss"
  " ratio skipped tokens_per_second",
}
NAMES = {f"{group}/{name}" for group, names in METRICS.items() for name in names.split()} | {"step"}
KL_NAMES = {"kl/coefficient", "kl/mean", "update/kl_reference"}
SIMULATOR_NAMES = {
  f"sampler/{n}" for n in METRICS["sampler"].replace("policy", "simulator").split()
}


def dialogues(workdir, step):
  with open(workdir / "dialogues" / f"step_{step:06d}.jsonl", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def assert_same_run(workdir, other):
  """Every reproducible metric is equal within 1e-6, and every dialogue to the byte."""
  pairs = zip(runs.metrics(workdir), runs.metrics(other), strict=True)
  for a, b in (map(runs.reproducible, pair) for pair in pairs):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), (a["step"], name)
  assert runs.dialogue_files(workdir) == runs.dialogue_files(other)


@pytest.fixture(scope="module")
def settings():
  return runs.config(**{"checkpoint.every": 2, "checkpoint.keep": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings):
  """The folder of a finished run of four steps, and its summary."""
  workdir = tmp_path_factory.mktemp("run")
  return workdir, runs.play(settings, workdir)


def test_every_step_has_every_metric(run):
  records = runs.metrics(run[0])
  assert [record["step"] for record in records] == [1, 2, 3, 4]
  for record in records:
    # The time of a checkpoint is known, and counted, one step later.
    assert set(record) - {"seconds/checkpoint"} == NAMES
    assert all(isinstance(value, int | float) for value in record.values())


def test_metrics_are_those_of_the_dialogues_that_were_kept(run):
  workdir, _ = run
  for record in runs.metrics(workdir):
    kept = dialogues(workdir, record["step"])
    assert len(kept) == 4
    assert [d["group"] for d in kept] == [0, 0, 1, 1]
    assert kept[0]["id"] == kept[1]["id"] != kept[2]["id"] == kept[3]["id"]
    final = [d["emo_point"] for d in kept]
    rewards = np.maximum(final, 0) / 100
    assert record["emotion/final_mean"] == pytest.approx(np.mean(final))
    assert (record["emotion/final_min"], record["emotion/final_max"]) == (min(final), max(final))
    assert record["reward/mean"] == pytest.approx(rewards.mean())
    assert record["reward/std"] == pytest.approx(rewards.std())
    flat = [np.ptp(rewards[i : i + 2]) == 0 for i in (0, 2)]
    assert record["reward/groups_without_signal"] == np.mean(flat)
    for turn in (1, 2):
      after = [d["history"][2 * turn]["emotion-point"] for d in kept]
      assert record[f"emotion/turn_{turn:02d}"] == pytest.approx(np.mean(after))
    assert record["tokens/policy"] == sum(d["tokens"]["policy"] for d in kept)
    assert record["rows/trained_tokens"] == record["tokens/policy"]
    assert record["sampler/policy_drawn"] == record["tokens/policy"]


def test_the_first_update_starts_from_the_sampled_policy_and_follows_the_schedule(run):
  records = runs.metrics(run[0])
  np.testing.assert_allclose(
    [record["update/learning_rate"] for record in records], [0.005, 0.01, 0.01, 0.01], rtol=1e-6
  )
  for record in records:
    assert record["update/ratio"] == pytest.approx(1, abs=1e-4)
    assert record["update/kl_sampler"] == pytest.approx(0, abs=1e-4)
    assert record["update/clip_fraction"] == record["update/skipped"] == 0


def test_no_program_is_compiled_after_the_second_step(run):
  programs = [r["compile/programs"] + r["compile/from_cache"] for r in runs.metrics(run[0])]
  assert programs[1] > 0 and programs[1:] == programs[1:2] * 3


def test_checkpoints_are_kept_as_asked_and_hold_what_was_trained(run, settings):
  workdir, _ = run
  kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
  rewards = {r["step"]: r["reward/mean"] for r in runs.metrics(workdir)}
  best = max((2, 4), key=lambda step: (rewards[step], step))
  assert kept == {4, best}
  state, metadata = runs.restored(workdir, settings)
  assert int(state.policy.updates) == 4
  assert metadata == {"step": 4, "nonfinite": 0, "config": flat_config.digest(settings)}
  sources = open_sources(settings)
  first = source.load_model(sources.policy, sources.mesh, settings.seed + trainables.POLICY_WEIGHTS)
  changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.policy.model, first)
  largest = max(jax.tree.leaves(changes))
  # Adam moves a parameter by at most about the rate an update.
  assert 0.005 < largest < 4 * 0.011


def test_the_summary_is_written_and_returned(run):
  workdir, summary = run
  assert json.loads((workdir / "summary.json").read_text()) == summary
  records = runs.metrics(workdir)
  assert summary["steps"] == 4
  assert summary["seconds"] == pytest.approx(sum(r["seconds/step"] for r in records))
  assert summary["checkpoints"] == str(workdir / "checkpoints")


def test_a_finished_run_is_left_alone_and_gets_the_summary_that_a_kill_took(run, settings, capsys):
  workdir, summary = run
  (workdir / "summary.json").unlink()
  assert runs.play(settings, workdir) == summary
  assert "has all its 4 steps" in capsys.readouterr().out
  assert json.loads((workdir / "summary.json").read_text()) == summary


def test_a_run_that_is_stopped_and_resumed_is_the_same_run(run, settings, tmp_path, capsys):
  check_resumed(run[0], settings, tmp_path, stops=(5, 7))
  assert "Going on after step" in capsys.readouterr().out


def check_resumed(finished, settings, workdir, stops):
  """Stops the run at each of these of its questions whether it shall, then lets it finish."""
  last = 0
  for n in stops:
    with pytest.raises(Interrupted) as stop:
      runs.play(settings, workdir, lambda n=n: runs.StopAt(n))
    assert stop.value.signum == signal.SIGTERM
    saved = Checkpoints(str(workdir / "checkpoints"), keep=None).latest()
    done = runs.metrics(workdir)
    assert saved == (done[-1]["step"] if done else 0) >= last
    last = saved
  assert runs.play(settings, workdir)["steps"] == settings.steps
  assert_same_run(workdir, finished)
  states = [runs.restored(folder, settings)[0] for folder in (workdir, finished)]
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states)))


@pytest.mark.slow
def test_a_curriculum_that_is_stopped_and_resumed_moves_as_if_it_never_was(tmp_path):
  """A policy of random weights pleases nobody, so the level falls after each window."""
  changes = {"level": "curriculum", "curriculum.start": "challenging", "curriculum.window": 2}
  changes |= {"curriculum.lower_at": 60.0}
  settings = runs.config(**{f"environment.{name}": value for name, value in changes.items()})
  whole = tmp_path / "whole"
  runs.play(settings, whole)
  at = [{d["level"] for d in dialogues(whole, step)} for step in range(1, 5)]
  assert at == [{"challenging"}] * 2 + [{"vanilla"}] * 2
  starts = [dialogues(whole, step)[0]["history"][0]["emotion-point"] for step in range(1, 5)]
  assert starts == [20, 20, 30, 30]
  records = runs.metrics(whole)
  for record, (level,) in zip(records, at, strict=True):
    assert record[f"environment/{level}_dialogues"] == 4
    assert record[f"environment/{level}_final_mean"] == record["emotion/final_mean"]
  _, metadata = runs.restored(whole, settings)
  assert metadata["environment"] == {"level": "easy", "recent": []}
  check_resumed(whole, settings, tmp_path / "stopped", stops=(5, 7))


@pytest.mark.slow
def test_a_mixture_gives_each_group_a_level(tmp_path):
  settings = runs.config(**{"environment.level": "mixture"})
  runs.play(settings, tmp_path)
  drawn = build_environment(settings)
  seen = set()
  for record in runs.metrics(tmp_path):
    kept = dialogues(tmp_path, record["step"])
    levels = [level.name for level in drawn.levels(record["step"] - 1, 2) for _ in range(2)]
    assert [d["level"] for d in kept] == levels
    seen.update(levels)
    for level in set(levels):
      final = [d["emo_point"] for d in kept if d["level"] == level]
      assert record[f"environment/{level}_dialogues"] == len(final)
      assert record[f"environment/{level}_final_mean"] == pytest.approx(np.mean(final))
  assert len(seen) > 1


@pytest.mark.slow
def test_a_run_goes_on_after_a_full_disk_a_stop_in_its_first_step_and_a_kill(
  run, settings, tmp_path
):
  # The file that cannot be written is named.
  runs.claim(str(tmp_path), settings)
  (tmp_path / "dialogues").write_text("")
  with pytest.raises(UserError) as refusal:
    runs.play(settings, tmp_path)
  assert str(refusal.value).startswith(f"workdir {tmp_path} cannot be written (File exists)")
  (tmp_path / "dialogues").unlink()
  for n in (2, 6):  # questions whether it shall stop: the first is in the first step
    with pytest.raises(Interrupted):
      runs.play(settings, tmp_path, lambda n=n: runs.StopAt(n))
    saved = Checkpoints(str(tmp_path / "checkpoints"), keep=None).latest()
    assert saved == 0 if n == 2 else saved > 0
  # What a kill leaves: files of steps whose checkpoint is not there.
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write(f'{{"step": {saved + 1}, "reward/mean": 7.0}}\n{{"step": {saved + 2}, "rew')
  (tmp_path / "dialogues" / f"step_{saved + 1:06d}.jsonl").write_text("{}\n")
  runs.play(settings, tmp_path)
  assert_same_run(tmp_path, run[0])
  states = [runs.restored(folder, settings)[0] for folder in (tmp_path, run[0])]
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states)))


@pytest.mark.slow
def test_more_steps_go_on_from_the_last(run, settings, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / "run")
  runs.play(runs.config(**flat_config.flatten(settings) | {"steps": 5}), workdir)
  ours, theirs = ([runs.reproducible(r) for r in runs.metrics(w)] for w in (workdir, run[0]))
  assert [record["step"] for record in ours] == [1, 2, 3, 4, 5]
  assert ours[:4] == theirs


@pytest.mark.slow
def test_few_slots_give_the_same_dialogues(run, settings, tmp_path):
  fewer = {"sampling.slots": 3, "sampling.decode_steps": 5}
  runs.play(runs.config(**flat_config.flatten(settings) | fewer), tmp_path)
  assert runs.dialogue_files(tmp_path) == runs.dialogue_files(run[0])


@pytest.fixture(scope="module")
def model_run(tmp_path_factory):
  """A run with a frozen model as user and a KL term; the fields of the configuration it read."""
  folder = tmp_path_factory.mktemp("model_run")
  moody = runs.save_model(folder / "moody", make_moody)
  changes = {"algorithm.kl_coef": 0.1, "simulator.path": str(moody)}
  changes |= {"evaluation.path": str(runs.held_out(folder, 3)), "evaluation.scenarios": 2}
  settings = runs.config(**runs.LANGUAGE_MODEL | changes)
  return folder / "run", settings, runs.fields_read(settings, folder / "run", runs.play)


@pytest.fixture(scope="module")
def ppo_run(tmp_path_factory):
  """PPO with adapters of the policy, a critic above shared layers, a KL in the reward that adapts,
  minibatches, and rewards by turn; the fields of the configuration it read."""
  workdir = tmp_path_factory.mktemp("ppo_run") / "run"
  changes = {
    "algorithm.advantage": "gae",
    "algorithm.whiten": True,
    "algorithm.lam": 0.95,
    "algorithm.kl_coef": 0.1,
    "algorithm.kl_in": "reward",
    "algorithm.kl_estimator": "k1",
    "algorithm.kl_target": 0.01,
    "algorithm.kl_horizon": 16,
    "algorithm.minibatches": 2,
    "algorithm.importance_cap": 2.0,
    "critic.shared_layers": 1,
    "critic.learning_rate": 0.01,
    "critic.warmup_steps": 1,
    "lora.policy_rank": 4,
    "reward.kind": "both",
    "dialogue.group_size": 1,
    "dialogue.scenarios_per_step": 4,
    "checkpoint.every": 2,
  }
  settings = runs.config(**changes)
  return workdir, settings, runs.fields_read(settings, workdir, runs.play)


@pytest.mark.slow
def test_ppo_trains_policy_and_critic_and_says_how(ppo_run):
  workdir, settings, _ = ppo_run
  first, *later = records = runs.metrics(workdir)
  assert "update/loss" not in first  # the critic warms up
  for record in records:
    assert record["critic/skipped"] == 0 and record["critic/loss"] > 0
    assert record["mismatch/kl"] == pytest.approx(0, abs=1e-5)
    kept = dialogues(workdir, record["step"])
    assert [d["group"] for d in kept] == [0, 1, 2, 3]
    final = np.array([d["emo_point"] for d in kept])
    earned = np.maximum(final, 0) / 100 + (final - 30) / 100  # final, and all changes together
    assert record["reward/mean"] == pytest.approx(earned.mean())
  for record in later:
    assert record["update/skipped"] == 0 and record["update/gradient_norm"] > 0
  # The coefficient waits for the policy; then the KL is below its target, and it falls.
  coefficients = [record["kl/coefficient"] for record in records[:3]]
  assert coefficients == pytest.approx([0.1, 0.1, 0.1 * (1 - 0.2 * 4 / 16)])
  assert "update/learning_rate" not in first and first["critic/learning_rate"] > 0
  state, _ = runs.restored(workdir, settings)
  assert int(state.critic.updates) == 8 and int(state.policy.updates) == 6
  assert set(state.policy.model) == set(settings.lora.targets)  # adapters, not the whole model
  assert first["critic/value_mean"] == 0 != records[-1]["critic/value_mean"]


@pytest.mark.slow
def test_a_ppo_run_that_is_stopped_and_resumed_is_the_same_run(ppo_run, tmp_path):
  workdir, settings, _ = ppo_run
  check_resumed(workdir, settings, tmp_path, stops=(4,))


@pytest.mark.slow
def test_no_program_is_compiled_after_the_second_step_of_ppo(ppo_run):
  programs = [r["compile/programs"] + r["compile/from_cache"] for r in runs.metrics(ppo_run[0])]
  assert len(programs) == 4 and programs[2:] == programs[1:2] * 2


def make_moody(model):
  """Sharpens attention, so that a few words of a reply decide what random weights answer."""
  model.layers.q[...] *= 10


@pytest.mark.slow
def test_a_model_as_user_answers_and_is_counted(model_run):
  workdir, *_ = model_run
  for record in runs.metrics(workdir):
    assert set(record) - {"seconds/checkpoint"} == NAMES | SIMULATOR_NAMES | KL_NAMES
    kept = dialogues(workdir, record["step"])
    assert record["tokens/simulator"] == sum(d["tokens"]["simulator"] for d in kept)
    assert record["sampler/simulator_drawn"] == record["tokens/simulator"] > 0
    assert record["simulator/parse_failure_rate"] == 0  # `choice` always gives a change


@pytest.mark.slow
def test_replies_to_a_model_are_rewarded_differently(model_run):
  records = runs.metrics(model_run[0])
  assert any(record["reward/groups_without_signal"] < 1 for record in records)
  assert max(record["update/gradient_norm"] for record in records) > 0.01


@pytest.mark.slow
def test_held_out_dialogues_are_judged_by_the_model_and_by_the_scripted_user(model_run):
  workdir, *_ = model_run
  numbers = json.loads((workdir / "evaluation.json").read_text())["users"]
  openings = {}
  for user, suffix in (("language_model", ""), ("scripted", "_scripted")):
    for when in ("before", "after"):
      with open(workdir / "evaluation" / f"{when}{suffix}.jsonl", encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
      assert [d["id"] for d in kept] == ["held-en-listen-01", "held-en-listen-02"]
      assert numbers[user][when]["final_emotion"] == np.mean([d["emo_point"] for d in kept])
      assert (kept[0]["tokens"]["simulator"] > 0) == (user == "language_model")
      openings[user, when] = [d["history"][0]["content"] for d in kept]
    assert openings[user, "before"] == openings[user, "after"]


@pytest.mark.slow
def test_a_run_with_two_models_that_is_stopped_and_resumed_is_the_same_run(model_run, tmp_path):
  """First while held-out dialogues are judged by the second user, then in the second step."""
  workdir, settings, _ = model_run
  check_resumed(workdir, settings, tmp_path, stops=(6, 13))
  for file in (workdir / "evaluation").iterdir():
    assert (tmp_path / "evaluation" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_the_kl_to_the_reference_starts_at_zero_and_grows(model_run):
  first, *later = [record["update/kl_reference"] for record in runs.metrics(model_run[0])]
  assert first == pytest.approx(0, abs=1e-6)
  assert all(value > 1e-6 for value in later)


@pytest.mark.slow
def test_no_program_is_compiled_after_the_second_step_with_two_models(model_run):
  programs = [r["compile/programs"] + r["compile/from_cache"] for r in runs.metrics(model_run[0])]
  assert len(programs) == 4 and programs[1:] == programs[1:2] * 3


@pytest.mark.slow
def test_every_field_of_the_configuration_is_read_by_a_run(model_run, ppo_run):
  _, settings, read = model_run
  fields = set(flat_config.flatten(settings))
  # In `main`, and by a run with a remote user, which takes the section as a whole.
  elsewhere = {
    "task",
    "cpu_devices",
    "compilation_cache",
    *(f for f in fields if f.startswith("simulator.remote.")),
  }
  assert fields - read - ppo_run[2] == elsewhere


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"algorithm.advantage": "remax", "algorithm.kl_coef": 0.1, "algorithm.kl_in": "reward"},
    {"algorithm.advantage": "reinforce_pp", "reward.kind": "change"},
    {
      "algorithm.advantage": "rloo",
      "algorithm.loss": "gspo",
      "algorithm.dynamic_sampling_rounds": 1,
    },
    {"algorithm.advantage": "gae", "lora.critic_rank": 2, "dialogue.group_size": 2},
  ],
  ids=lambda changes: changes["algorithm.advantage"],
)
def test_the_other_estimators_run(changes, tmp_path):
  settings = runs.config(**changes | {"steps": 2})
  runs.play(settings, tmp_path)
  records = runs.metrics(tmp_path)
  assert [record["update/skipped"] for record in records] == [0, 0]
  for record in records:
    kept = dialogues(tmp_path, record["step"])
    greedy = [d for d in kept if d["greedy"]]
    trained = kept[:4]
    assert len(greedy) == (2 if changes["algorithm.advantage"] == "remax" else 0)
    assert record["rows/trained_tokens"] == sum(d["tokens"]["policy"] for d in trained)
    replaced = record.get("reward/groups_replaced", 0)
    assert len(kept) == 4 + len(greedy) + 2 * replaced
  if "algorithm.dynamic_sampling_rounds" in changes:
    assert sum(record["reward/groups_replaced"] for record in records) > 0


@pytest.mark.slow
def test_thinking_epochs_and_penalties(tmp_path):
  changes = {
    "dialogue.mode": "think",
    "dialogue.malformed_penalty": 0.25,
    "dialogue.repeated_penalty": 0.5,
    "algorithm.epochs": 2,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_fraction": 0.0,
    "steps": 2,
  }
  settings = runs.config(**changes)
  runs.play(settings, tmp_path)
  records = runs.metrics(tmp_path)
  for record in records:
    kept = dialogues(tmp_path, record["step"])
    replies = [[m for m in d["history"] if m["role"] == "assistant"] for d in kept]
    assert all("thinking" in m for said in replies for m in said)
    malformed = [np.mean([not m["well_formed"] for m in said]) for said in replies]
    assert record["format/failure_rate"] == pytest.approx(np.mean(malformed))
    assert record["format/failure_rate"] > 0
    texts = [[m["content"] for m in said] for said in replies]
    again = [np.mean([repeats(t, said[:i], "en") for i, t in enumerate(said)]) for said in texts]
    rewards = [
      max(d["emo_point"], 0) / 100 - 0.25 * share - 0.5 * more
      for d, share, more in zip(kept, malformed, again, strict=True)
    ]
    assert record["reward/mean"] == pytest.approx(np.mean(rewards))
    # The second pass sees a policy that the first one has changed.
    assert abs(record["update/kl_sampler"]) > 1e-5
  # The cosine over 4 updates, at the last of each step.
  expected = [0.005 * (1 + np.cos(np.pi * n / 4)) for n in (1, 3)]
  np.testing.assert_allclose([r["update/learning_rate"] for r in records], expected, rtol=1e-5)
  assert int(runs.restored(tmp_path, settings)[0].policy.updates) == 4


@pytest.mark.slow
def test_an_appraisal_without_a_change_falls_back_on_the_integers(tmp_path):
  changes = {"simulator.score": "generate", "dialogue.max_turns": 1, "algorithm.kl_coef": 0.1}
  changes["simulator.reparse"] = 1
  runs.play(runs.config(**runs.LANGUAGE_MODEL | changes), tmp_path)
  for record in runs.metrics(tmp_path):
    assert record["simulator/parse_failure_rate"] == 1  # random weights fill in no form
    assert record["simulator/retry_rate"] == 1
    for kept in dialogues(tmp_path, record["step"]):
      planning = kept["history"][-1]["planning"]
      assert planning["parsed"] is False and planning["retries"] == 1
      assert -10 <= planning["change"] <= 10
      assert kept["emo_point"] == 30 + planning["change"]


@pytest.mark.slow
def test_bfloat16_products_over_float32_parameters(tmp_path):
  changes = {"policy.dtype": "bfloat16", "optimizer.moment_dtype": "bfloat16"}
  settings = runs.config(**changes)
  runs.play(settings, tmp_path)
  records = runs.metrics(tmp_path)
  state, _ = runs.restored(tmp_path, settings)
  assert {x.dtype for x in jax.tree.leaves(state.policy.model)} == {jnp.dtype("float32")}
  assert all(r["update/skipped"] == 0 and abs(r["update/kl_sampler"]) < 0.05 for r in records)
  programs = [r["compile/programs"] + r["compile/from_cache"] for r in records]
  assert programs[1:] == programs[1:2] * 3


def poison(model):
  """One parameter that is no number makes every log-probability none."""
  model.norm[...] = model.norm[...].at[0].set(jnp.nan)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(tmp_path):
  path = runs.save_model(tmp_path / "policy", poison)
  settings = runs.config(
    **{"policy.path": str(path), "training.max_nonfinite": 2, "checkpoint.every": 5}
  )
  workdir = tmp_path / "run"
  with pytest.raises(errors.Diverged, match=r"^2 updates in a row .* saved as step 2\.$"):
    runs.play(settings, workdir)
  records = runs.metrics(workdir)
  assert [record["step"] for record in records] == [1, 2]
  assert all(r["update/skipped"] == 1 and r["update/loss"] is None for r in records)
  state, metadata = runs.restored(workdir, settings)
  assert (int(state.policy.updates), metadata["step"], metadata["nonfinite"]) == (0, 2, 2)
  before = weights.load(path, state.policy.model.config, open_sources(settings).mesh)
  same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), state.policy.model, before)
  assert all(jax.tree.leaves(same))
  assert all(not np.any(x) for x in jax.tree.leaves(state.policy.opt_state))
  with pytest.raises(errors.Diverged, match=r"^3 updates in a row .* step 3\.$"):
    runs.play(settings, workdir)  # the count goes on where it was


@pytest.mark.slow
def test_a_rate_that_throws_the_policy_out_of_range_ends_the_run(tmp_path):
  changes = {"steps": 6, "optimizer.learning_rate": 1e38, "training.max_nonfinite": 2}
  with pytest.raises(errors.Diverged):
    runs.play(runs.config(**changes), tmp_path)
  skipped = [record["update/skipped"] for record in runs.metrics(tmp_path)]
  assert skipped[0] == 0 and skipped[-2:] == [1, 1] and sum(skipped) == 2
