"""What the public operations refuse: one sentence with the name, what it got and what it wants."""

import torch
from torch import Tensor

from kernels import runtime

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature: got {temperature}, expected a number greater than 0; take the argmax for greedy decoding"
        )


def check_tensor(name: str, tensor: Tensor, shape: tuple, like: Tensor | None = None) -> None:
    """A float tensor. shape: sizes, with a name in place of one that is free."""
    sizes = tensor.shape
    if len(sizes) != len(shape) or any([a != b and b.__class__ is not str for a, b in zip(sizes, shape, strict=True)]):
        raise ValueError(f"{name}: got shape {tuple(sizes)}, expected ({', '.join(map(str, shape))})")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise ValueError(
            f"{name}: got {tensor.dtype} on {tensor.device}, expected {like.dtype} on {like.device} like the operand "
            "beside it"
        )


def check_matrix(name: str, matrix: Tensor, shape: tuple, like: Tensor | None = None) -> None:
    """A contiguous float matrix."""
    check_tensor(name, matrix, shape, like)
    if not matrix.is_contiguous():
        raise ValueError(f"{name}: got strides {matrix.stride()}, expected a contiguous matrix: call .contiguous()")


def check_heads(
    name: str, heads: Tensor, shape: tuple, like: Tensor | None = None, inner: tuple[int, ...] = (-1,)
) -> None:
    """A float tensor (..., heads, Dh), perhaps a view into a larger one: only the last dimension, or another of
    `inner`, is contiguous."""
    check_tensor(name, heads, shape, like)
    if all(heads.stride(dim) != 1 for dim in inner):
        raise ValueError(f"{name}: got strides {heads.stride()}, expected 1 as the last: call .contiguous()")


def check_rows(name: str, values: Tensor, rows: int, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """One number a row: (rows,), on the device of `like`, in `dtype` or any float."""
    if tuple(values.shape) != (rows,):
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected ({rows},)")
    if values.device != like.device:
        raise ValueError(f"{name}: got a tensor on {values.device}, expected {like.device}")
    if values.dtype != dtype if dtype else not values.is_floating_point():
        raise ValueError(f"{name}: got dtype {values.dtype}, expected {dtype or 'a float'}")


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The operands of an operation from hidden states: hidden (M, D), weight (V, D), labels (M,)."""
    check_matrix("hidden", hidden, ("M", "D"))
    check_matrix("weight", weight, ("V", hidden.shape[1]), like=hidden)
    check_labels(labels, hidden.shape[0], weight.shape[0], like=hidden)


def check_labels(labels: Tensor, rows: int, vocab: int, like: Tensor) -> None:
    """One int64 label a row; outside the vocabulary it is refused on the CPU, and on CUDA gives nan (see _below)."""
    check_rows("labels", labels, rows, like, torch.int64)
    _below("labels", labels, vocab, "token ids")


def check_positions(positions: Tensor, rows: int, slots: int, like: Tensor) -> None:
    """One int64 slot of a cache a row; outside it is refused on the CPU (see _below)."""
    check_rows("positions", positions, rows, like, torch.int64)
    _below("positions", positions, slots, "slots")


def _below(name: str, numbers: Tensor, bound: int, what: str) -> None:
    """0 <= numbers < bound, on the CPU; on CUDA the answer would have to be waited for: NANORLHF_CHECK_LABELS=1."""
    if (numbers.device.type == "cpu" or runtime.CHECK_LABELS) and not torch.compiler.is_compiling() and len(numbers):
        low, high = (x.item() for x in numbers.aminmax())
        if low < 0 or high >= bound:
            raise ValueError(f"{name}: got {low if low < 0 else high}, expected {what} from 0 to {bound - 1}")
