"""The engine against whole forward passes: caches, rewinds, prefixes, budgets, choices, shapes."""

import builders
import jax
import numpy as np
import pytest

from rlver_jax.metrics import CompileCounter
from rlver_jax.sampling import cache
from rlver_jax.sampling.choices import Choices
from rlver_jax.sampling.engine import Engine
from rlver_jax.sampling.requests import EngineSettings, Request
from rlver_jax.sampling.sampler import Sampling

VOCABULARY, STOPS, TEMPERATURE = 61, (7, 11), 0.8
SLOTS, DECODE_STEPS, SEED = 4, 16, 5
SETTINGS = EngineSettings(SLOTS, windows=(40, 96), extend_buckets=(16,), decode_steps=DECODE_STEPS)
# Two sizes to read by, and answers that take several calls.
SMALLER = EngineSettings(SLOTS, windows=(96,), extend_buckets=(8, 24), decode_steps=3)
MINUS, DIGITS, END = 50, range(20, 30), 7
# The integers -10..10 written in these ids, each with an end, as a simulator scores them.
INTEGERS = [
  [*([MINUS] if n < 0 else []), *(DIGITS[int(digit)] for digit in str(abs(n))), END]
  for n in range(-10, 11)
]


def make_engine(model, settings=SETTINGS, sampling=None, seed=SEED):
  sampling = sampling or Sampling(temperature=TEMPERATURE)
  choices = Choices.of(INTEGERS)
  return Engine(model, builders.mesh(), settings, sampling, STOPS, seed, choices)


@pytest.fixture(scope="module")
def model():
  return builders.model(VOCABULARY)


@pytest.fixture(scope="module")
def counter():
  return CompileCounter()


@pytest.fixture(scope="module")
def compiled(model, counter):
  """An engine with all its programs, and how many programs had been compiled by then."""
  engine = make_engine(model)
  engine.compile()
  return engine, counter


@pytest.fixture(scope="module")
def smaller(model):
  """Reads its cache in blocks of a length that does not divide the window."""
  engine = make_engine(model, SMALLER)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cache, "CPU_KEY_BLOCK", 28)
    engine.compile()
  return engine


@pytest.fixture
def engine(compiled, model):
  """The compiled engine, with nothing in its slots that a test could count on."""
  engine, _ = compiled
  engine.model = model
  engine.take_stats()
  return engine


def ids(n, seed=0):
  return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist())


def play(engine, requests):
  """Submits these requests and steps until all are complete."""
  for slot, request in requests.items():
    engine.submit(slot, request)
  samples = {}
  while len(samples) < len(requests):
    samples |= engine.step()
  return samples


def sample(engine, slot, context, turn=0, new=12):
  return play(engine, {slot: Request(tuple(context), (0, slot, turn, 0), new)})[slot]


def assert_logprobs(model, context, drawn):
  """What the sampler reports is what one pass over everything gives."""
  assert drawn.ids
  (wanted,) = builders.sequence_logprobs(model, context, drawn.ids, temperature=TEMPERATURE)
  np.testing.assert_allclose(drawn.logprobs, wanted, atol=1e-4)


def integer_logprobs(model, context):
  return np.array([x.sum() for x in builders.sequence_logprobs(model, context, *INTEGERS)])


def assert_holds(engine, model, slot, context):
  """The slot's cache gives the distribution that the whole context gives, reading nothing."""
  engine.take_stats()
  got = engine.score({slot: context})[slot]
  assert engine.take_stats().extended == 0
  np.testing.assert_allclose(got, integer_logprobs(model, context), atol=1e-4)


@pytest.mark.parametrize("settings", (SETTINGS, SMALLER), ids=("windows", "buckets"))
def test_logprobs_equal_a_full_pass_for_rows_of_different_lengths(engine, smaller, model, settings):
  """Lengths around the sizes of buckets, windows and blocks, and a context of one token."""
  engine = smaller if settings is SMALLER else engine
  engine.take_stats()
  lengths = (1, 2, 8, 9, 17, 25, 28, 29, 40, 41, 57, 80)
  for first in range(0, len(lengths), SLOTS):
    contexts = {slot: ids(n, n) for slot, n in enumerate(lengths[first : first + SLOTS])}
    requests = {s: Request(c, (1, first, s, 0), 16) for s, c in contexts.items()}
    samples = play(engine, requests)
    for slot, drawn in samples.items():
      assert_logprobs(model, contexts[slot], drawn)
  assert engine.take_stats().extended == sum(n - 1 for n in lengths)


