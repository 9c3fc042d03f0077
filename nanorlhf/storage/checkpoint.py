"""Models in and out of Hugging Face folders.

Everything is safetensors and JSON: nothing is unpickled. A folder holds config.json, model.safetensors (or shards and
their index) and the tokenizer's files. What we save loads as

    policy        AutoModelForCausalLM                  same logits
    reward model  AutoModelForSequenceClassification    our score + score_shift, which is kept in config.json
    critic        AutoModelForTokenClassification       the same values
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanorlhf import parallel, sharding
from nanorlhf.data.hub import base_of_instruct
from nanorlhf.data.tokenizer import Tokenizer, check_matches
from nanorlhf.errors import UserError
from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.storage.atomic import atomic_folder, write_tensors
from nanorlhf.storage.model_config import ARCHITECTURES, config_json, eos_ids, read_config, read_json
from nanorlhf.storage.weights import file_parts, load_weights

MAX_SHARD_BYTES = 5 * 10**9
MUCH = 10**8  # parameters whose memory is worth a look at the files first


SCALARS = (ARCHITECTURES["reward_model"], ARCHITECTURES["critic"])


# --- reading ---------------------------------------------------------------------------------------------------------


def check_folder(folder: str | Path, tokenizer: Tokenizer, scalar: bool = False) -> list[str]:
    """What can be said before any post is encoded or weight read. scalar: it must be a reward model or a critic.

    Returns lines for the console about what is allowed and worth knowing. Raises UserError for a folder that is no
    Llama, of the other kind, or with another tokenizer's rows or EOS.
    """
    config = read_config(folder)
    _kind(folder, scalar)
    if scalar:
        _score_shift(folder)
    stops_at = eos_ids(read_json(Path(folder) / "config.json").get("eos_token_id", config.eos_token_id))
    generation, notes = Path(folder) / "generation_config.json", []  # the other place that may name more of them
    also = eos_ids(read_json(generation).get("eos_token_id")) if generation.exists() else []
    if others := {i for i in (*stops_at, *also) if type(i) is int and i != tokenizer.eos_id}:
        others = ", ".join(map(str, sorted(others)))
        base = base_of_instruct(str(folder)) or "the base model that it was made from, which its model card names"
        if tokenizer.eos_id not in stops_at and all(tokenizer.is_special(i) for i in stops_at):
            raise UserError(
                f"{folder}: its eos_token_id is {', '.join(map(str, stops_at))}, which ends a turn of a chat, expected "
                f"the tokenizer's EOS {tokenizer.eos_id}: this is an instruct model; begin with {base}"
            )
        notes.append(f"note    {folder} also ends at {others}, as instruct models do; summaries end at "
                     f"{tokenizer.eos_id} alone, and one begins with {base}")  # fmt: skip
    check_matches(tokenizer, config.vocab_size, stops_at)
    if spare := config.vocab_size - tokenizer.vocab_size:
        notes.append(f"note    {folder} has {spare:,} rows that no token has: they are left out")
    return notes


def without_spare_rows(config: LlamaConfig, tokenizer: Tokenizer | None) -> LlamaConfig:
    """The config with as many rows as the tokenizer has ids.

    Vocabularies are often padded, to a multiple of 64 say. A policy samples from all its rows: one that is no token
    decodes to nothing, and is out of range in a model that was padded otherwise. So the last rows are never loaded:
    then policy, reference, sampling and every log-prob, in every kernel, are over the tokens that there are.
    """
    return config if tokenizer is None else replace(config, vocab_size=tokenizer.vocab_size)


def _kind(folder: str | Path, scalar: bool) -> str | None:
    """The architecture that config.json names (base models may name none), which is a scalar one or is not."""
    named = read_json(Path(folder) / "config.json").get("architectures")
    kind = named[0] if isinstance(named, list) and named else None
    if scalar and kind not in SCALARS:
        raise UserError(
            f"{folder}: architectures is {kind}, expected a reward model or a critic; `python train_rm.py` makes one"
        )
    if not scalar and kind in SCALARS:
        raise UserError(
            f"{folder}: architectures is {kind}, expected a language model ({ARCHITECTURES['policy']}): this folder "
            "holds a reward model or a critic"
        )
    return kind


def _score_shift(folder: str | Path) -> tuple[float, int | None]:
    """What is subtracted from a reward model's raw score (N+ detail 15), and of how many posts it is the mean, where
    the folder says so. Raises UserError unless they are numbers."""
    raw = read_json(Path(folder) / "config.json")
    shift, posts = raw.get("score_shift", 0.0), raw.get("score_shift_posts")
    if type(shift) not in (int, float) or not math.isfinite(shift):
        raise UserError(
            f"{folder}: score_shift in config.json is {shift!r}, expected a finite number: take another checkpoint"
        )
    if posts is not None and (type(posts) is not int or posts < 1):
        raise UserError(
            f"{folder}: score_shift_posts in config.json is {posts!r}, expected a number of posts: take the line out"
        )
    return float(shift), posts


def _empty(build, folder: str | Path, device: str, dtype: torch.dtype, parts: str | None) -> nn.Module:
    """The model without values; its scalar head, if it has one, in fp32 (models.py). parts: as in `load_policy`. Raises
    UserError, before it takes memory, when the files cannot hold so much."""
    with torch.device("meta"):
        model = build()
    wanted = sum(parameter.numel() for parameter in model.parameters())
    there = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if wanted > max(there, MUCH):  # a number takes two bytes at least; what is small, load_weights refuses by name
        raise UserError(
            f"{folder}: config.json describes {wanted:,} parameters, expected no more than fit into the {there:,} "
            "bytes of safetensors beside it: copy or download the folder again"
        )
    in_parts = parts and parallel.on()
    model = model.to(torch.float32 if in_parts and parts == "masters" else dtype)
    if isinstance(model, ScalarModel):
        model.score.float()
    return (sharding.shard(model, dtype) if in_parts else model).to_empty(device=device)


def _fill(model: nn.Module, folder: str | Path, rows: int, dtype: torch.dtype) -> None:
    load_weights(model, folder, rows=rows)
    for name, parameter in model.named_parameters():
        if sharding.in_parts(model) and parameter.dtype != dtype and not name.startswith("score."):
            part = sharding.local(parameter.detach())
            part.copy_(part.to(dtype))  # masters start from what a single process would have read


def load_policy(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    parts: str | None = None,
) -> Policy:
    """A causal language model from a Hugging Face folder. tokenizer: without the rows that none of its tokens has.
    parts: under torchrun each process reads and keeps its part of every weight (sharding.py), "masters" in fp32 to be
    trained, "frozen" in `dtype`."""
    in_file = read_config(folder)
    config = without_spare_rows(in_file, tokenizer)
    _kind(folder, scalar=False)
    policy = _empty(lambda: Policy(config), folder, device, dtype, parts)
    _fill(policy, folder, in_file.vocab_size, dtype)
    return policy


def load_scalar(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    parts: str | None = None,
) -> ScalarModel:
    """A reward model or a critic from a folder that `save_scalar` wrote; which of the two, its config.json says.
    tokenizer, parts: as in `load_policy`."""
    in_file, is_critic = read_config(folder), _kind(folder, scalar=True) == ARCHITECTURES["critic"]
    config = without_spare_rows(in_file, tokenizer)
    model = _empty(lambda: ScalarModel(config, bias=is_critic), folder, device, dtype, parts)
    model.score_shift, model.shift_posts = _score_shift(folder)
    _fill(model, folder, in_file.vocab_size, dtype)
    return model


# --- writing ---------------------------------------------------------------------------------------------------------


def _file_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the file is to hold, on the CPU; only process 0 keeps it, where there are several."""
    tensors = {}
    for _, name, part in file_parts(model, dtype):
        if parallel.first():
            tensors[name] = part.detach().to("cpu").contiguous()
    return tensors


