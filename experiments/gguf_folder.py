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

from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError, one_sentence
from nanorlhf.run.streams import as_command
from nanorlhf.storage.model_config import read_config, read_json
from nanorlhf.storage.weights import TensorFolder

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
CONTROL = 3  # llama.cpp's kind of a special token
KINDS = {"f32": 0, "f16": 1, "bf16": 32}  # llama.cpp's numbers for a file's type
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


def folder_from_gguf(path: str | Path, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write config.json, model.safetensors (in dtype) and the tokenizer's files of a GGUF; returns how many parameters.

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
            f"{path}: not a complete GGUF file ({type(error).__name__}: {error}), expected that of a Llama: fetch "
            "it again"
        ) from None
    architecture = field.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture is {architecture!r}, expected 'llama': another model")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = _config(path, field, tied, dtype)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).copy()  # (rows, columns) fp32, writable
        for part, number in heads.items():
            if tensor.name.endswith(f".{part}.weight"):
                values = half_a_head_apart(values, number)
        tensors[hub_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in _tokenizer_files(path, field).items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read_config(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def _config(path: Path, field: dict, tied: bool, dtype: torch.dtype) -> dict:
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
            "torch_dtype": str(dtype).removeprefix("torch."),
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


def gguf_from_folder(folder: str | Path, path: str | Path, dtype: str = "f16") -> None:
    """Write a policy's folder as a GGUF. dtype: f32, f16 or bf16, of the matrices; norms stay f32, as llama.cpp wants.

    Raises UserError for a tokenizer that llama.cpp has no name for here (of SmolLM2's kind it has).
    """
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize

    folder, config = Path(folder), read_config(folder)
    if dtype not in KINDS:
        raise UserError(f"dtype: got {dtype!r}, expected one of {', '.join(KINDS)}")
    if config.rope_scaling:
        raise UserError(
            f"{folder}: rope_scaling is {config.rope_scaling}, expected null: use llama.cpp's own converter"
        )
    pre, data = _pre_tokenizer(folder), read_json(folder / "tokenizer.json")
    writer = GGUFWriter(path, "llama")
    writer.add_name(folder.parent.name if folder.name == "final" else folder.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(KINDS[dtype])

    tokens, kinds = [f"[unused{i}]" for i in range(config.vocab_size)], [TokenType.UNUSED] * config.vocab_size
    for token, i in data["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for token in data["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    tokenizer = load_tokenizer(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)  # our queries open with BOS
    writer.add_add_space_prefix(False)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    theirs = {theirs: ours for ours, theirs in PARTS.items()} | {theirs: ours for ours, theirs in OUTSIDE.items()}
    with TensorFolder(folder) as tensors:
        for name in tensors.where:
            stem = name.removesuffix(".weight")
            block, _, part = stem.removeprefix("model.layers.").partition(".")
            ours = f"blk.{block}.{theirs[part]}" if stem.startswith("model.layers.") else theirs[stem]
            target = torch.empty(tensors.shape(name), dtype=torch.float32)
            tensors.read(name, target)
            values = target.numpy()
            for head_part, number in heads.items():
                if ours.endswith(head_part):
                    values = side_by_side(values, number)
            kind = GGMLQuantizationType[dtype.upper()] if values.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(f"{ours}.weight", quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name for the steps of a folder's pre_tokenizer."""
    step = read_json(folder / "tokenizer.json").get("pre_tokenizer")
    steps = step["pretokenizers"] if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    for name, own in PRE_TOKENIZERS.items():
        if len(steps) == len(own) + 1 and steps[:-1] == own and steps[-1].get("type") == "ByteLevel":
            return name
    raise UserError(
        f"{folder}: its pre_tokenizer is {str(step)[:200]}, expected that of {' or '.join(PRE_TOKENIZERS)}: llama.cpp "
        "would cut texts otherwise; use its own converter"
    )


def llama_cpp_answers(file: Path, queries: list[list[int]], tokens: int) -> list[str]:
    """What llama.cpp itself, as the package xllamacpp ships it, writes after each query, greedily; it stops at EOS."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 1024, 1
    params.cpuparams.n_threads, params.warmup = 1, False
    server = xllamacpp.Server(params)
    asked = {"n_predict": tokens, "temperature": 0.0, "cache_prompt": False}
    return [server.handle_completions(asked | {"prompt": query})["choices"][0]["text"] for query in queries]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gguf_folder", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a policy's folder, such as runs/ppo/final")
    parser.add_argument("gguf", type=Path, help="the file to write")
    parser.add_argument("--dtype", default="f16", help="f32, f16 or bf16 [f16]")
    args = parser.parse_args()
    with one_sentence():
        gguf_from_folder(args.folder, args.gguf, args.dtype)
        print(f"{args.gguf}: {args.gguf.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    as_command(main)
