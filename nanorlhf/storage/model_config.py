"""config.json of a Hugging Face model folder: read into a LlamaConfig, and written so that others read it.

The hub spells rotary positions as rope_theta and rope_scaling, transformers 5 as rope_parameters; both are read, the
hub's is written. Anything that is no Llama is refused by the name of the field.
"""

import json
import math
from pathlib import Path

import torch

from nanorlhf.errors import UserError
from nanorlhf.llama import LlamaConfig

# Fields that would change the computation, and the value that leaves it a plain Llama (also where they are absent).
ORDINARY = (
    ("model_type", "llama", "'llama'"),
    ("hidden_act", "silu", "'silu'"),
    ("attention_bias", False, "false"),
    ("mlp_bias", False, "false"),
    ("quantization_config", None, "no such field (the weights as they were trained)"),
    ("sliding_window", None, "no such field"),
    ("partial_rotary_factor", 1.0, "1.0"),
)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MAY_BE_LEFT_OUT = ("num_key_value_heads", "head_dim", "max_position_embeddings")  # sizes, too; absent or null
LARGEST, MOST_LAYERS = 10**7, 1000  # of any size; a damaged file must not take all memory
OLD_CONTEXT = 4096  # the longest of Llama 1 and 2, whose config.json may leave out rope_theta
OLD_THETA = 10000.0
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ARCHITECTURES = {
    "policy": "LlamaForCausalLM",
    "reward_model": "LlamaForSequenceClassification",
    "critic": "LlamaForTokenClassification",
}


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError when the file is missing or is not JSON."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found, expected a Hugging Face model folder with a {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}), copy the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: got a JSON {type(raw).__name__}, expected an object")
    return raw


def read_config(folder: str | Path) -> LlamaConfig:
    """LlamaConfig from a folder's config.json. Raises UserError, naming the field, for anything that is no Llama."""
    path = Path(folder) / "config.json"
    raw = {"model_type": None} | read_json(path)  # of the fields below, the only one that may not be absent

    def refuse(field: str, got, expected: str):
        raise UserError(f"{path}: {field} is {got!r}, expected {expected}: only the Llama architecture is implemented")

    if dropout := raw.get("attention_dropout"):
        raise UserError(
            f"{path}: attention_dropout is {dropout!r}, expected 0.0: dropout is left out here (N+ detail 7), and no "
            "logit depends on it, so write 0.0 there"
        )
    if (adapter := path.with_name("adapter_config.json")).exists():
        raise UserError(f"{adapter}: an adapter (LoRA) lies beside the model, expected plain weights: merge it first")

    for field, ordinary, expected in ORDINARY:
        got = raw.get(field, ordinary)
        if got != ordinary:
            refuse(field, got, expected)
    for field in (*SIZES, *(field for field in MAY_BE_LEFT_OUT if raw.get(field) is not None)):
        if field not in raw:
            raise UserError(f"{path}: {field} is missing, expected every field of a Llama config.json")
        largest = MOST_LAYERS if field == "num_hidden_layers" else LARGEST
        if type(raw[field]) is not int or not 1 <= raw[field] <= largest:
            got = f"{path}: {field} is {raw[field]!r}"
            raise UserError(f"{got}, expected a whole number of at least 1 and at most {largest:,}")
    if not _positive(raw.get("rms_norm_eps")):
        raise UserError(f"{path}: rms_norm_eps is {raw.get('rms_norm_eps', 'missing')}, expected a number like 1e-5")
    if type(raw.get("tie_word_embeddings", False)) is not bool:
        raise UserError(f"{path}: tie_word_embeddings is {raw['tie_word_embeddings']!r}, expected true or false")

    heads = raw["num_attention_heads"]
    # Llama 1 and 2 (7B, 13B) leave it out: one key head a query head.
    kv_heads = raw.get("num_key_value_heads") or heads
    eos, bos, pad = raw.get("eos_token_id", 2), raw.get("bos_token_id", 1), raw.get("pad_token_id")
    for field, value in [("bos_token_id", bos), *(("eos_token_id", i) for i in eos_ids(eos))]:
        if type(value) is not int or not 0 <= value <= LARGEST:
            what = ": a model without EOS cannot stop" if field == "eos_token_id" else ""
            raise UserError(f"{path}: {field} is {value!r}, expected a token id, a whole number of at least 0{what}")
    if pad is not None and type(pad) is not int:
        raise UserError(f"{path}: pad_token_id is {pad!r}, expected null or a token id (which is not used)")
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if head_dim % 2:
        refuse("head_dim", head_dim, "an even number (rotary positions turn pairs)")
    theta, scaling = _read_rope(raw, path)
    return LlamaConfig(
        **{field: raw[field] for field in (*SIZES, "rms_norm_eps")},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=raw.get("max_position_embeddings") or 2048,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        bos_token_id=bos,
        eos_token_id=eos_ids(eos)[0],
        pad_token_id=pad if type(pad) is int and pad >= 0 else None,  # PAD is the tokenizer's, whatever stands here
    )


