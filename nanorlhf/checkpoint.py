"""Models in and out of Hugging Face folders, and the state that a run resumes from.

Everything is safetensors and JSON: nothing is unpickled. A folder holds config.json, model.safetensors (or shards and
their index) and the tokenizer's files. What we save loads as

    policy        AutoModelForCausalLM                  same logits
    reward model  AutoModelForSequenceClassification    our score + score_shift, which is kept in config.json
    critic        AutoModelForTokenClassification       the same values

Our q, k, v and gate, up are one matrix each; in the files they are Hugging Face's separate ones.
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanorlhf.errors import UserError
from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy, ScalarModel

MAX_SHARD_BYTES = 5 * 10**9
KEEP = 2  # checkpoints of a run: the newest, and the one before in case the newest is damaged
ARCHITECTURES = {
    "policy": "LlamaForCausalLM",
    "reward_model": "LlamaForSequenceClassification",
    "critic": "LlamaForTokenClassification",
}

# --- config.json -----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError when the file is missing or is not JSON."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found, expected a Hugging Face model folder with a {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}), copy the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: got a JSON {type(raw).__name__}, expected an object")
    return raw


def read_config(folder: str | Path) -> LlamaConfig:
    """LlamaConfig from a folder's config.json. Raises UserError, naming the field, for anything that is no Llama."""
    path = Path(folder) / "config.json"
    raw = read_json(path)

    def refuse(field: str, got, expected: str):
        raise UserError(f"{path}: {field} is {got!r}, expected {expected}: only the Llama architecture is implemented")

    if raw.get("model_type") != "llama":
        refuse("model_type", raw.get("model_type"), "'llama'")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", raw["hidden_act"], "'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field, False):
            refuse(field, raw[field], "false")
    if raw.get("attention_dropout", 0.0) != 0.0:
        refuse("attention_dropout", raw["attention_dropout"], "0.0 (N+ detail 7)")
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    for field in required:
        if field not in raw:
            raise UserError(f"{path}: {field} is missing, expected every field of a Llama config.json")

    heads = raw["num_attention_heads"]
    # Llama 1 and 2 (7B, 13B) leave it out: one key head a query head.
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    theta, scaling = _read_rope(raw, path)
    eos = raw.get("eos_token_id", 2)
    return LlamaConfig(
        **{field: raw[field] for field in required},
        num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        pad_token_id=raw.get("pad_token_id"),
    )


def _read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """(theta, scaling or None) from the hub's rope_theta + rope_scaling, or from transformers 5's rope_parameters."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise UserError(
            f"{path}: rope_theta is missing (and rope_parameters too): without it positions would be wrong, "
            "so it is not guessed"
        )
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default":
        return float(theta), None
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or any(field not in rope for field in fields):
        raise UserError(
            f"{path}: rope_scaling is {kind!r} with {sorted(rope)}, "
            f"expected 'default', or 'llama3' with {sorted(fields)}"
        )
    return float(theta), {"rope_type": "llama3", **{field: rope[field] for field in fields}}


def config_json(
    config: LlamaConfig, kind: str, dtype: torch.dtype, pad_id: int, score_shift: float | None = None
) -> dict:
    """What we write: the hub's spelling, readable by transformers 4 and 5, vLLM and llama.cpp."""
    raw = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": "llama",
        **{k: v for k, v in vars(config).items() if k != "pad_token_id"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": pad_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind != "policy":
        raw |= {
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "classifier_dropout": 0.0,
            "tie_word_embeddings": False,
        }
    if kind == "reward_model":
        raw["score_shift"] = score_shift  # the normalised score is the head's output minus this (N+ detail 15)
    return raw


# --- names -----------------------------------------------------------------------------------------------------------


def file_tensors(name: str, config: LlamaConfig) -> list[tuple[str, int | None]]:
    """Where a parameter of ours lives in a Hugging Face file: [(tensor name, rows)], in order.

    rows is None for the whole parameter.
    """
    for merged, parts, sizes in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj"), config.qkv_sizes),
        ("gate_up_proj", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
    ):
        if merged in name:
            return [(name.replace(merged, part), rows) for part, rows in zip(parts, sizes, strict=True)]
    return [(name, None)]


# --- reading ---------------------------------------------------------------------------------------------------------


def _open_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for one model.safetensors or for shards with an index."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: weight_map is missing, expected a file for each tensor, copy the file again")
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        raise UserError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json, expected a Hugging Face model folder"
        )
    try:
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    except SafetensorError as error:
        raise UserError(f"{single}: not a complete safetensors file ({error}), copy or download it again") from None


