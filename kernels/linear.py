"""x W^T, the operation a language model spends its time in.

On a GPU this is cuBLAS. On a CPU in fp32 torch sends it to MKL, but it also ships oneDNN, and which of the two is
faster depends on the processor and on which of the three products of a layer is asked for: y = x W^T, dx = dy W,
dW = dy^T x. GFLOP/s of one core at (4096, 128) x (704, 128), MKL and oneDNN (`python -m bench.linear`):

    vectors               y           dx          dW
    AVX-512, Zen 5     98   227    94   212    99   198    MKL uses AVX-512 on Intel's processors only
    AVX-512, Zen 4     91   102    85   108    94    97    over all shapes oneDNN: y 1.16, dx 1.25, dW 1.04 times
    AVX-512, Xeon     215   211   221   219   199   156    MKL's y at the 32 to 128 rows of decoding: 1.1 to 1.6 times
    AVX2, Zen 5        98   118    93   111   100   107    dW: over all shapes of the tiny model oneDNN takes 4% longer
    AVX2, Zen 4        91   101    83    93    93    88    over all shapes oneDNN: y 1.12, dx 1.11, dW 0.91 times
    AVX2, Xeon        121   116   107   123   101    94    over all shapes oneDNN: y 1.00, dx 1.07, dW 0.91 times

So each product is taken from where it was the faster one over all shapes, by the vectors that the processor has and
those that MKL uses on it (Zen 5: 033417b; Zen 4: 2371294; Xeon, model 167: a45b0de). It is no measurement of each
start: that would sometimes fall the other way, and a run that is resumed would end in other bits.
The libraries' results differ by fp32 rounding only.

`linear_fp32` is the same for a head: bf16 in, fp32 out, straight from the accumulator.
Rounding the logits to bf16 first, as a plain matmul does, puts an error of 0.03 on a log-prob.
`mm_wide` and `addmm_wide` are its building blocks for the chunked operations beside this file.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import runtime
from kernels.runtime import INTEL, wide

_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")  # where it was measured
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
# Vectors of the processor (torch's word for them), and whether Intel made it -> products that go to oneDNN.
_ONEDNN_PRODUCTS = {("AVX512", False): ("y", "dx", "dw"), ("AVX512", True): ()}
_VECTORS = torch.backends.cpu.get_cpu_capability()


def onednn_products(vectors: str = _VECTORS, intel: bool = INTEL) -> tuple[str, ...]:
    """Which of y, dx and dw oneDNN computes here: a function of the processor alone."""
    return _ONEDNN_PRODUCTS.get((vectors, intel), ("y", "dx")) if _HAS_ONEDNN else ()


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The specification."""
    return F.linear(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _onednn_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """dW = dy^T x (N, K), or its transpose x^T dy where that is the wider one: oneDNN likes to write long rows."""
    N, K = grad.shape[1], x.shape[1]
    return _onednn(x.T, grad.T).T if N > K else _onednn(grad.T, x.T)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        products = onednn_products()
        grad_x = grad_weight = None
        if of_x:
            grad_x = _onednn(grad, weight.T) if "dx" in products else grad @ weight
        if of_weight:
            grad_weight = _onednn_grad_weight(grad, x) if "dw" in products else grad.T @ x
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K), weight (N, K), same dtype and device -> (M, N); differentiable in both."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and onednn_products() and runtime.MODE != "torch":
        return _OneDNNLinear.apply(x, weight) if torch.is_grad_enabled() else _onednn(x, weight)
    return linear_reference(x, weight)


def mm_wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N), same dtype -> (M, N) fp32 from the accumulator (fp64 for fp64), into `out` if given."""
    if a.is_cuda and wide(a.dtype) != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    onednn = onednn_products() and runtime.MODE != "torch"
    if a.device.type == "cpu" and a.dtype == torch.bfloat16 and out is None and onednn:
        return _onednn(a.float(), b.T.float())  # as in `linear`: 1.9 times MKL's speed at SmolLM2's head on Zen 5
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
    if runtime.MODE == "torch" or runtime.INTERPRETED or torch.cuda.is_available():
        return runtime.chosen()
    products = onednn_products()
    onednn = " and oneDNN's matrices" + ("" if "dw" in products else ", torch's for the gradients of weights")
    return "PyTorch reference; on the CPU in fp32 gradients by hand" + (onednn if products else "")
