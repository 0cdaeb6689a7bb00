"""A page in headless Chromium, asked and driven through its debugging pipe; nothing but Python.

`python tests/browser.py PAGE.html FOLDER` takes screenshots of a page: light, dark, narrow, whole.
"""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

SECONDS = 120  # until an answer is given up


def find() -> str | None:
  """The browser, if this machine has one."""
  names = ("chromium", "chromium-browser", "google-chrome", "chrome")
  return next(filter(None, map(shutil.which, names)), None)


class Page:
  """A tab. errors: what the console was told of errors; requests: the addresses it asked for."""

  def __init__(self, to_browser: int, from_browser: int):
    self._to, self._from, self._ids = to_browser, from_browser, itertools.count(1)
    self._rest, self.errors, self.requests = b"", [], []
    self._session, self._loaded = None, False
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """Calls a method of the browser's protocol and returns its result."""
    number = next(self._ids)
    message = {"id": number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._to, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._next()
      if answer.get("id") == number:
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

  def open(self, path: pathlib.Path) -> None:
    """Loads a file and waits until it is there."""
    self._loaded = False
    self.call("Page.navigate", url=path.resolve().as_uri())
    while not self._loaded:
      self._next()

  def ask(self, expression: str) -> Any:
    """The value of an expression of JavaScript."""
    options = {"returnByValue": True, "awaitPromise": True}
    found = self.call("Runtime.evaluate", expression=expression, **options)
    assert "exceptionDetails" not in found, found["exceptionDetails"]
    return found["result"].get("value")

  def press(self, key: str) -> None:
    """Presses a key, by its name in KeyboardEvent.key."""
    text = {"text": key} if len(key) == 1 else {}
    codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}
    codes |= {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
    if key in codes:
      text["windowsVirtualKeyCode"] = codes[key]
    if key == "Enter":
      text["text"] = "\r"
    self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
    self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

  def write(self, text: str) -> None:
    """Types a text."""
    self.call("Input.insertText", text=text)

  def look(self, width: int, height: int, scheme: str) -> None:
    """Sets the window's size in pixels, and light or dark."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    self.call("Emulation.setDeviceMetricsOverride", **size)
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    self.call("Emulation.setEmulatedMedia", features=wanted)

  def picture(self, path: pathlib.Path, whole: bool = False) -> None:
    """Writes what is seen, or the whole page, to a PNG file."""
    shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(shot["data"]))

  def _next(self) -> dict[str, Any]:
    """The next message, noted where it is an event that counts."""
    until = time.monotonic() + SECONDS
    while b"\0" not in self._rest:
      ready, _, _ = select.select([self._from], [], [], max(0, until - time.monotonic()))
      assert ready, "the browser does not answer"
      part = os.read(self._from, 1 << 20)
      assert part, "the browser has ended"
      self._rest += part
    raw, _, self._rest = self._rest.partition(b"\0")
    message = json.loads(raw)
    told = message.get("params", {})
    match message.get("method"):
      case "Page.loadEventFired":
        self._loaded = True
      case "Runtime.exceptionThrown":
        self.errors.append(json.dumps(told["exceptionDetails"]))
      case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
        self.errors.append(json.dumps(told["args"]))
      case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
        self.errors.append(told["entry"]["text"])
      case "Network.requestWillBeSent":
        self.requests.append(told["request"]["url"])
    return message


@contextlib.contextmanager
def opened(browser: str) -> Iterator[Page]:
  """A tab in a browser of its own, which ends with the block."""
  (reads, to_browser), (from_browser, writes) = os.pipe(), os.pipe()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
    # The browser reads from descriptor 3 and writes to 4.
    shell = ["bash", "-c", f'exec "$0" "$@" 3<&{reads} 4>&{writes}', browser, *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(shell, pass_fds=(reads, writes), **quiet)
    os.close(reads)
    os.close(writes)
    try:
      yield Page(to_browser, from_browser)
    finally:
      os.close(to_browser)  # on which it ends
      os.close(from_browser)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
      process.kill()
      process.wait()


def main(page_file: str, folder: str) -> None:
  out = pathlib.Path(folder)
  out.mkdir(parents=True, exist_ok=True)
  with opened(find()) as page:
    page.look(1280, 900, "light")
    page.open(pathlib.Path(page_file))
    for name, (width, height, scheme) in {
      "light": (1280, 900, "light"), "dark": (1280, 900, "dark"), "narrow": (360, 800, "light"),
    }.items():  # fmt: skip
      page.look(width, height, scheme)
      for place in ("curves", "trajectories", "tables", "dialogues"):
        page.ask(f"document.documentElement.style.scrollBehavior='auto';"
                 f"document.getElementById('{place}').scrollIntoView()")  # fmt: skip
        page.picture(out / f"{name}-{place}.png")
    print(f"errors: {page.errors}; requests: {page.requests}")


if __name__ == "__main__":
  main(*sys.argv[1:])
