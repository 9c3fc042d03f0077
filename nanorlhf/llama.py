"""Llama, the trunk: token ids in, hidden states out. Llama 2, 3, 3.1, 3.2 and TinyLlama, and nothing else.

A block is two lines of algebra on the residual stream x (N, D):

    x = x + attention(rms_norm(x))
    x = x + mlp(rms_norm(x))

In the code an addition and the norm that follows it are one operation, so each line ends where the next one begins:
blocks hand on the stream and the update that the last sublayer has made and nobody has added yet.

N packed tokens go in (nanorlhf/packing.py) and (N, D) comes out, never (N, V): the language-model head is 27% of a
forward pass at a vocabulary of 128,256, and PPO reads it at the response tokens only, so the head lives in models.py.
What nobody reads behind the last layer need not be computed in it either: after its attention, which is the last to
look at other tokens, the rows that are read go on alone.

Parameter names are Hugging Face's, except that q, k, v and gate, up are one matrix each (one matmul instead of three
and of two); nanorlhf/storage/checkpoint.py merges and splits them on the way in and out.

Dimensions: N packed tokens, D model, H query heads, Hkv key/value heads, Dh head, F
feed-forward, V vocabulary, L layers.

With one post's numbers: docs/walk.md, stations 2 and 5.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import add_rms_norm, linear, rms_norm, rope, swiglu
from nanorlhf.attention import Attend, rows


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face config.json that shape the computation, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # None, or Llama 3's {"rope_type": "llama3", "factor": ..., ...}
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int | None  # None in a base model's config; the tokenizer decides, and what we save carries it

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k, v in the merged projection."""
        kv = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, kv, kv


class Linear(nn.Linear):
    """x W^T, without bias: Llama has none."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs) -> (N, outputs)
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32 (Zhang & Sennrich 2019), after an update of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream x takes the update in: -> rms_norm(x + update), x + update. All (N, D)."""
        if update is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(update, x, self.weight, self.eps)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of coordinates: theta^(-2i/Dh), (Dh/2,) fp32, with Llama 3's scaling where asked.

    Llama 3.1 stretched an 8k context by slowing down the slow rotations: wavelengths
    longer than the old context / low_freq_factor are divided by `factor`, those shorter
    than old context / high_freq_factor are kept, and between the two it interpolates.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high, context = (
        scaling[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    keep = ((context / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: keep the frequency, 0: divide it by factor
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        self.qkv_proj = Linear(config.hidden_size, sum(config.qkv_sizes))
        self.o_proj = Linear(config.qkv_sizes[0], config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, read: Tensor | None) -> Tensor:
        """(N, D) -> (N, D), or of the rows `read` alone, (n, D)."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.config.head_dim))  # (N, H + 2 Hkv, Dh)
        q, k, v = rope(qkv, cos, sin, self.config.num_key_value_heads)  # (N, H, Dh), (N, Hkv, Dh) twice
        return self.o_proj(attend(self.layer, q, k, v, read).flatten(1))  # (N or n, H*Dh) -> (N or n, D)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
        return self.down_proj(swiglu(self.gate_up_proj(x)))  # (N, 2F) -> (N, F) -> (N, D)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (N, D), and the update of the block before, (N, D) or None -> x, and the update of this one; of the rows
        `read` (n,) alone where they are given, (n, D)."""
        normed, x = self.input_layernorm(x, update)
        attended = self.self_attn(normed, cos, sin, attend, read)
        normed, x = self.post_attention_layernorm(rows(x, read), attended)
        return x, self.mlp(normed)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # Zeros until a file or `initialise` fills them: to draw on the meta device imports torch's compiler, 1.4 s.
        zeros = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.activation_checkpointing = False  # keep the inputs of the blocks only, and go through each again backwards
        self._frequencies: dict[torch.device, Tensor] = {}  # no buffer: a cast to bf16 would spoil it

    def frequencies(self, device: torch.device) -> Tensor:
        """rope_frequencies, (Dh/2,) fp32, made once a device."""
        if device not in self._frequencies:
            self._frequencies[device] = rope_frequencies(self.config).to(device)
        return self._frequencies[device]

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, read: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        args: tokens (N,) int64; positions (N,) int64; attend: how a token sees others (attention.causal, or a KV
        cache); read (n,) int64: the rows that the caller reads, all of them if None
        -> (N, D), or those rows (n, D), in the dtype of the weights
        """
        angles = positions[:, None].float() * self.frequencies(positions.device)  # (N, Dh/2)
        cos, sin = angles.cos(), angles.sin()  # (N, Dh/2), fp32: bf16 cannot hold position 300
        x, update = self.embed_tokens(tokens), None  # (N, D)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            block = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) if recompute else layer
            x, update = block(x, update, cos, sin, attend, read if layer is self.layers[-1] else None)
        return self.norm(x, update)[0]


@torch.no_grad()
def initialise(model: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """Random weights for pretraining from nothing: N(0, std), and the norms' weights 1 (as GPT-2 and Llama do)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
