"""kernels/cpu.py: values and gradients are those of the references by autograd, and nothing given is changed."""

import importlib
from types import SimpleNamespace

import pytest
import torch

import kernels
from bench import body
from kernels import cpu, runtime

N, H, HKV, DH, D, F = 37, 6, 2, 20, 24, 14
FILES = {name: importlib.import_module(f"kernels.{name}") for name in ("rope", "swiglu", "rms_norm")}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands() -> dict[str, tuple]:
    """For each operation: itself, its reference, the tensors it is differentiable in, and what follows them."""
    angles = draw(N, DH // 2, seed=1)
    x, residual, weight = draw(N, D), draw(N, D, seed=1), 1 + 0.1 * draw(D, seed=2)
    wide = draw(N, H + 2 * HKV + 1, DH)  # rope takes a view of it
    norm = FILES["rms_norm"]
    return {
        "rope": (kernels.rope, FILES["rope"].rope_reference, [wide[:, 1:]], [angles.cos(), angles.sin(), HKV]),
        "swiglu": (kernels.swiglu, FILES["swiglu"].swiglu_reference, [draw(N, 2 * F)], []),
        "rms_norm": (kernels.rms_norm, norm.rms_norm_reference, [x, weight], [1e-5]),
        "add_rms_norm": (kernels.add_rms_norm, norm.add_rms_norm_reference, [x, residual, weight], [1e-5]),
    }


OPERATIONS = tuple(operands())


def as_tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run(function, leaves: list[torch.Tensor], constants: list, dtype: torch.dtype) -> tuple[list, list]:
    """-> outputs, gradients of the leaves for gradients of the outputs that are drawn."""
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    constants = [c.to(dtype) if isinstance(c, torch.Tensor) else c for c in constants]
    outputs = as_tuple(function(*leaves, *constants))
    torch.autograd.backward(outputs, [draw(*out.shape, seed=9 + i).to(dtype) for i, out in enumerate(outputs)])
    return [out.detach() for out in outputs], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_the_reference_in_float64(name):
    ours, reference, leaves, constants = operands()[name]
    outputs, grads = run(ours, leaves, constants, torch.float32)
    expected, expected_grads = run(reference, leaves, constants, torch.float64)
    for mine, theirs in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_finite_differences(name):
    ours, _, leaves, constants = operands()[name]
    leaves = [(leaf[:4] if leaf.dim() > 1 else leaf).contiguous().requires_grad_() for leaf in leaves]
    constants = [c[:4] if isinstance(c, torch.Tensor) else c for c in constants]
    assert torch.autograd.gradcheck(lambda *args: ours(*args, *constants), leaves)


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_gradients_the_values_are_the_same_bits(name):
    ours, _, leaves, constants = operands()[name]
    outputs, _ = run(ours, leaves, constants, torch.float64)
    with torch.no_grad():
        for mine, again in zip(outputs, as_tuple(ours(*leaves, *constants)), strict=True):
            assert mine.equal(again)


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_and_incoming_gradients_are_left_alone(name):
    """In place is only what nobody else sees."""
    ours, _, leaves, constants = operands()[name]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = as_tuple(ours(*leaves, *constants))
    grads = [draw(*out.shape, seed=9 + i) for i, out in enumerate(outputs)]
    seen = [x.detach() for x in [*leaves, *outputs, *grads, *(c for c in constants if isinstance(c, torch.Tensor))]]
    before = [x.clone() for x in seen]
    torch.autograd.backward(outputs, grads, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    torch.autograd.backward(outputs, grads)
    assert all(x.equal(then) for x, then in zip(seen, before, strict=True))
    assert all(leaf.grad.equal(2 * grad) for leaf, grad in zip(leaves, first, strict=True))  # what is kept is whole


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_of_a_norm_may_be_without_a_gradient(which):
    """After the last norm nobody reads the stream; a block that is skipped reads only that."""
    ours, reference, leaves, constants = operands()["add_rms_norm"]
    found = []
    for function in (ours, reference):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        function(*inputs, *constants)[which].square().sum().backward()
        found.append([x.grad for x in inputs])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = draw(N, D).requires_grad_(), 1 + 0.1 * draw(D, seed=2)
    found = []
    for function in (kernels.rms_norm, FILES["rms_norm"].rms_norm_reference):
        function(x, weight, 1e-5).square().sum().backward()
        found.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*found)
    needs = (True, False, False, False)
    kept = SimpleNamespace(saved_tensors=(x.detach(), weight, torch.ones(N, 1)), needs_input_grad=needs)
    of_x, *others = cpu._AddRMSNorm.backward(kept, torch.ones(N, D), None)  # no sum over rows for nobody
    assert of_x is not None and others == [None, None, None]


@pytest.mark.parametrize(
    ("dtype", "mode", "here"),
    [(torch.float32, "auto", True), (torch.float32, "torch", False), (torch.bfloat16, "auto", False)],
)
def test_what_comes_here(dtype, mode, here, monkeypatch):
    monkeypatch.setattr(runtime, "MODE", mode)
    asked = []
    for name in OPERATIONS:
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, name=name, real=real: asked.append(name) or real(*args))
    for function, _, leaves, constants in operands().values():
        constants = [c.float() if isinstance(c, torch.Tensor) else c for c in constants]
        function(*(leaf.to(dtype) for leaf in leaves), *constants)
    assert asked == (list(OPERATIONS) if here else [])


def test_both_ways_of_a_cpu_take_turns_and_the_first_of_each_does_not_count(monkeypatch):
    monkeypatch.setattr(cpu, "by_hand", cpu.by_hand)  # put back at the end
    monkeypatch.setattr(body, "ROUNDS", 2)
    found = body.seconds(body.operations())
    assert found.keys() == {"rope", "swiglu", "add_rms_norm"}
    assert not [took for took in found.values() if took.keys() != set(body.WAYS) or min(took.values()) <= 0]
    by_hand, now, takes = [], [0.0], iter([70.0, 90.0, 1.0, 2.0, 3.0, 6.0])

    def work() -> None:
        by_hand.append(cpu.by_hand(torch.zeros(1)))
        now[0] += next(takes)

    monkeypatch.setattr(body.time, "perf_counter", lambda: now[0])
    assert body.seconds({"asked": work}) == {"asked": {"references": 2.0, "by hand": 4.0}}
    assert by_hand == [False, True] * 3