def load_weights(model: nn.Module, folder: str | Path, ignore: tuple[str, ...] = ()) -> None:
    """Fill a model's parameters from a folder, one tensor at a time, cast to the parameter's dtype.

    Raises UserError that names the tensor when one is missing, misshapen, or in the file but in no parameter (unless it
    starts with a prefix in `ignore`).
    """
    folder = Path(folder)
    where = _open_tensors(folder)
    unused = {name for name in where if "rotary_emb.inv_freq" not in name and not name.startswith(ignore)}
    handles: dict[Path, object] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for ours, parameter in model.named_parameters():
            begin = 0
            for name, rows in file_tensors(ours, model.config):
                if name not in where:
                    raise UserError(f"{folder}: tensor {name} is missing, expected it for the config.json beside it")
                path = where[name]
                try:
                    if path not in handles:
                        handles[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor = handles[path].get_tensor(name)
                except (SafetensorError, FileNotFoundError) as error:
                    raise UserError(f"{path}: cannot be read ({error}), copy or download it again") from None
                target = parameter if rows is None else parameter[begin : begin + rows]
                if tensor.shape != target.shape:
                    raise UserError(
                        f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                        f"expected {tuple(target.shape)} for the config.json beside it"
                    )
                target.copy_(tensor)
                unused.discard(name)
                begin += rows or 0
    if unused:
        raise UserError(
            f"{folder}: unexpected tensors {sorted(unused)[:4]}, expected exactly those of the config.json beside them"
        )


def _empty(build, device: str, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = build()
    return model.to(dtype).to_empty(device=device)


def load_policy(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """A causal language model from a Hugging Face folder."""
    config = read_config(folder)
    policy = _empty(lambda: Policy(config), device, dtype)
    load_weights(policy, folder, ignore=("lm_head.",) if config.tie_word_embeddings else ())
    return policy


def load_scalar(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ScalarModel:
    """A reward model or a critic from a folder that `save_scalar` wrote; which of the two, its config.json says."""
    raw, config = read_json(Path(folder) / "config.json"), read_config(folder)
    kind = (raw.get("architectures") or [None])[0]
    if kind not in (ARCHITECTURES["reward_model"], ARCHITECTURES["critic"]):
        raise UserError(
            f"{folder}: architectures is {kind}, expected a reward model or a critic; `python train_rm.py` makes one"
        )
    model = _empty(lambda: ScalarModel(config, bias=kind == ARCHITECTURES["critic"]), device, dtype)
    model.score.float()  # the head stays fp32, see models.py
    model.score_shift = float(raw.get("score_shift", 0.0))
    load_weights(model, folder)
    return model


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(folder: str | Path):
    """A folder that is complete or absent: what is written into the yielded one takes its name only at the end.

    An earlier folder of that name stands aside as <name>.old between the two renames, so a kill never loses both.
    """
    folder = Path(folder)
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    if old.exists() and not folder.exists():  # a save was killed between its renames: the earlier folder is the best
        os.replace(old, folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in [*partial.rglob("*"), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' save_file, with a full disk as the OSError that it is."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
        raise


def _file_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for ours, parameter in model.named_parameters():
        begin = 0
        for name, rows in file_tensors(ours, model.config):
            part = parameter if rows is None else parameter[begin : begin + rows]
            tensors[name] = part.detach().to("cpu", torch.float32 if ours.startswith("score.") else dtype).contiguous()
            begin += rows or 0
    return tensors


def _save_model(folder: Path, model: nn.Module, raw_config: dict, dtype: torch.dtype, tokenizer) -> None:
    with atomic_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in _file_state(model, dtype).items():
            if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        if len(shards) == 1:
            _write(shards[0], partial / "model.safetensors")
        else:
            weight_map = {}
            for number, shard in enumerate(shards, start=1):
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                _write(shard, partial / file)
                weight_map |= dict.fromkeys(shard, file)
            total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if "CausalLM" in raw_config["architectures"][0]:
            generation = {key: raw_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            generation |= {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer.save(partial)


def save_policy(policy: Policy, folder: str | Path, tokenizer, dtype: torch.dtype | None = None) -> None:
    """Write a policy as a Hugging Face folder, whole or not at all. dtype: that of the file (default: the weights')."""
    dtype = dtype or policy.head_weight.dtype
    _save_model(Path(folder), policy, config_json(policy.config, "policy", dtype, tokenizer.pad_id), dtype, tokenizer)


def save_scalar(model: ScalarModel, folder: str | Path, tokenizer, dtype: torch.dtype | None = None) -> None:
    """Write a reward model (no bias) or a critic (bias) as a Hugging Face folder, whole or not at all."""
    kind = "reward_model" if model.score.bias is None else "critic"
    dtype = dtype or model.model.embed_tokens.weight.dtype
    raw = config_json(model.config, kind, dtype, tokenizer.pad_id, model.score_shift)
    _save_model(Path(folder), model, raw, dtype, tokenizer)


# --- resume ----------------------------------------------------------------------------------------------------------


def save_state(folder: str | Path, tensors: dict[str, Tensor], state: dict) -> None:
    """A checkpoint of a run: named tensors and a small JSON object; complete or absent."""
    with atomic_folder(folder) as partial:
        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        _write(on_cpu, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def save_checkpoint(run_folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Save checkpoints/step_<step> of a run, then delete all but the newest KEEP: one of a 1B PPO run is 30 GB."""
    save_state(run_folder / "checkpoints" / f"step_{step}", tensors, {"step": step})
    for old in _checkpoints(run_folder)[:-KEEP]:
        shutil.rmtree(old)


def load_state(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The inverse of `save_state`: tensors on the CPU, and the JSON object."""
    folder = Path(folder)
    try:
        with safe_open(folder / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(
            f"{folder}: the checkpoint cannot be read ({error}), remove the folder to resume from an earlier one"
        ) from None
    return tensors, read_json(folder / "state.json")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint under a run folder's checkpoints/, or None. Not one that is .partial or .old."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: str | Path) -> list[Path]:
    found = [path for path in Path(folder, "checkpoints").glob("step_*") if not path.suffix]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
