"""How a kernel is chosen and launched.

    NANORLHF_KERNELS=auto     Triton on a CUDA device where it is installed, else PyTorch: the references, on a
                              CPU in fp32 with the gradients of kernels/cpu.py (default)
    NANORLHF_KERNELS=torch    the reference everywhere
    NANORLHF_KERNELS=triton   Triton, or an error

With TRITON_INTERPRET=1 as well, `triton` runs the kernels on CPU tensors in Triton's interpreter: slow, exact, and how
they are tested without a GPU. Both variables are read once, when this file is imported.
"""

import math
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    # The number of rows, M or N, differs from batch to batch: without this, each new divisor of it would compile anew.
    jit = triton.jit(do_not_specialize=["M", "N"])
except ImportError:  # macOS, or a CPU build of torch: the references do the work
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)

    def jit(function):
        return function


MODE = os.environ.get("NANORLHF_KERNELS", "auto")
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
CHECK_LABELS = os.environ.get("NANORLHF_CHECK_LABELS") == "1"  # on CUDA too, where it waits for the device

# Whether Intel made the processor: MKL, torch's library for matrices, is at home there only. On Linux /proc/cpuinfo has
# the maker's name, on Windows platform.processor() ends in it.
_CPUINFO = Path("/proc/cpuinfo")
INTEL = "GenuineIntel" in (_CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else platform.processor())

CHUNK_ELEMENTS = 2**28  # logits at a time: 1 GB in fp32, 2,093 rows of Llama 3's vocabulary

LOG2E = tl.constexpr(1.4426950408889634)  # the hardware's exponential is 2^x
LN2 = tl.constexpr(0.6931471805599453)
EMPTY = tl.constexpr(-1e20)  # a running maximum before the first logit
MASKED = tl.constexpr(-2e20)  # stands for -inf and for columns past the vocabulary: far below EMPTY, and finite


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor take the Triton kernels. Raises ValueError when they are asked for in vain."""
    if MODE not in ("auto", "torch", "triton"):
        raise ValueError(f"NANORLHF_KERNELS: got {MODE!r}, expected auto, torch or triton")
    if MODE == "torch":
        return False
    if INTERPRETED:
        return MODE == "triton"
    if MODE == "triton" and (triton is None or not tensor.is_cuda):
        where = "Triton is not installed" if triton is None else f"the tensor is on {tensor.device}"
        raise ValueError(f"NANORLHF_KERNELS=triton: {where}, expected CUDA and Triton: unset it, or set it to auto")
    return triton is not None and (tensor.is_cuda or tensor.is_meta)  # a meta tensor stands for one on a GPU


def use_tiles(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the matrix kernels, which never write logits, can take these operands.

    They are made for Hopper's copy engine and tensor cores; other cards, and fp32 (which
    their tensor cores would round to 10 bits), take chunks of cuBLAS logits and a row kernel.
    """
    if hidden.shape[1] * hidden.element_size() % 16 or hidden.data_ptr() % 16 or weight.data_ptr() % 16:
        return False  # the copy engine wants rows on 16-byte boundaries
    if INTERPRETED:
        return hidden.dtype == torch.float32
    return hidden.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(hidden.device) == (9, 0)


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
    """Start a Triton kernel: arguments in its order, compile-time constants by name."""
    start(kernel, grid, args, constants, dict(num_warps=num_warps, num_stages=num_stages))


def start(kernel, grid: tuple[int, ...], args: tuple, constants: dict, options: dict) -> None:
    """What `launch` ends in; `python -m bench.compile` puts a compiler in its place."""
    kernel[grid](*args, **constants, **options)


def compute_type(tensor: Tensor):
    """What a kernel calculates in: fp32, or fp64 for the gradient checks of the tests."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs, losses and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log2_scale(temperature: float) -> float:
    """What turns a difference of logits into a power of 2: log2(e) / T."""
    return 1 / (temperature * math.log(2))


def chunks(rows: int, columns: int) -> list[slice]:
    """Equal slices of `rows` so that none has more than CHUNK_ELEMENTS logits (but at least one row)."""
    count = max(1, min(rows, -(-rows * columns // CHUNK_ELEMENTS)))
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def chosen() -> str:
    """What the first lines of a run print."""
    if MODE != "torch" and triton is not None and (INTERPRETED or torch.cuda.is_available()):
        return f"Triton {triton.__version__}" + (" (interpreted)" if INTERPRETED else "")
    return "PyTorch reference"
