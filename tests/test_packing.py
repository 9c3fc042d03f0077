"""Packing: what one sequence gives in a batch is what it gives alone."""

import pytest
import torch

from nanorlhf.packing import ROUND_TO, in_microbatches, pack, split_by_tokens


def test_a_packed_batch_by_hand():
    packed = pack([[5, 6, 7], [8], [9, 10]], round_to=1)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.lengths == (3, 1, 2) and packed.max_length == 3
    assert packed.last_rows().tolist() == [2, 3, 5]
    assert packed.tokens.dtype == packed.positions.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32


def test_response_rows_begin_at_the_last_query_token_and_stop_before_the_last_response_token():
    #           query 3, response 2      query 1, response 2
    packed = pack([[10, 11, 12, 20, 21], [13, 22, 23]])
    rows = packed.response_rows(2)
    assert rows.tolist() == [[2, 3], [5, 6]]
    assert packed.tokens[rows].tolist() == [[12, 20], [13, 22]]  # the tokens that predict 20, 21 and 22, 23


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], [], [3]]])
def test_no_sequence_or_an_empty_one_is_refused(sequences):
    with pytest.raises(ValueError, match="none of them empty"):
        pack(sequences)


def test_a_sequence_gives_the_same_in_a_batch_as_alone(make_policy, make_sequences):
    policy = make_policy()
    sequences = make_sequences([9, 1, 17, 2, 33])
    for sequence, logits in zip(sequences, policy.logits(sequences), strict=True):
        torch.testing.assert_close(logits, policy.logits([sequence])[0], rtol=1e-5, atol=1e-5)


def test_the_order_of_the_sequences_does_not_matter(make_policy, make_sequences):
    policy = make_policy()
    sequences = make_sequences([9, 4, 17])
    logits = policy.logits(sequences)
    for place, index in enumerate([2, 0, 1]):
        permuted = policy.logits([sequences[i] for i in (2, 0, 1)])
        torch.testing.assert_close(permuted[place], logits[index], rtol=1e-5, atol=1e-5)


def test_no_token_of_another_sequence_matters(make_policy, make_sequences):
    policy = make_policy()
    sequences = make_sequences([9, 12, 6])
    neighbours = make_sequences([9, 12, 6], seed=1)
    before = policy.logits(sequences)[1]
    after = policy.logits([neighbours[0], sequences[1], neighbours[2]])[1]
    assert torch.equal(before, after)


def test_the_gradient_with_respect_to_another_sequence_is_exactly_zero(make_policy, make_sequences, monkeypatch):
    policy = make_policy()
    packed = pack(make_sequences([9, 12, 6]))
    embedded = policy.model.embed_tokens(packed.tokens).detach().requires_grad_()
    monkeypatch.setattr(policy.model.embed_tokens, "forward", lambda tokens: embedded)
    hidden = policy.hidden(packed)
    hidden[9:21].pow(2).sum().backward()
    assert embedded.grad[:9].eq(0).all() and embedded.grad[21:].eq(0).all()
    assert embedded.grad[9:21].abs().max() > 0


def test_groups_keep_the_order_and_the_limit():
    assert split_by_tokens([3, 4, 5, 2, 1], 7) == [[0, 1], [2, 3], [4]]
    assert split_by_tokens([3, 4, 5, 2, 1], 100) == [[0, 1, 2, 3, 4]]
    assert split_by_tokens([3, 4, 5, 2, 1], 1) == [[0], [1], [2], [3], [4]]


def test_a_sequence_longer_than_the_limit_is_a_group_of_its_own():
    assert split_by_tokens([2, 50, 2, 2], 10) == [[0], [1], [2, 3]]
    assert split_by_tokens([50, 2], 10) == [[0], [1]]


def test_no_sequences_are_no_groups():
    assert split_by_tokens([], 10) == []


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_microbatches_without_gradient_give_the_results_of_the_batch(make_scalar, make_sequences, max_tokens):
    critic, sequences = make_scalar(bias=True), make_sequences([9, 3, 17, 4])
    indices = []

    def forward(packed, group):
        indices.extend(group)
        return critic.last_scores(packed), torch.tensor([packed.tokens[0].item()] * len(group))

    scores, firsts = in_microbatches(forward, sequences, max_tokens, "cpu")
    torch.testing.assert_close(scores, critic.scores(sequences), rtol=1e-5, atol=1e-5)
    assert not scores.requires_grad and indices == [0, 1, 2, 3] and firsts.shape == (4,)


def test_the_row_is_rounded_up_with_tokens_that_nobody_reads():
    packed = pack([[5, 6, 7], [8]], round_to=16)
    assert packed.tokens.tolist() == [5, 6, 7, 8] + [0] * 12
    assert packed.filling == 12 and packed.lengths == (3, 1) and packed.cu_seqlens.tolist() == [0, 3, 4]
    assert packed.last_rows().tolist() == [2, 3]
    assert [rows.tolist() for rows in packed.unpack(packed.tokens)] == [[5, 6, 7], [8]]
    assert pack([[5, 6, 7], [8]], round_to=4).filling == 0


def test_the_filling_changes_no_result_and_no_gradient(make_policy, make_sequences):
    sequences = make_sequences([5, 9, 3])
    results = []
    for round_to in (1, 64, 256):
        policy = make_policy()
        packed = pack(sequences, round_to=round_to)
        hidden = torch.cat(packed.unpack(policy.hidden(packed)))  # (17, D)
        (hidden**2).sum().backward()
        results.append([hidden.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_by_default_shapes_are_multiples_of_256_whatever_the_lengths():
    assert ROUND_TO == 256
    for lengths, N in (([1], 256), ([255, 1], 256), ([256, 1], 512), ([100, 100, 400], 768)):
        packed = pack([[7] * length for length in lengths])
        assert packed.tokens.shape == packed.positions.shape == (N,)
        assert packed.filling == N - sum(lengths) and packed.cu_seqlens[-1] == sum(lengths)
        assert packed.max_length == max(lengths)  # the filling is none of the sequences
        rows = torch.arange(N * 2).view(N, 2)  # as hidden states: more than one number a token
        parts = packed.unpack(rows)
        assert [len(part) for part in parts] == lengths
        assert torch.equal(torch.cat(parts), rows[: sum(lengths)])