def _save_model(
    folder: Path, model: nn.Module, raw_config: dict, dtype: torch.dtype, tokenizer, temperature: float = 0.7
) -> None:
    tensors = _file_state(model, dtype)  # every process gives its parts
    if not parallel.first():
        return
    with atomic_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in tensors.items():
            if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        if len(shards) == 1:
            write_tensors(partial / "model.safetensors", shards[0])
        else:
            weight_map = {}
            for number, shard in enumerate(shards, start=1):
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                write_tensors(partial / file, shard)
                weight_map |= dict.fromkeys(shard, file)
            total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if "CausalLM" in raw_config["architectures"][0]:
            generation = {key: raw_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            generation |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(partial)


def save_policy(
    policy: Policy, folder: str | Path, tokenizer, dtype: torch.dtype | None = None, temperature: float = 0.7
) -> None:
    """Write a policy as a Hugging Face folder, whole or not at all. dtype: that of the file (default: the weights').
    temperature: what others sample it at unless told (generation_config.json)."""
    dtype = dtype or sharding.dtype_of(policy)
    raw = config_json(policy.config, "policy", dtype, tokenizer)
    _save_model(Path(folder), policy, raw, dtype, tokenizer, temperature)


def save_scalar(model: ScalarModel, folder: str | Path, tokenizer, dtype: torch.dtype | None = None) -> None:
    """Write a reward model (no bias) or a critic (bias) as a Hugging Face folder, whole or not at all."""
    kind = "reward_model" if model.score.bias is None else "critic"
    dtype = dtype or sharding.dtype_of(model)
    raw = config_json(model.config, kind, dtype, tokenizer, model.score_shift, model.shift_posts)
    _save_model(Path(folder), model, raw, dtype, tokenizer)
