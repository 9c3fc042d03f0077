"""Weights in: every layout and dtype of a Hugging Face folder, and damage that is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanorlhf.errors import UserError
from nanorlhf.storage import checkpoint, weights
from nanorlhf.storage.checkpoint import load_policy, save_policy
from nanorlhf.storage.weights import TensorFile


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def same(model, other) -> bool:
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


def with_header(path, change, extra=b""):
    """Rewrite a safetensors file's header as `change` returns it; the tensors' bytes stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :] + extra)


def with_offsets(header: bytes, change) -> bytes:
    """A header in which the last tensor has other data_offsets."""
    entries = json.loads(header)
    last = max((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    entries[last]["data_offsets"] = change(*entries[last]["data_offsets"])
    return json.dumps(entries).encode()


# --- layouts and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("piece_bytes", [2**24, 64])  # a tensor is cast in one piece, or in many and a rest
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_dtype_on_disk_is_read_as_safetensors_reads_it(
    make_policy, tokenizer, tmp_path, monkeypatch, shard_bytes, piece_bytes, stored, wanted
):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(weights, "PIECE_BYTES", piece_bytes)
    save_policy(make_policy(tie_word_embeddings=False), tmp_path / "final", tokenizer, dtype=stored)
    expected = {}
    for path in (tmp_path / "final").glob("*.safetensors"):
        expected |= load_file(path)
    assert {tensor.dtype for tensor in expected.values()} == {stored}
    loaded = load_policy(tmp_path / "final", dtype=wanted)
    parts = {name: part for _, name, part in weights.file_parts(loaded)}
    assert parts.keys() == expected.keys()
    for name, tensor in expected.items():
        assert parts[name].dtype == wanted and torch.equal(parts[name], tensor.to(wanted)), name


def test_a_tied_model_has_one_matrix_and_an_untied_one_two(make_policy, make_sequences, tokenizer, tmp_path):
    """The same embedding with another config.json: TinyLlama stores a head of its own, Llama-3.2-1B does not."""
    policy = make_policy(tie_word_embeddings=False)
    save_policy(policy, tmp_path / "final", tokenizer)
    untied = load_policy(tmp_path / "final")
    assert not torch.equal(untied.head_weight, untied.model.embed_tokens.weight)
    path = tmp_path / "final" / "config.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'),
        encoding="utf-8",
    )
    edit_tensors(tmp_path / "final", lambda tensors: tensors.pop("lm_head.weight"))
    tied = load_policy(tmp_path / "final")
    assert tied.head_weight is tied.model.embed_tokens.weight
    (sequence,) = make_sequences([7])
    assert not torch.allclose(tied.logits([sequence])[0], untied.logits([sequence])[0])


PEAK = """
import resource, sys, torch
from nanorlhf.storage.checkpoint import load_policy
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
policy = load_policy(sys.argv[1], dtype=torch.bfloat16)
print((peak() - before) / sum(parameter.nbytes for parameter in policy.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_loading_takes_hardly_more_memory_than_the_model_has(make_policy, tokenizer, tmp_path):
    """The usual way, a mapped file, takes twice the model's size."""
    policy = make_policy(vocab_size=50_000, hidden_size=1024, intermediate_size=2048)
    save_policy(policy, tmp_path / "final", tokenizer, dtype=torch.bfloat16)  # 130 MB
    program = [sys.executable, "-c", PEAK, tmp_path / "final"]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, encoding="utf-8", check=True)
    assert float(done.stdout) < 1.3


# --- tensors that do not fit ------------------------------------------------------------------------------------------

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved[1], lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(UserError, match=rf"tensor {Q_PROJ} is missing"):
        load_policy(saved[1])


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved, name):
    edit_tensors(saved[1], lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(UserError, match=rf"tensor {name} has shape \((\d+).*expected \((\d+)"):
        load_policy(saved[1])


def test_a_tensor_that_no_parameter_takes_is_named(saved):
    edit_tensors(saved[1], lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"unexpected tensors \['model.layers.2.mlp.up_proj.weight'\]"):
        load_policy(saved[1])


def test_what_older_files_carry_besides_weights_is_passed_over(make_policy, tokenizer, tmp_path):
    policy = make_policy()
    save_policy(policy, tmp_path / "final", tokenizer)
    # Llama 2's files hold the rotary frequencies, and some tied models a copy of the head.
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": policy.head_weight.detach().clone(),
    }
    edit_tensors(tmp_path / "final", lambda tensors: tensors.update(extra))
    assert same(load_policy(tmp_path / "final"), policy)


