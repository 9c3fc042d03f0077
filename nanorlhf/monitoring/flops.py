"""Model FLOPs, and how much of a GPU's peak a PPO update uses (MFU, as in PaLM, Chowdhery et al. 2022, appendix B).

Only what the mathematics needs is counted: a multiplication and an addition are 2 FLOPs, attention is causal, the
language-model head runs where its output is read, and so does the last layer behind its attention; a backward pass is
twice a forward one. Recomputed activations and padding, had we any, would not count: they lower the MFU, as they should.
"""

import torch

from nanorlhf.llama import LlamaConfig

PEAK = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12}  # FLOP/s in bf16, dense, NVIDIA's data sheets


def trunk_flops(config: LlamaConfig, lengths: list[int], read: int | None = None) -> float:
    """One forward pass of the trunk over sequences of these lengths, of whose tokens `read` are read afterwards (all)."""
    D, H, Dh = config.hidden_size, config.num_attention_heads, config.head_dim
    behind = H * Dh * D + 3 * D * config.intermediate_size  # weights of a layer behind its attention
    weights = D * sum(config.qkv_sizes) + behind
    seen = sum(length * (length + 1) // 2 for length in lengths)  # keys, summed over queries
    unread = 0 if read is None else sum(lengths) - read
    return config.num_hidden_layers * (2.0 * weights * sum(lengths) + 4.0 * H * Dh * seen) - 2.0 * behind * unread


def head_flops(config: LlamaConfig, rows: int) -> float:
    """The language-model head at `rows` positions."""
    return 2.0 * config.hidden_size * config.vocab_size * rows


def ppo_update_flops(
    config: LlamaConfig, lengths: list[int], finished: list[int], response_length: int, epochs: int,
    warming: bool = False, reward_models: int = 1,
) -> float:  # fmt: skip
    """All of one PPO update: rollout, scores, and `epochs` passes of learning.

    args: lengths: tokens of each query with its R response tokens; finished: the same up to EOS, which is what the
    reward model reads; warming: only the critic learns
    """
    read = len(lengths) * response_length
    trunk, head = trunk_flops(config, lengths, read), head_flops(config, read)
    rollout = trunk + head  # prefill and decoding: each token once
    score = 3 * trunk + 2 * head  # policy, reference, critic
    score += reward_models * trunk_flops(config, finished, len(finished))
    learned = trunk if warming else 2 * trunk + head  # the critic, or policy and critic
    learn = 3 * epochs * learned  # forward and twice that backward
    return rollout + score + learn


def mfu(flops: float, seconds: float, device: torch.device) -> float | None:
    """Share of the device's peak, 0 to 1; None where the peak is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((PEAK[card] for card in PEAK if card in name), None)
    return flops / seconds / peak if peak else None
