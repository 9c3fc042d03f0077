"""x W^T, the operation a language model spends its time in.

On a GPU this is cuBLAS. On a CPU in fp32, torch sends it to MKL, which on AMD processors
does not use AVX-512: 92 GFLOP/s on one Zen 5 core at (4096, 128) x (704, 128), where
oneDNN, which torch also ships, reaches 220 (`python -m bench.linear`). So there it goes
to oneDNN, forward and backward; the result differs from MKL's by fp32 rounding only.

`linear_fp32` is the same for a head: bf16 in, fp32 out, straight from the accumulator.
Rounding the logits to bf16 first, as a plain matmul does, puts an error of 0.03 on a log-prob.
`mm_wide` and `addmm_wide` are its building blocks for the chunked operations beside this file.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import runtime
from kernels.runtime import wide

_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")  # where it was measured
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The specification."""
    return F.linear(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = _onednn(grad, weight.T) if ctx.needs_input_grad[0] else None  # dX = dY W
        grad_weight = _onednn(grad.T, x.T) if ctx.needs_input_grad[1] else None  # dW = dY^T X
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K), weight (N, K), same dtype and device -> (M, N); differentiable in both."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and _HAS_ONEDNN and runtime.MODE != "torch":
        return _OneDNNLinear.apply(x, weight) if torch.is_grad_enabled() else _onednn(x, weight)
    return linear_reference(x, weight)


def mm_wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N), same dtype -> (M, N) fp32 from the accumulator (fp64 for fp64), into `out` if given."""
    if a.is_cuda and wide(a.dtype) != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.to(wide(a.dtype)), b.to(wide(a.dtype)), out=out)


def addmm_wide(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total (M, N) fp32 += a (M, K) @ b (K, N), in the order of the calls: gradients of chunks add up without rounding
    to bf16 in between, and the same way every time. first: total = a @ b, whatever it holds: no zeros to write and to
    read again, which for Llama 3's head is 2.1 GB."""
    if first:
        mm_wide(a, b, out=total)
    elif a.is_cuda and wide(a.dtype) != a.dtype:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return mm_wide(x, weight.T)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.T @ x


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K), weight (N, K), both bf16 or both fp32 -> (M, N) fp32; differentiable in both."""
    return linear(x, weight) if wide(x.dtype) == x.dtype else _LinearFp32.apply(x, weight)


def chosen() -> str:
    """What the first lines of a run print: which path this process takes."""
    on_cpu = runtime.MODE != "torch" and _HAS_ONEDNN and not torch.cuda.is_available()
    return runtime.chosen() + (", oneDNN for fp32 matrices on the CPU" if on_cpu else "")
