"""Models in and out of Hugging Face folders, and the state that a run resumes from.

Everything is safetensors and JSON: nothing is unpickled. A folder holds config.json, model.safetensors (or shards and
their index) and the tokenizer's files. What we save loads as

    policy        AutoModelForCausalLM                  same logits
    reward model  AutoModelForSequenceClassification    our score + score_shift, which is kept in config.json
    critic        AutoModelForTokenClassification       the same values
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
from nanorlhf.model_config import ARCHITECTURES, config_json, read_config, read_json
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.weights import file_parts, load_weights

MAX_SHARD_BYTES = 5 * 10**9
KEEP = 2  # checkpoints of a run: the newest, and the one before in case the newest is damaged


# --- reading ---------------------------------------------------------------------------------------------------------


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
    """safetensors' save_file, with a full disk as the OSError that it is, readable by whoever may read the folder."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600, and a server often runs as another user
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
        raise


def _file_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for ours, name, part in file_parts(model):
        tensors[name] = part.detach().to("cpu", torch.float32 if ours.startswith("score.") else dtype).contiguous()
    return tensors


def _save_model(
    folder: Path, model: nn.Module, raw_config: dict, dtype: torch.dtype, tokenizer, temperature: float = 0.7
) -> None:
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
            generation |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer.save(partial)


def save_policy(
    policy: Policy, folder: str | Path, tokenizer, dtype: torch.dtype | None = None, temperature: float = 0.7
) -> None:
    """Write a policy as a Hugging Face folder, whole or not at all. dtype: that of the file (default: the weights').
    temperature: what others sample it at unless told (generation_config.json)."""
    dtype = dtype or policy.head_weight.dtype
    raw = config_json(policy.config, "policy", dtype, tokenizer.pad_id)
    _save_model(Path(folder), policy, raw, dtype, tokenizer, temperature)


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
