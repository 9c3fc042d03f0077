"""The training scripts in this process, on a small tiny world, from small random models: a second or two each.

The fixtures `world` and `models` (conftest.py) are made here.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

import train_ppo
import train_rm
import train_sft
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.run.config import parse
from nanorlhf.storage.checkpoint import save_policy, save_scalar
from nanorlhf.tiny.data import write_world

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train_sft": train_sft, "train_rm": train_rm, "train_ppo": train_ppo}
SMALL = {  # flags that make each stage take a second or two
    "train_sft": "--batch_size 8 --eval_posts 8 --max_updates 4",
    "train_rm": "--batch_size 4 --eval_pairs 16 --shift_posts 16 --max_updates 4",
    "train_ppo": "--batch_size 8 --total_episodes 32 --response_length 24",
}


def write_small_world(folder: Path) -> Path:
    """A small tiny world on disk."""
    return write_world(folder, posts={"train": 64, "valid": 32, "test": 8}, comparisons={"train": 32, "valid1": 32})


def write_small_models(folder: Path, world: Path) -> dict[str, str]:
    """Flags that name a small random base model, SFT model and reward model, for each script."""
    tokenizer = load_tokenizer(ROOT / "nanorlhf" / "tiny")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    for seed, stage in enumerate(("base", "sft")):
        policy = Policy(config)
        initialise(policy, seed=seed)
        with torch.no_grad():  # what all tokens have in common makes EOS the likeliest: half of the responses stop
            policy.model.embed_tokens.weight.add_(0.05)
            policy.model.embed_tokens.weight[tokenizer.eos_id] = 0.16
        save_policy(policy, folder / stage, tokenizer)
    reward_model = reward_model_from(policy, seed=0)
    references = zip(*encode_posts(load_posts(world, "train"), tokenizer, 104), strict=True)
    reward_model.score_shift = reward_model.scores([query + reference for query, reference in references]).mean().item()
    save_scalar(reward_model, folder / "rm", tokenizer)
    sft, rm = f"--sft_model {folder / 'sft'}", f"--reward_model {folder / 'rm'}"
    return {"train_sft": f"--model {folder / 'base'}", "train_rm": sft, "train_ppo": f"{sft} {rm}"}


class Killed(Exception):
    """Stands in for a kill: nothing in the scripts catches it."""


def start(name: str, flags: str) -> Path:
    """Run a script's main in this process with these flags and no others; returns its run folder."""
    script = SCRIPTS[name]
    cfg = parse(script.Config, script.PRESETS, script.__doc__, flags.split())
    script.main(cfg)
    return Path("runs") / cfg.run_name


def run(name: str, world: Path, more: str = "", preset: str = "tiny") -> Path:
    """`start` on the small world, for a few steps."""
    return start(name, f"--preset {preset} --device cpu --data {world} {SMALL[name]} {more}")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(folder: Path, other: Path):
    a, b = (load_file(path / "final" / "model.safetensors") for path in (folder, other))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