def test_a_dialogue_that_is_extended_equals_one_that_is_read_whole(engine, model):
  context = ids(20, 1)
  for turn in range(4):
    drawn = sample(engine, 2, context, turn, new=9)
    assert_logprobs(model, context, drawn)
    context += (*drawn.ids, *ids(5 + 2 * turn, turn))
    by_turns = engine.score({2: context})[2]
    np.testing.assert_allclose(by_turns, integer_logprobs(model, context), atol=1e-4)
    whole = engine.score({1: context})[1]
    np.testing.assert_allclose(by_turns, whole, atol=1e-4)


def test_nothing_that_is_held_is_read_again(engine):
  context = ids(20, 2)
  first = sample(engine, 0, context, new=9)
  # The last token of a context is read by the draw itself, and so is every drawn token but the
  # last, which is not held yet.
  assert engine.take_stats().extended == 19
  longer = (*context, *first.ids, *ids(6, 3))
  second = sample(engine, 0, longer, 1, new=4)
  stats = engine.take_stats()
  assert stats.extended == 6
  assert stats.drawn == len(second.ids)
  assert stats.prefilled == 0
  engine.score({0: (*longer, *second.ids, 1, 2, 3)})
  stats = engine.take_stats()
  assert (stats.extended, stats.scored, stats.drawn) == (3, 1, 0)
  assert stats.seconds > 0


def test_a_prefix_is_read_once_for_all_its_slots(engine, model):
  short, long = ids(13, 4), ids(37, 5)
  engine.prefill({0: short, 1: long, 3: list(short)})
  assert engine.take_stats().prefilled == len(short) + len(long)
  contexts = {s: (*p, *ids(4, 20 + s)) for s, p in ((0, short), (1, long), (3, short))}
  requests = {s: Request(c, (2, s, 0, 0), 7) for s, c in contexts.items()}
  for slot, drawn in play(engine, requests).items():
    assert_logprobs(model, contexts[slot], drawn)
  stats = engine.take_stats()
  assert (stats.prefilled, stats.extended) == (0, 9)
  # Slots that hold the prefix already, with more behind it, are left as they are.
  engine.prefill({0: short, 1: long})
  assert engine.take_stats().prefilled == 0
  assert_holds(engine, model, 0, contexts[0])


def test_a_prefill_leaves_the_other_slots_alone(engine, model):
  kept = {slot: ids(15 + slot, 30 + slot) for slot in (0, 2)}
  for slot, context in kept.items():
    sample(engine, slot, context, new=1)
  engine.prefill({1: ids(9, 33), 3: ids(10, 34)})
  for slot, context in kept.items():
    assert_holds(engine, model, slot, context)


@pytest.mark.parametrize(
  ("change", "new"),
  (
    (lambda c: c, 0),  # identical
    (lambda c: c[:12], 0),  # shorter
    (lambda c: c[:1], 0),
    (lambda c: (*c[:12], *ids(10, 6)), 9),  # another tail (it differs from its first token on)
    (lambda c: (*c[:-1], (c[-1] + 1) % VOCABULARY), 0),  # another last token, which is not held
    (lambda c: ((c[0] + 1) % VOCABULARY, *c[1:]), 29),  # another first token
    (lambda c: ids(50, 8), 49),  # another dialogue
  ),
  ids=("same", "shorter", "first", "tail", "last", "other_first", "other"),
)
def test_a_rewind_costs_what_is_new(engine, model, change, new):
  context = ids(30, 9)
  sample(engine, 1, context, new=8)
  engine.take_stats()
  rewound = change(context)
  drawn = sample(engine, 1, rewound, 1, new=8)
  assert_logprobs(model, rewound, drawn)
  assert engine.take_stats().extended == new
  assert_holds(engine, model, 1, (*rewound, *drawn.ids))


