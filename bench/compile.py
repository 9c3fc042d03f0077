"""Compile every kernel, at the shapes and configurations that ship, to Hopper machine code. Needs no GPU.

    python -m bench.compile              the table of docs/kernels.md
    python -m bench.compile --check      exit status 1 where a kernel breaks its promise

The public operations run on tensors without storage, and each kernel launch is compiled where it would have started: so
what is compiled is what a GPU would be given, and cannot drift from it. Printed from the machine code (cuobjdump and
nvdisasm, which Triton ships): registers a thread, spill stores and stack bytes (0 is the promise), shared memory (227
KB is there), wgmma instructions (the matrix kernels' tensor-core instruction), 128-bit global loads (the row kernels').
One JSON line last.

Another version of Triton, the one that torch 2.11 brings for example, is a folder away:

    pip install --target build/triton-3.6 --no-deps triton==3.6.0
    PYTHONPATH=build/triton-3.6 python -m bench.compile
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nanorlhf.run.streams import as_command

M, D, V, B, R = 6784, 2048, 128_256, 128, 53  # one PPO batch of Llama-3.2-1B: 128 responses of 53 tokens
N, H, HKV, DH, F, S = 12_896, 32, 8, 64, 8192, 576  # and its body: packed tokens of 32 sequences, slots of the KV cache
SHARED_LIMIT = 232_448  # bytes of shared memory a block can have on sm_90
MATRIX = ("_tile_stats", "_tile_kl")  # kernels that must use wgmma
STREAMS = (  # kernels that must load 128 bits at a time
    "_logprob_entropy_fwd", "_logprob_entropy_bwd", "_kl_fwd", "_kl_bwd", "_loss_rows", "_rms_norm_fwd",
    "_rms_norm_bwd", "_rope_fwd", "_rope_bwd", "_swiglu_fwd", "_swiglu_bwd", "_decode",
)  # fmt: skip


def signature(kernel, args: tuple, constants: dict) -> tuple[dict, dict, dict]:
    """Types, constants and divisibilities of a launch, as Triton's own launcher would see them."""
    types, values, attributes = {}, dict(constants), {}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64"}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        name = parameter.name
        multiple_of_16 = False
        if isinstance(value, torch.Tensor):
            types[name], multiple_of_16 = f"*{names[value.dtype]}", True  # the allocator aligns to 512 bytes
        elif isinstance(value, float):
            types[name] = "fp32"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            multiple_of_16 = value % 16 == 0 and not parameter.do_not_specialize
            if value == 1 and not parameter.do_not_specialize:
                values[name] = 1
        else:  # a descriptor of the copy engine
            types[name] = f"tensordesc<{names[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
        if multiple_of_16:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature = {parameter.name: types.get(parameter.name, "constexpr") for parameter in kernel.params}
    signature |= dict.fromkeys(values, "constexpr")
    positions = {parameter.name: index for index, parameter in enumerate(kernel.params)}
    return signature, {(positions[name],): value for name, value in values.items()}, attributes


