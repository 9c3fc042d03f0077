"""The operations from hidden states, by tiles and by chunks of logits, against float64."""

import importlib
import math

import pytest
import torch
from conftest import some_labels

from kernels import linear_cross_entropy, linear_kl, linear_logprob, linear_ppo_loss, runtime, sample_head

logprob_file = importlib.import_module("kernels.linear_logprob")
ppo_file = importlib.import_module("kernels.linear_ppo_loss")
entropy_file = importlib.import_module("kernels.linear_cross_entropy")
kl_file = importlib.import_module("kernels.linear_kl")
sample_file = importlib.import_module("kernels.sample_head")

# (M, D, V): one row, more rows than a tile, primes (no tile fits, and D = 33 not even 16 bytes: chunks), whole tiles.
SHAPES = [(1, 20, 97), (37, 32, 1009), (19, 33, 131), (32, 16, 64)]


OFFSET = 50.0  # of the first row's logits: what they are rounded by is no fault of a kernel


def operands(M: int, D: int, V: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (M, D), weight (V, D): logits of standard deviation 3, the first row's shifted by -OFFSET."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(M, D, generator=generator), torch.randn(V, D, generator=generator)
    hidden, weight = hidden * 3 / math.sqrt(D), weight
    weight[:, 0] = 1.0  # so that coordinate 0 of a hidden state is an offset of all its logits
    hidden[0, 0] = -OFFSET
    return hidden, weight


@pytest.fixture(params=["tiles", "chunks"])
def path(request, monkeypatch):
    """Both ways to the same numbers; chunks of three rows."""
    if request.param == "chunks":
        for file in (logprob_file, kl_file, sample_file):
            monkeypatch.setattr(file, "use_tiles", lambda hidden, weight: False)
    monkeypatch.setattr(runtime, "CHUNK_ELEMENTS", 1009 * 13)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probs_and_gradients_are_those_of_float64(within_budget, path, shape, temperature):
    hidden, weight = operands(*shape)
    inputs = dict(hidden=hidden, weight=weight, labels=some_labels(shape[0], shape[2]), temperature=temperature)
    reference, leaves = logprob_file.linear_logprob_reference, ("hidden", "weight")
    ours = within_budget(linear_logprob, reference, inputs, leaves, largest=OFFSET / temperature)
    assert ours["gradient of weight"].abs().max() > 0
    assert (ours["output 0"] <= 1e-6).all()  # phantom columns past the vocabulary, of logit 0, gave verl +123 here


def ppo_inputs(shape: tuple[int, int, int]) -> dict:
    hidden, weight = operands(*shape)
    M, labels = shape[0], some_labels(shape[0], shape[2])
    generator = torch.Generator().manual_seed(3)
    now, _ = logprob_file.linear_logprob_reference(hidden, weight, labels, 0.7)
    weights = torch.rand(M, generator=generator)
    weights[1::4] = 0.0
    old = now + 0.2 * torch.randn(M, generator=generator)
    old[1::4] = -1e4  # what is masked must not overflow
    advantages = torch.randn(M, generator=generator)
    return dict(hidden=hidden, weight=weight, labels=labels, old_logprobs=old, advantages=advantages, weights=weights)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ppo_loss_and_its_gradients_are_those_of_float64(within_budget, path, shape):
    inputs = ppo_inputs(shape) | dict(temperature=0.7, cliprange=0.2)
    reference, leaves = ppo_file.linear_ppo_loss_reference, ("hidden", "weight")
    ours = within_budget(linear_ppo_loss, reference, inputs, leaves, largest=OFFSET / 0.7)
    if shape[0] > 1:
        assert 0 < ours["output 3"] < inputs["weights"].sum()  # some rows are clipped, some are not
        assert ours["gradient of hidden"][1::4].eq(0).all()  # weight 0
        assert ours["gradient of hidden"].abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_and_its_gradients_are_those_of_float64(within_budget, path, shape):
    inputs = {k: v for k, v in ppo_inputs(shape).items() if k in ("hidden", "weight", "labels", "weights")}
    reference = entropy_file.linear_cross_entropy_reference
    ours = within_budget(linear_cross_entropy, reference, inputs, ("hidden", "weight"), largest=OFFSET)
    assert ours["gradient of hidden"].abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_between_two_heads_is_that_of_float64(within_budget, path, shape):
    hidden, weight = operands(*shape)
    generator = torch.Generator().manual_seed(4)
    ref_hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=generator)
    ref_weight = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    inputs = dict(hidden=hidden, weight=weight, ref_hidden=ref_hidden, ref_weight=ref_weight)
    inputs |= dict(labels=some_labels(shape[0], shape[2]), temperature=0.7)
    ours = within_budget(linear_kl, kl_file.linear_kl_reference, inputs, largest=OFFSET / 0.7)
    assert (ours["output 0"] > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sampled_tokens_are_the_references(within_budget, path, shape, temperature):
    hidden, weight = operands(*shape)
    u = torch.rand(shape[0], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    u[0, 0], u[0, 1], u[0, 2] = 0.0, 1 - 2**-53, 0.5
    for t in (0, 1, 3):
        inputs = dict(hidden=hidden, weight=weight, u=u, step=torch.tensor(t), temperature=temperature)
        within_budget(sample_head, sample_file.sample_head_reference, inputs, largest=OFFSET / temperature)


def test_tokens_are_drawn_with_their_probabilities(path):
    """200 draws over 40 tokens, two tiles wide, with u spread evenly: each count is its expectation, rounded."""
    hidden, weight = operands(2, 16, 40)
    hidden[1] /= 4  # so that no token has it all
    p = (hidden[1:] @ weight.T / 0.7).softmax(-1)[0]
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    rows = hidden[1:].expand(200, -1).contiguous()
    tokens, _ = sample_head(rows, weight, u[:, None].contiguous(), torch.zeros((), dtype=torch.int64), 0.7)
    counts = torch.bincount(tokens, minlength=40)
    assert (counts - 200 * p).abs().max() <= 1.01 and (counts > 0).sum() > 20


def test_a_token_without_probability_is_never_drawn(path):
    """The last tokens have logit -inf in effect: u next to 1 must not fall into them, nor past the vocabulary."""
    weight = torch.zeros(70, 16)
    weight[:, 0] = 1.0
    weight[60:, 0] = -200.0
    hidden = torch.zeros(3, 16)
    hidden[:, 0] = 5.0
    u = torch.tensor([[0.0], [0.999], [1 - 2**-53]], dtype=torch.float64)
    tokens, logprobs = sample_head(hidden, weight, u, torch.zeros((), dtype=torch.int64))
    assert tokens.tolist() == [0, 59, 59]
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(60.0)))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (4, 5))
    labels = some_labels(4, 5)
    now = logprob_file.linear_logprob_reference(h, w, labels, 0.7)[0]
    old = now + torch.tensor([0.1, -0.1, 0.5, -0.5]).double()  # the last two are outside the clip range
    advantages, weights = torch.tensor([1.0, -1.0, 1.0, 1.0]).double(), torch.tensor([0.3, 0.2, 0.4, 0.1]).double()
    h.requires_grad_(), w.requires_grad_()

    def loss(h, w):
        return linear_ppo_loss(h, w, labels, old, advantages, weights, temperature=0.7).loss

    assert torch.autograd.gradcheck(loss, (h, w))
    assert torch.autograd.grad(loss(h, w), h)[0][:3].abs().amin(1).gt(0).all()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, weights), (h, w))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, labels, 0.7), (h, w))
    assert torch.autograd.gradcheck(lambda h: linear_logprob(h, w.detach(), labels, 0.7), (h,))
    assert torch.autograd.gradcheck(lambda w: linear_logprob(h.detach(), w, labels, 0.7), (w,))