def test_an_answer_ends_at_its_first_stop_id_or_at_its_budget(engine):
  lengths, stopped = set(), 0
  for turn in range(12):
    budgets = {slot: 1 + (5 * turn + slot) % 19 for slot in range(SLOTS)}
    requests = {s: Request(ids(6, turn), (3, s, turn, 0), b) for s, b in budgets.items()}
    for slot, drawn in play(engine, requests).items():
      assert drawn.stopped == (drawn.ids[-1] in STOPS)
      assert not set(drawn.ids[:-1]) & set(STOPS)
      assert len(drawn.ids) == len(drawn.logprobs) <= budgets[slot]
      assert drawn.stopped or len(drawn.ids) == budgets[slot]
      lengths.add(len(drawn.ids))
      stopped += drawn.stopped
  assert len(lengths) > 10
  assert 5 < stopped < 43


def test_an_answer_longer_than_a_call_is_the_same_as_in_one_call(engine, smaller, model):
  requests = {s: Request(ids(9 + s, 40 + s), (4, s, 0, 0), 15 + s) for s in range(SLOTS)}
  whole, pieces = play(engine, requests), play(smaller, requests)
  assert max(len(drawn.ids) for drawn in whole.values()) > DECODE_STEPS
  for slot, drawn in whole.items():
    assert pieces[slot].ids == drawn.ids
    assert pieces[slot].stopped == drawn.stopped
    np.testing.assert_allclose(pieces[slot].logprobs, drawn.logprobs, atol=1e-5)
    assert_logprobs(model, requests[slot].ids, pieces[slot])


def test_what_is_drawn_can_be_read_before_an_answer_is_complete(smaller, model):
  smaller.model = model
  for slot in range(SLOTS):
    smaller.submit(slot, Request(ids(9 + slot, 40 + slot), (4, slot, 0, 0), 15 + slot))
  assert smaller.drawn() == {slot: [] for slot in range(SLOTS)}
  seen, complete = [], {}
  while len(complete) < SLOTS:
    complete |= smaller.step()
    seen.append(smaller.drawn())
    assert seen[-1].keys() == set(range(SLOTS)) - complete.keys()
  for number, drawn in enumerate(seen, 1):
    for slot, so_far in drawn.items():
      assert so_far == complete[slot].ids[: 3 * number] and len(so_far) == 3 * number
  assert len(seen) > 3 and smaller.drawn() == {}


def test_a_sample_depends_on_its_numbers_and_not_on_its_company(engine, smaller):
  """Not on the slot, the batch, when it joins, or what the slot held before."""
  requests = [Request(ids(5 + 6 * i, 50 + i), (5, i, 0, 0), 20) for i in range(SLOTS)]
  together = play(engine, dict(enumerate(requests)))
  alone = [play(engine, {(i + 1) % SLOTS: r})[(i + 1) % SLOTS] for i, r in enumerate(requests)]
  joined, waiting = {}, list(enumerate(requests))
  while len(joined) < SLOTS:
    if waiting:  # one more at each step, while the earlier ones are on their way
      smaller.submit(*waiting.pop(0))
    joined |= smaller.step()
  for i, drawn in together.items():
    for other in (alone[i], joined[i]):
      assert other.ids == drawn.ids
      np.testing.assert_allclose(other.logprobs, drawn.logprobs, atol=1e-5)
  again = [Request(requests[0].ids, (5, 0, 0, 0), 20) for _ in range(SLOTS)]
  assert {tuple(d.ids) for d in play(engine, dict(enumerate(again))).values()} == {
    tuple(together[0].ids)
  }
  changed = [(6, 0, 0, 0), (5, 1, 0, 0), (5, 0, 1, 0), (5, 0, 0, 1)]
  others = {s: Request(requests[0].ids, numbers, 20) for s, numbers in enumerate(changed)}
  drawn = {tuple(d.ids) for d in play(engine, others).values()} | {tuple(together[0].ids)}
  assert len(drawn) == 5


