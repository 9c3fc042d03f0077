"""What gradients by hand bring on this CPU: kernels/cpu.py against the references under autograd.

    python -m bench.body                  one thread, then all: 1 minute

The operations of a block, forward and backward pass at the tiny model's sizes and 4,096 tokens, and whole passes of the
scripts over a batch of tiny posts. Both ways take turns in one process; matrices and attention are the same in both.
Seconds are medians and belong to the machine; the ratio is what to look at. One JSON line last.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others

import json
import time
from collections.abc import Callable
from statistics import median

import torch

import kernels
import train_rm
import train_sft
from kernels import cpu
from nanorlhf.data.encoding import encode_comparisons, encode_posts
from nanorlhf.data.tldr import load_comparisons, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.models import reward_model_from
from nanorlhf.packing import pack
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.memory import keep_freed_memory
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.tiny.data import ensure_world

N, ROUNDS = 4096, 9
WAYS = {"references": lambda x: False, "by hand": cpu.by_hand}  # whether a tensor goes to kernels/cpu.py


def operations() -> dict[str, Callable[[], None]]:
    """Forward and backward pass of each of a block's elementwise operations."""
    c = load_policy(EMBEDDED / "sft").config
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    angles = torch.rand(N, c.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()

    def both(function, *shapes: tuple[int, ...]) -> Callable[[], None]:
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        with torch.no_grad():
            outputs = function(*leaves)
        grads = [torch.randn_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]

        def run() -> None:
            outputs = function(*leaves)
            torch.autograd.grad(outputs, leaves, grads)

        return run

    D = c.hidden_size
    return {
        "rope": both(lambda qkv: kernels.rope(qkv, cos, sin, kv), (N, heads + 2 * kv, c.head_dim)),
        "swiglu": both(kernels.swiglu, (N, 2 * c.intermediate_size)),
        "add_rms_norm": both(lambda x, s, w: kernels.add_rms_norm(x, s, w, 1e-5), (N, D), (N, D), (D,)),
    }


def passes() -> dict[str, Callable[[], None]]:
    """Learning from a batch, as the scripts do; and a forward pass alone."""
    data, tokenizer, policy = ensure_world("data/tiny"), load_tokenizer(EMBEDDED / "sft"), load_policy(EMBEDDED / "sft")
    sft, rm = (script.Config(**script.PRESETS["tiny"]) for script in (train_sft, train_rm))
    posts, comparisons = load_posts(data, "train")[: sft.batch_size], load_comparisons(data, "train")[: rm.batch_size]
    encoded = encode_posts(posts, tokenizer, sft.max_query_length)
    both = [query + summary for query, summary in zip(*encoded, strict=True)]
    triples = list(zip(*encode_comparisons(comparisons, tokenizer, rm.max_query_length), strict=True))
    reward_model = reward_model_from(policy, seed=1)

    def forward() -> None:
        with torch.no_grad():
            policy.hidden(pack(both))

    return {
        "forward pass": forward,
        "SFT, a batch": lambda: train_sft.learn(policy, both, sft),
        "reward model, a batch": lambda: train_rm.learn(reward_model, triples, rm),
    }


def seconds(work: dict[str, Callable[[], None]]) -> dict[str, dict[str, float]]:
    """{what: {way: median seconds}}: the two ways in turn, "by hand" last, after one of each to warm up."""
    took = {what: {way: [] for way in WAYS} for what in work}
    for what, run in work.items():
        for turn in range(ROUNDS + 1):
            for way, cpu.by_hand in WAYS.items():
                began = time.perf_counter()
                run()
                if turn:
                    took[what][way].append(time.perf_counter() - began)
    return {what: {way: median(times) for way, times in ways.items()} for what, ways in took.items()}


def main() -> None:
    keep_freed_memory()  # as every run does
    rows = []
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| threads | what | references, ms | by hand, ms | ratio |\n|---|---|---|---|---|")
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for what, took in seconds(operations() | passes()).items():
            theirs, ours = took["references"], took["by hand"]
            cells = threads, what, f"{1e3 * theirs:.2f}", f"{1e3 * ours:.2f}", f"{theirs / ours:.2f}"
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            rows.append({"threads": threads, "what": what, "seconds": [theirs, ours]})
    print(json.dumps({"bench": "body", "rows": rows}))


if __name__ == "__main__":
    as_command(main)
