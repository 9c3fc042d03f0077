"""Ids word by word are those of the library on the whole text, wherever the word cache is taken."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import CORPUS, TEXTS
from test_tokenizer_json import BYTE_LEVEL, DIGITS, changed, write_smollm_like

from nanorlhf.data import word_cache
from nanorlhf.data.tokenizer import load_tokenizer

SPECIAL, TEXT = {"special": True}, {"special": False}
WORDS = st.sampled_from(
    [*CORPUS.split(" "), "they'll", " 'S", "\n\n", "  ", "\t1", "2024", "'re", "12th", "...", "a\n"]
)
# Blanks of all kinds, and the control characters that are blanks in Python's `re` and not in the library's.
ascii_text = st.lists(st.one_of(WORDS, st.sampled_from([chr(i) for i in range(128)])), max_size=30).map("".join)


def gpt2(data):
    data["pre_tokenizer"] = BYTE_LEVEL


@pytest.fixture(scope="module", params=["digits alone", "gpt2"])
def both(request, tmp_path_factory):
    """A tokenizer with the word cache, and the library's own of the same file."""
    from tokenizers import Tokenizer

    folder = write_smollm_like(tmp_path_factory.mktemp("words") / "base")
    if request.param == "gpt2":
        folder = changed(folder, folder.with_name("gpt2"), gpt2)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer._encode.__self__, word_cache.WordCache)
    return tokenizer, library


@settings(max_examples=500, deadline=None)
@given(text=ascii_text)
def test_ids_of_words_are_those_of_the_whole_text(both, text):
    tokenizer, library = both
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_a_blank_before_a_digit_ends_as_at_the_end_of_a_text_where_digits_are_cut_out_first():
    assert word_cache.DIGITS_ALONE.findall("a  12") == ["a", "  ", "1", "2"]
    assert word_cache.ALL.findall("a  12") == ["a", " ", " 12"]
    assert word_cache.ALL.findall("a\x1c!b") == ["a", "\x1c!", "b"]  # no blank for the library, but for Python's str


def test_text_that_is_not_ascii_goes_to_the_library_whole(both):
    tokenizer, library = both
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert all(word.isascii() for word in tokenizer._encode.__self__)


def test_a_cache_that_is_full_is_emptied_and_gives_the_same_ids(monkeypatch):
    asked = []

    def encode(word):
        asked.append(word)
        return [len(word), ord(word[0])]

    monkeypatch.setattr(word_cache, "CACHED_WORDS", 3)
    cache = word_cache.WordCache(encode, word_cache.ALL)
    text = "one two three four one"
    assert cache.encode(text) == [x for word in word_cache.ALL.findall(text) for x in [len(word), ord(word[0])]]
    assert len(cache) <= 3 and cache.encode("one") == [3, ord("o")]
    count = len(asked)
    assert cache.encode("one one") == [3, ord("o"), 4, ord(" ")] and len(asked) == count  # both are still there


NFC, LOWER = {"type": "NFC"}, {"type": "Lowercase"}
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "steps, normalisers, added, taken",
    [
        ([DIGITS, BYTE_LEVEL], [], [SPECIAL], word_cache.DIGITS_ALONE),
        ([BYTE_LEVEL], [NFC], [], word_cache.ALL),
        ([DIGITS | {"individual_digits": False}, BYTE_LEVEL], [], [], None),
        ([BYTE_LEVEL, DIGITS], [], [], None),
        ([BYTE_LEVEL | {"use_regex": False}], [], [], None),
        ([SPLIT, BYTE_LEVEL], [], [], None),
        ([BYTE_LEVEL], [LOWER], [], None),
        ([BYTE_LEVEL], [], [SPECIAL, TEXT], None),
    ],
)
def test_only_the_two_known_ways_to_cut_a_text_are_taken(steps, normalisers, added, taken):
    assert word_cache.pattern_of(json.loads(json.dumps(steps)), normalisers, added) is taken
