"""Damaged models and data, as a user meets them: one sentence, exit status 2, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train_rm
import train_sft
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.llama import initialise
from nanorlhf.models import Policy
from nanorlhf.run.config import cli
from nanorlhf.storage.checkpoint import save_policy
from nanorlhf.tiny.data import write_world

TINY = Path(__file__).parents[1] / "nanorlhf" / "tiny"
FLAGS = "--preset tiny --device cpu --data data --max_updates 1 --batch_size 2"


@pytest.fixture
def world(tmp_path, monkeypatch, make_config):
    """A model and data in an empty folder, both sound."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(TINY)
    policy = Policy(make_config(vocab_size=tokenizer.vocab_size))
    initialise(policy)
    save_policy(policy, Path("model"), tokenizer)
    return write_world(Path("data"), posts={"train": 8, "valid": 4}, comparisons={"train": 8, "valid1": 4})


def stopped(script, capsys, *flags: str) -> str:
    """The line a script ends with; asserts that it ended as it should and that nothing was written."""
    before = {path for path in Path(".").rglob("*")}
    with pytest.raises(SystemExit) as caught:
        cli(script.main, script.Config, script.PRESETS, script.__doc__, [*FLAGS.split(), *flags])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert {path for path in Path(".").rglob("*")} == before
    return said


def edit(path: str, change) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


def edit_json(path: str, **changes) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text(encoding="utf-8")) | changes), encoding="utf-8")


def without_a_tensor(path="model/model.safetensors"):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path)


WEIGHTS, CONFIG, TOKENS = (f"model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.model"))
DAMAGED_MODELS = [
    (lambda: edit(WEIGHTS, lambda c: c[: len(c) // 2]), "model.safetensors: not a complete"),
    (lambda: edit(WEIGHTS, lambda c: c[:8] + b"\xff" + c[9:]), "model.safetensors: not a complete"),
    (lambda: edit(WEIGHTS, lambda c: b"version https://git-lfs"), "model.safetensors: not a complete"),
    (without_a_tensor, "tensor model.layers.1.mlp.down_proj.weight is missing"),
    (lambda: edit_json(CONFIG, intermediate_size=64), "tensor model.layers.0.mlp.gate_proj.weight has shape"),
    (lambda: edit_json(CONFIG, num_hidden_layers=1), "unexpected tensors ['model.layers.1."),
    (lambda: edit_json(CONFIG, model_type="qwen2"), "model_type is 'qwen2', expected 'llama'"),
    (lambda: edit_json(CONFIG, architectures=["LlamaForSequenceClassification"]), "expected a language model"),
    (lambda: edit_json(CONFIG, architectures=7, vocab_size=32000), "the model has 32000 embedding rows"),
    (lambda: edit(CONFIG, lambda c: c[:-9]), "config.json: not valid JSON"),
    (lambda: Path(TOKENS).unlink(), "no tokenizer.model or tokenizer.json in model"),
    (lambda: edit(TOKENS, lambda c: c[:99]), "tokenizer.model: neither a sentencepiece model nor"),
    (lambda: shutil.rmtree("model"), "model: model is not a folder"),
]


@pytest.mark.parametrize("script, flag", [(train_sft, "--model"), (train_rm, "--sft_model")])
def test_the_wrong_model_is_refused_before_any_post_is_encoded(world, capsys, monkeypatch, script, flag):
    for encode in ("encode_posts", "encode_comparisons"):
        monkeypatch.setattr(script, encode, lambda *_: pytest.fail("posts were encoded first"), raising=False)
    edit_json(CONFIG, vocab_size=32000)
    assert "the model has 32000 embedding rows" in stopped(script, capsys, flag, "model")


@pytest.mark.parametrize("damage, named", DAMAGED_MODELS, ids=[named for _, named in DAMAGED_MODELS])
def test_a_damaged_model_is_named(world, capsys, damage, named):
    damage()
    assert named in stopped(train_sft, capsys, "--model", "model")


def test_a_tokenizer_of_another_model_is_noticed(world, capsys, make_policy, tokenizer):
    save_policy(
        make_policy(vocab_size=32_000), Path("other"), load_tokenizer(TINY)
    )  # BOS and EOS are 1 and 2 there too
    assert "has 1280 ids but the model has 32000 embedding rows" in stopped(train_sft, capsys, "--model", "other")


def test_a_model_that_is_neither_here_nor_can_be_fetched_is_one_sentence(world, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = stopped(train_sft, capsys, "--model", "nobody/llama-of-nobody")
    assert "nobody/llama-of-nobody: not a folder here, not complete in the cache" in said


def line(number: int, change):
    """Change a line (from 1) of a file of lines."""

    def edited(content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        return b"".join(lines)

    return edited


def field(name: str, value) -> callable:
    return lambda row: json.dumps({**json.loads(row), name: value}).encode() + b"\n"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda row: row[:40] + b"\n", "train.jsonl:3: malformed JSON"),
        (field("summary", None), "train.jsonl:3: summary is None, expected text"),
        (field("post", "  \n"), "train.jsonl:3: post is empty"),
        (field("title", "word " * 200), "tokens with an empty post, expected at most max_length 104"),
    ],
)
def test_a_bad_post_is_named(world, capsys, change, named):
    edit("data/tldr/train.jsonl", line(3, change))
    assert named in stopped(train_sft, capsys, "--model", "model")


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda row: row[:-20] + b"\n", "batch1.json:1: malformed JSON"),
        (field("choice", 2), "batch1.json:1: choice is 2, expected 0 or 1"),
        (field("info", {"id": "x", "subreddit": "s", "title": "t", "post": ""}), "batch1.json:1: post is empty"),
        (field("info", {"id": "x", "subreddit": "s", "title": "t"}), "batch1.json:1: post is None"),
    ],
)
def test_a_bad_comparison_is_named(world, capsys, change, named):
    edit("data/comparisons/batch1.json", line(1, change))
    assert named in stopped(train_rm, capsys, "--sft_model", "model")


def test_missing_data_says_which_command_fetches_it(world, capsys):
    Path("data/tldr/train.jsonl").unlink()
    said = stopped(train_sft, capsys, "--model", "model")
    assert "python -m nanorlhf download --data data" in said


def test_held_out_comparisons_that_are_all_about_training_posts_are_refused(world, capsys):
    rows = [json.loads(row) for row in Path("data/comparisons/batch1.json").read_text(encoding="utf-8").splitlines()]
    for path in Path("data/comparisons").glob("*.json"):
        kept = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        for row in kept:
            row["info"]["id"] = rows[0]["info"]["id"]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    assert "is not split by post" in stopped(train_rm, capsys, "--sft_model", "model")