def test_the_operations_are_what_torch_expects_of_an_operation():
    inputs = ppo_inputs((5, 16, 40))
    h, w = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    y, old, advantages, weights = (inputs[k] for k in ("labels", "old_logprobs", "advantages", "weights"))
    u, step = torch.rand(5, 2, dtype=torch.float64), torch.tensor(1)
    torch.library.opcheck(logprob_file._forward, (h, w, y, 0.7))
    torch.library.opcheck(ppo_file._forward, (h, w, y, weights, old, advantages, 0.7, 0.2, True, True))
    torch.library.opcheck(ppo_file._forward, (h, w, y, weights, None, None, 1.0, 0.0, True, False))
    torch.library.opcheck(kl_file._forward, (h.detach(), w.detach(), h.detach(), w.detach(), y, 0.7))
    torch.library.opcheck(sample_file._forward, (h.detach(), w.detach(), u, step, 0.7))


@pytest.mark.parametrize("name", ["linear_logprob", "linear_ppo_loss", "linear_cross_entropy", "both without gradient"])
def test_compiles_whole(name):
    inputs = ppo_inputs((6, 16, 40))
    y, old, advantages, weights = (inputs[k] for k in ("labels", "old_logprobs", "advantages", "weights"))
    u, step = torch.rand(6, 2, dtype=torch.float64), torch.tensor(1)

    def loss(h, w):
        if name == "linear_logprob":
            return linear_logprob(h, w, y, 0.7)[0].sum()
        if name == "linear_ppo_loss":
            return linear_ppo_loss(h, w, y, old, advantages, weights, temperature=0.7).loss
        if name == "linear_cross_entropy":
            return linear_cross_entropy(h, w, y, weights)
        return linear_kl(h, w, 0.9 * h, w, y, 0.7)[0].sum() + sample_head(h, w, u, step)[1].sum() + (h * 0).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
        value = function(h, w)
        value.backward()
        results.append((value.detach(), h.grad))
    torch.testing.assert_close(*results)
    assert name == "both without gradient" or results[0][1].abs().max() > 0


def test_without_a_gradient_no_gradient_is_made(monkeypatch):
    inputs = ppo_inputs((5, 16, 40))
    made = []
    monkeypatch.setattr(ppo_file, "addmm_wide", lambda *args: made.append("weight"))
    monkeypatch.setattr(torch, "mm", lambda *args, mm=torch.mm, **kw: made.append("mm") or mm(*args, **kw))
    loss = linear_ppo_loss(**inputs).loss
    assert not loss.requires_grad and made == ["mm"]  # the logits
    inputs["hidden"].requires_grad_()
    with torch.no_grad():
        linear_ppo_loss(**inputs)
    assert made == ["mm", "mm"]
    linear_ppo_loss(**inputs)
    assert made == ["mm", "mm", "mm", "mm"]  # of hidden alone: the logits and dh


def test_a_second_derivative_is_refused_not_wrong():
    inputs = ppo_inputs((5, 16, 40))
    inputs["hidden"].requires_grad_()
    (grad,) = torch.autograd.grad(linear_ppo_loss(**inputs).loss, inputs["hidden"], create_graph=True)
    assert not grad.requires_grad


def test_the_loss_scales_its_gradient_and_may_be_differentiated_twice_over():
    inputs = ppo_inputs((5, 16, 40))
    inputs["weight"].requires_grad_()
    loss = linear_ppo_loss(**inputs).loss
    (once,) = torch.autograd.grad(loss, inputs["weight"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, inputs["weight"])
    torch.testing.assert_close(thrice, 3 * once)
