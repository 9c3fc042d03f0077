"""Text that nobody here wrote: each real post and comparison at hand, through readers, tokenizers, cuts and packing."""

import os
from pathlib import Path

import pytest
from test_tldr import naive_query
from test_tokenizer import reference_ids, train_sentencepiece, write_llama3_folders

from nanorlhf.data.encoding import encode_comparisons, encode_posts
from nanorlhf.data.tldr import (
    BETWEEN_WORDS,
    ComparisonStats,
    fit_query,
    format_query,
    load_comparisons,
    load_posts,
    without_posts_of,
)
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.packing import pack, split_by_tokens

DATA = Path(os.environ.get("NANORLHF_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not (DATA / "tldr" / "valid.jsonl").is_file(), reason="no real Reddit posts: set NANORLHF_DATA to their folder"
)
LIMIT = 512
BOTH = ["llama3", "llama2"]


@pytest.fixture(scope="module")
def posts():
    return load_posts(DATA, "train") + load_posts(DATA, "valid")


@pytest.fixture(scope="module")
def folders(posts, tmp_path_factory):
    """Tokenizers of both formats, learned from every tenth post, so that most of the text is new to them."""
    root = tmp_path_factory.mktemp("tokenizers")
    corpus = "\n".join(f"{p.title}\n{p.post}\n{p.summary}" for p in posts[::10])
    write_llama3_folders(root, corpus, size=3000)
    train_sentencepiece(root / "llama2", corpus, add_dummy_prefix=True, byte_fallback=True, vocab_size=3000)
    return root


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folders / name) for name in BOTH}


@pytest.fixture(scope="module")
def encoded(posts, tokenizers):
    return {name: encode_posts(posts, tokenizers[name], LIMIT) for name in BOTH}


def spelled(text: str, name: str) -> str:
    """What a tokenizer can give back: Llama 2's writes a space as U+2581, so a typed U+2581 comes back as a space."""
    return text.replace("▁", " ") if name == "llama2" else text


def test_every_post_is_read_and_no_post_is_in_two_splits(posts):
    assert len(posts) == len({post.id for post in posts}) > 9000


@pytest.mark.parametrize("name", BOTH)
def test_every_query_fits_and_keeps_both_ends_and_nothing_else_is_lost(posts, tokenizers, encoded, name):
    tokenizer, (queries, responses) = tokenizers[name], encoded[name]
    cut = 0
    for post, query, response in zip(posts, queries, responses, strict=True):
        assert len(query) <= LIMIT and query[0] == tokenizer.bos_id
        ids = query[1:] + response[:-1]
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert response[-1] == tokenizer.eos_id
        text = tokenizer.decode(query)
        begin = spelled(f"SUBREDDIT: r/{post.subreddit}\n\nTITLE: {post.title}\n\nPOST: ", name)
        assert text.startswith(begin) and text.endswith("\n\nTL;DR:")
        kept = text.removeprefix(begin).removesuffix("\n\nTL;DR:")
        assert spelled(post.post, name).startswith(kept)
        cut += kept != spelled(post.post, name)
        # the response continues the query with exactly one space, and both come back letter for letter
        assert tokenizer.decode(query + response) == f"{text} {spelled(post.summary, name).removeprefix(' ')}"
    assert 0 < cut == queries.truncated < 0.5 * len(posts)


@pytest.mark.parametrize("name", BOTH)
def test_real_posts_are_cut_as_the_slow_rule_cuts_them(posts, tokenizers, encoded, name):
    queries, _ = encoded[name]
    whole = tokenizers[name].encode
    long = [i for i, p in enumerate(posts) if len(p.post) > 1200 and len(queries[i]) > LIMIT - 60]
    checked = 0
    for i in long:
        p = posts[i]
        if 1 + len(whole(format_query(p.subreddit, p.title, p.post))) > LIMIT and len(p.post) < 4000:
            assert queries[i] == naive_query(tokenizers[name], p.subreddit, p.title, p.post, LIMIT)
            assert fit_query(tokenizers[name], p.subreddit, p.title, p.post, LIMIT)[1] < len(p.post)
            checked += 1
        if checked == 25:
            return
    raise AssertionError(f"only {checked} posts to compare")


@pytest.mark.parametrize("name", BOTH)
def test_a_real_text_may_be_encoded_in_parts_that_are_cut_between_words(posts, tokenizers, name):
    encode, cuts = tokenizers[name].encode, 0
    for post in posts[::12]:
        text = post.post[:1500]
        for found in list(BETWEEN_WORDS.finditer(text))[::15]:
            begin = max(0, found.start() - 100)
            assert encode("x" + text[begin : found.start()]) + encode(text[found.start() :]) == encode(
                "x" + text[begin:]
            )
            cuts += 1
    assert cuts > 5000


@pytest.mark.parametrize("name", BOTH)
def test_ids_equal_those_of_transformers_on_thousands_of_real_texts(posts, folders, tokenizers, name):
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    if name == "llama3":
        reference = PreTrainedTokenizerFast(tokenizer_file=str(folders / name / "tokenizer.json"))
    else:
        reference = LlamaTokenizer.from_pretrained(folders / name, legacy=False)
    texts = [text for p in posts[::8] for text in (p.title, p.post, " " + p.summary)]
    texts += ["<|end_of_text|>" + p.summary + "</s><|begin_of_text|>" for p in posts[::80]]
    assert len(texts) > 3000
    for text in texts:
        assert tokenizers[name].encode(text) == reference_ids(reference, text), repr(text)


def test_packing_loses_and_repeats_no_token(encoded):
    queries, responses = encoded["llama3"]
    sequences = [query + response for query, response in zip(queries, responses, strict=True)]
    groups = split_by_tokens([len(sequence) for sequence in sequences], 16_384)
    assert [i for group in groups for i in group] == list(range(len(sequences)))
    for group in groups[::10]:
        packed = pack([sequences[i] for i in group])
        assert [rows.tolist() for rows in packed.unpack(packed.tokens)] == [sequences[i] for i in group]
        assert packed.tokens[packed.last_rows()].tolist() == [sequences[i][-1] for i in group]


@pytest.mark.parametrize("name", BOTH)
def test_every_comparison_keeps_both_texts_with_one_space(tokenizers, name):
    stats = ComparisonStats()
    train, valid = load_comparisons(DATA, "train", stats), load_comparisons(DATA, "valid", stats)
    assert len(train) + len(valid) == stats.kept == 1000 and stats.equal_summaries == stats.cnndm == 0
    assert without_posts_of(train, valid) == valid
    every, tokenizer = train + valid, tokenizers[name]
    queries, chosen, rejected = encode_comparisons(every, tokenizer, LIMIT)
    for c, query, *pair in zip(every, queries, chosen, rejected, strict=True):
        text = tokenizer.decode(query)
        assert len(query) <= LIMIT and text.startswith(f"SUBREDDIT: r/{c.post.subreddit}\n") and "r/None" not in text
        for ids, summary in zip(pair, (c.chosen, c.rejected), strict=True):
            assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
            assert summary[0] == " " != summary[1]
            assert tokenizer.decode(query + ids) == text + spelled(summary, name)
