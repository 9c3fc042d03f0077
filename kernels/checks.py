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


def check_matrix(name: str, matrix: Tensor, shape: tuple, like: Tensor | None = None) -> None:
    """A contiguous float matrix. shape: sizes, with a name in place of one that is free."""
    sizes = tuple(matrix.shape)
    fits = len(sizes) == len(shape) and all(isinstance(b, str) or a == b for a, b in zip(sizes, shape, strict=True))
    if not fits:
        raise ValueError(f"{name}: got shape {sizes}, expected ({', '.join(map(str, shape))})")
    if matrix.dtype not in FLOATS:
        raise ValueError(f"{name}: got dtype {matrix.dtype}, expected float32, bfloat16 or float16")
    if like is not None and (matrix.dtype != like.dtype or matrix.device != like.device):
        raise ValueError(
            f"{name}: got {matrix.dtype} on {matrix.device}, expected {like.dtype} on {like.device} like the operand "
            "beside it"
        )
    if not matrix.is_contiguous():
        raise ValueError(f"{name}: got strides {matrix.stride()}, expected a contiguous matrix: call .contiguous()")


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
    """One int64 label a row. That they are below `vocab` is checked on the CPU, and on CUDA only on request.

    There the answer would have to be waited for, so it is off unless NANORLHF_CHECK_LABELS=1; a label outside the
    vocabulary then gives nan.
    """
    check_rows("labels", labels, rows, like, torch.int64)
    if (labels.device.type == "cpu" or runtime.CHECK_LABELS) and not torch.compiler.is_compiling() and rows:
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= vocab:
            raise ValueError(f"labels: got {low if low < 0 else high}, expected token ids from 0 to {vocab - 1}")