def test_greedy_requests_take_the_best_tokens_and_leave_the_others_as_they_are(
  engine, smaller, model
):
  """Against whole passes; the others' samples against those of a batch without greedy ones."""
  contexts = {slot: ids(9 + 5 * slot, 130 + slot) for slot in range(SLOTS)}
  batches = []
  for greedy in ((), (1, 3)):
    requests = {s: Request(c, (8, s, 0, 0), 14, greedy=s in greedy) for s, c in contexts.items()}
    batches.append(play(engine, requests))
    pieces = play(smaller, requests)  # answers that take several calls
    assert all(pieces[s].ids == sample.ids for s, sample in batches[-1].items())
  plain, mixed = batches
  for slot in (0, 2):
    assert mixed[slot] == plain[slot]
  for slot in (1, 3):
    drawn = mixed[slot]
    assert_logprobs(model, contexts[slot], drawn)
    best = builders.best_logprobs(model, contexts[slot], drawn.ids, TEMPERATURE)
    np.testing.assert_allclose(drawn.logprobs, best, atol=1e-4)
    unlike = builders.best_logprobs(model, contexts[slot], plain[slot].ids, TEMPERATURE)
    assert np.max(unlike - plain[slot].logprobs) > 0.1  # a draw is no such thing


def test_a_greedy_sample_does_not_depend_on_its_numbers(engine):
  context = ids(21, 140)
  numbers = [(8, 0, 0, 0), (9, 0, 0, 0), (8, 7, 0, 0), (8, 0, 3, 1)]
  drawn = play(engine, {s: Request(context, n, 12, greedy=True) for s, n in enumerate(numbers)})
  assert len({tuple(sample.ids) for sample in drawn.values()}) == 1


def test_slots_without_a_request_are_untouched(engine, model):
  kept = {0: ids(18, 60), 3: ids(31, 61)}
  for slot, context in kept.items():
    sample(engine, slot, context, new=1)
  for turn in range(3):
    sample(engine, 1, ids(40, 62 + turn), turn)
    engine.score({2: ids(33, 65 + turn)})
  for slot, context in kept.items():
    assert_holds(engine, model, slot, context)


def test_scores_are_sums_over_full_passes_and_write_nothing(engine, model):
  contexts = {slot: ids(n, 70 + n) for slot, n in ((0, 1), (1, 23), (3, 60))}
  scores = engine.score(contexts)
  assert scores.keys() == contexts.keys()
  for slot, context in contexts.items():
    wanted = integer_logprobs(model, context)
    np.testing.assert_allclose(scores[slot], wanted, atol=1e-4)
    assert np.ptp(wanted) > 1
  assert engine.take_stats().extended == sum(len(c) - 1 for c in contexts.values())
  for slot, context in contexts.items():
    assert_logprobs(model, context, sample(engine, slot, context, new=5))
  assert engine.take_stats().extended == 0


def test_a_context_may_fill_the_cache_to_the_last_position(engine, model):
  context = ids(86, 80)
  assert engine.fits(context, 10)
  assert not engine.fits(context, 11)
  for turn in range(8):
    drawn = sample(engine, 1, context, turn, new=10)
    assert_logprobs(model, context, drawn)
    if not drawn.stopped:
      break
  assert len(drawn.ids) == 10
  full = (*context, *drawn.ids)
  np.testing.assert_allclose(engine.score({1: full})[1], integer_logprobs(model, full), atol=1e-4)


def test_nothing_compiles_after_compile(compiled, model):
  engine, counter = compiled
  engine.model = model
  before = counter.count + counter.cached
  random = np.random.default_rng(0)
  engine.prefill({s: ids(random.integers(1, 80), s) for s in range(SLOTS)})
  for turn in range(12):
    slots = random.permutation(SLOTS)[: random.integers(1, SLOTS + 1)].tolist()
    contexts = {s: ids(random.integers(1, 76), 100 + turn) for s in slots}
    requests = {
      s: Request(c, (9, s, turn, 0), int(random.integers(1, 20))) for s, c in contexts.items()
    }
    play(engine, requests)
    engine.score(contexts)
  assert counter.count + counter.cached == before


