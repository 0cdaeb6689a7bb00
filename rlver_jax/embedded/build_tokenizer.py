"""Rebuilds the tokenizer of the models of the embedded world: `python -m
rlver_jax.embedded.build_tokenizer`.

The same kind as the tiny drawn model's (`rlver_jax/assets/build_tokenizer.py`), trained on what is
said in the embedded world, with details that mean nothing: the words of real details, those of
training and those held out alike, are then put together from the same short pieces, and a model
that can repeat the one can repeat the other.
"""

from collections.abc import Iterator

from rlver_jax.assets import build_tokenizer
from rlver_jax.dialogue import templates as templates_lib
from rlver_jax.dialogue.answers import PLAN_FIELDS
from rlver_jax.dialogue.policy import THINK_CLOSE, THINK_OPEN
from rlver_jax.dialogue.simulators.chat import appraisal_text, persona_text, question_text
from rlver_jax.embedded import dialogues
from rlver_jax.embedded.dialogues import Plan
from rlver_jax.embedded.helper import Habits

VOCAB_SIZE = 2048
SEED = 3
DIALOGUES = 1500
PLAN = Plan(
  "train", Habits(0.4, 0.3, repeated=0.0), thinking=1.0, emotions=(5, 95), turns=(1, 10), coined=1.0
)
NO_PLAN = dict.fromkeys(PLAN_FIELDS, "")  # which the prompts of the world do not show
MODELS = ("tiny-policy", "tiny-simulator")


def main() -> None:
  """Trains on dialogues of the world and replaces the files beside the models' configurations."""
  texts = list(world_texts())
  tokenizer = build_tokenizer.train([*texts, *build_tokenizer.ROLE_TEXTS], VOCAB_SIZE)
  for model in MODELS:
    build_tokenizer.save(tokenizer, build_tokenizer.PACKAGE / "assets" / model)
  print(f"{VOCAB_SIZE} ids from {len(texts):,} texts, {sum(map(len, texts)):,} characters")


def world_texts() -> Iterator[str]:
  """What models of the embedded world read and write, as often as it comes in dialogues."""
  own = templates_lib.load("en", "tiny")
  for number in range(DIALOGUES):
    dialogue = dialogues.play(PLAN, number, SEED)
    yield own.render("policy")
    yield own.render("policy_think")
    yield persona_text(own, dialogue.scenario)
    yield dialogue.opening.text
    emotion = dialogue.rules.initial_emotion
    for turn in dialogue.turns:
      yield f"{THINK_OPEN}{turn.reply.thought}{THINK_CLOSE}{turn.reply.text}"
      yield from own.quote("")
      yield question_text(own, "plan", emotion)
      yield appraisal_text(own, turn.plan)
      yield question_text(own, "message", turn.emotion, change=f"{turn.plan.change:+d}", **NO_PLAN)
      emotion = turn.emotion
      if turn.message is not None:
        yield turn.message.text


if __name__ == "__main__":
  main()
