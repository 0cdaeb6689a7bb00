"""A list of continuations whose probabilities are compared, as a trie."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Choices:
  """A list of continuations as a trie, so that what they share is read once.

  Node 0 is the pending token of a row; the others are the inner nodes of the trie (a leaf is
  never read: only its probability is wanted). Edge e leads from node `parents[e]` to the token
  `edge_tokens[e]`. `member[c][e]` tells whether continuation c uses edge e.
  """

  node_tokens: tuple[int, ...]
  depths: tuple[int, ...]
  ancestors: tuple[tuple[bool, ...], ...]  # [node][node]: is the second the first or above it
  parents: tuple[int, ...]
  edge_tokens: tuple[int, ...]
  member: tuple[tuple[bool, ...], ...]

  @classmethod
  def of(cls, continuations: Sequence[Sequence[int]]) -> "Choices":
    """The trie of token-id lists; ValueError where one is empty or begins another."""
    nodes: dict[tuple[int, ...], int] = {(): 0}
    edges: dict[tuple[int, ...], int] = {}
    for continuation in continuations:
      for end in range(1, len(continuation) + 1):
        path = tuple(continuation[:end])
        edges.setdefault(path, len(edges))
        if end < len(continuation):
          nodes.setdefault(path, len(nodes))
    leaves = [tuple(c) for c in continuations]
    if len(set(leaves)) < len(leaves) or any(not leaf or leaf in nodes for leaf in leaves):
      raise ValueError("continuations must differ, and none may be empty or begin another one")
    paths = list(nodes)
    return cls(
      node_tokens=tuple(path[-1] if path else 0 for path in paths),
      depths=tuple(len(path) for path in paths),
      ancestors=tuple(tuple(a[: len(b)] == b for b in paths) for a in paths),
      parents=tuple(nodes[path[:-1]] for path in edges),
      edge_tokens=tuple(path[-1] for path in edges),
      member=tuple(tuple(leaf[: len(path)] == path for path in edges) for leaf in leaves),
    )
