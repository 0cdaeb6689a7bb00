"""The scripted user's word lists, and a text read through them: sentences, cues, content words.

The lists are `assets/scripted/{language}.toml`. English is matched by whole words, Chinese by
substrings; both are reduced to one plain form first. Every step is linear in the text's length.
"""

import dataclasses
import functools
import importlib.resources
import re
import tomllib
import unicodedata

MAX_CHARS = 4000  # a person reads no further
MAX_SENTENCES = 80
_GUARD = {"en": 30, "zh": 5}  # characters before a cue in which a negator voids it

_END = re.compile(r"[.!?。\n]+")
_CLAUSE = re.compile(r"[,;:、()\"“”「」—–]+")
_TOKEN = re.compile(r"[^\W_]+|,")
_HAN = re.compile(r"[㐀-䶿一-鿿]")
_CONTRACTIONS = (
  ("can't", "can not"),
  ("won't", "will not"),
  ("n't", " not"),
  ("'re", " are"),
  ("'m", " am"),
  ("'ve", " have"),
  ("'ll", " will"),
  ("'d", " would"),
  ("'s", " is"),
)


@dataclasses.dataclass(frozen=True)
class Sentence:
  text: str  # the plain form: in English " , word word , ", in Chinese ",字字,字"
  question: bool


@dataclasses.dataclass(frozen=True)
class Lexicon:
  """One language's lists; cues and feeling words are in the plain form."""

  language: str
  cues: dict[str, tuple[str, ...]]  # feature -> phrases
  hinted: dict[str, tuple[str, ...]]  # intention -> phrases of a user who hints at it ...
  said: dict[str, tuple[str, ...]]  # ... and of one who asks for it
  feelings: tuple[str, ...]
  bands: dict[str, tuple[str, ...]]  # how well one feels -> words for it
  negators: tuple[str, ...]
  not_negators: tuple[str, ...]
  stopwords: frozenset[str]
  stop_chars: frozenset[str]
  common: frozenset[str]
  phrases: dict  # what the user thinks and says: the file's other tables


@functools.cache
def load(language: str) -> Lexicon:
  """The package's lists for "en" or "zh"."""
  file = importlib.resources.files("rlver_jax") / "assets" / "scripted" / f"{language}.toml"
  table = tomllib.loads(file.read_text(encoding="utf-8"))
  words = table["stopwords"]
  common = table["common"]

  def plain(phrases):
    return tuple(_plain_cue(p, language) for p in phrases)

  return Lexicon(
    language=language,
    **{
      kind: {name: plain(phrases) for name, phrases in table[kind].items()}
      for kind in ("cues", "hinted", "said")
    },
    feelings=plain(table["feelings"]["words"].split()),
    bands={name: plain(words.split()) for name, words in table["bands"].items()},
    negators=plain(table["negators"]),
    not_negators=plain(table["not_negators"]),
    stopwords=frozenset(_stem(w) for w in words.split()) if language == "en" else frozenset(words),
    stop_chars=frozenset(table.get("stop_chars", "")),
    common=frozenset(common.split() if language == "en" else common),
    phrases=table,
  )


def plain(text: str) -> str:
  """Casefolded, full-width forms narrowed, invisible characters dropped, cut at MAX_CHARS."""
  text = unicodedata.normalize("NFKC", text[:MAX_CHARS]).casefold()[:MAX_CHARS]
  text = text.replace("’", "'").replace("\r", "\n")
  return "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def sentences(text: str, language: str) -> list[Sentence]:
  """The sentences of a text in `plain` form, at most MAX_SENTENCES."""
  found, start = [], 0
  for end in [*_END.finditer(text), None]:
    piece = text[start : end.start() if end else len(text)]
    if piece.strip():
      found.append(Sentence(_reduced(piece, language), bool(end) and "?" in end[0]))
    if end is None or len(found) == MAX_SENTENCES:
      return found
    start = end.end()
  return found


