"""The fused operations: references against float64, the chunked path against the whole one, refusals."""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import chosen, linear, linear_cross_entropy, linear_fp32, linear_logprob, runtime

ROOT = Path(__file__).parents[1]
# The files; `import kernels.linear_logprob as file` would give the function of that name.
linear_file = importlib.import_module("kernels.linear")
cross_entropy_file = importlib.import_module("kernels.linear_cross_entropy")
logprob_file = importlib.import_module("kernels.linear_logprob")

M, D, V = 13, 24, 101


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (M,), generator=generator)
    weights = torch.rand(M, generator=generator) * torch.tensor([0.0] + [1.0] * (M - 1))
    return hidden, weight, labels, weights


def gradients(function, hidden, weight):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    outputs = function(hidden, weight)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [
        torch.linspace(0.5, 1.5 + i, out.numel(), device=out.device).view_as(out) for i, out in enumerate(outputs)
    ]
    loss = sum((out * cotangent).sum() for out, cotangent in zip(outputs, cotangents, strict=True))
    loss.backward()
    return [out.detach() for out in outputs], [hidden.grad, weight.grad]


# (x, weight): one row, sizes that are no multiple of 16, a part of a larger matrix, a transposed one.
MATRICES = {
    "one row": lambda: (torch.randn(1, 24), torch.randn(101, 24)),
    "one of each": lambda: (torch.randn(1, 1), torch.randn(1, 1)),
    "odd": lambda: (torch.randn(13, 37), torch.randn(5, 37)),
    "many rows": lambda: (torch.randn(1030, 24), torch.randn(7, 24)),
    "columns of a larger one": lambda: (torch.randn(13, 40)[:, 8:32], torch.randn(60, 24)[3:50]),
    "transposed": lambda: (torch.randn(24, 13).T, torch.randn(24, 33).T),
}


PROCESSORS = {"AVX-512, AMD": ("AVX512", False), "AVX-512, Intel": ("AVX512", True), "AVX2": ("AVX2", False)}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("build", MATRICES.values(), ids=MATRICES)
def test_linear_equals_float64_in_value_and_gradients(build, processor, monkeypatch):
    monkeypatch.setattr(linear_file, "onednn_products", partial(linear_file.onednn_products, *processor))
    torch.manual_seed(0)
    x, weight = build()
    ours, theirs = gradients(linear, x, weight), gradients(F.linear, x.double(), weight.double())
    for mine, reference in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert mine.dtype == torch.float32 and mine.shape == reference.shape
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not linear_file._HAS_ONEDNN, reason="this build of torch has no oneDNN for this processor")
@pytest.mark.parametrize(
    ("vectors", "intel", "calls"),
    [("AVX512", False, 3), ("AVX512", True, 0), ("AVX2", False, 2), ("AVX2", True, 2), ("DEFAULT", False, 2)],
)
def test_each_product_goes_where_the_table_says(vectors, intel, calls, monkeypatch):
    asked, real = [], linear_file._onednn
    monkeypatch.setattr(linear_file, "_onednn", lambda x, weight: asked.append(1) or real(x, weight))
    monkeypatch.setattr(linear_file, "onednn_products", partial(linear_file.onednn_products, vectors, intel))
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(asked) == calls


def test_the_choice_is_that_of_the_processor_in_every_process():
    """A run that is killed and resumed must go on with the same bits: nothing is timed, nothing remembered."""
    program = "from kernels.linear import onednn_products; print(onednn_products())"
    for capability in (None, "avx2"):
        environment = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
        command = [sys.executable, "-c", program]
        said = {subprocess.check_output(command, cwd=ROOT, env=environment, encoding="utf-8") for _ in range(2)}
        expected = linear_file.onednn_products(*([capability.upper()] if capability else []))
        assert said == {f"{expected}\n"}


def test_linear_without_a_gradient_of_its_input_or_of_its_weight(inputs):
    hidden, weight, _, _ = inputs
    for x, w in ((hidden.clone().requires_grad_(), weight), (hidden, weight.clone().requires_grad_())):
        leaf = x if x.requires_grad else w
        linear(x, w).sum().backward()
        expected = weight.sum(0).expand_as(x) if leaf is x else hidden.sum(0).expand_as(w)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5)
    assert not linear(hidden, weight).requires_grad


def test_linear_is_torchs_own_where_the_environment_says_so_and_in_bf16(inputs, monkeypatch):
    hidden, weight, _, _ = inputs
    assert torch.equal(linear(hidden.bfloat16(), weight.bfloat16()), F.linear(hidden.bfloat16(), weight.bfloat16()))
    monkeypatch.setattr(runtime, "MODE", "torch")
    assert torch.equal(linear(hidden, weight), F.linear(hidden, weight))
    monkeypatch.setattr(importlib.import_module("kernels.linear"), "_onednn", None)  # it is not even called
    linear(hidden, weight)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.01])
