"""What bf16 does to a real model's numbers: every operation rounded, in two orders of summation, on real posts.

    python -m bench.stand_ins smollm2 models/smollm2
    python -m experiments.rounding models/smollm2 data/openai --posts 24        17 minutes on two busy cores

Two kernels that compute the same thing add up in another order, and then round to bf16: now and then to the neighbour.
Through thirty layers that becomes a difference that is nobody's fault, and the pre-flight's bounds have to let it pass
(nanorlhf/monitoring/preflight.py). Here it is made on a CPU: fp32 arithmetic, each operation's result rounded to bf16,
once with whole matrix products and once with products of four parts that are added. Log-probs are of the authors'
summaries at temperature 0.7; scores and values come from a head that is drawn as train_rm.py draws it. The gradients of
the head's kernels in bf16 are measured on the same states. One JSON line last.
"""

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nanorlhf import attention, llama
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.models import reward_model_from
from nanorlhf.packing import pack, split_by_tokens
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import load_policy

T, TOKENS = 0.7, 4096  # temperature; tokens a forward pass


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@contextmanager
def in_bf16(parts: int):
    """Inside, a Llama in fp32 rounds the result of every operation to bf16; a matrix product adds up so many parts."""

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return rounded(sum(a @ b.T for a, b in zip(x.chunk(parts, 1), weight.chunk(parts, 1), strict=True)))

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rounded(rounded(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * weight)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = rounded(x + residual)
        return rms_norm(total, weight, eps), total

    rope, swiglu, padded = llama.rope, llama.swiglu, attention._padded
    ours = {
        "linear": linear,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope": lambda *args: tuple(rounded(x) for x in rope(*args)),
        "swiglu": lambda gate_up: rounded(swiglu(gate_up)),
    }
    before = {name: getattr(llama, name) for name in ours}
    vars(llama).update(ours)
    attention._padded = lambda *args: rounded(padded(*args))
    try:
        yield
    finally:
        vars(llama).update(before)
        attention._padded = padded


@torch.no_grad()
def hidden_states(trunk: nn.Module, sequences: list[list[int]]) -> list[Tensor]:
    """(T_i, D) each."""
    states = []
    for group in split_by_tokens([len(s) for s in sequences], TOKENS):
        packed = pack([sequences[i] for i in group])
        states += packed.unpack(trunk(packed.tokens, packed.positions, attention.causal(packed)))
    return states


def head_gradients(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[str, float]:
    """The log-prob's gradients of hidden states (n, D) and head (V, D) as the head's kernels make them in bf16 (dz is
    rounded, and the result): how far they are from float64, relative to their norm."""
    h, w = hidden.double(), head.double()
    dz = (torch.nn.functional.one_hot(labels, len(w)) - (h @ w.T / T).softmax(-1)) / T / len(h)  # (n, V)
    ours = rounded(dz.float())
    pairs = {"hidden": (rounded(ours @ head), dz @ w), "head": (rounded(ours.T @ hidden), dz.T @ h)}
    return {name: ((mine - true).norm() / true.norm()).item() for name, (mine, true) in pairs.items()}


def spread(difference: Tensor) -> dict:
    return {"n": difference.numel(), "rms": difference.square().mean().sqrt().item(),
            "largest": difference.abs().max().item()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.rounding", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--posts", type=int, default=24)
    args = parser.parse_args()
    policy = load_policy(args.model, torch.device("cpu"), torch.float32)
    posts = load_posts(args.data, "train")[: args.posts]
    queries, summaries = (list(x) for x in encode_posts(posts, load_tokenizer(args.model), 512))
    sequences = [query + summary for query, summary in zip(queries, summaries, strict=True)]
    exact = hidden_states(policy.model, sequences)
    with in_bf16(parts=1):
        whole = hidden_states(policy.model, sequences)
    with in_bf16(parts=4):
        in_parts = hidden_states(policy.model, sequences)
    rows = [slice(len(query) - 1, len(sequence) - 1) for query, sequence in zip(queries, sequences, strict=True)]
    head, score = policy.head_weight.detach(), reward_model_from(policy, seed=0).score.weight.detach()[0]

    def read(states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs and values of all summary tokens; scores; scores read one token early."""
        logprobs = [
            ((h[r] @ head.T) / T).log_softmax(-1).gather(1, torch.tensor(s)[r.start + 1 : r.stop + 1, None])[:, 0]
            for h, r, s in zip(states, rows, sequences, strict=True)
        ]
        values = torch.cat([h[r] @ score for h, r in zip(states, rows, strict=True)])
        return torch.cat(logprobs), values, *(torch.stack([h[i] @ score for h in states]) for i in (-1, -2))

    a, b, x = read(whole), read(in_parts), read(exact)
    found = {name: spread(a[i] - b[i]) for i, name in enumerate(("log-prob", "value", "score"))}
    found["log-prob, from fp32"] = spread(a[0] - x[0])
    found["score one token early"] = spread(x[3] - x[2])
    # What all scores move alike is no error of one of them, but it is one of their mean: the pre-flight's SHIFT.
    found["score, mean moved from fp32"] = [(one[2] - x[2]).mean().item() for one in (a, b)]
    found |= {"approxkl": 0.5 * (a[0] - b[0]).square().mean().item(), "score_std": x[2].std().item()}
    states = torch.cat([rounded(h[r]) for h, r in zip(exact, rows, strict=True)])
    labels = torch.cat([torch.tensor(s)[r.start + 1 : r.stop + 1] for r, s in zip(rows, sequences, strict=True)])
    found["gradients of the head, relative"] = head_gradients(states, rounded(head), labels)
    for name, value in found.items():
        print(f"{name:24} {value}")
    print(json.dumps({"bench": "rounding", "posts": len(posts)} | found))


if __name__ == "__main__":
    as_command(main)
