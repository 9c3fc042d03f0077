"""The Triton kernels without a GPU: interpreted on the CPU, and compiled to Hopper machine code. A process for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import runtime

ROOT = Path(__file__).parent.parent
INTERPRETED = sorted((ROOT / "tests" / "interpreter").glob("test_*.py"))
pytestmark = pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed: it exists for Linux only")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, timeout=1200, encoding="utf-8"
    )


@pytest.mark.parametrize("file", INTERPRETED, ids=lambda path: path.stem)
def test_every_kernel_is_exact_in_the_interpreter(file):
    """tests/interpreter: each kernel against float64, in values, gradients and edges. A process a file."""
    done = run("-m", "pytest", "-p", "no:warnings", str(file), TRITON_INTERPRET="1", NANORLHF_KERNELS="triton")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_every_kernel_compiles_for_hopper_without_spills():
    """bench/compile.py: every launch at the shapes and configurations that ship."""
    done = run("-m", "bench.compile", "--check")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    launches = json.loads(done.stdout.splitlines()[-1])["launches"]
    assert {row["op"] for row in launches} == {
        "logprob_entropy", "kl", "linear_logprob", "linear_ppo_loss", "linear_cross_entropy", "linear_kl",
        "sample_head", "rms_norm", "add_rms_norm", "rope", "swiglu", "decode_attention",
    }  # fmt: skip
    assert all(row["spills"] == row["stack"] == 0 and row["shared"] <= 232_448 for row in launches)
    assert all(row["wgmma"] > 0 for row in launches if row["kernel"] in ("_tile_stats", "_tile_kl"))
    rows = (
        "_logprob_entropy_fwd", "_logprob_entropy_bwd", "_kl_fwd", "_kl_bwd", "_loss_rows", "_rms_norm_fwd",
        "_rms_norm_bwd", "_rope_fwd", "_rope_bwd", "_swiglu_fwd", "_swiglu_bwd", "_decode",
    )  # fmt: skip
    assert all(row["wide_loads"] > 0 for row in launches if row["kernel"] in rows)
    assert {row["kernel"] for row in launches} >= {
        *rows, "_tile_stats", "_tile_kl", "_merge", "_pick", "_merge_splits",
    }  # fmt: skip


def test_triton_asked_for_where_it_cannot_run_is_refused():
    program = "import torch, kernels; kernels.logprob_entropy(torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64))"
    done = run("-c", program, NANORLHF_KERNELS="triton", TRITON_INTERPRET="0")
    assert "NANORLHF_KERNELS=triton: the tensor is on cpu, expected CUDA and Triton" in done.stderr
    done = run("-c", program, NANORLHF_KERNELS="cuda")
    assert "NANORLHF_KERNELS: got 'cuda', expected auto, torch or triton" in done.stderr