def compile_launch(kernel, args: tuple, constants: dict, options: dict) -> dict:
    """One launch -> what its machine code needs and holds."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types, values, attributes = signature(kernel, args, constants)
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, check=True, encoding="utf-8"
        ).stdout
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, encoding="utf-8", check=True
        ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\bSTL\b", sass)),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E(?:\.\w+)*\.128\b", sass)),
    }


def launches() -> list[dict]:
    """Run every operation without data and compile its launches."""
    from kernels import runtime

    files = ("logprob_entropy", "kl", "linear_logprob", "linear_ppo_loss", "linear_kl", "sample_head")
    logprob_entropy, kl, linear_logprob, linear_ppo_loss, linear_kl, sample_head = (
        importlib.import_module(f"kernels.{file}")
        for file in files  # each function has the name of its file
    )
    rms_norm, rope, swiglu, decode_attention = (
        importlib.import_module(f"kernels.{file}") for file in ("rms_norm", "rope", "swiglu", "decode_attention")
    )
    rows = []

    def record(kernel, grid, args, constants, options):
        name = kernel.__name__
        measured = compile_launch(kernel, args, constants, options)
        tile = [
            constants[key]
            for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK", "SLOTS", "Q_SLOTS", "HALF")
            if key in constants
        ]
        dtype = next((str(a.dtype)[6:] for a in args if isinstance(a, torch.Tensor)), "")
        dtype = "bfloat16" if name in MATRIX else dtype
        rows.append({"op": op, "kernel": name, "tile": "x".join(map(str, tile)), "dtype": dtype} | options | measured)

    runtime.start = record
    bf16 = dict(dtype=torch.bfloat16, device="meta")
    fp32 = dict(dtype=torch.float32, device="meta")
    hidden, weight = torch.empty(M, D, **bf16), torch.empty(V, D, **bf16)
    labels = torch.empty(M, dtype=torch.int64, device="meta")
    row = torch.empty(M, **fp32)
    for dtype in (bf16, fp32):
        logits = torch.empty(1696, V, **dtype)
        y, r = labels[:1696], row[:1696]
        op = "logprob_entropy"
        logprob_entropy.forward_rows(logits, y, 0.7)
        logprob_entropy.backward_rows(logits, y, (r, r, r), (r, r, r), 0.7, torch.empty_like(logits))
        op = "kl"
        kl._forward._init_fn(logits, logits, y, 0.7)
        kl._backward._init_fn(logits, logits, y, r, r, r, r, r, r, r, 0.7)
    op = "linear_logprob"
    linear_logprob._forward_tiles(hidden, weight, labels, 0.7)
    linear_logprob._backward._init_fn(hidden, weight, labels, row, row, row, row, row, 0.7, True, True)
    linear_logprob._forward_chunks(hidden, weight, labels, 0.7)
    op = "linear_ppo_loss"
    linear_ppo_loss._forward._init_fn(hidden, weight, labels, row, row, row, 0.7, 0.2, True, True)
    linear_ppo_loss._forward._init_fn(hidden, weight, labels, row, row, row, 0.7, 0.2, False, False)
    op = "linear_cross_entropy"
    linear_ppo_loss._forward._init_fn(hidden, weight, labels, row, None, None, 1.0, 0.0, True, True)
    op = "linear_kl"
    linear_kl._tiles(hidden, weight, hidden, weight, labels, 0.7)
    op = "sample_head"
    u, step = torch.empty(B, R, dtype=torch.float64, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    sample_head._tiles(hidden[:B], weight, u, step, 0.7)
    x, w, scales = torch.empty(N, D, **bf16), torch.empty(D, **bf16), torch.empty(N, **fp32)
    op = "rms_norm"
    rms_norm._forward._init_fn(x, w, 1e-5)
    rms_norm._backward._init_fn(x, w, scales, x, None)
    op = "add_rms_norm"
    rms_norm._add_forward._init_fn(x, x, w, 1e-5)
    rms_norm._backward._init_fn(x, w, scales, x, x)
    op = "rope"
    qkv, angles = torch.empty(N, H + 2 * HKV, DH, **bf16), torch.empty(N, DH // 2, **fp32)
    rope._backward._init_fn(*rope._forward._init_fn(qkv, angles, angles, HKV), angles, angles)
    op = "swiglu"
    gate_up = torch.empty(N, 2 * F, **bf16)
    swiglu._backward._init_fn(gate_up, swiglu._forward._init_fn(gate_up))
    op = "decode_attention"
    for batch in (B, 8):  # the second one is split
        q, cache = torch.empty(batch, H, DH, **bf16), torch.empty(batch, HKV, S, DH, **bf16).transpose(1, 2)
        decode_attention._forward._init_fn(q, cache, cache, labels[:batch])
    unique = {}
    for found in rows:  # a loop over chunks launches the same kernel again
        unique.setdefault(tuple(found.values()), found)
    return list(unique.values())


def broken_promises(rows: list[dict]) -> list[str]:
    """What a kernel must hold, and which do not."""
    broken = []
    for row in rows:
        name = f"{row['op']}: {row['kernel']} {row['tile']} {row['dtype']}"
        if row["spills"] or row["stack"]:
            broken.append(f"{name} spills: {row['spills']} stores, {row['stack']} bytes of stack")
        if row["shared"] > SHARED_LIMIT:
            broken.append(f"{name} wants {row['shared']} bytes of shared memory, {SHARED_LIMIT} are there")
        if row["kernel"] in MATRIX and not row["wgmma"]:
            broken.append(f"{name} does not use the tensor cores' wgmma")
        if row["kernel"] in STREAMS and not row["wide_loads"]:
            broken.append(f"{name} has no 128-bit loads")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit status 1 where a kernel breaks its promise")
    check = parser.parse_args().check
    import triton

    rows = launches()
    print(f"Triton {triton.__version__}, sm_90, M {M}, D {D}, V {V}\n")
    print(
        "| operation | kernel | tile | in | warps | stages | registers | spills | shared KB | wgmma | 128-bit loads |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        spills = f"{r['spills']}" + (f" ({r['stack']} B)" if r["stack"] else "")
        cells = [
            r["op"], f"`{r['kernel']}`", r["tile"], r["dtype"], r["num_warps"], r["num_stages"], r["registers"], spills,
            round(r["shared"] / 1024), r["wgmma"], r["wide_loads"],
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")
    broken = broken_promises(rows)
    print("\n" + ("\n".join(broken) or "every kernel holds what it promises"))
    print(json.dumps({"bench": "compile", "triton": triton.__version__, "launches": rows, "broken": broken}))
    if check and broken:
        sys.exit(1)


if __name__ == "__main__":
    as_command(main)
