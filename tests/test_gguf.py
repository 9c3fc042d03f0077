"""A folder of ours as a GGUF and back: every tensor, the tokenizer and the fields that llama.cpp reads."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_tokenizer import QUERY, TEXTS
from test_tokenizer_json import write_smollm_like

from experiments.gguf_folder import (
    folder_from_gguf,
    gguf_from_folder,
    half_a_head_apart,
    hub_name,
    llama_cpp_answers,
    side_by_side,
)
from experiments.out_again import out_again, same_in_transformers
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.rollout import generate
from nanorlhf.storage.checkpoint import load_policy, save_policy


@pytest.fixture
def final(make_policy, tmp_path):
    """(folder that a run of ours would end with, its tokenizer) of a model whose tokenizer is SmolLM2's kind."""
    tokenizer = load_tokenizer(write_smollm_like(tmp_path / "base"))
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    policy = make_policy(vocab_size=tokenizer.vocab_size, rope_scaling=None, tie_word_embeddings=True, **ids)
    save_policy(policy, tmp_path / "final", tokenizer)
    return tmp_path / "final", tokenizer


def test_the_order_of_rows_is_undone_exactly():
    rows = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)  # 2 heads of 8
    there = side_by_side(rows, 2)
    assert there[:4, 0].tolist() == [rows[0, 0], rows[4, 0], rows[1, 0], rows[5, 0]]  # i and i + Dh/2, side by side
    assert np.array_equal(half_a_head_apart(there, 2), rows) and not np.array_equal(there, rows)


def test_a_gguf_of_our_folder_read_back_is_the_same_model(final, tmp_path):
    folder, tokenizer = final
    gguf_from_folder(folder, tmp_path / "model.gguf", "f32")
    folder_from_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
    ours, back = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert ours.keys() == back.keys() and all(torch.equal(ours[name].float(), back[name]) for name in ours)
    again = load_tokenizer(tmp_path / "back")
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert again._tokens == tokenizer._tokens and all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    ids = [tokenizer.bos_id, *tokenizer.encode(QUERY)]
    written = [generate(load_policy(f), [ids], 12, temperature=0.0)[0].tolist() for f in (folder, tmp_path / "back")]
    assert written[0] == written[1]


def test_the_gguf_has_the_fields_that_llama_cpp_reads(final, tmp_path):
    from gguf import GGUFReader

    folder, tokenizer = final
    gguf_from_folder(folder, tmp_path / "model.gguf", "f16")
    field = {name: entry.contents() for name, entry in GGUFReader(tmp_path / "model.gguf").fields.items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert field["general.architecture"] == "llama" and field["llama.block_count"] == config["num_hidden_layers"]
    assert field["llama.rope.freq_base"] == config["rope_theta"]
    assert field["tokenizer.ggml.add_bos_token"] is True and field["tokenizer.ggml.add_space_prefix"] is False
    assert field["tokenizer.ggml.pre"] == "smollm" and len(field["tokenizer.ggml.tokens"]) == config["vocab_size"]
    ids = [field[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]


@pytest.mark.parametrize("keep", [0, 100, 3000, -200])
def test_a_cut_gguf_is_one_sentence(final, tmp_path, keep):
    gguf_from_folder(final[0], tmp_path / "model.gguf", "f16")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:keep] if keep >= 0 else content[:keep])
    with pytest.raises(UserError, match="cut.gguf: not a complete GGUF file"):
        folder_from_gguf(tmp_path / "cut.gguf", tmp_path / "back")


def test_a_tensor_that_no_llama_has_is_named():
    with pytest.raises(UserError, match="tensor blk.0.attn_q.bias: expected those of a plain Llama"):
        hub_name("blk.0.attn_q.bias")
    with pytest.raises(UserError, match="tensor blk.3.post_ffw_norm.weight"):
        hub_name("blk.3.post_ffw_norm.weight")


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(final, tmp_path):
    data = json.loads((final[0] / "tokenizer.json").read_text(encoding="utf-8"))
    data["pre_tokenizer"]["pretokenizers"].pop(0)
    (final[0] / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError, match="pre_tokenizer is .*, expected that of smollm"):
        gguf_from_folder(final[0], tmp_path / "model.gguf", "f16")


def test_llama_cpp_writes_the_same_greedy_text(final, tmp_path):
    """llama.cpp itself, as the package xllamacpp ships it, asked with the ids of a query."""
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp (Linux, macOS; 34 MB)")
    folder, tokenizer = final
    gguf_from_folder(folder, tmp_path / "model.gguf", "f32")
    query = [tokenizer.bos_id, *tokenizer.encode(QUERY)]
    (ours,), _ = generate(load_policy(folder), [query], 12, temperature=0.0)
    (answer,) = llama_cpp_answers(tmp_path / "model.gguf", [query], 12)
    written, expected = (text.replace("\ufffd", "") for text in (answer, tokenizer.decode(ours.tolist())))
    assert written == expected and len(written) > 5  # half characters are shown in two ways


def test_our_decoder_transformers_and_llama_cpp_are_compared_on_one_folder(final, tmp_path):
    folder, tokenizer = final
    queries = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in (QUERY, QUERY[:20])]
    found = out_again(str(folder), queries, 12, torch.device("cpu"))
    assert found.pop("same_in_llama_cpp", 2) == 2
    assert found == {"posts": 2, "same_greedy_text": 2, "gguf_same_tensors": True}
    assert same_in_transformers(str(folder), queries, [[7] * 12] * 2, torch.device("cpu")) == 0  # it can say no
