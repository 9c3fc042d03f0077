"""Pairs that share their query: the scores and gradients of two sequences, for fewer tokens."""

import pytest
import torch

from nanorlhf import attention
from nanorlhf.losses import bradley_terry_loss
from nanorlhf.packing import pack
from nanorlhf.pairs import pack_pairs

QUERIES = [[5, 6], [11, 12, 13, 14, 15], [20]]
CHOSEN = [[7, 8], [16], [21, 22, 23]]
REJECTED = [[9], [17, 18, 19], [24, 25]]


def test_a_batch_by_hand():
    packed = pack_pairs(QUERIES[:2], CHOSEN[:2], REJECTED[:2], round_to=1)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert packed.lengths == (5, 9) and packed.cu_seqlens.tolist() == [0, 5, 14] and packed.filling == 0
    assert packed.tokens[packed.last_rows()].tolist() == [8, 16, 9, 19]  # chosen, chosen, rejected, rejected
    assert packed.apart.tokens.tolist() == [5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 5, 6, 9, 11, 12, 13, 14, 15, 17, 18, 19]
    assert packed.tokens[packed.spread].equal(packed.apart.tokens)
    assert packed.apart.tokens[packed.home].equal(packed.tokens)
    assert packed.home.tolist() == [0, 1, 2, 3, 12, 4, 5, 6, 7, 8, 9, 18, 19, 20]


def of_two_sequences(model):
    apart = [q + c for q, c in zip(QUERIES, CHOSEN, strict=True)]
    apart += [q + r for q, r in zip(QUERIES, REJECTED, strict=True)]
    return model.last_scores(pack(apart))


@pytest.mark.parametrize("round_to", [1, 64])
def test_scores_and_gradients_are_those_of_two_sequences(make_scalar, round_to):
    model = make_scalar(bias=False)
    found = []
    for scores in (
        of_two_sequences(model),
        model.last_scores(pack_pairs(QUERIES, CHOSEN, REJECTED, round_to=round_to)),
    ):
        bradley_terry_loss(*scores.chunk(2)).backward()
        found.append((scores, {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (scores, gradients), (shared_scores, shared_gradients) = found
    assert scores.std() > 1e-3  # six different ones
    torch.testing.assert_close(shared_scores, scores, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


def test_the_summaries_of_a_pair_do_not_see_each_other(make_scalar):
    model = make_scalar(bias=False)
    scores = model.last_scores(pack_pairs(QUERIES, CHOSEN, REJECTED))
    other = model.last_scores(pack_pairs(QUERIES, [[30, 31, 32]] * 3, REJECTED))
    torch.testing.assert_close(other[3:], scores[3:], rtol=1e-5, atol=1e-6)
    assert (other[:3] - scores[:3]).abs().min() > 1e-5
    other = model.last_scores(pack_pairs(QUERIES, CHOSEN, [[30, 31, 32]] * 3))
    torch.testing.assert_close(other[:3], scores[:3], rtol=1e-5, atol=1e-6)


def test_the_way_of_a_gpu_is_that_of_the_mask(monkeypatch):
    """Two sequences a pair, given to variable-length attention, against one with a mask: values and gradients."""
    pairs = pack_pairs(QUERIES, CHOSEN, REJECTED, round_to=64)
    plain = lambda q, k, v, packed: attention._padded(q, k, v, attention._Rectangles(packed))  # noqa: E731
    monkeypatch.setattr(attention, "_varlen", plain)  # which needs a GPU
    N, generator = len(pairs.tokens), torch.Generator().manual_seed(0)
    qkv = [torch.randn(N, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    grad = torch.randn(N, 4, 8, generator=generator, dtype=torch.float64)
    found = []
    for attend in (attention._varlen_pairs(pairs), lambda *qkv: plain(*qkv, pairs)):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = attend(*leaves)
        out.backward(grad)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for apart, masked in zip(*found, strict=True):
        torch.testing.assert_close(apart, masked)
        assert not masked[N - pairs.filling :].any()  # nothing comes from the filling


def test_an_empty_part_is_refused():
    for parts in (([[]], [[1]], [[1]]), ([[1]], [[]], [[1]]), ([[1]], [[1]], [[]])):
        with pytest.raises(ValueError, match="expected at least one token in each"):
            pack_pairs(*parts)
