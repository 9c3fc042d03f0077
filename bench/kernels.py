"""The kernels against what one would use instead: time, rate, share of the machine's ceiling, memory.

    python -m bench.kernels                 at the shape of Llama-3.2-1B on a GPU; small, references only, without one
    python -m bench.kernels --rows 6784     one PPO batch: 128 responses of 53 tokens [default: that and 8,192]
    python -m bench.kernels --tokens 12896  the body's kernels: that many packed tokens [default: 32 sequences]
    python -m bench.kernels --compile       also torch.compile of each reference: half a minute more on a GPU
    python -m bench.kernels --tiles         other tiles and chunks than the ones that ship, to tune a new card

Each operation is timed beside its PyTorch reference, torch's own fused cross-entropy and norm, and Liger's kernels
where it is installed, in turn in one process; torch.compile comes last. The ceilings, a copy and a matmul
in bf16, are measured in the same run. Times are medians over at least a fifth of a second, with a cold L2; those of the
body's operations also for the GPU alone, in a captured graph that needs no Python. Memory is the peak above the
operands. A line a measurement goes to bench.all as it is made (bench/rows.py), so that a visit that is cut short keeps
what it has. One JSON line last. Needs torch and triton, nothing else.
"""

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

import kernels
from bench.rows import note
from nanorlhf.run.streams import as_command

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
D, V = (2048, 128_256) if GPU else (64, 4001)
F, H, HKV, DH = (8192, 32, 8, 64) if GPU else (176, 4, 2, 16)
CAPTURED = 10  # calls in a graph
OTHERS = {"add_rms_norm": "rms_norm"}  # the file of an operation that has not its name
FILES = {name: importlib.import_module(f"kernels.{OTHERS.get(name, name)}") for name in kernels.__all__
         if name.islower() and name not in ("chosen", "linear", "linear_fp32")}  # fmt: skip
REFERENCE = {name: getattr(file, f"{name}_reference") for name, file in FILES.items()}


def measure(function: Callable[[], object]) -> tuple[float, float]:
    """(seconds, GB above what was there): median time of a call, and the peak of its memory."""
    function()  # compiles
    if not GPU:
        times = []
        while len(times) < 3:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return sorted(times)[1], float("nan")
    from triton.testing import do_bench

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    gigabytes = (torch.cuda.max_memory_allocated() - before) / 1e9
    return do_bench(function, warmup=50, rep=200, return_mode="median") / 1e3, gigabytes


def on_the_gpu_alone(function: Callable[[], object]) -> float:
    """Seconds of a call without Python: ten of them in one captured graph, replayed. The host takes as long to ask for
    an operation of the body as the GPU to do it, and in an update of a large model the host is far ahead. The L2 is as
    warm as the call before left it. Raises RuntimeError for what cannot be captured.
    """
    from triton.testing import do_bench

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # sets up on this stream what it needs
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            function()
    return do_bench(graph.replay, warmup=20, rep=100, return_mode="median") / 1e3 / CAPTURED


def with_gradient(function: Callable, leaves: list[Tensor]) -> Callable[[], None]:
    """Forward and backward pass; the gradients are dropped, as after an optimizer step."""

    ones = []  # made once: they are not what is measured

    def step() -> None:
        result = function()
        result = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
        ones[:] = ones or [torch.ones_like(x) for x in result]
        torch.autograd.backward(result, ones)
        for leaf in leaves:
            leaf.grad = None

    return step


def both(name: str, *args, **keywords) -> tuple[Callable, Callable]:
    """An operation and its reference, with these arguments."""
    ours, reference = getattr(kernels, name), REFERENCE[name]
    return (lambda f=ours: f(*args, **keywords)), (lambda f=reference: f(*args, **keywords))


