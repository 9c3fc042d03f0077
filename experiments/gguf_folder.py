"""A GGUF file of a Llama -> a Hugging Face folder, and back: llama.cpp's format, by its own `gguf` package.

    folder_from_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "models/smollm2")    4-bit blocks become bf16 tensors again
    gguf_from_folder("runs/ppo/final", "ppo.gguf")                          for llama.cpp, in f32, f16 or bf16

    python -m experiments.gguf_folder runs/ppo/final ppo.gguf               the second, from a shell

Two things differ between the formats. Names: `blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`. And
the rows of q and k: rotary positions turn pairs of dimensions, which Hugging Face keeps half a head apart (i, i + Dh/2)
and llama.cpp side by side (2i, 2i + 1); a matrix without this permutation loads, runs and writes nonsense.
Left out: sentencepiece tokenizers, shards, quantising (llama.cpp's own `llama-quantize` does it from our file).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from nanorlhf.errors import UserError
from nanorlhf.storage.model_config import read_config, read_json

PARTS = {  # of a block: llama.cpp's name, Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, NORMAL, USER_DEFINED, UNUSED = 3, 1, 4, 5  # llama.cpp's kinds of token
# llama.cpp names how a text is cut before merging instead of storing it: the steps of its name in tokenizer.json.
PRE_TOKENIZERS = {"smollm": [{"type": "Digits", "individual_digits": True}]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def half_a_head_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k (heads * Dh, D) in llama.cpp's row order -> in Hugging Face's."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_a_head_apart`."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def hub_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight. Raises UserError for what no Llama has."""
    stem = name.removesuffix(".weight")
    block, _, part = stem.removeprefix("blk.").partition(".")
    if stem in OUTSIDE and name != stem:
        return f"{OUTSIDE[stem]}.weight"
    if name.startswith("blk.") and block.isdigit() and part in PARTS and name != stem:
        return f"model.layers.{block}.{PARTS[part]}.weight"
    raise UserError(
        f"tensor {name}: expected those of a plain Llama (no biases, no rotary table): another architecture"
    )


def folder_from_gguf(path: str | Path, folder: str | Path) -> int:
    """Write config.json, model.safetensors (bf16) and the tokenizer's files of a GGUF; returns how many parameters.

    Raises UserError for a cut file, another architecture, or a tokenizer that is not known by name.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path, folder = Path(path), Path(folder)
    try:
        reader = GGUFReader(path)
        field = {name: entry.contents() for name, entry in reader.fields.items()}
    except (ValueError, IndexError, KeyError) as error:  # what numpy and gguf say of bytes that are not there
        raise UserError(
            f"{path}: not a complete GGUF file ({type(error).__name__}: {error}), expected that of a Llama: fetch it again"
        ) from None
    architecture = field.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture is {architecture!r}, expected 'llama': another model")
    config = _config(path, field, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).copy()  # (rows, columns) fp32, writable
        for part, number in heads.items():
            if tensor.name.endswith(f".{part}.weight"):
                values = half_a_head_apart(values, number)
        tensors[hub_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in _tokenizer_files(path, field).items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read_config(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def _config(path: Path, field: dict, tied: bool) -> dict:
    try:
        eps = float(str(np.float32(field["llama.attention.layer_norm_rms_epsilon"])))  # 1e-5, kept there in fp32
        heads, width = field["llama.attention.head_count"], field["llama.embedding_length"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(field["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "intermediate_size": field["llama.feed_forward_length"],
            "num_hidden_layers": field["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": field["llama.attention.head_count_kv"],
            "head_dim": field.get("llama.rope.dimension_count", width // heads),
            "max_position_embeddings": field["llama.context_length"],
            "rms_norm_eps": eps,
            "rope_theta": field["llama.rope.freq_base"],
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "bos_token_id": field["tokenizer.ggml.bos_token_id"],
            "eos_token_id": field["tokenizer.ggml.eos_token_id"],
            "torch_dtype": "bfloat16",
        }
    except KeyError as error:
        raise UserError(
            f"{path}: the field {error} is missing, expected every field of a Llama: fetch it again"
        ) from None


def _tokenizer_files(path: Path, field: dict) -> dict[str, dict]:
    """{file name: content} of tokenizer.json and tokenizer_config.json."""
    pre, tokens = field.get("tokenizer.ggml.pre"), field["tokenizer.ggml.tokens"]
    if field.get("tokenizer.ggml.model") != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(PRE_TOKENIZERS)}: take the model's own "
            "folder from the hub"
        )
    kinds = field["tokenizer.ggml.token_type"]
    specials = [i for i, kind in enumerate(kinds) if kind == CONTROL]
    as_added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    model["merges"] = [merge.split(" ") for merge in field["tokenizer.ggml.merges"]]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i]} | as_added for i in specials],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*PRE_TOKENIZERS[pre], BYTE_LEVEL]},
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"add_prefix_space": True},
        "model": model,
    }
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: field.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about |= {name: tokens[i] for name, i in ids.items() if i is not None}
    return {"tokenizer.json": whole, "tokenizer_config.json": about}
