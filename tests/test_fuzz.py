"""Whatever a file or a command line holds, it works or is refused with one clear sentence: never a traceback or a hang.

    FUZZ_CASES=1500 python -m pytest tests/test_fuzz.py       the full run: 1,500 cases of each of the kinds below

Cases are sound inputs with bytes flipped, cut, doubled or put in (what disks, downloads and editors do), JSON values of
any other kind, and texts that mean something to a tokenizer, a terminal, a shell or a browser.
"""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as eval_script
import train_ppo
import train_rm
import train_sft
from nanorlhf.data.tldr import encode_query, encode_response, load_comparisons, load_posts
from nanorlhf.data.tokenizer import llama3_specials, load_tokenizer
from nanorlhf.errors import UserError, one_line
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy
from nanorlhf.run.config import parse
from nanorlhf.run.run import Run
from nanorlhf.storage.checkpoint import load_policy, save_policy
from nanorlhf.storage.jsonl import read_jsonl
from nanorlhf.storage.model_config import read_config
from nanorlhf.storage.resume import damage, load_state, save_state

TINY = Path(__file__).parents[1] / "nanorlhf" / "tiny"
CASES = int(os.environ.get("FUZZ_CASES", "20"))
SECONDS = 20  # for one case, on a busy machine
MEMORY_FREE = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
    derandomize="FUZZ_CASES" not in os.environ,
)

HOSTILE = (
    "<|end_of_text|>", "</s>", "<s>", "<unk>", "<|begin_of_text|>", "<script>alert(1)</script>", "\x00", "\x1b[2J",
    "\u202e", "\ud800", "\u2028", "../../etc/passwd", "'; rm -rf /", "\r\n", "TL;DR:", "a" * 5000, " " * 5000, "é" * 99,
)  # fmt: skip
LUMPS = (b"[" * 100_000, b'{"a":' * 20_000, b"9" * 5000, b"\0" * 64, b"\n\n", b"x" * 2**20)
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40), st.lists(st.sampled_from(HOSTILE)).map("".join))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.just(10**30), st.just(-1), st.just(0)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content after a few accidents."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0 if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del content[place:]
            case 2:
                del content[place : place + draw(st.integers(1, 30))]
            case 3:
                content[place:place] = draw(st.binary(max_size=12))
            case 4:
                content[place:place] = content[place : place + draw(st.integers(1, 300))]
            case 5:
                piece = draw(
                    st.sampled_from([b"[" * 100_000, b'{"a":' * 20_000, b"9" * 5000, b"\0" * 64, b"\n\n", b"x" * 2**20])
                )
                content[place:place] = piece
    return bytes(content)


@st.composite
def changed(draw, row: dict) -> dict:
    """A JSON object with one to three fields, at any depth, that are something else or are missing."""
    row = json.loads(json.dumps(row))
    for _ in range(draw(st.integers(1, 3))):
        at = row
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.booleans()):
                at[key] = draw(values)
            else:
                del at[key]
            break
    return row


def accepted(call, *args):
    """What the call returns, None when it refuses in one sentence; fails when it takes more than SECONDS."""

    def late(*_):
        raise AssertionError(f"{call} takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return call(*args)
    except UserError as error:
        assert len(one_line(str(error))) > 10 and "\n" not in one_line(str(error))
        return None
    except SystemExit as stop:  # tyro says what is wrong in a box of its own
        assert stop.code == 2
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


POST = {"id": "t3_1", "subreddit": "tifu", "title": "A title", "post": "A post.\nTwo lines.", "summary": "It is short."}
INFO = {name: POST[name] for name in ("id", "subreddit", "title", "post")}
PAIR = {
    "info": INFO, "summaries": [{"text": "one", "policy": "a"}, {"text": "two", "policy": "b"}], "choice": 1,
    "worker": "w", "batch": "batch1", "split": "train", "extra": {"confidence": 3},
}  # fmt: skip


def lines(row: dict):
    """A file of one sound line and one that is not: damaged in its bytes, or in its values."""
    sound = json.dumps(row).encode() + b"\n"
    other = changed(row).map(lambda r: json.dumps(r).encode() + b"\n")
    return st.one_of(damaged(sound), other).map(lambda line: sound + line)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@MEMORY_FREE
@given(content=lines(POST))
def test_posts(content, tmp_path, tokenizer):
    write(tmp_path / "tldr" / "train.jsonl", content)
    for post in accepted(load_posts, tmp_path, "train") or []:
        ids = accepted(encode_query, tokenizer, post.subreddit, post.title, post.post, 104)
        assert ids is None or (len(ids) <= 104 and ids.count(tokenizer.bos_id) == 1 and tokenizer.eos_id not in ids)
        response = encode_response(tokenizer, post.summary)
        assert response.count(tokenizer.eos_id) == 1  # text that spells a special token is text


@MEMORY_FREE
@given(content=lines(PAIR))
def test_comparisons(content, tmp_path):
    write(tmp_path / "comparisons" / "batch1.json", content)
    accepted(load_comparisons, tmp_path, "train")


@MEMORY_FREE
@given(content=lines({"step": 1, "loss": 0.5}))
def test_metrics(content, tmp_path):
    write(tmp_path / "metrics.jsonl", content)
    accepted(read_jsonl, tmp_path / "metrics.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A sound model folder."""
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    policy = Policy(config)
    initialise(policy)
    save_policy(policy, tmp_path_factory.mktemp("model") / "model", tokenizer)
    return tmp_path_factory.getbasetemp() / "model0" / "model"


@MEMORY_FREE
@given(data=st.data())
def test_a_models_config(data, model, tmp_path):
    content = (model / "config.json").read_bytes()
    other = changed(json.loads(content)).map(lambda row: json.dumps(row).encode())
    write(tmp_path / "config.json", data.draw(st.one_of(damaged(content), other)))
    if accepted(read_config, tmp_path):
        write(tmp_path / "model.safetensors", (model / "model.safetensors").read_bytes())
        accepted(load_policy, tmp_path)


@MEMORY_FREE
@given(data=st.data())
def test_a_models_weights(data, model, tmp_path):
    whole = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    write(tmp_path / "config.json", (model / "config.json").read_bytes())
    text = data.draw(changed(header).map(lambda row: json.dumps(row).encode()))
    sound_length = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    head = damaged(whole[: 8 + length]).map(lambda begin: begin + whole[8 + length :])
    write(tmp_path / "model.safetensors", data.draw(st.one_of(st.just(sound_length), head)))
    accepted(load_policy, tmp_path)


def tiktoken_file() -> bytes:
    import base64

    return b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))


