"""The three products of a layer in fp32 on this CPU, y = x W^T, dx = dy W and dW = dy^T x: by MKL (torch) and oneDNN.

    python -m bench.linear

Prints GFLOP/s of one core at the shapes of the tiny model's layers and head, both libraries in turn in one process, and
whether kernels/linear.py takes the faster one over all shapes. A rate is the best of many, in seconds of this thread's
CPU time: so it is right beside other jobs, too. One JSON line last.
"""

import json
import platform
import time

import torch

from kernels.linear import _onednn, _onednn_grad_weight, linear_reference, onednn_products
from nanorlhf.run.streams import as_command

SHAPES = [(4096, 128, 256), (4096, 128, 704), (4096, 352, 128), (1024, 128, 1280)]  # M tokens, K inputs, N outputs


def seconds(M: int, K: int, N: int, repeats: int = 40) -> dict[str, dict[str, float]]:
    """{product: {library: CPU seconds}}, the best of `repeats`: noise only ever slows down."""
    x, weight, grad = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    work = {
        "y": {"mkl": lambda: linear_reference(x, weight), "onednn": lambda: _onednn(x, weight)},
        "dx": {"mkl": lambda: grad @ weight, "onednn": lambda: _onednn(grad, weight.T)},
        "dw": {"mkl": lambda: grad.T @ x, "onednn": lambda: _onednn_grad_weight(grad, x)},
    }
    best = {product: dict.fromkeys(libraries, float("inf")) for product, libraries in work.items()}
    for _ in range(repeats):
        for product, libraries in work.items():
            for library, operation in libraries.items():
                began = time.thread_time()
                operation()
                best[product][library] = min(best[product][library], time.thread_time() - began)
    return best


def main() -> None:
    torch.set_num_threads(1)
    products = ("y", "dx", "dw")
    machine, vectors = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    print(f"{machine}, {vectors}, torch {torch.__version__}; GFLOP/s of one thread, MKL and oneDNN")
    print(f"{'M x K x N':>18}" + "".join(f"{product:>14}" for product in products))
    rows, total = [], {product: {"mkl": 0.0, "onednn": 0.0} for product in products}
    for M, K, N in SHAPES:
        found, work = seconds(M, K, N), 2 * M * K * N / 1e9
        rates = {product: [work / found[product][library] for library in ("mkl", "onednn")] for product in products}
        print(f"{f'{M} x {K} x {N}':>18}" + "".join(f"{a:8.0f}{b:6.0f}" for a, b in rates.values()))
        rows.append({"shape": [M, K, N], "mkl_onednn": rates})
        for product, libraries in found.items():
            for library, spent in libraries.items():
                total[product][library] += spent
    ratios = {product: total[product]["mkl"] / total[product]["onednn"] for product in products}
    for product, ratio in ratios.items():
        taken = product in onednn_products()
        right = "the faster one" if taken == (ratio > 1) else "the slower one: mend the table of kernels/linear.py"
        print(f"{product:>3}: oneDNN is {ratio:.2f} times as fast; taken: {'oneDNN' if taken else 'MKL'}, {right}")
    print(json.dumps({"bench": "linear", "vectors": vectors, "onednn_over_mkl": ratios, "gflops": rows}))


if __name__ == "__main__":
    as_command(main)
