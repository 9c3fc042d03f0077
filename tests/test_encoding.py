"""Many texts at once: the same ids as one by one, whoever encodes them, remembered only as long as they are true."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tldr import Characters, comparison, write_comparisons

from nanorlhf.data import encoding
from nanorlhf.data.encoding import TokenLists, describe, encode_comparisons, encode_posts, length_report
from nanorlhf.data.tldr import Post, encode_query, encode_response, load_comparisons
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError

TINY = Path(__file__).parents[1] / "nanorlhf" / "tiny"
POSTS = [Post(str(n), "s", "t" * (n % 7), f"post {n}\n" * (1 + n % 5), f"summary {n}") for n in range(1, 120)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def always_cached(monkeypatch):
    monkeypatch.setattr(encoding, "CACHED_FROM", 1)


@pytest.fixture
def tokenizer():
    return load_tokenizer(TINY)


def one_by_one(posts, tokenizer, limit):
    queries = [encode_query(tokenizer, p.subreddit, p.title, p.post, limit) for p in posts]
    return queries, [encode_response(tokenizer, p.summary) for p in posts]


def saved() -> list[Path]:
    return sorted(Path("data/tokens").iterdir()) if Path("data/tokens").exists() else []


# --- the same ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("piece", [7, 500])
def test_posts_are_encoded_in_their_order_by_any_number_of_workers(tokenizer, monkeypatch, cores, piece):
    monkeypatch.setattr(encoding, "_cores", lambda: cores)
    monkeypatch.setattr(encoding, "PARALLEL_FROM", 1)
    monkeypatch.setattr(encoding, "PIECE", piece)
    queries, responses = encode_posts(POSTS, tokenizer, 40)
    expected_queries, expected_responses = one_by_one(POSTS, tokenizer, 40)
    assert list(queries) == expected_queries and list(responses) == expected_responses
    whole, _ = one_by_one(POSTS, tokenizer, 10_000)
    assert queries.truncated == sum(len(query) > 40 for query in whole) > 0
    assert not saved()  # so few are not worth a file


def test_comparisons_are_encoded_in_their_order(tmp_path):
    tokenizer = Characters()
    write_comparisons(tmp_path, [comparison(), comparison(choice=1)])
    queries, chosen, rejected = encode_comparisons(load_comparisons(tmp_path, "train"), tokenizer, 512)
    assert list(queries) == [encode_query(tokenizer, "cats", "My cat", "It hates me.", 512)] * 2
    assert [tokenizer.decode(ids) for ids in chosen] == [" zero", " one"]
    assert [tokenizer.decode(ids) for ids in rejected] == [" one", " zero"]


def test_comparisons_are_cut_to_the_same_length_as_posts(tmp_path):
    write_comparisons(tmp_path, [comparison()])
    (loaded,) = load_comparisons(tmp_path, "train")
    long = replace(loaded, post=replace(loaded.post, post="one line\n" * 50))
    tokenizer = Characters()
    (query,), _, _ = encode_comparisons([long], tokenizer, 100)
    assert query == encode_query(tokenizer, "cats", "My cat", "one line\n" * 50, 100) and len(query) <= 100


def test_token_lists_are_read_like_lists_of_lists():
    lists = TokenLists(np.arange(6, dtype=np.int32), np.array([2, 0, 3, 1]))
    assert list(lists) == [[0, 1], [], [2, 3, 4], [5]] and len(lists) == 4
    assert lists[np.int64(2)] == lists[-2] == [2, 3, 4] and type(lists[0]) is list and type(lists[0][0]) is int
    assert lists[1:3] == [[], [2, 3, 4]] and lists[::-1] == [[5], [2, 3, 4], [], [0, 1]]
    with pytest.raises(IndexError):
        lists[4]


def test_progress_walks_over_the_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 50)
    seen = []

    def progress(items, total, what):
        seen.append((total, what))
        yield from items

    assert len(encode_posts(POSTS, tokenizer, 40, progress)[0]) == len(POSTS)
    assert seen == [(3, "encoding posts")]


@pytest.mark.parametrize("cores", [1, 2])
def test_a_post_that_does_not_fit_is_the_users_error_in_every_process(tokenizer, monkeypatch, cores):
    monkeypatch.setattr(encoding, "_cores", lambda: cores)
    monkeypatch.setattr(encoding, "PARALLEL_FROM", 1)
    monkeypatch.setattr(encoding, "PIECE", 10)
    with pytest.raises(UserError, match="post t3_x: query: .* tokens with an empty post"):
        encode_posts([*POSTS, Post("t3_x", "s", "word " * 100, "p", "s")], tokenizer, 40)


def test_a_worker_that_is_killed_is_one_sentence_and_no_hang(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    monkeypatch.setattr(encoding, "PARALLEL_FROM", 1)
    monkeypatch.setattr(encoding, "PIECE", 10)
    parent = os.getpid()
    monkeypatch.setattr(encoding, "response_text", lambda *_: os._exit(9) if os.getpid() != parent else None)
    with pytest.raises(UserError, match="a worker process was killed"):
        encode_posts(POSTS, tokenizer, 40)


# --- remembered -------------------------------------------------------------------------------------------------------


def test_a_second_time_the_ids_come_from_disk(tokenizer, monkeypatch, always_cached):
    first = encode_posts(POSTS, tokenizer, 40)
    assert len(saved()) == 1
    monkeypatch.setattr(encoding, "_pieces", None)  # nothing is encoded any more
    second = encode_posts(POSTS, load_tokenizer(TINY), 40)
    assert [list(lists) for lists in second] == [list(lists) for lists in first]
    assert second[0].truncated == first[0].truncated > 0 and second[0].tokens.dtype == np.int32


def test_whatever_the_ids_depend_on_makes_a_new_file(tokenizer, tmp_path, monkeypatch, always_cached):
    encode_posts(POSTS, tokenizer, 40)
    others = [[Post(p.id, p.subreddit, p.title, p.post, p.summary) for p in POSTS] for _ in range(4)]
    others[0][50] = Post("x", "s", "t", POSTS[50].post, "other summary")
    others[1][50] = Post("x", "s", "tother", "post", "summary")
    others[2][50] = Post("x", "s", "t", "otherpost", "summary")  # the same letters as before in another field
    others[3].pop()
    for count, posts in enumerate(others, start=2):
        encode_posts(posts, tokenizer, 40)
        assert len(saved()) == count
    encode_posts(POSTS, tokenizer, 41)
    tokenizer._files["tokenizer.model"] += b" "
    encode_posts(POSTS, tokenizer, 40)
    assert len(saved()) == 7
    code = tmp_path / "encoding.py"
    code.write_text("changed", encoding="utf-8")
    monkeypatch.setattr(encoding, "CODE", [code])
    encode_posts(POSTS, tokenizer, 40)
    assert len(saved()) == 8
    monkeypatch.setattr(encoding, "LIBRARIES", "sentencepiece 9.9")
    encode_posts(POSTS, tokenizer, 40)
    assert len(saved()) == 9


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c[:10], lambda c: b"", lambda c: c[:-9] + b"?" + c[-8:]]
)
def test_a_damaged_file_is_noticed_said_and_replaced(tokenizer, always_cached, capsys, damage):
    first = encode_posts(POSTS, tokenizer, 40)
    (path,) = saved()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert [list(lists) for lists in encode_posts(POSTS, tokenizer, 40)] == [list(lists) for lists in first]
    assert f"{path} is damaged: encoding again" in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_no_half_of_a_file(tokenizer, monkeypatch, always_cached):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        encode_posts(POSTS, tokenizer, 40)
    assert saved() == []


# --- described --------------------------------------------------------------------------------------------------------


def test_describe_gives_mean_p99_max_and_the_share_over_a_limit():
    lengths = list(range(1, 101))
    assert describe(lengths) == {"mean": 50.5, "p99": pytest.approx(99.01), "max": 100.0}
    assert describe(lengths, limit=90)["share_over_limit"] == 0.1
    assert describe([53], limit=53)["share_over_limit"] == 0
    with pytest.raises(UserError, match="lengths: got none"):
        describe([])


def test_the_report_says_what_was_cut_and_what_is_too_long_to_be_sampled():
    queries = TokenLists(np.zeros(40, np.int32), np.array([10, 10, 20]), truncated=1)
    responses = TokenLists(np.zeros(60, np.int32), np.array([5, 5, 50]))
    assert length_report(queries, [responses], 40) == (
        "queries mean 13 max 20, 33.3% cut; responses mean 20 p99 49 max 50, 33.3% longer than response_length 40"
    )
    assert length_report(queries, [responses, responses]).endswith("responses mean 20 p99 50 max 50")
