"""The elementwise operations of a block on a CPU, in fp32: fewer passes over memory than autograd would make of them.

    rope           (a, b) -> (a cos - b sin, b cos + a sin)                    kernels/rope.py
    swiglu         silu(gate) * up                                             kernels/swiglu.py
    add_rms_norm   s = x + residual,  w * s / sqrt(mean(s^2) + eps)            kernels/rms_norm.py

The references of those files say what is computed. Their backward passes are autograd's: one tensor for each
operation, and for each slice (gate, up, q, k, v, half a head) zeros of the whole, the slice copied in, and a sum. Here
the gradients are the formulas of the Triton kernels, and each is written to where it belongs. It matters in a small
model, whose matrices are no more than half of the time: docs/speed.md has the figures, by `python -m bench.body`.

What counts on a CPU is how often N rows go through memory, so results are computed in place where nobody else sees
them. bf16 takes the references, which say where it rounds; fp64 comes here for the checks of gradients. Off with
NANORLHF_KERNELS=torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import runtime


def by_hand(x: Tensor) -> bool:
    """Whether operations on this tensor come here."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and runtime.MODE != "torch"


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int) -> None:
    """out = x turned by direction * angle. x, out (N, heads, Dh); cos, sin (N, 1, Dh/2)."""
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=direction)


def _turned(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    N, merged, Dh = qkv.shape
    heads = merged - kv_heads  # of q and k
    qk = qkv.new_empty(N, heads, Dh)
    _turn(qkv[:, :heads], cos[:, None], sin[:, None], qk, 1)
    return qk[:, : heads - kv_heads], qk[:, heads - kv_heads :], qkv[:, heads:]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(qkv, cos, sin, kv_heads)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        cos, sin = (table[:, None] for table in ctx.saved_tensors)
        (N, heads, Dh), kv_heads = grad_q.shape, grad_k.shape[1]
        grad = grad_q.new_empty(N, heads + 2 * kv_heads, Dh)
        for_q, for_k, for_v = grad.split((heads, kv_heads, kv_heads), dim=1)
        _turn(grad_q, cos, sin, for_q, -1)
        _turn(grad_k, cos, sin, for_k, -1)
        for_v.copy_(grad_v)
        return grad, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate_up


def _normed(s: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> w s / rms (N, D), and 1 / rms of each row (N, 1)."""
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)  # reads s and writes no squares
    scale = norm.square_().div_(s.shape[-1]).add_(eps).rsqrt_()
    return (s * scale).mul_(weight), scale


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        s = x if residual is None else x + residual
        normed, scale = _normed(s, weight, eps)
        ctx.save_for_backward(s, weight, scale)
        ctx.set_materialize_grads(False)  # after the last norm nobody reads the sum: None, not a matrix of zeros
        return normed, s

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_s: Tensor | None):
        """With n = s / rms: d / d s = (g w - n mean(g w n)) / rms, d / d w = the sum over rows of g n."""
        s, weight, scale = ctx.saved_tensors
        if grad is None:
            return grad_s, grad_s if ctx.needs_input_grad[1] else None, None, None
        n = s * scale
        gn = grad * n
        mean = (gn @ weight).div_(-s.shape[-1])[:, None]  # (N, 1), with its sign
        grad_weight = gn.sum(0) if ctx.needs_input_grad[2] else None
        total = torch.mul(grad, weight, out=gn).addcmul_(n, mean)
        total = total.mul_(scale) if grad_s is None else torch.addcmul(grad_s, total, scale)
        return total, total if ctx.needs_input_grad[1] else None, grad_weight, None


# A decoding step has four of these a layer, over few rows: without a gradient it does without autograd's bookkeeping.


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """As kernels.rope.rope_reference."""
    return (_Rope.apply if torch.is_grad_enabled() else _turned)(qkv, cos, sin, kv_heads)


def swiglu(gate_up: Tensor) -> Tensor:
    """As kernels.swiglu.swiglu_reference."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.rms_norm.rms_norm_reference."""
    return (_AddRMSNorm.apply(x, None, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps))[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As kernels.rms_norm.add_rms_norm_reference."""
    if torch.is_grad_enabled():
        return _AddRMSNorm.apply(x, residual, weight, eps)
    s = x + residual
    return _normed(s, weight, eps)[0], s