def tokenizer_json() -> bytes:
    from nanorlhf.data.tokenizer import LLAMA3_SPLIT

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    vocab = {chr(b if b in printable else 0x100 + others.index(b)): b for b in range(256)}
    added = [{"content": name, "id": i} for name, i in llama3_specials(256).items()]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
    return json.dumps({"model": model, "added_tokens": added, "pre_tokenizer": {"pretokenizers": [split]}}).encode()


@pytest.mark.parametrize("name", ["tiktoken", "tokenizer.json", "sentencepiece"])
@MEMORY_FREE
@given(data=st.data())
def test_tokenizer_files(name, data, tmp_path):
    sound = {"tiktoken": tiktoken_file, "tokenizer.json": tokenizer_json}.get(
        name, (TINY / "tokenizer.model").read_bytes
    )()
    content = damaged(sound)
    if name == "tokenizer.json":
        content = st.one_of(content, changed(json.loads(sound)).map(lambda row: json.dumps(row).encode()))
    write(tmp_path / ("tokenizer.json" if name == "tokenizer.json" else "tokenizer.model"), data.draw(content))
    if found := accepted(load_tokenizer, tmp_path):
        found.decode(found.encode("A word, and </s> <|end_of_text|> 99."))


WORDS = st.one_of(
    st.sampled_from(
        "--lr --batch_size --preset tiny --resume auto --overwrite --seed -1 0 1e99 nan inf --run_name a/b .. --policy "
        "--device cpu cuda:99 --keep --on_nan skip --stop_kl --no_preflight -- - = --= --lr= --lr=3 --resume=auto"
        "".split()
    ),
    texts,
)


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo, eval_script], ids=lambda script: script.__name__)
@MEMORY_FREE
@given(words=st.lists(WORDS, max_size=6))
def test_command_lines(script, words, tmp_path):
    words = [word for word in words if word not in ("-h", "--help")]
    cfg = accepted(parse, script.Config, script.PRESETS, script.__doc__, ["--preset", "tiny", *words])
    if cfg is not None and accepted(lambda: Run("sft", cfg, root=tmp_path / "runs")):
        assert (tmp_path / "runs" / cfg.run_name).resolve().parent == (tmp_path / "runs").resolve()


@MEMORY_FREE
@given(data=st.data())
def test_checkpoints(data, tmp_path, model):
    import torch

    if not (tmp_path / "step_1").exists():
        save_state(tmp_path / "step_1", {"a": torch.arange(5.0)}, {"step": 1})
    name = data.draw(st.sampled_from(["state.safetensors", "state.json", "SHA256SUMS"]))
    path = tmp_path / "step_1" / name
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    try:
        changed_it = path.read_bytes() != whole
        assert bool(damage(tmp_path / "step_1")) == changed_it
        assert (accepted(load_state, tmp_path / "step_1") is None) == changed_it
    finally:
        path.write_bytes(whole)


def test_a_line_of_many_megabytes_and_a_million_lines_do_not_take_the_memory(tmp_path):
    draw = random.Random(0)
    long = {**POST, "post": "".join(draw.choice("ab \n") for _ in range(5_000_000))}
    write(tmp_path / "tldr" / "train.jsonl", json.dumps(long).encode() + b"\n" + b"\n" * 1_000_000)
    (post,) = load_posts(tmp_path, "train")
    assert len(post.post) == 5_000_000