def test_requests_that_cannot_be_served_are_refused(engine, model):
  context = ids(20, 90)
  sample(engine, 0, context, new=1)
  engine.submit(1, Request(context, (0, 0, 0, 0), 30))
  with pytest.raises(ValueError, match="slot 1 has an unfinished request"):
    engine.submit(1, Request(context, (0, 0, 0, 0), 1))
  with pytest.raises(ValueError, match="slot 1 has an unfinished request"):
    engine.score({1: context})
  with pytest.raises(ValueError, match="slot 1 has an unfinished request"):
    engine.prefill({1: ids(4, 91)})
  with pytest.raises(ValueError, match=r"slot 0 is asked to hold 90 \+ 7 tokens.* holds 96"):
    engine.submit(0, Request(ids(90), (0, 0, 0, 0), 7))
  with pytest.raises(ValueError, match=r"slot 2 is asked to hold 97 \+ 0 tokens.* holds 96"):
    engine.score({2: ids(97)})
  with pytest.raises(ValueError, match=r"slot 3 is asked to hold 97 \+ 0 tokens.* holds 96"):
    engine.prefill({3: ids(97)})
  with pytest.raises(ValueError, match="at least one token"):
    engine.submit(0, Request((), (0, 0, 0, 0), 7))
  with pytest.raises(ValueError, match="at least one token"):
    engine.submit(0, Request(context, (0, 0, 0, 0), 0))
  with pytest.raises(ValueError, match="at least one token"):
    engine.score({0: ()})
  # None of it has touched a slot, and the request in progress goes on.
  assert_holds(engine, model, 0, context)
  samples = {}
  while not samples:
    samples = engine.step()
  assert_logprobs(model, context, samples[1])
  assert engine.step() == {}


def test_a_new_model_forgets_what_the_old_one_read(engine, model):
  context = ids(30, 95)
  sample(engine, 0, context)
  engine.prefill({1: context[:12]})
  other = jax.tree.map(lambda x: 0.8 * x, model)
  engine.model = other
  engine.take_stats()
  engine.prefill({1: context[:12]})
  for slot in (0, 1):
    assert_logprobs(other, context, sample(engine, slot, context))
  stats = engine.take_stats()
  assert (stats.prefilled, stats.extended) == (12, 29 + 17)


def test_a_cleared_engine_has_empty_slots_and_no_requests(engine, model):
  context = ids(30, 96)
  engine.submit(0, Request(context, (0, 0, 0, 0), 30))
  engine.step()
  engine.clear()
  assert engine.step() == {}
  engine.take_stats()
  assert_logprobs(model, context, sample(engine, 0, context))
  assert engine.take_stats().extended == 29


@pytest.mark.parametrize(("seed", "same"), ((SEED + 2**32, True), (SEED + 1, False)))
def test_a_seed_of_any_size_counts_modulo_32_bits(engine, model, seed, same):
  other = make_engine(model, seed=seed)
  other.programs.compiled = engine.programs.compiled  # no program depends on the seed
  drawn = [sample(e, 0, ids(12), new=8).ids for e in (other, engine)]
  assert (drawn[0] == drawn[1]) == same


def test_cache_bytes(engine):
  # 2 (keys, values) x 2 layers x 4 slots x 2 heads x 96 positions x 8 x 4 bytes.
  assert engine.cache_bytes() == {0: 2 * 2 * 4 * 2 * 96 * 8 * 4}


