"""What the kernel tests share: an error budget, hard inputs, and guards around every tensor that a kernel gets.

These tests run the Triton kernels in Triton's interpreter, in fp32 on the CPU, and need a process of their own, because
Triton decides when a kernel is defined whether it will be interpreted:

    TRITON_INTERPRET=1 NANORLHF_KERNELS=triton python -m pytest tests/interpreter

tests/test_triton.py starts that process.
"""

import pytest
import torch
from guards import guarded

from kernels import runtime

if runtime.INTERPRETED:
    from triton.runtime import interpreter

assert runtime.INTERPRETED and runtime.MODE == "triton", "set TRITON_INTERPRET=1 and NANORLHF_KERNELS=triton"

EPSILON = 2.0**-23  # spacing of fp32 at 1


@pytest.fixture(autouse=True)
def a_loops_bound_is_a_number(monkeypatch):
    """Triton 3.6 makes a loop's bound a number by int() of an array of one element, which numpy 2.4 refuses; later
    versions do as is done here."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def outputs_and_gradients(
    function, inputs: dict, leaves: tuple[str, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Call function(**inputs) in a dtype; -> its outputs, and the gradients of the leaves for fixed cotangents."""
    inputs = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "u" else x
        for name, x in inputs.items()
    }
    for leaf in leaves:
        inputs[leaf] = inputs[leaf].clone().requires_grad_()
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        generator = torch.Generator().manual_seed(7)
        scalars = [(x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in outputs if x.requires_grad]
        sum(scalars).backward()
        named |= {f"gradient of {leaf}": inputs[leaf].grad for leaf in leaves}
    return named


@pytest.fixture
def within_budget():
    """within_budget(op, reference, inputs, leaves): the kernel errs no more than twice what PyTorch does in fp32.

    The truth is the reference in float64. Beside the twice, a few roundings of the largest number that occurs are
    granted, because PyTorch is sometimes exact by luck: the largest number that comes out, or `largest`, a logit on the
    way. What rounds a logit, 4e-6 at 50, is a relative error of its probability, and so of every gradient.
    """

    def check(op, reference, inputs: dict, leaves: tuple[str, ...] = (), largest: float = 1.0) -> dict:
        exact = outputs_and_gradients(reference, inputs, leaves, torch.float64)
        plain = outputs_and_gradients(reference, inputs, leaves, torch.float32)
        ours = outputs_and_gradients(op, inputs, leaves, torch.float32)
        assert ours.keys() == exact.keys()
        for name, truth in exact.items():
            assert ours[name].shape == truth.shape, name
            if not truth.is_floating_point():
                assert torch.equal(ours[name], truth), name
                continue
            assert ours[name].dtype == torch.float32, name
            finite = truth.isfinite()
            assert torch.equal(ours[name][~finite].double(), truth[~finite]), name
            error = (ours[name].double() - truth)[finite].abs().max().item()
            allowed = (plain[name].double() - truth)[finite].abs().max().item()
            top = truth[finite].abs().max().item()
            scale = max(largest, top) if name.startswith("output") else max(1.0, largest * top)
            assert error <= 2 * allowed + 8 * EPSILON * scale, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"
        return ours

    return check


def hard_logits(M: int, V: int, seed: int = 0) -> torch.Tensor:
    """(M, V): rows with a logit of 60, an offset of -200, -inf, all equal, and ordinary ones."""
    z = 3 * torch.randn(M, V, generator=torch.Generator().manual_seed(seed))
    z[0, 0] = 60.0
    if M > 1:
        z[1] -= 200.0
    if M > 2:
        z[2, 1:-1:2] = float("-inf")
    if M > 3:
        z[3] = 0.5
    return z


def some_labels(M: int, V: int, seed: int = 1) -> torch.Tensor:
    """(M,) int64, the first one 0 and the last one the last token of the vocabulary."""
    labels = torch.randint(V, (M,), generator=torch.Generator().manual_seed(seed))
    labels[0], labels[-1] = 0, V - 1
    return labels


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    monkeypatch.setattr(runtime, "start", guarded(runtime.start))
