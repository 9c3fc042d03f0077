"""Where a run computes: device, dtype, seed. The first lines of every run print what was chosen."""

import os
import random
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kernels.runtime import INTERPRETED
from nanorlhf import parallel
from nanorlhf.errors import check


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:1 -> device; auto is cuda where there is one, under torchrun a process's own. Raises
    UserError for one not here."""
    name = parallel.own_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    known = kind in ("cpu", "cuda") and (index.isdigit() or not index)
    check(known, "device", name, "auto, cpu, cuda or cuda:<number>", "choose --device auto")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        check(int(index or 0) < count, "device", name, f"among the {count} CUDA devices here", "choose --device auto")
        if index:
            torch.cuda.set_device(int(index))  # Triton starts its kernels on the current device
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto | float32 | bfloat16 -> dtype; auto is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        # bf16 needs an Ampere card or newer (as does flash attention)
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            else torch.float32
        )
    known = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    check(
        name in known,
        "dtype",
        name,
        "auto, float32 or bfloat16",
        "float16 needs its loss scaled, which is left out here",
    )
    return known[name]


def device_name(device: torch.device) -> str:
    """What the first lines of a run print."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{device} ({card.name}, {card.total_memory / 1e9:.0f} GB)"
    return f"cpu ({torch.get_num_threads()} threads)"


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # fixed workspaces: with others cuBLAS may add up in another order
FIXED = (":4096:8", ":16:8")


def make_deterministic(device: torch.device, kernels: str | None, dtype: torch.dtype) -> None:
    """From here on the same work gives the same bits on a GPU too, for the rest of the process. Call it before the GPU
    is given any work.

    Without it the backward pass of flash attention adds up with atomics, in another order each time; torch also takes
    the fixed one of its two ways to scatter and to index, and wants cuBLAS's workspaces fixed. Our kernels have no
    atomics. A CPU repeats itself in any case, as long as it has as many threads: nothing changes there. (Nor is memory
    filled with NaN before it is written, as torch would: nothing here reads it.)

    kernels: what kernels.chosen() says. Raises UserError for cuBLAS workspaces that are not fixed, and where sampling
    on a GPU takes torch's cumulative sum, which has no fixed order: in the reference kernels, in fp32, off Hopper.
    """
    if device.type == "cuda":
        found = os.environ.setdefault(CUBLAS, FIXED[0])
        check(found in FIXED, CUBLAS, found, f"{' or '.join(FIXED)}, which --deterministic needs", "unset it")
        triton = kernels is None or kernels.startswith("Triton")
        check(triton, "--deterministic on a GPU with kernels", kernels, "Triton's", "unset NANORLHF_KERNELS")
        tiles = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) == (9, 0)
        got = str(dtype).removeprefix("torch.")
        check(tiles, "--deterministic on a GPU with dtype", got, "bfloat16 on an H100 or H200", "leave the flag out")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far, GiB: the GPU's on CUDA, else what the process ever held resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def side_by_side(*tasks: Callable, device: torch.device) -> list:
    """The results of pieces of work that do not touch one another, in order; the first error is raised again.

    On a CPU they run at the same time, each on its share of the cores: a model of the tiny world is too small for all
    of them. Two models on 2 cores are 1.3 times faster than one after the other on both, and where other programs use
    the cores, and the threads of one operation wait for one another, many times. On a GPU, and in Triton's interpreter,
    which runs one kernel at a time, one after the other; so too where models are in parts, because processes that meet
    in each layer must meet in the same order.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or INTERPRETED or parallel.on():
        return [task() for task in tasks]
    share = max(1, threads // len(tasks))
    try:
        with ThreadPoolExecutor(len(tasks), initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return [future.result() for future in [pool.submit(task) for task in tasks]]
    finally:
        torch.set_num_threads(threads)  # the workers set it for all threads to come
