"""The fused operations: references against float64, the chunked path against the whole one, refusals."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy, linear_logprob

# The files; `import kernels.linear_logprob as file` would give the function of that name.
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
    loss = sum((i + 1) * (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum() for i, out in enumerate(outputs))
    loss.backward()
    return [out.detach() for out in outputs], [hidden.grad, weight.grad]


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
    operations = {
        logprob_file: lambda h, w: linear_logprob(h, w, labels, 0.7),
        cross_entropy_file: lambda h, w: linear_cross_entropy(h, w, labels, weights),
    }
    for file, operation in operations.items():
        whole = gradients(operation, hidden, weight)
        monkeypatch.setattr(file, "CHUNK_ELEMENTS", rows * V + V - 1)
        chunked = gradients(operation, hidden, weight)
        for a, b in zip([*chunked[0], *chunked[1]], [*whole[0], *whole[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_a_chunk_are_formed_at_a_time(inputs, monkeypatch):
    hidden, weight, labels, weights = inputs
    formed = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: formed.append(x.shape[0]) or linear(x, w))
    for file in (logprob_file, cross_entropy_file):
        monkeypatch.setattr(file, "CHUNK_ELEMENTS", 5 * V)
    linear_logprob(hidden, weight, labels, 1.0)
    linear_cross_entropy(hidden, weight, labels, weights)
    assert formed == [5, 5, 3, 5, 5, 3]


def test_a_vocabulary_larger_than_a_chunk_is_done_one_row_at_a_time(inputs, monkeypatch):
    hidden, weight, labels, _ = inputs
    whole = linear_logprob(hidden, weight, labels)
    monkeypatch.setattr(logprob_file, "CHUNK_ELEMENTS", V // 2)
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
    _, entropy = linear_logprob(torch.tensor([[500.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 4.0]).log())


def test_bf16_logits_are_made_fp32_before_the_softmax(inputs):
    hidden, weight, labels, weights = inputs
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs, entropy = linear_logprob(hidden, weight, labels, 0.7)
    loss = linear_cross_entropy(hidden, weight, labels, weights)
    assert {logprobs.dtype, entropy.dtype, loss.dtype} == {torch.float32}
    logits = F.linear(hidden, weight).double() / 0.7  # the matmul's rounding is granted, nothing after it
    torch.testing.assert_close(logprobs.double(), logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -0.7])
def test_a_temperature_that_is_not_positive_is_refused(inputs, temperature):
    hidden, weight, labels, _ = inputs
    with pytest.raises(ValueError, match=f"temperature: got {temperature}, expected a number greater than 0"):
        linear_logprob(hidden, weight, labels, temperature)


def test_shapes_that_do_not_belong_together_are_refused_by_name(inputs):
    hidden, weight, labels, weights = inputs
    with pytest.raises(ValueError, match=r"hidden \(13, 24\).*labels \(12,\)"):
        linear_logprob(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"weight \(101, 23\)"):
        linear_logprob(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels \(12,\)"):
        linear_cross_entropy(hidden, weight, labels[1:], weights[1:])
    with pytest.raises(ValueError, match=r"weights \(12,\)"):
        linear_cross_entropy(hidden, weight, labels, weights[1:])
    with pytest.raises(ValueError, match=r"weight \(101, 23\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels, weights)
