"""What `chat.py` does: the other side of a person, built from a run or a preset, and the dialogues.

A run's own settings hold where there is a run. A model alone plays by the preset for its size: one
with a small vocabulary in the embedded world, any other in the scenarios of the package.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from configs import common
from rlver_jax import build, cli, json_lines, partitioning, run_policy, terminal, trainables
from rlver_jax import sources as sources_lib
from rlver_jax import workdir as workdir_lib
from rlver_jax.dialogue import records, rollout
from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.dialogue import HELD_OUT_STEP, Dialogue, Rules, Stage
from rlver_jax.dialogue.levels import VANILLA
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.errors import UserError
from rlver_jax.models import source as model_source
from rlver_jax.models.source import ModelSource
from rlver_jax.sources import Sources
from rlver_jax.terminal import Left

SIMULATOR = "tiny-simulator"  # by default
EMBEDDED, PACKAGE = ("tiny-held-out", "tiny"), ("en", "zh", "adversarial")  # scenario files
_SMALL_VOCABULARY = 4096
_DECODE_STEPS = 8  # tokens that appear at a time
_MANY_TURNS = 10**6
# Who a person is without a scenario.
YOU = Scenario("chat", "", "", "", (), "")


@dataclasses.dataclass(frozen=True)
class Choice:
  """What the command asks for; None where it does not say."""

  path: str | None
  step: int | None
  simulator: str | None
  scenario: str | None
  mode: str | None
  seed: int


def with_policy(choice: Choice, out: pathlib.Path | None) -> None:
  """The person talks to a policy; raises UserError for what cannot be opened."""
  run = pathlib.Path(choice.path).expanduser() if run_policy.is_run(choice.path) else None
  if run is None and choice.step is not None:
    raise UserError(
      f"--step is {choice.step}, expected none as --path, '{choice.path}', is no folder of a run."
    )
  config, files = _settings(run, choice.path, "--path")
  config.seed = choice.seed
  if choice.mode:
    config.dialogue.mode = choice.mode
  scenario = _scenarios(files, choice.scenario)[0] if choice.scenario else YOU
  templates = sources_lib.open_templates(config, [scenario], [VANILLA.name])
  opened = run_policy.open_source(run) if run else _open(choice.path, "--path", config)
  sources_lib.check_policy_room(config, opened, templates)
  mesh = _mesh(config)
  cli.show("Loading the policy ...")
  if run:
    model = run_policy.load(run, opened, run_policy.find(run, choice.step))
  else:
    model = model_source.load_model(opened, mesh, choice.seed + trainables.POLICY_WEIGHTS)
  model = partitioning.for_sampling(mesh, model, config.policy.dtype)
  sources = Sources(mesh, [scenario], (), templates, opened, None, None, None)
  policy = build.build_policy(config, sources, model)
  think = config.dialogue.mode == "think"
  printer = terminal.ReplyPrinter(policy, opened.tokenizer, think)
  person = terminal.PersonAsUser(printer)
  if scenario is not YOU:
    cli.show(f"You are:\n{scenario.persona}\n{scenario.background}\n{scenario.task}")
  cli.show(f"Write what you like. {terminal.COMMANDS}")

  def play(dialogue: Dialogue) -> bool:
    _play(policy, person, dialogue, config, mesh, printer.look)
    if person.left is None:
      cli.show("There is no room for more.")
      return _another()
    return person.left.again

  rules = dataclasses.replace(build.build_rules(config), max_turns=_MANY_TURNS)
  own = dataclasses.replace(scenario, first_message="")  # the person speaks for the user
  _dialogues(itertools.repeat(own), rules, play, out)


def with_simulator(choice: Choice, out: pathlib.Path | None) -> None:
  """The person helps a simulated user; raises UserError for what cannot be opened."""
  run = pathlib.Path(choice.path).expanduser() if choice.path else None
  if run and not run_policy.is_run(choice.path):
    raise UserError(
      f"--path is {choice.path} with --as=helper, expected the folder of a run, or --simulator."
    )
  if run and not choice.simulator and (task := workdir_lib.read_config(run).task) != "rl":
    raise UserError(
      f"--path is {choice.path} with --as=helper, which holds a run of task '{task}' and no "
      "simulated user, expected one of task 'rl', or --simulator."
    )
  simulator = choice.simulator or ("" if run else SIMULATOR)
  scripted = simulator == "scripted"
  config, files = _settings(run, "" if scripted else simulator, "--simulator")
  if simulator:
    config.simulator.kind = "scripted" if scripted else "language_model"
    config.simulator.path = simulator
  if scripted and not run:
    config.simulator.templates, files = "", (*PACKAGE, *EMBEDDED)
  config.seed = choice.seed
  scenarios = _scenarios(files, choice.scenario)
  templates = sources_lib.open_templates(config, scenarios, [VANILLA.name])
  opened = sources_lib.open_simulator(config, scenarios, templates)
  sources_lib.check_server(config)
  mesh = _mesh(config)
  sources = Sources(mesh, scenarios, (), templates, None, None, None, opened)
  if opened:
    cli.show("Loading the simulated user ...")
  user, person = build.build_simulator(config, sources), terminal.PersonAsHelper()
  cli.show(f"Reply to the user. {terminal.COMMANDS}")

  def play(dialogue: Dialogue) -> bool:
    try:
      _play(person, user, dialogue, config, mesh)
    except Left as left:
      cli.show(f"Left; emotion {dialogue.emotion}.")
      return left.again
    terminal.show_end(dialogue)
    return _another()

  try:
    _dialogues(itertools.cycle(scenarios), build.build_rules(config), play, out)
  finally:
    user.close()


def _settings(run: pathlib.Path | None, model: str, flag: str) -> tuple[ConfigDict, Sequence[str]]:
  """The configuration of one dialogue at a time, and the scenario files of its world.

  model: the value of `flag`; "": one of the embedded world.
  """
  config = workdir_lib.read_config(run) if run else None
  if config is not None and config.task == "rl":
    files = [path for path in (config.evaluation.path, config.data.path) if path]
  else:
    config, files = common.base("tiny"), EMBEDDED
    if run or model:
      opened = run_policy.open_source(run) if run else _open(model, flag, config)
      if opened.config.vocab_size > _SMALL_VOCABULARY:
        config, files = common.base("qwen2.5-0.5b"), PACKAGE
        if jax.default_backend() == "cpu":
          config.policy.dtype = config.simulator.dtype = "float32"
  config.cpu_devices = 1
  config.mesh.update(data=1, fsdp=-1, tensor=1)
  config.sampling.update(slots=1, decode_steps=_DECODE_STEPS)
  cli.configure_jax(config)
  return config, files


def _open(model: str, flag: str, config: ConfigDict) -> ModelSource:
  dtype = config.policy.dtype
  return model_source.open_source(model, flag, dtype=dtype, param_dtype=dtype)


def _mesh(config: ConfigDict):
  return partitioning.make_mesh(**config.mesh)


def _scenarios(files: Sequence[str], wanted: str | None) -> list[Scenario]:
  """The scenarios of the first file, or the one with this id in any of them."""
  every = [scenario_lib.read(scenario_lib.resolve(path))[0] for path in files]
  if wanted is None:
    return every[0]
  found = [s for scenarios in every for s in scenarios if s.id == wanted]
  if not found:
    raise UserError(
      f"--scenario is {wanted}, expected the id of a scenario of {' or '.join(files)}, such as "
      f"{every[0][0].id}."
    )
  return found[:1]


def _dialogues(
  scenarios: Iterator[Scenario],
  rules: Rules,
  play: Callable[[Dialogue], bool],
  out: pathlib.Path | None,
) -> None:
  """Plays dialogues while `play` says that another is wanted, and keeps those that have ended."""
  for index, scenario in enumerate(scenarios):
    dialogue = Dialogue(index, index, scenario, rules)
    try:
      again = play(dialogue)
    except Left as left:  # before a word was said
      again = left.again
    if out is not None and dialogue.stage is Stage.DONE:
      try:
        json_lines.append(out, records.record(dialogue))
      except OSError as error:
        raise UserError(
          f"--out is {out}, which cannot be written ({error.strerror}), expected a file to write."
        ) from error
    if not again:
      return
    cli.show("")


def _play(policy, simulator, dialogue, config, mesh, on_round=lambda: None) -> None:
  slots = build.slots(config, mesh)
  rollout.play(policy, simulator, [dialogue], slots=slots, step=HELD_OUT_STEP, on_round=on_round)


def _another() -> bool:
  """Whether the person wants another dialogue after one that has ended by itself."""
  while True:
    try:
      terminal.ask(f"{terminal.NEW} or {terminal.QUIT}> ")
    except Left as left:
      return left.again
