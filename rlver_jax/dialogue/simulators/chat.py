"""A language-model user's chat as token ids: what it is told, asked and shown, and what it said.

The user is the assistant of this chat. Whoever plays one (`language_model.py`) and whoever learns
to (`supervised/recorded.py`) puts it together from the pieces here, so that a training row holds
what the model will read.
"""

import dataclasses

from rlver_jax.dialogue import emotion as emotion_lib
from rlver_jax.dialogue.dialogue import Plan
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.dialogue.templates import Templates
from rlver_jax.tokenizer import Tokenizer


def persona_text(templates: Templates, scenario: Scenario) -> str:
  """What all dialogues of one scenario begin with: instructions, persona, background."""
  return templates.render(
    "system",
    persona=scenario.persona,
    background=scenario.background,
    character=scenario.character,
    traits=", ".join(scenario.traits),
    task=scenario.task,
  )


def persona_ids(tokenizer: Tokenizer, templates: Templates, scenario: Scenario) -> list[int]:
  """The prefix that all dialogues of one scenario share, as token ids."""
  return tokenizer.chat.system(persona_text(templates, scenario))


def question_text(templates: Templates, section: str, emotion: int, **fields: str) -> str:
  """The text of a section that asks the user, at an emotion."""
  state = emotion_lib.state(emotion)
  return templates.render(section, emotion=str(emotion), state=state, **fields)


def appraisal_text(templates: Templates, plan: Plan) -> str:
  """An appraisal as it is answered: a labelled line for each of its fields."""
  return "\n".join(f"{label}: {getattr(plan, name)}" for name, label in templates.labels.items())


@dataclasses.dataclass(frozen=True)
class UserChat:
  """The pieces of one user's chat; templates: of its dialogue's language and level."""

  tokenizer: Tokenizer
  templates: Templates

  def question(self, section: str, emotion: int, **fields: str) -> list[int]:
    """A question as a message of its own, and the start of its answer."""
    chat, text = self.tokenizer.chat, question_text(self.templates, section, emotion, **fields)
    return [*chat.user(text), *chat.assistant_start]

  def message_question(self, emotion: int, change: int, fields: dict[str, str]) -> list[int]:
    """The question for the next message, given the emotion after the change and the appraisal."""
    return self.question("message", emotion, change=f"{change:+d}", **fields)

  def quoted(self, reply: str) -> list[int]:
    """A reply of the helper, its message still open.

    Frame and reply are encoded apart, so that no reply changes the ids of its frame.
    """
    pieces = self.templates.quote(reply)
    ids = [i for piece in pieces for i in self.tokenizer.encode(piece)]
    return [*self.tokenizer.chat.user_start, *ids]

  def question_below(self, section: str, emotion: int) -> list[int]:
    """After `quoted`: a question about the reply in the same message, and the answer's start."""
    question = self.tokenizer.encode("\n\n" + question_text(self.templates, section, emotion))
    return [*question, *self.nothing_below]

  @property
  def nothing_below(self) -> list[int]:
    """After `quoted`: the message ends, and what the user said to the helper starts."""
    chat = self.tokenizer.chat
    return [*chat.user_end, *chat.assistant_start]

  def said(self, text: str, ids: tuple[int, ...] | None) -> list[int]:
    """What the user said: the ids that it sampled, where there are any."""
    return self.tokenizer.encode(text) if ids is None else list(ids)
