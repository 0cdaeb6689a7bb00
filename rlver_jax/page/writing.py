"""A page's content put into its template: one file that asks no other one and no server for more.

Texts of models travel as JSON inside a script element that is not run, with every character escaped
that could end the element; the script that reads them makes text of them and nothing else. The
page's policy lets the browser run this one script and this one style, and load nothing.
"""

import base64
import hashlib
import importlib.resources
import json
import pathlib
import re
from typing import Any

from rlver_jax import files

SCRIPTS = ("elements.js", "charts.js", "dialogues.js", "page.js")  # in the order they run
# What could end a script element or a line of a script, and halves of a surrogate pair.
_ESCAPED = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes the page, all or nothing; raises OSError where it cannot."""
  with files.replacing(path) as file:
    file.write(page(content))


def page(content: dict[str, Any]) -> str:
  """The page as HTML."""
  style, script = _asset("page.css"), "\n".join(map(_asset, SCRIPTS))
  parts = {
    "policy": f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
    "style": style,
    "script": script,
    "content": embedded(content),
  }
  # In one pass: what is put in is not looked at again.
  return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def embedded(value: Any) -> str:
  """JSON that can stand in a script element; ValueError for a number that is not finite."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _asset(name: str) -> str:
  return (importlib.resources.files("rlver_jax") / "assets" / "page" / name).read_text("utf-8")


def _digest(text: str) -> str:
  """How a content policy names an inline script or style."""
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