@pytest.mark.parametrize("seed", range(5))
def test_choices_are_a_trie(seed):
  """Against the definition: nodes are proper beginnings, edges are beginnings, leaves the lists."""
  random = np.random.default_rng(seed)
  found = {tuple(random.integers(0, 3, random.integers(1, 6)).tolist()) for _ in range(40)}
  lists = sorted(c for c in found if not any(c != o and o[: len(c)] == c for o in found))
  random.shuffle(lists)
  trie = Choices.of(lists)
  proper = {c[:n] for c in lists for n in range(len(c))}
  beginnings = {c[:n] for c in lists for n in range(1, len(c) + 1)}
  assert len(trie.node_tokens) == len(trie.depths) == len(proper)
  assert len(trie.parents) == len(trie.edge_tokens) == len(beginnings)

  def path(node):
    above = [n for n in range(len(proper)) if trie.ancestors[node][n]]
    above.sort(key=lambda n: trie.depths[n])
    assert [trie.depths[n] for n in above] == list(range(trie.depths[node] + 1))
    assert above[0] == 0 and above[-1] == node
    return tuple(trie.node_tokens[n] for n in above[1:])

  paths = [path(node) for node in range(len(proper))]
  assert set(paths) == proper
  edges = [
    (*paths[parent], token) for parent, token in zip(trie.parents, trie.edge_tokens, strict=True)
  ]
  assert set(edges) == beginnings
  for leaf, member in zip(lists, trie.member, strict=True):
    used = sorted((edges[e] for e in range(len(edges)) if member[e]), key=len)
    assert used == [leaf[:n] for n in range(1, len(leaf) + 1)]


def test_the_integers_share_what_they_begin_with():
  trie = Choices.of(INTEGERS)
  # Read: the pending token, minus, 0..9 and 10, and -1..-9 and -10.
  assert len(trie.node_tokens) == 1 + 1 + 11 + 10
  assert len(trie.edge_tokens) == 22 + 21  # the same but the pending one, and 21 ends


@pytest.mark.parametrize(
  "lists",
  ([[1, 2], [1]], [[1], [1, 2, 3]], [[1, 2], [1, 2]], [[]], [[], [1]], [[3], [1, 2], [3]]),
)
def test_choices_that_begin_one_another_are_refused(lists):
  with pytest.raises(ValueError, match="none may be empty or begin another"):
    Choices.of(lists)


@pytest.mark.parametrize("settings", (SETTINGS, SMALLER), ids=("windows", "buckets"))
def test_the_likelihood_of_a_texts_end_is_that_of_a_full_pass(engine, smaller, model, settings):
  """Ends of one id, of all but the first, and around the sizes of buckets and of blocks."""
  engine = smaller if settings is SMALLER else engine
  texts = {0: (ids(2, 1), 1), 1: (ids(33, 2), 32), 2: (ids(70, 3), 17), 3: (ids(97, 4), 5)}
  for slot, found in engine.logprobs(texts).items():
    text, last = texts[slot]
    context, end = text[:-last], text[-last:]
    (wanted,) = builders.sequence_logprobs(model, context, end)
    np.testing.assert_allclose(found.logprobs, wanted, atol=1e-4)
    np.testing.assert_array_equal(found.best, wanted == builders.best_logprobs(model, context, end))
    assert found.logprobs.dtype == np.float32 and found.best.dtype == bool


def test_ends_after_one_context_read_it_once(engine, model):
  context = ids(30, 8)
  engine.logprobs({1: ((*context, 3, 4), 2)})
  engine.take_stats()
  found = engine.logprobs({1: ((*context, 9, 10, 5), 3)})[1]
  (wanted,) = builders.sequence_logprobs(model, context, (9, 10, 5))
  np.testing.assert_allclose(found.logprobs, wanted, atol=1e-4)
  stats = engine.take_stats()
  assert (stats.extended, stats.scored) == (0, 3)
  assert_holds(engine, model, 1, (*context, 9, 10, 5))


def test_what_cannot_be_asked_of_a_text_is_told(engine):
  for text, last in ((ids(4), 0), (ids(4), 4), (ids(98), 1)):
    with pytest.raises(ValueError, match="slot 2 is asked"):
      engine.logprobs({2: (text, last)})
  engine.logprobs({2: (ids(97), 1)})


def test_an_unfinished_request_can_be_looked_at_and_dropped(smaller, model):
  engine, context = smaller, ids(12, 3)
  whole = sample(engine, 0, context)
  engine.submit(0, Request(context, (0, 0, 0, 0), 12))
  assert engine.step() == {} and engine.drawn() == {0: whole.ids[:3]}
  engine.drop(0)
  assert engine.step() == {}
  assert sample(engine, 0, context).ids == whole.ids
