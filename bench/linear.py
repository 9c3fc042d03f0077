"""x W^T in fp32 on this CPU: torch's default (MKL) against kernels.linear (oneDNN), forward and both gradients.

    python -m bench.linear

Prints GFLOP/s at the shapes of the tiny model's layers, both timed in turn in one process, and one JSON line last.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: how long a CPU thread waits awake for the others

import json
import platform
import time

import torch

from kernels.linear import linear, linear_reference

SHAPES = [(4096, 128, 256), (4096, 128, 704), (4096, 352, 128), (4096, 128, 1280)]  # M tokens, K inputs, N outputs


def gflops(operation, M: int, K: int, N: int, repeats: int = 15) -> tuple[float, float]:
    """(forward, backward) rates, each the best of `repeats`: the machine's noise only ever slows down."""
    x, weight = torch.randn(M, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    grad = torch.randn(M, N)
    forward = backward = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        y = operation(x, weight)
        middle = time.perf_counter()
        y.backward(grad)
        forward = min(forward, middle - start)
        backward = min(backward, time.perf_counter() - middle)
    work = 2 * M * K * N / 1e9
    return work / forward, 2 * work / backward


def main() -> None:
    rows = []
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; GFLOP/s")
    print(f"{'M x K x N':>18} {'torch fwd':>10} {'ours':>6} {'ratio':>6} {'torch bwd':>10} {'ours':>6} {'ratio':>6}")
    for M, K, N in SHAPES:
        (fwd, bwd), (our_fwd, our_bwd) = gflops(linear_reference, M, K, N), gflops(linear, M, K, N)
        name = f"{M} x {K} x {N}"
        forward = f"{fwd:10.0f} {our_fwd:6.0f} {our_fwd / fwd:6.2f}"
        print(f"{name:>18} {forward} {bwd:10.0f} {our_bwd:6.0f} {our_bwd / bwd:6.2f}")
        rows.append({"shape": [M, K, N], "torch": [fwd, bwd], "ours": [our_fwd, our_bwd]})
    print(json.dumps({"bench": "linear", "threads": torch.get_num_threads(), "gflops": rows}))


if __name__ == "__main__":
    main()