def eos_ids(value) -> list:
    """What eos_token_id holds, as a list: newer files name several, of which a tokenizer has one as its EOS."""
    return value if isinstance(value, list) and value else [value]


def _positive(number) -> bool:
    return type(number) in (int, float) and 0 < number < math.inf


def _read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """(theta, scaling or None) from the hub's rope_theta + rope_scaling, or from transformers 5's rope_parameters.

    A file may say it in both ways, if it says the same. Llama 1 and 2 were published before the fields existed: theta
    was 10000.
    """
    thetas, scalings = {}, {}
    for name in ("rope_parameters", "rope_scaling"):
        if raw.get(name):
            theta, scalings[name] = _read_scaling(raw[name], name, path)
            thetas |= {f"rope_theta in {name}": theta} if theta is not None else {}
    thetas |= {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    for found in (thetas, scalings):
        if len(found) > 1 and any(value != next(iter(found.values())) for value in found.values()):
            said = " and ".join(f"{name} {value if value is not None else 'default'}" for name, value in found.items())
            raise UserError(
                f"{path}: says {said}, expected the same: keep the one that the model was trained with and remove the "
                "other"
            )
    theta, scaling = next(iter(thetas.values()), None), next(iter(scalings.values()), None)
    if theta is None and scaling is None and (raw.get("max_position_embeddings") or OLD_CONTEXT) <= OLD_CONTEXT:
        theta = OLD_THETA
    if theta is None:
        raise UserError(
            f"{path}: rope_theta is missing (and rope_parameters too): without it positions would be wrong, and only "
            "for Llama 1 and 2 is it known to be 10000"
        )
    if not _positive(theta):
        raise UserError(f"{path}: rope_theta is {theta!r}, expected a number like 500000.0")
    return float(theta), scaling


def _read_scaling(rope, name: str, path: Path) -> tuple[float | None, dict | None]:
    """(theta where it is given, the four numbers of Llama 3's scaling or None) from one of the two objects."""
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{path}: {name} is {rope!r}, expected null or an object with rope_type, the same for all layers"
        )
    kind, old = rope.get("rope_type", rope.get("type", "default")), rope.get("type", None)
    if (old is not None and old != kind) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: {name} is {rope}, expected one rope_type, and a partial_rotary_factor of 1.0 or none")
    if kind == "default":
        return rope.get("rope_theta"), None
    if kind != "llama3" or any(key not in rope for key in ROPE_NUMBERS):
        raise UserError(
            f"{path}: {name} is {kind!r} with {sorted(rope)}, expected 'default', or 'llama3' with "
            f"{', '.join(ROPE_NUMBERS)}"
        )
    numbers = {key: rope[key] for key in ROPE_NUMBERS}
    if not all(map(_positive, numbers.values())) or numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise UserError(
            f"{path}: {name} is {numbers}, expected four positive numbers, low_freq_factor below high_freq_factor"
        )
    return rope.get("rope_theta"), {"rope_type": "llama3", **numbers}


def config_json(
    config: LlamaConfig, kind: str, dtype: torch.dtype, tokenizer, score_shift: float | None = None,
    shift_posts: int | None = None,
) -> dict:  # fmt: skip
    """What we write: the hub's spelling, readable by transformers 4 and 5, vLLM and llama.cpp. tokenizer: its EOS and
    PAD are the ones that the model was trained with."""
    raw = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": "llama",
        **{k: v for k, v in vars(config).items() if k != "pad_token_id"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
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
        raw |= {"score_shift_posts": shift_posts} if shift_posts else {}
    return raw