# --- files that are damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 4000, -1])
def test_a_truncated_file_is_refused_by_name(saved, keep):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: .* copy or download it again"):
        load_policy(saved[1])


def test_a_missing_shard_is_named(make_policy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    save_policy(make_policy(), tmp_path / "final", tokenizer)
    sorted((tmp_path / "final").glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-\d+.safetensors: not found"):
        load_policy(tmp_path / "final")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["model-00001-of-00002.safetensors"]}',
                                     '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ""}}'])  # fmt: skip
def test_an_index_without_a_map_is_refused_by_name(saved, content):
    (saved[1] / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"model.safetensors.index.json: weight_map is missing"):
        load_policy(saved[1])


def test_a_folder_without_weights_is_refused(saved):
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load_policy(saved[1])


def test_other_formats_are_named_and_never_unpickled(saved):
    (saved[1] / "model.safetensors").rename(saved[1] / "pytorch_model.bin")
    with pytest.raises(UserError, match="but pytorch_model.bin, which is not read: nothing is unpickled"):
        load_policy(saved[1])


def test_a_tensor_that_is_in_the_index_but_not_in_its_shard_is_named(make_policy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    save_policy(make_policy(), tmp_path / "final", tokenizer)
    path = tmp_path / "final" / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    first, *_, last = sorted(set(index["weight_map"].values()))
    assert index["weight_map"]["model.norm.weight"] == last
    index["weight_map"]["model.norm.weight"] = first
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{first}: tensor model.norm.weight is missing, though the index says"):
        load_policy(tmp_path / "final")


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda header: header[:-9], "Expecting|Unterminated|delimiter"),
        (lambda header: b"[1, 2]", "its header is a JSON list"),
        (lambda header: b"\xff" * 40, "utf-8|codec"),
        (lambda header: header.replace(b'"data_offsets"', b'"data_offzets"', 1), "the header's entry of"),
        (lambda header: header.replace(b'"shape":[', b'"shape":[-', 1), "the header's entry of"),
        (lambda header: header.replace(b'"F32"', b'["F32"]', 1), "the header's entry of"),
        (lambda header: header.replace(b'"shape":[', b'"shape":[1.5,', 1), "the header's entry of"),
        (lambda header: with_offsets(header, lambda first, last: [float(first), last]), "the header's entry of"),
        (lambda header: with_offsets(header, lambda first, last: [0, last - first]), "expected it to begin at"),
        (lambda header: header.replace(b'"F32"', b'"F16"', 1), r"tensor .* has [\d,]+ bytes for shape"),
        (lambda header: header.replace(b'"F32"', b'"F8_E4M3"', 1), "is F8_E4M3, expected F32, F16, BF16"),
        (lambda header: header.replace(b'"F32"', b'"I64"', 1), "is I64, expected F32, F16, BF16, F64: quantised"),
    ],
)
def test_a_corrupt_header_is_refused_by_file(saved, change, named):
    with_header(saved[1] / "model.safetensors", change)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*({named})"):
        load_policy(saved[1])


def test_bytes_after_the_last_tensor_are_refused(saved):
    with_header(saved[1] / "model.safetensors", lambda header: header, extra=b"\0")
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete .* where its header promises"):
        load_policy(saved[1])


def test_a_file_that_is_cut_while_it_is_read_is_named(saved):
    path = saved[1] / "model.safetensors"
    file = TensorFile(path)
    name = max(file.names, key=lambda name: file._entries[name]["data_offsets"])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="became shorter while it was read"):
        file.read(name, torch.empty(file._entries[name]["shape"]))
    file.close()