def test_logprob_and_entropy_equal_float64(inputs, temperature):
    hidden, weight, labels, _ = inputs

    def exact(h, w):
        distribution = torch.distributions.Categorical(logits=(h @ w.T) / temperature)
        return distribution.log_prob(labels), distribution.entropy()

    ours = gradients(lambda h, w: linear_logprob(h, w, labels, temperature), hidden, weight)
    theirs = gradients(exact, hidden.double(), weight.double())
    for mine, reference in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=2e-5 / temperature)


def test_cross_entropy_equals_float64(inputs):
    hidden, weight, labels, weights = inputs

    def exact(h, w):
        return -((h @ w.T).log_softmax(-1).gather(1, labels[:, None])[:, 0] * weights.double()).sum()

    ours = gradients(lambda h, w: linear_cross_entropy(h, w, labels, weights), hidden, weight)
    theirs = gradients(exact, hidden.double(), weight.double())
    for mine, reference in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)
    assert ours[1][0][0].eq(0).all()  # a token of weight 0 has no gradient


@pytest.mark.parametrize("rows", [1, 3, 12, 13, 14])
def test_chunks_of_rows_change_neither_values_nor_gradients(inputs, monkeypatch, rows):
    hidden, weight, labels, weights = inputs
    operations = (
        lambda h, w: linear_logprob(h, w, labels, 0.7),
        lambda h, w: linear_cross_entropy(h, w, labels, weights),
    )
    wholes = [gradients(operation, hidden, weight) for operation in operations]
    monkeypatch.setattr(runtime, "CHUNK_ELEMENTS", rows * V + V - 1)
    for operation, whole in zip(operations, wholes, strict=True):
        chunked = gradients(operation, hidden, weight)
        for a, b in zip([*chunked[0], *chunked[1]], [*whole[0], *whole[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_a_chunk_are_formed_at_a_time(inputs, monkeypatch):
    hidden, weight, labels, weights = inputs
    formed = []
    for file in (logprob_file, cross_entropy_file):
        monkeypatch.setattr(file, "linear_fp32", lambda x, w: formed.append(x.shape[0]) or linear_fp32(x, w))
    monkeypatch.setattr(runtime, "CHUNK_ELEMENTS", 5 * V)
    linear_logprob(hidden, weight, labels, 1.0)
    linear_cross_entropy(hidden, weight, labels, weights)
    assert formed == [5, 5, 3, 5, 5, 3]


def test_a_vocabulary_larger_than_a_chunk_is_done_one_row_at_a_time(inputs, monkeypatch):
    hidden, weight, labels, _ = inputs
    whole = linear_logprob(hidden, weight, labels)
    monkeypatch.setattr(runtime, "CHUNK_ELEMENTS", V // 2)
    torch.testing.assert_close(linear_logprob(hidden, weight, labels), whole)


def test_one_row(inputs):
    hidden, weight, labels, weights = inputs
    logprobs, entropy = linear_logprob(hidden[:1], weight, labels[:1])
    torch.testing.assert_close(logprobs, (hidden[:1] @ weight.T).log_softmax(-1)[0, labels[:1]])
    assert entropy.shape == (1,)
    torch.testing.assert_close(linear_cross_entropy(hidden[:1], weight, labels[:1], torch.ones(1)), -logprobs[0])


def test_huge_logits_give_finite_numbers_and_gradients():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0], [0.999]])
    (logprobs, entropy), grads = gradients(lambda h, w: linear_logprob(h, w, torch.tensor([1]), 0.7), hidden, weight)
    assert logprobs.item() == pytest.approx(-2e4 / 0.7, rel=1e-6) and entropy.item() == pytest.approx(0, abs=1e-4)
    assert all(grad.isfinite().all() for grad in grads)


def test_a_certain_distribution_has_entropy_0_and_a_flat_one_ln_v():
    hidden, weight = torch.tensor([[500.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    _, entropy = linear_logprob(hidden, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 4.0]).log())


def test_bf16_logits_are_never_rounded_to_bf16(inputs):
    hidden, weight, labels, weights = inputs
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs, entropy = linear_logprob(hidden, weight, labels, 0.7)
    loss = linear_cross_entropy(hidden, weight, labels, weights)
    assert {logprobs.dtype, entropy.dtype, loss.dtype} == {torch.float32}
    logits = hidden.double() @ weight.double().T  # exact, from what bf16 holds: no rounding is granted but fp32's
    expected = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5)
    expected = -(logits.log_softmax(-1).gather(1, labels[:, None])[:, 0] * weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_linear_fp32_is_exact_in_bf16_and_its_gradients_are_those_of_bf16(inputs):
    hidden, weight, _, _ = inputs
    check_linear_fp32(hidden.bfloat16(), weight.bfloat16())
    assert torch.equal(linear_fp32(hidden, weight), linear(hidden, weight))  # in fp32 there is nothing to add


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_linear_fp32_is_exact_in_bf16_on_a_gpu(inputs):
    hidden, weight, _, _ = inputs
    check_linear_fp32(hidden.bfloat16().cuda(), weight.bfloat16().cuda())


def check_linear_fp32(x, w):
    (out,), grads = gradients(linear_fp32, x, w)
    (exact,), exact_grads = gradients(F.linear, x.double(), w.double())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert (F.linear(x, w).double() - exact).abs().max() > 1e-3  # what a plain matmul in bf16 is off by
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_the_path_that_a_run_prints_is_the_path_it_takes(monkeypatch):
    file = importlib.import_module("kernels.linear")
    monkeypatch.setattr(file, "_HAS_ONEDNN", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    by_hand = "PyTorch reference; on the CPU in fp32 gradients by hand"
    real = file.onednn_products
    monkeypatch.setattr(file, "onednn_products", partial(real, "AVX512", False))
    assert chosen() == f"{by_hand} and oneDNN's matrices"
    monkeypatch.setattr(file, "onednn_products", partial(real, "AVX512", True))
    assert chosen() == by_hand
    monkeypatch.setattr(file, "onednn_products", partial(real, "AVX2", False))
    assert chosen() == f"{by_hand} and oneDNN's matrices, torch's for the gradients of weights"
    monkeypatch.setattr(runtime, "MODE", "torch")
    assert chosen() == "PyTorch reference"
    monkeypatch.setattr(runtime, "MODE", "auto")
    monkeypatch.setattr(file, "_HAS_ONEDNN", False)
    assert chosen() == by_hand
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "triton", SimpleNamespace(__version__="9.9"))
    assert chosen() == "Triton 9.9"


@pytest.mark.parametrize("temperature", [0.0, -0.7])
def test_a_temperature_that_is_not_positive_is_refused(inputs, temperature):
    hidden, weight, labels, _ = inputs
    with pytest.raises(ValueError, match=f"temperature: got {temperature}, expected a number greater than 0"):
        linear_logprob(hidden, weight, labels, temperature)


def test_shapes_that_do_not_belong_together_are_refused_by_name(inputs):
    hidden, weight, labels, weights = inputs
    with pytest.raises(ValueError, match=r"labels: got shape \(12,\), expected \(13,\)"):
        linear_logprob(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"weight: got shape \(101, 23\), expected \(V, 24\)"):
        linear_logprob(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels: got shape \(12,\)"):
        linear_cross_entropy(hidden, weight, labels[1:], weights[1:])
    with pytest.raises(ValueError, match=r"weights: got shape \(12,\)"):
        linear_cross_entropy(hidden, weight, labels, weights[1:])
    with pytest.raises(ValueError, match=r"weight: got shape \(101, 23\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels, weights)


def operands():
    """Valid arguments of every operation, by name."""
    h, w, y = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([0, 3, 10, 5])
    z, row = torch.randn(4, 11), torch.rand(4)
    u, step = torch.rand(4, 2, dtype=torch.float64), torch.tensor(1)
    ppo = dict(hidden=h, weight=w, labels=y, old_logprobs=row, advantages=row, weights=row, cliprange=0.2)
    return {
        kernels.logprob_entropy: dict(logits=z, labels=y, temperature=1.0),
        kernels.kl: dict(logits=z, reference_logits=z, labels=y, temperature=1.0),
        kernels.linear_logprob: dict(hidden=h, weight=w, labels=y, temperature=1.0),
        kernels.linear_ppo_loss: ppo | dict(temperature=1.0),
        kernels.linear_cross_entropy: dict(hidden=h, weight=w, labels=y, weights=row),
        kernels.linear_kl: dict(hidden=h, weight=w, ref_hidden=h, ref_weight=w, labels=y, temperature=1.0),
        kernels.sample_head: dict(hidden=h, weight=w, u=u, step=step, temperature=1.0),
        kernels.rms_norm: dict(x=z, weight=torch.randn(11), eps=1e-5),
        kernels.add_rms_norm: dict(x=z, residual=z, weight=torch.randn(11), eps=1e-5),
        kernels.rope: dict(qkv=torch.randn(4, 6, 8), cos=torch.randn(4, 4), sin=torch.randn(4, 4), kv_heads=1),
        kernels.swiglu: dict(gate_up=torch.randn(4, 6)),
        kernels.decode_attention: dict(
            q=torch.randn(4, 6, 8), keys=torch.randn(4, 11, 2, 8), values=torch.randn(4, 11, 2, 8), positions=y
        ),
    }


BAD = {  # what is wrong with an argument -> (a version of it that is, words of the refusal)
    "shape": (lambda x: x[:3] if x.dim() == 1 else x[:, :5], r"got shape \(.*expected \("),
    "integers": (lambda x: x.long(), r"got .*torch.int64.*expected"),
    "strides": (lambda x: torch.cat((x, x), 1)[:, ::2], r"got strides .*call .contiguous\(\)"),
    "head strides": (lambda x: torch.stack((x, x), -1)[..., 0], r"got strides .*call .contiguous\(\)"),
    "fewer": (lambda x: x[:3], r"got shape \(.*expected \("),
    "one more": (lambda x: torch.cat((x, x[..., :1, :]), -2), r"got shape \(.*expected \("),
    "too large": (lambda x: x + 1, r"got 11, expected (token ids|slots) from 0 to 10"),
    "negative": (lambda x: x - 1, r"got -1, expected (token ids|slots) from 0 to 10"),
    "int32": (lambda x: x.int(), r"got .*torch.int32.*expected (torch.int64|one int64)"),
    "zero": (lambda x: 0.0, r"temperature: got 0.0, expected a number greater than 0"),
    "nan": (lambda x: float("nan"), r"temperature: got nan, expected a number greater than 0"),
    "odd": (lambda x: x[..., 1:].contiguous(), r"got .* expected an even number"),
    "none": (lambda x: 0, r"kv_heads: got 0, expected from 1 to 2 of 6 merged heads"),
    "too many": (lambda x: 3, r"kv_heads: got 3, expected from 1 to 2 of 6 merged heads"),
    "eps": (lambda x: 0.0, r"eps: got 0.0, expected a number greater than 0"),
    "bf16": (lambda x: x.bfloat16(), r"got .*torch.bfloat16.*expected .*torch.float32"),
    "below zero": (lambda x: -0.1, r"cliprange: got -0.1, expected 0 or more"),
}
MATRICES_BY_NAME = ("logits", "reference_logits", "hidden", "weight", "ref_hidden", "ref_weight")
FAULTS = {
    **dict.fromkeys(MATRICES_BY_NAME, ("integers", "strides")),
    "labels": ("shape", "too large", "negative", "int32"),
    "temperature": ("zero", "nan"),
    "cliprange": ("below zero",),
    **dict.fromkeys(("weights", "advantages", "old_logprobs"), ("shape", "integers")),
    "u": ("integers", "strides"),
    "step": ("int32",),
    **dict.fromkeys(("x", "residual"), ("integers", "strides")),
    "eps": ("eps",),
    "qkv": ("integers", "head strides", "odd"),
    **dict.fromkeys(("cos", "sin"), ("integers", "strides", "fewer", "bf16")),
    "kv_heads": ("none", "too many"),
    "gate_up": ("integers", "strides", "odd"),
    "q": ("integers", "head strides"),
    "keys": ("integers", "head strides", "fewer"),
    "values": ("integers", "head strides", "fewer", "one more"),
    "positions": ("shape", "too large", "negative", "int32"),
}
NORM_WEIGHT = ("shape", "integers", "bf16")  # where `weight` is a row, not a matrix


@pytest.mark.parametrize("operation", operands(), ids=lambda operation: operation.__name__)
def test_every_operation_names_the_argument_that_is_wrong(operation):
    operation(**operands()[operation])
    norm = "norm" in operation.__name__
    for name, value in operands()[operation].items():
        for fault in NORM_WEIGHT if norm and name == "weight" else FAULTS[name]:
            spoil, words = BAD[fault]
            with pytest.raises(ValueError, match=words) as refusal:
                operation(**operands()[operation] | {name: spoil(value)})
            assert str(refusal.value).startswith(f"{name}: ") or fault == "integers", (name, refusal.value)
    matrices = [name for name in operands()[operation] if name in MATRICES_BY_NAME and not norm]
    for name in matrices[1:]:
        with pytest.raises(ValueError, match=rf"{name}: got (torch.bfloat16 on cpu, expected torch.float32|shape)"):
            operation(**operands()[operation] | {name: operands()[operation][name].bfloat16()})
        with pytest.raises(ValueError, match=rf"^{name}: got shape"):
            operation(**operands()[operation] | {name: operands()[operation][name][:, :5].contiguous()})


def test_query_heads_that_key_heads_do_not_divide_are_refused():
    arguments = operands()[kernels.decode_attention]
    with pytest.raises(ValueError, match="^keys: got 2 heads, expected a divisor of the 5 heads of q$"):
        kernels.decode_attention(**arguments | dict(q=arguments["q"][:, :5]))
