"""The policy as a model behind an OpenAI-compatible server, to be evaluated, not trained."""

from ml_collections import ConfigDict

from rlver_jax.dialogue.dialogue import SILENCE, Answer, Dialogue, PolicyReply
from rlver_jax.dialogue.policy import POLICY_CALL, split_text
from rlver_jax.dialogue.remote import player
from rlver_jax.dialogue.remote.connection import (
  Connection,
  Message,
  RemoteSampling,
  RemoteSettings,
)
from rlver_jax.dialogue.remote.player import (
  RemotePlayer,
  assistant,
  plain_text,
  seed_of,
  system,
  user,
)
from rlver_jax.dialogue.templates import Templates


def _settings(config: ConfigDict) -> tuple[RemoteSettings, RemoteSampling]:
  s = config.sampling
  sampling = RemoteSampling(s.temperature, s.top_k, s.top_p)
  return RemoteSettings("policy", **config.policy.remote), sampling


def check(config: ConfigDict) -> None:
  """Checks the access to the server of the section `policy` before anything is loaded.

  Raises UserError in all processes for what the first one finds.
  """
  player.check(*_settings(config))


def build(config: ConfigDict, templates: dict[str, Templates]) -> "RemotePolicy":
  """The policy of the section `policy`, connected in the first process."""
  think, budget = config.dialogue.mode == "think", config.sampling.max_new_tokens
  return RemotePolicy(player.connect(*_settings(config)), templates, think, budget, config.seed)


class RemotePolicy(RemotePlayer):
  """Answers every dialogue whose stage is POLICY, as `policy.Policy` does.

  think: think-then-say instead of a direct reply. A thought is seen by nobody later; one that a
  reasoning model writes unasked, before a direct reply, is dropped. budget: most tokens of a reply.
  """

  who = ("policy", "policies")

  def __init__(
    self,
    connection: Connection | None,
    templates: dict[str, Templates],
    think: bool,
    budget: int,
    seed: int,
  ):
    super().__init__(connection)
    self._templates, self._think, self._budget, self._seed = templates, think, budget, seed
    self._dialogues: dict[int, Dialogue] = {}

  def open(self, placed: dict[int, Dialogue]) -> None:
    """These dialogues begin, in these slots."""
    self._dialogues |= placed

  async def answer(self, slot: int) -> Answer:
    d = self._dialogues[slot]
    seed = seed_of(self._seed, self.step, d.index, d.turn, POLICY_CALL, 0)
    chat = self._chat(d)
    done = await self.connection.chat(chat, self._budget, seed, keep_thought=self._think)
    if not self._think:
      return PolicyReply(done.text, None, True, not done.cut, done.tokens)
    thought, text, well_formed = split_text(done.text)
    return PolicyReply(text, thought, well_formed, not done.cut, done.tokens)

  def _chat(self, d: Dialogue) -> list[Message]:
    section = "policy_think" if self._think else "policy"
    chat = [system(self._templates[d.scenario.language].render(section))]
    chat.append(user(plain_text(d.opening.text)))
    for turn in d.turns:
      chat += [assistant(turn.reply.text or SILENCE), user(plain_text(turn.message.text))]
    return chat
