"""logprob_entropy and kl against float64: values, gradients, the edges, and rows beyond 32 bits."""

import importlib

import pytest
import torch
from conftest import hard_logits, some_labels

from kernels import kl, logprob_entropy

rows_file = importlib.import_module("kernels.logprob_entropy")
kl_file = importlib.import_module("kernels.kl")

# One row, primes, fewer columns than a block, a whole number of blocks, and a last block of one column.
SHAPES = [(1, 97), (7, 1009), (5, 4096), (5, 8193), (70, 3)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probs_entropies_and_their_gradients_are_those_of_float64(within_budget, shape, temperature):
    inputs = dict(logits=hard_logits(*shape), labels=some_labels(*shape), temperature=temperature)
    ours = within_budget(logprob_entropy, rows_file.logprob_entropy_reference, inputs, ("logits",))
    assert ours["gradient of logits"].abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_and_its_gradient_are_those_of_float64(within_budget, shape, temperature):
    logits = hard_logits(*shape)
    reference = logits + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    reference[-1] += 150  # an offset that a softmax does not see
    inputs = dict(logits=logits, reference_logits=reference, labels=some_labels(*shape), temperature=temperature)
    ours = within_budget(kl, kl_file.kl_reference, inputs, ("logits",))
    assert ours["gradient of logits"].abs().max() > 0
    assert (ours["output 0"] > -1e-5).all()


def test_kl_of_equal_rows_is_0_and_of_a_token_that_only_p_takes_infinite():
    z = hard_logits(5, 1009)
    labels = some_labels(5, 1009)
    divergence, logprobs, ref_logprobs = kl(z, z.clone(), labels)
    assert divergence.abs().max() < 1e-6 and torch.equal(logprobs, ref_logprobs)
    x = torch.zeros(1, 8)
    x[0, 3] = float("-inf")
    assert kl(torch.zeros(1, 8), x, torch.tensor([0]))[0].item() == float("inf")
    assert kl(x, torch.zeros(1, 8), torch.tensor([0]))[0].item() == pytest.approx(torch.tensor(8 / 7).log().item())


def test_a_label_of_probability_0_has_log_prob_minus_infinity_and_a_nan_stays_one():
    z = torch.zeros(2, 50)
    z[0, 7], z[1, 9] = float("-inf"), float("nan")
    logprobs, entropy, lse = logprob_entropy(z, torch.tensor([7, 3]))
    assert logprobs[0] < -1e19 and entropy[0].item() == pytest.approx(torch.tensor(49.0).log().item())
    assert logprobs[1].isnan() and entropy[1].isnan() and lse[1].isnan()


@pytest.mark.parametrize("name", ["logprob_entropy", "kl"])
def test_rows_beyond_32_bits_are_found(name):
    """Row 2 begins 2^31 + 128 elements after row 0; the product of row and stride in 32 bits would be negative."""
    V, stride = 64, 2**30 + 64
    # Torch asks for 8 GB of addresses and the operating system gives only the pages that are touched.
    z = torch.empty(2 * stride + V, dtype=torch.float32).as_strided((3, V), (stride, 1))
    z.copy_(hard_logits(3, V))
    labels = some_labels(3, V)
    if name == "logprob_entropy":
        ours, expected = rows_file.forward_rows(z, labels, 1.0)[:3], rows_file.logprob_entropy_reference(z, labels)
    else:
        ours, expected = kl_file._forward._init_fn(z, z, labels, 1.0)[1:3], kl_file.kl_reference(z, z, labels)[1:]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_last_rows_of_a_gradient_beyond_32_bits_are_written():
    V, stride = 64, 2**30 + 64
    grad = torch.empty(2 * stride + V, dtype=torch.float32).as_strided((3, V), (stride, 1))
    z, labels = hard_logits(3, V), some_labels(3, V)
    _, entropy, _, tops, log2sums = rows_file.forward_rows(z, labels, 1.0)
    ones, zeros = torch.ones(3), torch.zeros(3)
    rows_file.backward_rows(z, labels, (entropy, tops, log2sums), (ones, zeros, zeros), 1.0, grad)
    expected = torch.nn.functional.one_hot(labels, V) - z.softmax(-1)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    z, x = (torch.randn(2, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = some_labels(2, 7)
    assert torch.autograd.gradcheck(lambda z: logprob_entropy(z, labels, 0.7), (z.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda z: kl(z, x, labels, 0.7)[:2], (z,))


def test_the_operations_are_what_torch_expects_of_an_operation():
    z, labels = hard_logits(3, 40)[:2].requires_grad_(), some_labels(2, 40)
    torch.library.opcheck(rows_file._forward, (z, labels, 0.7))
    torch.library.opcheck(kl_file._forward, (z, (z * 0.9).detach(), labels, 0.7))


@pytest.mark.parametrize("name", ["logprob_entropy", "kl"])
def test_compiles_whole(name):
    z, labels = torch.randn(3, 40), some_labels(3, 40)

    def loss(z):
        return (logprob_entropy(z, labels, 0.7) if name == "logprob_entropy" else kl(z, 0.9 * z, labels, 0.7))[0].sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


def test_no_rows_at_all():
    z = torch.zeros(0, 9, requires_grad=True)
    outputs = logprob_entropy(z, torch.zeros(0, dtype=torch.int64))
    sum(x.sum() for x in outputs).backward()
    assert [x.shape for x in outputs] == [(0,)] * 3 and z.grad.shape == (0, 9)