def operations(rows: int) -> dict[str, tuple[Callable, Callable, list[Tensor], str, float]]:
    """name -> (ours, reference, leaves or [], "GB" or "TFLOP", the work that has to be done in that unit)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float32
    options = dict(dtype=dtype, device=DEVICE)
    hidden, weight = torch.randn(rows, D, **options) * 4 / D**0.5, torch.randn(V, D, **options)
    labels = torch.randint(V, (rows,), device=DEVICE)
    per_row = [torch.rand(rows, device=DEVICE) for _ in range(3)]
    batch = min(128, rows)
    u = torch.rand(batch, 53, dtype=torch.float64, device=DEVICE)
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    logits = hidden @ weight.T
    size, gemm = rows * V * logits.element_size() / 1e9, 2 * rows * D * V / 1e12
    h, w, z = (x.clone().requires_grad_() for x in (hidden, weight, logits))
    ppo = (*per_row,)

    loss = (lambda: kernels.linear_ppo_loss(h, w, labels, *ppo, temperature=0.7, cliprange=0.2).loss,
            lambda f=REFERENCE["linear_ppo_loss"]: f(h, w, labels, *ppo, 0.7, 0.2).loss)  # fmt: skip
    return {
        "logprob_entropy": (*both("logprob_entropy", logits, labels, 0.7), [], "GB", size),
        "logprob_entropy fwd+bwd": (*both("logprob_entropy", z, labels, 0.7), [z], "GB", 3 * size),
        "kl": (*both("kl", logits, logits, labels, 0.7), [], "GB", 2 * size),
        "linear_logprob": (*both("linear_logprob", hidden, weight, labels, 0.7), [], "TFLOP", gemm),
        "linear_logprob fwd+bwd": (*both("linear_logprob", h, w, labels, 0.7), [h, w], "TFLOP", 3 * gemm),
        "linear_ppo_loss fwd+bwd": (*loss, [h, w], "TFLOP", 3 * gemm),
        "linear_cross_entropy fwd+bwd": (
            *both("linear_cross_entropy", h, w, labels, per_row[0]), [h, w], "TFLOP", 3 * gemm,
        ),
        "linear_kl": (*both("linear_kl", hidden, weight, hidden, weight, labels, 0.7), [], "TFLOP", 2 * gemm),
        f"sample_head, {batch} rows": (
            *both("sample_head", hidden[:batch], weight, u, step, 0.7), [], "GB", V * D * hidden.element_size() / 1e9,
        ),
    }  # fmt: skip


def body(tokens: int) -> dict[str, tuple[Callable, Callable, list[Tensor], str, float]]:
    """As `operations`: the kernels of the model's body. The work is what has to be read and written once."""
    torch.manual_seed(0)
    options = dict(dtype=torch.bfloat16 if GPU else torch.float32, device=DEVICE)
    x, residual = (torch.randn(tokens, D, **options) for _ in range(2))
    weight, merged = torch.ones(D, **options), torch.randn(tokens, H + 2 * HKV, DH, **options)
    cos, sin = (torch.rand(tokens, DH // 2, device=DEVICE) for _ in range(2))
    gate_up = torch.randn(tokens, 2 * F, **options)
    column = tokens * x.element_size() / 1e9  # GB
    leaf_x, leaf_r, leaf_w, leaf_m, leaf_g = (
        t.clone().requires_grad_() for t in (x, residual, weight, merged, gate_up)
    )
    batch, slots, eps = min(128, tokens), 576 if GPU else 40, 1e-5
    q = torch.randn(batch, H, DH, **options)
    keys, values = (torch.randn(batch, slots, HKV, DH, **options) for _ in range(2))
    positions = torch.randint(slots // 3, slots, (batch,), device=DEVICE)
    cache = 2 * (positions + 1).sum().item() * HKV * DH * x.element_size() / 1e9
    heads = (H + 2 * HKV) * DH
    return {
        "rms_norm": (*both("rms_norm", x, weight, eps), [], "GB", 2 * D * column),
        "rms_norm fwd+bwd": (*both("rms_norm", leaf_x, leaf_w, eps), [leaf_x, leaf_w], "GB", 5 * D * column),
        "add_rms_norm": (*both("add_rms_norm", x, residual, weight, eps), [], "GB", 4 * D * column),
        "add_rms_norm fwd+bwd": (
            *both("add_rms_norm", leaf_x, leaf_r, leaf_w, eps), [leaf_x, leaf_r, leaf_w], "GB", 8 * D * column,
        ),
        "rope": (*both("rope", merged, cos, sin, HKV), [], "GB", 2 * heads * column),
        "rope fwd+bwd": (*both("rope", leaf_m, cos, sin, HKV), [leaf_m], "GB", 4 * heads * column),
        "swiglu": (*both("swiglu", gate_up), [], "GB", 3 * F * column),
        "swiglu fwd+bwd": (*both("swiglu", leaf_g), [leaf_g], "GB", 8 * F * column),
        f"decode_attention, {batch} sequences": (
            *both("decode_attention", q, keys, values, positions), [], "GB", cache,
        ),
    }  # fmt: skip


def body_rivals(name: str, tokens: int) -> dict[str, Callable]:
    """torch's fused norm and Liger's kernels, where it is installed; each with its own shapes and views."""
    operation, found = name.split()[0], {}
    options = dict(dtype=torch.bfloat16, device=DEVICE, requires_grad=name.endswith("bwd"))
    x, residual, weight = torch.randn(tokens, D, **options), torch.randn(tokens, D, **options), torch.ones(D, **options)
    if operation == "rms_norm":
        found["torch F.rms_norm"] = lambda: torch.nn.functional.rms_norm(x, (D,), weight, 1e-5), [x, weight]
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        gate, up = (torch.randn(tokens, F, **options) for _ in range(2))
        q, k = (torch.randn(1, heads, tokens, DH, **options) for heads in (H, HKV))
        cos, sin = (torch.rand(1, tokens, DH, dtype=q.dtype, device=DEVICE) for _ in range(2))
        norm = (1e-5, 0.0, "llama", False)
        found |= {
            "rms_norm": {"Liger": (lambda: LigerRMSNormFunction.apply(x, weight, *norm), [x, weight])},
            "add_rms_norm": {"Liger": (
                lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, *norm), [x, residual, weight],
            )},
            "rope": {"Liger (q and k apart)": (lambda: LigerRopeFunction.apply(q, k, cos, sin), [q, k])},
            "swiglu": {"Liger (gate and up apart)": (lambda: LigerSiLUMulFunction.apply(gate, up), [gate, up])},
        }.get(operation, {})  # fmt: skip
    return {who: with_gradient(f, leaves) if options["requires_grad"] else f for who, (f, leaves) in found.items()}


def rivals(name: str, rows: int) -> dict[str, Callable]:
    """What is ready-made and stands in for ours, where it is installed."""
    if not GPU:
        return {}
    if not name.startswith("linear_cross_entropy"):
        return body_rivals(name, rows) if name.split()[0] in ("rms_norm", "add_rms_norm", "rope", "swiglu") else {}
    options = dict(dtype=torch.bfloat16, device=DEVICE)
    h = (torch.randn(rows, D, **options) * 4 / D**0.5).requires_grad_()
    w, labels = torch.randn(V, D, **options).requires_grad_(), torch.randint(V, (rows,), device=DEVICE)
    found = {}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        fused = torch.nn.functional.linear_cross_entropy
        found["torch F.linear_cross_entropy"] = with_gradient(lambda: fused(h, w, labels), [h, w])
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = with_gradient(lambda: liger(w, h, labels), [h, w])
    return found


def ceilings() -> dict[str, float]:
    """What this machine can do: GB/s of a copy, TFLOP/s of a matmul."""
    n = 2**30 if GPU else 2**24
    x = torch.empty(n // 4, device=DEVICE)
    y = torch.empty_like(x)
    copy, _ = measure(lambda: y.copy_(x))
    size = 8192 if GPU else 512
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    matmul, _ = measure(lambda: a @ a)
    return {"GB": 2 * x.numel() * 4 / 1e9 / copy, "TFLOP": 2 * size**3 / 1e12 / matmul}


def alone(name: str, who: str, function: Callable) -> dict:
    """The time of a call for the GPU alone, printed, as part of a row; nothing where it cannot be captured."""
    try:
        seconds = on_the_gpu_alone(function)
    except RuntimeError as error:
        print(f"{name}, {who}: not captured, {str(error).splitlines()[0][:80]}")
        return {}
    print(f"{name}, {who}: {seconds * 1e3:.3f} ms for the GPU alone", flush=True)
    return {"gpu_ms": seconds * 1e3}


@contextmanager
def changed(file, name: str, value):
    """A module constant, for the time of a measurement."""
    before = getattr(file, name)
    setattr(file, name, value)
    yield
    setattr(file, name, before)


def in_chunks(count: int, rows: int, function: Callable) -> Callable[[], None]:
    """The same with the logits of `rows` made in so many parts: fewer are faster and take more memory."""

    def run() -> None:
        with changed(kernels.runtime, "CHUNK_ELEMENTS", -(-rows // count) * V):
            function()

    return run


def tiles(rows: int, tokens: int, ceiling: dict[str, float]) -> list[dict]:
    """Other configurations than those that ship."""
    ops, results = operations(rows) | body(tokens), []

    def show(op: str, name: str, function: Callable) -> None:
        ours, _, leaves, unit, work = ops[op]
        try:
            seconds, _ = measure(with_gradient(ours, leaves) if leaves else ours)
        except RuntimeError as error:  # a tile that this card cannot hold
            print(f"{op:32} {name:60} {str(error).splitlines()[0][:60]}")
            return
        share = work / seconds / ceiling[unit]
        print(f"{op:32} {name:60} {seconds * 1e3:9.3f} ms {share:5.0%}")
        results.append({"op": op, "tile": name, "ms": seconds * 1e3})

    for name, op in (("logprob_entropy", "logprob_entropy"), ("kl", "kl")):
        for block, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
            with changed(FILES[name], "ROW", dict(BLOCK=block, num_warps=warps)):
                show(op, f"BLOCK {block}, {warps} warps", ops[op][0])
    sample = next(op for op in ops if op.startswith("sample_head"))
    for name, op in (("linear_logprob", "linear_logprob"), ("linear_kl", "linear_kl"), ("sample_head", sample)):
        for n, k, stages, group in itertools.product((64, 128, 256), (64, 128), (3, 4), (1, 8, 16)):
            if op == sample and group > 1:
                continue
            tile = dict(BLOCK_M=128, BLOCK_N=n, BLOCK_K=k, GROUP=group, num_warps=8, num_stages=stages)
            with changed(FILES[name], "TILE", tile):
                show(op, f"128 x {n} x {k}, {stages} stages, groups of {group}", ops[op][0])
    with changed(FILES["linear_logprob"], "use_tiles", lambda *_: False):
        show("linear_logprob", "chunks of cuBLAS logits", ops["linear_logprob"][0])
    for elements in (2**26, 2**27, 2**28, 2**29, 2**30):
        with changed(kernels.runtime, "CHUNK_ELEMENTS", elements):
            show("linear_ppo_loss fwd+bwd", f"chunks of {elements // V} rows", ops["linear_ppo_loss fwd+bwd"][0])
    decode = next(op for op in ops if op.startswith("decode_attention"))
    for name, constant, values, op in (
        ("rms_norm", "PROGRAMS", (132, 264, 528, 1056), "add_rms_norm fwd+bwd"),
        ("rope", "TOKENS", (1, 2, 4), "rope fwd+bwd"),
        ("swiglu", "BLOCK", (1024, 2048, 4096), "swiglu fwd+bwd"),
        ("decode_attention", "BLOCK", (32, 64, 128), decode),
        ("decode_attention", "PROGRAMS", (264, 2048, 4096), decode),
    ):
        for value in values:
            with changed(FILES[name], constant, value):
                show(op, f"{constant} {value}", ops[op][0])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[6784, 8192] if GPU else [256], help="rows M")
    parser.add_argument("--tokens", type=int, default=12_896 if GPU else 256, help="packed tokens N of the body")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each reference too, last")
    parser.add_argument("--tiles", action="store_true", help="other tiles and chunks than those that ship")
    flags = parser.parse_args()
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, kernels: {kernels.chosen()}, D {D}, V {V}")
    if not GPU:
        print("no CUDA device: small shapes, PyTorch references only; skipped: Triton, torch.compile, Liger, memory")
    ceiling = ceilings()
    print(f"ceilings: copy {ceiling['GB']:.0f} GB/s, matmul {ceiling['TFLOP']:.3g} TFLOP/s\n")
    results = []
    tables = [(rows, "rows", operations) for rows in flags.rows] + [(flags.tokens, "tokens", body)]
    for rows, what, build in tables:
        if flags.tiles and GPU:
            results += tiles(rows, flags.tokens, ceiling) if what == "rows" else []
            continue
        print(f"| {rows} {what} | who | ms | rate | of ceiling | GB |\n|---|---|---|---|---|---|")
        for compiled in (False, True) if flags.compile and GPU else (False,):
            for name, (ours, reference, leaves, unit, work) in build(rows).items():
                if not compiled:
                    contenders = {"ours": ours, "PyTorch": reference} if GPU else {"PyTorch": ours}
                elif name.startswith("sample"):  # a search over a cumulative sum is nothing to fuse
                    continue
                else:
                    contenders = {"torch.compile": torch.compile(reference)}
                contenders = {who: with_gradient(f, leaves) if leaves else f for who, f in contenders.items()}
                contenders |= {} if compiled else rivals(name, rows)
                if GPU and not compiled and name.startswith("linear_ppo_loss"):
                    contenders |= {f"ours, {n} chunks": in_chunks(n, rows, contenders["ours"]) for n in (8, 2, 1)}
                for who, function in contenders.items():
                    try:
                        seconds, gigabytes = measure(function)
                    except RuntimeError as error:  # out of memory, or a compiler that is not there: said, not hidden
                        print(f"| {name} | {who} | {type(error).__name__}: {str(error).splitlines()[0][:60]} | | | |")
                        continue
                    rate = work / seconds
                    share, unit_name = rate / ceiling[unit], f"{unit}/s"
                    memory = f"{gigabytes:.2f}" if GPU else ""
                    numbers = f"{seconds * 1e3:.3f} | {rate:.3g} {unit_name} | {share:.0%} | {memory}"
                    print(f"| {name} | {who} | {numbers} |", flush=True)
                    row = {what: rows, "op": name, "who": who, "ms": seconds * 1e3, unit_name: rate}
                    row |= {"of_ceiling": share} | ({"gb": gigabytes} if GPU else {})
                    if GPU and what == "tokens" and not compiled:
                        row |= alone(name, who, function)
                    results.append(row)
                    note(results[-1])
                torch._dynamo.reset() if compiled else None
        print()
    print(json.dumps({"bench": "kernels", "device": device, "torch": torch.__version__, "ceilings": ceiling,
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    as_command(main)
