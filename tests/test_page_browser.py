"""The page in headless Chromium, where there is one: quiet, and its filters and keys work."""

import browser
import pytest
from test_page import HOSTILE, benchmark_run, hostile, made, training_run

from rlver_jax.page import writing

CHROMIUM = browser.find()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  run = training_run(folder / "mine")
  return made(run, benchmark_run(folder / "hostile", [hostile(0), hostile(1)]))


@pytest.fixture(scope="module")
def page(content, tmp_path_factory):
  file = tmp_path_factory.mktemp("page") / "page.html"
  writing.write(file, content)
  with browser.opened(CHROMIUM) as tab:
    tab.look(1200, 900, "light")
    tab.open(file)
    yield tab
    assert tab.errors == [] and tab.requests == [file.as_uri()]


@pytest.fixture(autouse=True)
def afresh(page):
  page.ask("document.querySelector('#filters [type=reset]').click(); document.activeElement.blur()")
  page.ask("new Promise(setTimeout)")


def listed(page):
  return page.ask("document.querySelectorAll('#list li:not([hidden])').length")


def chosen(page):
  return int(page.ask("document.querySelector('#list [aria-current]').dataset.number"))


def choose(page, name, value):
  page.ask(f"""(() => {{
    const field = document.querySelector('#filters [name={name}]');
    field.value = {value!r};
    field.dispatchEvent(new Event('input', {{bubbles: true}}));
  }})()""")


@pytest.mark.parametrize(
  ("field", "value", "fits"),
  [
    ("run", "hostile", lambda d: d["run"] == 1),
    ("set", "before", lambda d: d["set"] == "before"),
    ("set", "step 2", lambda d: d["step"] == 2),
    ("user", "scripted user", lambda d: d["user"] == "scripted user"),
    ("tactic", "baiting", lambda d: d["run"] == 1),
    ("least", "40", lambda d: d["final"] >= 40),
    ("most", "39", lambda d: d["final"] <= 39),
    ("text", "MESSAGE 1 of 2", lambda d: any("essage 1 of 2" in t["message"] for t in d["turns"])),
  ],
)
def test_filters(page, content, field, value, fits):
  assert listed(page) == len(content["dialogues"])
  choose(page, field, value)
  wanted = [i for i, d in enumerate(content["dialogues"]) if fits(d)]
  assert 0 < len(wanted) < len(content["dialogues"]) and listed(page) == len(wanted)
  assert chosen(page) in wanted
  count = page.ask("document.getElementById('count').textContent")
  assert count == f"{len(wanted)} of {len(content['dialogues'])}"


def test_keys_search_move_and_unfold(page, content):
  page.press("/")
  page.write("Window.Broken")  # which the hostile dialogues alone have
  assert listed(page) == 2 and content["dialogues"][chosen(page)]["run"] == 1
  page.press("Escape")
  assert page.ask("document.querySelector('#filters input').value") == "Window.Broken"
  first = chosen(page)
  for key, place in (("j", 1), ("j", 1), ("k", 0), ("ArrowDown", 1), ("Home", 0), ("End", 1)):
    page.press(key)
    assert chosen(page) == first + place
    assert page.ask("document.activeElement.dataset.number") == str(first + place)
  folds = "document.querySelectorAll('#detail .said details[open]').length"
  assert page.ask(folds) == 0
  page.press("f")
  assert page.ask(folds) == 3  # two thoughts, and what went on in the user once
  page.press("f")
  assert page.ask(folds) == 0


def test_values_are_read_from_a_chart_by_keys(page, content):
  page.ask("document.querySelector('#curves svg[role]').focus()")
  page.press("ArrowRight")
  page.press("ArrowRight")
  value = content["runs"][0]["curves"]["emotion/final_mean"][0][1]
  assert f"training {value:.1f} [" in page.ask("document.querySelector('.readout').textContent")
  page.ask("document.querySelector('#curves figure summary').click()")
  page.ask("new Promise(setTimeout)")
  rows = "document.querySelectorAll('#curves figure:first-child tbody tr').length"
  assert page.ask(f"new Promise((done) => setTimeout(() => done({rows}), 50))") == 4  # 0 to 3


def test_before_and_after_are_side_by_side(page, content):
  choose(page, "set", "after")
  heads = page.ask("[...document.querySelectorAll('#detail .row h3')].map((h) => h.textContent)")
  assert heads == ["mine, before, language model", "mine, after, language model"]
  changes = page.ask("[...document.querySelectorAll('.said .change')].map((c) => c.textContent)")
  assert changes == ["+3", "+8", "−4", "+9", "±0", "+5", "±0"]


def test_texts_of_dialogues_stay_texts(page):
  choose(page, "run", "hostile")
  assert page.ask("window.broken") is None
  assert page.ask("document.querySelectorAll('img, #detail script, #detail b b').length") == 0
  said = page.ask("document.querySelector('#detail .said.policy > p').textContent")
  assert said == HOSTILE
  thought = page.ask("document.querySelector('#detail .thought p').textContent")
  assert thought == HOSTILE


def test_a_scenario_says_its_tactic_if_it_has_one(page):
  terms = "[...document.querySelectorAll('#detail dt')].map((term) => term.textContent)"
  choose(page, "tactic", "baiting")
  assert "Tactic" in page.ask(terms)
  choose(page, "tactic", "none")
  assert "Character" in page.ask(terms) and "Tactic" not in page.ask(terms)


def test_light_and_dark(page):
  ground = "getComputedStyle(document.body).backgroundColor"
  light = page.ask(ground)
  page.look(1200, 900, "dark")
  dark = page.ask(ground)
  page.ask("document.getElementById('theme').click()")
  assert page.ask(ground) == light != dark
  page.ask("document.getElementById('theme').click()")
  page.look(1200, 900, "light")
  assert page.ask(ground) == dark  # as the reader chose


def test_a_narrow_window_needs_no_scrolling_to_the_side(page):
  page.look(360, 800, "light")
  assert page.ask("document.documentElement.scrollWidth") == 360
  page.look(1200, 900, "light")


def test_all_that_can_be_used_has_a_name(page):
  nameless = """[...document.querySelectorAll('button, select, input, summary, svg[role], a')]
    .filter((node) => !(node.textContent.trim() || node.getAttribute('aria-label') ||
      node.labels?.length)).length"""
  assert page.ask(nameless) == 0
