"""What the benchmarks of whole steps run on: models of a real shape with random weights, posts of realistic lengths.

Random weights cost the same time and memory as trained ones, and nothing has to be downloaded: every figure of
bench.update, bench.plan and bench.scaling can be made on a fresh machine.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from bench.stand_ins import LLAMA_32_1B
from nanorlhf import parallel, sharding
from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.storage.model_config import read_config

POSTS, PAIRS = 116_722, 92_858  # rows of OpenAI's training splits: an epoch of SFT and of PPO, and one of the RM


@dataclass(frozen=True)
class Shape:
    """A model and the lengths of what it reads, in tokens. mean, spread: of a normal distribution that is cut off."""

    name: str
    config: LlamaConfig
    preset: str  # whose batch sizes and flags the scripts take
    mean: int
    spread: int
    least: int
    most: int
    response: int  # tokens of a written summary, on average

    def lengths(self, count: int, seed: int = 0) -> list[int]:
        """Lengths of `count` queries: N(mean, spread), rounded, cut off at `least` and `most`."""
        drawn = np.random.default_rng(seed).normal(self.mean, self.spread, count)
        return np.clip(drawn.round(), self.least, self.most).astype(int).tolist()

    def queries(self, count: int, seed: int = 0) -> list[list[int]]:
        """`count` queries of random tokens."""
        rng = np.random.default_rng([seed, 1])
        return [rng.integers(3, self.config.vocab_size, n).tolist() for n in self.lengths(count, seed)]

    def summaries(self, count: int, seed: int = 0) -> list[list[int]]:
        """`count` summaries of random tokens, `response` / 2 to 3 / 2 of them each."""
        rng = np.random.default_rng([seed, 2])
        sizes = rng.integers(self.response // 2, 3 * self.response // 2 + 1, count)
        return [rng.integers(3, self.config.vocab_size, n).tolist() for n in sizes]

    def with_summaries(self, count: int, seed: int = 0) -> list[list[int]]:
        """`count` queries, each with a summary after it: a batch of SFT."""
        return [q + s for q, s in zip(self.queries(count, seed), self.summaries(count, seed), strict=True)]

    def pairs(self, count: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
        """`count` queries with two summaries each: a batch of the reward model."""
        parts = self.queries(count, seed), self.summaries(count, seed), self.summaries(count, seed + 1)
        return list(zip(*parts, strict=True))


SMOLLM2 = {  # config.json on the hub: hidden_size, intermediate_size, layers, heads, key heads
    "smollm2": ("SmolLM2-135M", 576, 1536, 30, 9, 3),
    "smollm2-360m": ("SmolLM2-360M", 960, 2560, 32, 15, 5),
}
LARGER = {  # what differs from Llama-3.2-1B, from config.json of Llama-3.2-3B and Llama-3.1-8B on the hub
    "llama-3b": ("Llama-3.2-3B", dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128)),
    "llama-8b": ("Llama-3.1-8B", dict(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, head_dim=128, tie_word_embeddings=False)),
}  # fmt: skip
MODELS = ("llama-1b", *LARGER, *SMOLLM2)


def smollm2_config(name: str) -> LlamaConfig:
    """SmolLM2's, from its config.json on the hub."""
    _, width, ffn, layers, heads, kv_heads = SMOLLM2[name]
    return LlamaConfig(
        vocab_size=49_152, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5,
        rope_scaling=None, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=16,
    )  # fmt: skip


def llama_config() -> LlamaConfig:
    """Llama-3.2-1B's, from its config.json on the hub."""
    names = LlamaConfig.__dataclass_fields__
    return LlamaConfig(**{name: LLAMA_32_1B.get(name, 128_004) for name in names})  # the file names no PAD


def shape_for(device: torch.device | str, model: str = "llama-1b") -> Shape:
    """Llama-3.2-1B on TL;DR for a GPU (and the meta device), the embedded world's for a CPU. model: one of MODELS; with
    SmolLM2's tokenizer 1,000 of OpenAI's posts have 352 tokens on average and 531 at most, their summaries 35."""
    if model in SMOLLM2:
        name, config = SMOLLM2[model][0], smollm2_config(model)
        return Shape(name, config, "smollm2", mean=352, spread=100, least=64, most=544, response=35)
    if torch.device(device).type == "cpu":
        return Shape("tiny", read_config(EMBEDDED / "sft"), "tiny", mean=85, spread=9, least=58, most=104, response=15)
    name, changes = LARGER.get(model, ("Llama-3.2-1B", {}))
    config = replace(llama_config(), **changes)
    return Shape(name, config, "llama-1b", mean=352, spread=100, least=64, most=512, response=33)


@torch.no_grad()
def random_model(
    kind: type[nn.Module], config: LlamaConfig, device, dtype: torch.dtype, parts: str | None = None, **options
) -> nn.Module:
    """A Policy or ScalarModel made on the device itself, weights from N(0, 0.02), norms 1, and an fp32 scalar head.
    parts: under torchrun in parts, as `load_policy` has it."""
    in_parts = parts and parallel.on()
    with torch.device("meta"):
        model = kind(config, **options)
    model = model.to(torch.float32 if in_parts and parts == "masters" else dtype)
    if isinstance(model, ScalarModel):
        model.score.float()
    model = (sharding.shard(model, dtype) if in_parts else model).to_empty(device=device)
    for parameter in model.parameters():
        part = sharding.local(parameter.detach())
        part.fill_(1.0) if parameter.dim() == 1 else part.normal_(0.0, 0.02)
    return model


def four_models(config: LlamaConfig, device, dtype: torch.dtype) -> tuple[Policy, Policy, ScalarModel, ScalarModel]:
    """Policy, reference, critic and reward model, as train_ppo.py has them: the second and the last frozen."""
    policy, reference = (random_model(Policy, config, device, dtype, parts) for parts in ("masters", "frozen"))
    critic = random_model(ScalarModel, config, device, dtype, "masters", bias=True)
    reward_model = random_model(ScalarModel, config, device, dtype, "frozen", bias=False)
    return policy, reference.requires_grad_(False), critic, reward_model.requires_grad_(False)
