"""Queries, responses, files and data order (N+ details 2, 3, 21; traps T1 to T8, T10, T11, T45)."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import CORPUS, train_sentencepiece, write_llama3_folders

from nanorlhf.data import tldr
from nanorlhf.data.tldr import (
    BETWEEN_WORDS,
    CLOSING,
    SLACK,
    ComparisonStats,
    Post,
    batch_indices,
    encode_query,
    encode_response,
    fit_query,
    format_query,
    load_comparisons,
    load_posts,
    without_posts_of,
)
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError


class Characters:
    """One token a character; ids are code points above the three special ids."""

    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, text):
        return [3 + ord(character) for character in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(chr(i - 3) for i in ids if i > 2)


class Words(Characters):
    """Finished words of up to 15 letters are one token, others one a letter: adding a letter can save 14 tokens."""

    def encode(self, text):
        ids = []
        for word in text.replace(" ", "\0 \0").replace("\n", "\0\n\0").split("\0"):
            ids += [3 + sum(map(ord, word))] if len(word) in (5, 15) else super().encode(word)
        return ids


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    write_llama3_folders(root)
    train_sentencepiece(root / "llama2", add_dummy_prefix=True, byte_fallback=True, vocab_size=500)
    train_sentencepiece(root / "plain", add_dummy_prefix=False, byte_fallback=True, vocab_size=500)
    real = {name: load_tokenizer(root / name) for name in ("llama3", "llama2", "plain")}
    return real | {"characters": Characters(), "words": Words()}


EVERY = ["llama3", "llama2", "plain", "characters", "words"]


def naive_query(tokenizer, subreddit, title, post, max_length):
    """Detail 2.2 as the authors wrote it: encode everything again after every cut."""
    while True:
        query = [tokenizer.bos_id, *tokenizer.encode(format_query(subreddit, title, post))]
        if len(query) <= max_length:
            return query
        if not post:
            raise UserError("does not fit")
        post = post[: post.rfind("\n")] if "\n" in post else post[:-1]


def outcome(function, *args):
    try:
        return function(*args)
    except UserError:
        return "error"


# ---------------------------------------------------------------------------------------------------------- queries


def test_the_query_format_is_exact_and_fields_are_raw():
    assert format_query("cats", "My cat", "It hates\nme.") == (
        "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It hates\nme.\n\nTL;DR:"
    )
    raw = "SUBREDDIT: r/ a \n\nTITLE: \tb\n\n\nPOST:  ﬁ\u00a0\n \n\nTL;DR:"
    assert format_query(" a ", "\tb\n", " ﬁ\u00a0\n ") == raw


FRAME = len(format_query("s", "t", "")) + 1  # characters around the post, and BOS


@pytest.mark.parametrize(
    "post, kept",
    [
        ("123456789abc", "12345678"),
        ("ab\ncd\nefghij", "ab\ncd"),
        ("ab\n\ncdefghijkl", "ab\n"),
        ("a\nbcdefghijklmnop", "a"),
        ("\nabcdefghijkl", ""),
        ("abcdefghijkl\n", "abcdefgh"),
        ("12345678", "12345678"),
        ("\n" * 9, "\n" * 8),
        ("", ""),
    ],
)
def test_truncation_gives_the_golden_vectors(post, kept):
    tokenizer = Characters()
    query = encode_query(tokenizer, "s", "t", post, FRAME + 8)
    assert query == [tokenizer.bos_id, *tokenizer.encode(format_query("s", "t", kept))]


def test_a_query_that_does_not_fit_without_its_post_is_an_error():
    assert len(encode_query(Characters(), "s", "t", "abc", FRAME)) == FRAME
    for post in ("", "abc", "\n", "a\nb", "x" * 1000):
        with pytest.raises(UserError, match=f"query: {FRAME} tokens with an empty post, expected at most max_length"):
            encode_query(Characters(), "s", "t", post, FRAME - 1)
    with pytest.raises(UserError, match=f"query: {FRAME} tokens"):
        encode_query(Characters(), "s", "t", "a\nb", 5)


@pytest.mark.parametrize("name", EVERY)
def test_a_query_has_one_bos_counted_in_its_length_and_keeps_both_ends(tokenizers, name):
    tokenizer = tokenizers[name]
    whole = encode_query(tokenizer, "cats", "My cat", CORPUS, 10_000)
    assert encode_query(tokenizer, "cats", "My cat", CORPUS, len(whole)) == whole
    cut = encode_query(tokenizer, "cats", "My cat", CORPUS, len(whole) - 1)
    assert len(cut) < len(whole)
    for query in (whole, cut):
        assert query[0] == tokenizer.bos_id and Counter(query)[tokenizer.bos_id] == 1
        assert tokenizer.eos_id not in query
        if name != "words":
            text = tokenizer.decode(query)
            assert text.startswith("SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: My sister")
            assert text.endswith("\n\nTL;DR:")


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.one_of(st.sampled_from("the cat's, 123 n't 'll I. \n \n\n -- wow! é 🙂 ▁ \t  x".split(" ")),
                             st.text(max_size=6)), max_size=60),
    name=st.sampled_from(["llama3", "llama2", "plain", "characters", "words"]),
)  # fmt: skip
def test_a_text_may_be_encoded_in_parts_that_are_cut_between_words(tokenizers, words, name):
    text = " ".join(words)
    for found in BETWEEN_WORDS.finditer(text):
        for end in (found.end() + 1, len(text)):  # also where the text ends after the first letter
            whole, cut = text[:end] + CLOSING, found.start()
            ids = tokenizers[name].encode(whole[:cut]) + tokenizers[name].encode(whole[cut:])
            assert ids == tokenizers[name].encode(whole)


def test_how_much_of_a_post_is_kept_is_told():
    assert fit_query(Characters(), "s", "t", "ab\ncd", FRAME + 8)[1] == 5
    assert fit_query(Characters(), "s", "t", "ab\ncdefghi", FRAME + 8)[1] == 2
    assert fit_query(Characters(), "s", "t", "abcdefghi", FRAME + 8)[1] == 8


@settings(max_examples=300, deadline=None)
@given(
    post=st.text(st.one_of(st.sampled_from("  \n\nabcdethis.é🙂"), st.characters(codec="utf-8")), max_size=150),
    room=st.integers(-2, 60),
    name=st.sampled_from(EVERY),
)
def test_the_fast_search_gives_the_slow_rules_answer_on_any_text(tokenizers, post, room, name):
    tokenizer = tokenizers[name]
    max_length = room + len(naive_query(tokenizer, "cats", "t", "", 10_000))
    args = (tokenizer, "cats", "t", post, max_length)
    for part in (5, 400):  # characters: short texts have parts too
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tldr, "PART", part)
            assert outcome(encode_query, *args) == outcome(naive_query, *args)


@pytest.mark.parametrize("name", EVERY)
def test_the_fast_search_gives_the_slow_rules_answer_on_prose(tokenizers, name):
    rng = random.Random(0)
    words = CORPUS.split()
    for _ in range(25):
        separators = rng.choice([" ", "  ", " \n", "  \n\n"])
        post = "".join(rng.choice(words) + rng.choice(separators) for _ in range(rng.randint(1, 150)))
        args = (tokenizers[name], "cats", "My cat", post, rng.randint(60, 150))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tldr, "PART", rng.choice([1, 20, 100, 400]))
            assert outcome(encode_query, *args) == outcome(naive_query, *args)


def test_a_word_that_is_cheaper_when_finished_is_kept_whole():
    tokenizer = Words()
    post = "x" * 14 + "y"  # 15 letters are one token, 14 are fourteen
    whole = encode_query(tokenizer, "s", "t", post, 10_000)
    longer = encode_query(tokenizer, "s", "t", post + " zz zz zz", len(whole) + 1)
    assert longer == encode_query(tokenizer, "s", "t", post + " ", 10_000)


def test_after_the_line_ends_only_characters_of_the_first_line_are_dropped():
    class CheapNewlines(Characters):
        def encode(self, text):
            return super().encode(text.replace("\n\n\n", "\n"))  # "abc\n" is now cheaper than "abc"

    tokenizer = CheapNewlines()
    query = encode_query(tokenizer, "s", "t", "abc\ndef", FRAME + 2)
    assert query == naive_query(tokenizer, "s", "t", "abc\ndef", FRAME + 2)
    assert query == [tokenizer.bos_id, *tokenizer.encode(format_query("s", "t", "ab"))]


@pytest.mark.parametrize("name", ["llama3", "llama2", "plain"])
def test_a_longer_text_never_saves_more_tokens_than_the_margin_of_the_search(tokenizers, name):
    text = (CORPUS + "=" * 200 + " " * 200 + "\n" * 60 + "I'm 123456789 🙂🙂 " + "ha" * 50) * 2
    highest = worst = 0
    for length in range(len(text)):
        count = len(tokenizers[name].encode(format_query("cats", "t", text[:length])))
        highest = max(highest, count)
        worst = max(worst, highest - count)
    assert worst <= SLACK / 2


@pytest.mark.parametrize("name", ["llama3", "llama2", "plain"])
@pytest.mark.parametrize("kind", ["prose", "letters", "lines"])
def test_a_post_of_100_kb_is_cut_quickly(tokenizers, name, kind):
    prose = CORPUS.replace("\n", " ")
    post = {"prose": prose * (100_000 // len(prose)), "letters": "a" * 100_000, "lines": "\n" * 100_000}[kind]
    start = time.perf_counter()
    query = encode_query(tokenizers[name], "cats", "My cat", post, 512)
    assert time.perf_counter() - start < 5
    assert 490 < len(query) <= 512


# --------------------------------------------------------------------------------------------------------- responses


@pytest.mark.parametrize("name", EVERY)
def test_a_response_has_one_leading_space_whether_or_not_the_text_brings_it(tokenizers, name):
    tokenizer = tokenizers[name]
    response = encode_response(tokenizer, "A cat.")
    assert response == encode_response(tokenizer, " A cat.") == [*tokenizer.encode(" A cat."), tokenizer.eos_id]
    assert response[0] == tokenizer.encode(" A")[0]
    assert response != encode_response(tokenizer, "  A cat.")  # a second space is the text's own: kept
    assert response.count(tokenizer.eos_id) == 1 and tokenizer.bos_id not in response


@pytest.mark.parametrize("name", ["llama3", "llama2", "plain"])
@pytest.mark.parametrize("summary", ["A cat.", " A cat.", "don 't . ", "x</s>y<|end_of_text|>", "\nnext", "🙂", ""])
def test_query_and_response_decode_to_the_joined_text(tokenizers, name, summary):
    tokenizer = tokenizers[name]
    query = encode_query(tokenizer, "cats", "My cat", "It does n't . ", 512)
    response = encode_response(tokenizer, summary)
    expected = format_query("cats", "My cat", "It does n't . ") + " " + summary.removeprefix(" ")
    assert tokenizer.decode(query + response) == expected
    assert response.index(tokenizer.eos_id) == len(response) - 1


# -------------------------------------------------------------------------------------------------------- data order


def test_an_epoch_shows_every_item_at_most_once_and_drops_only_the_ragged_end():
    n, batch_size = 23, 5
    epochs = []
    for epoch in range(3):
        batches = [batch_indices(n, batch_size, seed=7, step=4 * epoch + batch) for batch in range(4)]
        assert all(batch.shape == (batch_size,) for batch in batches)
        seen = np.concatenate(batches)
        assert len(set(seen.tolist())) == 20 and seen.min() >= 0 and seen.max() < n
        epochs.append(tuple(seen))
    assert len(set(epochs)) == 3  # reshuffled
    assert len({frozenset(range(n)) - set(epoch) for epoch in epochs}) > 1  # not always the same three are dropped


def test_an_epoch_that_divides_shows_every_item():
    seen = np.concatenate([batch_indices(12, 4, seed=0, step=step) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert batch_indices(5, 5, seed=0, step=9).shape == (5,)


def test_every_epoch_has_its_own_order():
    epochs = [
        np.concatenate([batch_indices(30, 10, 1, 3 * epoch + i) for i in range(3)]).tolist() for epoch in (0, 1, 2)
    ]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_seed_and_step_alone():
    first = [batch_indices(100, 10, seed=1, step=step).tolist() for step in range(25)]
    np.random.seed(0)
    assert [batch_indices(100, 10, seed=1, step=step).tolist() for step in reversed(range(25))] == first[::-1]
    assert batch_indices(100, 10, seed=2, step=0).tolist() != first[0]
    assert first[0] != list(range(10))


def test_the_order_is_the_same_on_every_machine():
    assert batch_indices(10, 4, seed=1, step=0).tolist() == [8, 4, 7, 0]
    assert batch_indices(10, 4, seed=1, step=2).tolist() == [7, 2, 4, 6]  # the second epoch


def test_a_batch_larger_than_the_data_is_an_error():
    for batch_size in (0, -1, 11):
        with pytest.raises(UserError, match=f"batch_size: got {batch_size}, expected 1 to 10"):
            batch_indices(10, batch_size, seed=0, step=0)
    with pytest.raises(UserError, match="batch_size: got 1, expected 1 to 0"):
        batch_indices(0, 1, seed=0, step=0)
    with pytest.raises(UserError, match="seed: got -1"):
        batch_indices(10, 1, seed=-1, step=0)


# ------------------------------------------------------------------------------------------------------------- files


def post_row(**changes):
    row = {"id": "t3_1", "subreddit": "cats", "title": "My cat", "post": "It hates me.", "summary": "cat hates me"}
    return {name: value for name, value in (row | changes).items() if value != "absent"}


def write_posts(data, lines, folder="tldr", split="train"):
    path = data / folder / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def comparison(**changes):
    row = {
        "info": {"id": "t3_1", "subreddit": "cats", "title": "My cat", "post": "It hates me."},
        "summaries": [{"text": " zero", "policy": "ref", "note": None}, {"text": " one", "policy": "sup4"}],
        "choice": 0,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 2},
    }
    return {name: value for name, value in (row | changes).items() if value != "absent"}


def write_comparisons(data, rows, name="batch3"):
    path = data / "comparisons" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("folder", ["tldr", "tldr_3_filtered"])
def test_posts_are_read_raw_and_in_order(tmp_path, folder):
    rows = [post_row(title=" é\u2028x \n", post="a\n\n b ", extra=1), "", post_row(id="t3_2", subreddit="", title="")]
    write_posts(tmp_path, rows, folder, "valid")
    assert load_posts(tmp_path, "valid") == [
        Post("t3_1", "cats", " é\u2028x \n", "a\n\n b ", "cat hates me"),
        Post("t3_2", "", "", "It hates me.", "cat hates me"),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"id": "t3_1", "subred', r"train\.jsonl:3: malformed JSON"),
        ("<html>", r"train\.jsonl:3: malformed JSON"),
        ("[1, 2]", r"train\.jsonl:3: got a list, expected a JSON object"),
        (post_row(post="absent"), r"train\.jsonl:3: post is None, expected text"),
        (post_row(subreddit=None), r"train\.jsonl:3: subreddit is None, expected text"),
        (post_row(id=5), r"train\.jsonl:3: id is 5, expected text"),
        (post_row(post=" \n"), r"train\.jsonl:3: post is empty"),
        (post_row(summary=""), r"train\.jsonl:3: summary is empty"),
    ],
)
def test_a_bad_post_is_named_by_file_and_line(tmp_path, row, message):
    write_posts(tmp_path, [post_row(), "", row, post_row()])
    with pytest.raises(UserError, match=message):
        load_posts(tmp_path, "train")


def test_bytes_that_are_no_utf_8_are_named_by_file_and_line(tmp_path):
    path = write_posts(tmp_path, [post_row()])
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:2: malformed JSON"):
        load_posts(tmp_path, "train")


def test_missing_or_empty_files_say_what_was_expected_and_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"no .*tldr.test\.jsonl .*python -m nanorlhf download --data "):
        load_posts(tmp_path, "test")
    with pytest.raises(UserError, match=r"no .*comparisons.batch\*\.json.*python -m nanorlhf download --data "):
        load_comparisons(tmp_path, "train")
    with pytest.raises(UserError, match="split: got 'validation', expected one of train, valid, test"):
        load_posts(tmp_path, "validation")
    with pytest.raises(UserError, match="split: got 'test', expected one of train, valid, valid1, valid2"):
        load_comparisons(tmp_path, "test")
    write_posts(tmp_path, [""])
    with pytest.raises(UserError, match=r"train\.jsonl: no posts"):
        load_posts(tmp_path, "train")


def test_the_chosen_text_is_the_one_that_choice_points_at(tmp_path):
    write_comparisons(tmp_path, [comparison(), comparison(choice=1, extra={"confidence": 9})])
    first, second = load_comparisons(tmp_path, "train")
    assert (first.chosen, first.rejected) == (" zero", " one")
    assert (first.chosen_policy, first.rejected_policy) == ("ref", "sup4")
    assert (second.chosen, second.rejected) == (" one", " zero")
    assert (second.chosen_policy, second.rejected_policy) == ("sup4", "ref")
    assert first.post == Post("t3_1", "cats", "My cat", "It hates me.", "")
    assert (first.batch, first.split, first.worker) == ("batch3", "train", "w")
    assert (first.confidence, second.confidence) == (2, 9)


def test_splits_cnndm_rows_and_equal_summaries_are_told_apart_and_counted(tmp_path):
    article = {"id": "x", "site": "cnn", "title": "t", "article": "text", "post": None, "subreddit": None}
    equal = [{"text": " same", "policy": "a"}, {"text": " same", "policy": "b"}]
    tenth = [comparison(worker="a"), comparison(split="valid1"), comparison(summaries=equal)]
    third = [comparison(worker="b"), comparison(split="valid2"), comparison(split="valid")]
    write_comparisons(tmp_path, tenth, "batch10")
    write_comparisons(tmp_path, third, "batch3")
    write_comparisons(tmp_path, [comparison(info=article, split="valid1"), comparison(batch="cnndm2")], "cnndm0")

    stats = ComparisonStats()
    assert [c.worker for c in load_comparisons(tmp_path, "train", stats)] == ["a", "b"]
    assert stats == ComparisonStats(kept=2, equal_summaries=1, cnndm=2, other_split=3)
    assert str(stats) == "comparisons: 2 kept; dropped 1 with equal summaries, 2 CNN/DM, 3 of other splits"
    assert [c.split for c in load_comparisons(tmp_path, "valid")] == ["valid1", "valid2", "valid"]
    assert [c.split for c in load_comparisons(tmp_path, "valid2")] == ["valid2"]


def test_held_out_comparisons_are_about_other_posts_than_those_of_the_training_split(tmp_path):
    def of(post_id, split):
        return comparison(info={"id": post_id, "subreddit": "s", "title": "t", "post": "p"}, split=split)

    write_comparisons(tmp_path, [of("a", "train"), of("a", "train"), of("a", "valid1"), of("b", "valid2")])
    train, valid = load_comparisons(tmp_path, "train"), load_comparisons(tmp_path, "valid")
    assert [c.post.id for c in without_posts_of(train, valid)] == ["b"]
    assert without_posts_of(valid, valid) == []


@pytest.mark.parametrize("extra", ["absent", None, {}, {"confidence": None}])
def test_confidence_may_be_absent(tmp_path, extra):
    write_comparisons(tmp_path, [comparison(extra=extra)])
    assert load_comparisons(tmp_path, "train")[0].confidence is None


def _texts(*texts):
    return [{"text": text, "policy": "p"} for text in texts]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"info": {"id"', "malformed JSON"),
        (comparison(info="absent"), "info is None, expected an object"),
        (comparison(info={"id": "x", "title": "t", "post": None, "subreddit": "s"}), "post is None, expected text"),
        (comparison(info={"id": "x", "title": "t", "post": " \n", "subreddit": "s"}), "post is empty, expected text"),
        (comparison(summaries=_texts("a")), "expected exactly two objects"),
        (comparison(summaries=_texts("a", "b", "c")), "expected exactly two objects"),
        (comparison(summaries=["a", "b"]), "expected exactly two objects"),
        (comparison(summaries=_texts("a", None)), "text is None, expected text"),
        (comparison(choice=2), "choice is 2, expected 0 or 1"),
        (comparison(choice=-1), "choice is -1, expected 0 or 1"),
        (comparison(choice=None), "choice is None, expected 0 or 1"),
        (comparison(choice=True), "choice is True, expected 0 or 1"),
        (comparison(split="dev"), "split is 'dev', expected train, valid1 or valid2"),
        (comparison(extra={"confidence": "high"}), "extra.confidence is 'high', expected a whole number"),
        (comparison(extra="high"), "extra.confidence is 'high', expected a whole number"),
    ],
)
def test_a_bad_comparison_is_named_by_file_and_line(tmp_path, row, message):
    write_comparisons(tmp_path, [comparison(), row])
    with pytest.raises(UserError, match=r"batch3\.json:2: .*" + message):
        load_comparisons(tmp_path, "train")


def test_a_split_without_comparisons_is_an_error(tmp_path):
    write_comparisons(tmp_path, [comparison()])
    with pytest.raises(UserError, match="no comparisons of split 'valid' .*1 of other splits"):
        load_comparisons(tmp_path, "valid")