def has_cue(sentence: Sentence, phrases: tuple[str, ...], lexicon: Lexicon) -> bool:
  """Whether one of the phrases stands in the sentence without a negation before it."""
  text = sentence.text
  for phrase in phrases:
    start = text.find(phrase)
    while start >= 0:
      before = text[max(0, start - _GUARD[lexicon.language]) : start].rpartition(",")[2] + " "
      if not _negated(before, lexicon):
        return True
      start = text.find(phrase, start + 1)
  return False


def has_word(sentence: Sentence, words: tuple[str, ...]) -> bool:
  """Whether one of the words stands in the sentence at all."""
  return any(word in sentence.text for word in words)


def content(sentence: Sentence, lexicon: Lexicon) -> frozenset[str]:
  """The words that can tie a sentence to a story: English stems, or pairs of Chinese characters."""
  if lexicon.language == "en":
    words = (_stem(w) for w in sentence.text.split() if len(w) > 2)
    return frozenset(w for w in words if w not in lexicon.stopwords and not w.isdigit())
  text, stop = sentence.text, lexicon.stop_chars
  return frozenset(
    text[i : i + 2]
    for i in range(len(text) - 1)
    if _HAN.match(text[i])
    and _HAN.match(text[i + 1])
    and text[i] not in stop
    and text[i + 1] not in stop
    and text[i : i + 2] not in lexicon.stopwords
  )


@functools.lru_cache(maxsize=512)
def content_of(text: str, language: str) -> frozenset[str]:
  """The content words of a whole text of any length (a story, a persona, a message)."""
  lexicon, found = load(language), set()
  for start in range(0, len(text), MAX_CHARS):
    piece = plain(text[start : start + MAX_CHARS])
    found |= content(Sentence(_reduced(piece, language), False), lexicon)
  return frozenset(found)


def story(background: str, language: str) -> str:
  """The background's events: what stands before its headings on reactions and intentions."""
  ends = load(language).phrases["story_end"]
  kept = []
  for line in background.splitlines():
    heading = line.lstrip().startswith(("#", "**"))
    if heading and kept and any(end in line.casefold() for end in ends):
      break
    kept.append(line)
  return "\n".join(kept)


def units(text: str, language: str) -> list[str]:
  """Words (English) or characters (Chinese) of a text in `plain` form, for counting."""
  if language == "en":
    return re.findall(r"[^\W_]+", text)
  return [c for c in text if c.isalnum()]


def foreign_share(text: str, language: str) -> float:
  """The share of letters that are not of the language's script."""
  letters = [c for c in text if c.isalpha()]
  han = len(_HAN.findall(text))
  other = han if language == "en" else len(letters) - han
  return other / max(1, len(letters))


def _reduced(text: str, language: str) -> str:
  text = _CLAUSE.sub(",", text)
  if language == "zh":
    return "," + re.sub(r"[^\w,]", "", text)
  for short, long in _CONTRACTIONS:
    text = text.replace(short, long)
  return f" , {' '.join(_TOKEN.findall(text))} "


def _plain_cue(phrase: str, language: str) -> str:
  phrase = plain(phrase)
  if language == "zh":
    return _CLAUSE.sub(",", phrase)
  for short, long in _CONTRACTIONS:
    phrase = phrase.replace(short, long)
  words = " ".join(_TOKEN.findall(phrase))
  return f" {words}" if phrase.endswith("*") else f" {words} "


def _negated(before: str, lexicon: Lexicon) -> bool:
  if not any(n in before for n in lexicon.negators):
    return False
  for idiom in lexicon.not_negators:
    before = before.replace(idiom, " ")
  return any(n in before for n in lexicon.negators)


def _stem(word: str) -> str:
  for suffix in ("ing", "ed", "es", "ly", "s", "e"):
    if word.endswith(suffix) and len(word) - len(suffix) >= 3:
      return word[: -len(suffix)]
  return word
