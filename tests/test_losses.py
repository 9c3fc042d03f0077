"""The losses of SFT and of the reward model: weights by hand, parity with transformers' loss, signs."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy
from nanorlhf.losses import bradley_terry_loss, next_token_labels, pair_accuracy, sequence_mean_weights
from nanorlhf.packing import pack, split_by_tokens


def sft_loss(policy, sequences, of=None):
    """As train_sft.py computes it: the share of `sequences` in a batch of `of`."""
    packed = pack(sequences)
    labels, counts = next_token_labels(packed)
    weights = sequence_mean_weights(packed, counts, sequences=of or len(sequences))
    return linear_cross_entropy(policy.hidden(packed), policy.head_weight, labels, weights)


def test_each_token_is_labelled_with_the_next_one_of_its_own_sequence():
    labels, counts = next_token_labels(pack([[5, 6, 7], [8, 9]], round_to=1))
    assert counts.tolist() == [True, True, False, True, False]
    assert labels[counts].tolist() == [6, 7, 9]


def test_weights_by_hand():
    packed = pack([[5, 6, 7], [8, 9], [1, 2, 3, 4, 5]], round_to=1)
    weights = sequence_mean_weights(packed, next_token_labels(packed)[1], sequences=3)
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 6, 0, 1 / 3, 0, 1 / 12, 1 / 12, 1 / 12, 1 / 12, 0]))
    assert weights.dtype == torch.float32


def test_more_filling_changes_no_weight():
    sequences = [[5, 6, 7], [8, 9], [1, 2, 3, 4, 5]]
    for round_to in (16, 256):
        packed = pack(sequences, round_to=round_to)
        weights = sequence_mean_weights(packed, next_token_labels(packed)[1], sequences=3)
        bare = pack(sequences, round_to=1)
        torch.testing.assert_close(weights[:10], sequence_mean_weights(bare, next_token_labels(bare)[1], sequences=3))
        assert weights[10:].eq(0).all() and weights.sum() == pytest.approx(1)


def test_the_loss_of_a_three_token_model_by_hand(make_policy):
    # All hidden states are the same, so the next token has probabilities 1/2, 1/4, 1/4 whatever came before.
    policy = make_policy(vocab_size=3, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        policy.model.embed_tokens.weight.fill_(1.0)
        policy.model.norm.weight.fill_(1.0)
        policy.lm_head.weight.copy_((torch.tensor([0.5, 0.25, 0.25]).log() / 32)[:, None].expand(3, 32))
    # row 1: tokens 1, 0 are predicted: (ln 4 + ln 2) / 2; row 2: token 0: ln 2
    expected = ((math.log(4) + math.log(2)) / 2 + math.log(2)) / 2
    assert math.isclose(sft_loss(policy, [[0, 1, 0], [2, 0]]).item(), expected, rel_tol=1e-4)


def test_the_sft_loss_is_the_mean_over_sequences_of_transformers_loss(make_policy, make_sequences, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    from nanorlhf.storage.checkpoint import save_policy

    policy = make_policy()
    save_policy(policy, tmp_path / "model", tokenizer)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    sequences = make_sequences([9, 2, 25])
    rows = [oracle(torch.tensor([s]), labels=torch.tensor([s])).loss for s in sequences]
    theirs = torch.stack(rows).mean()
    ours = sft_loss(policy, sequences)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    labels = torch.tensor([8, 1, 24])
    token_mean = (torch.stack(rows) * labels).sum() / labels.sum()
    assert abs(token_mean - theirs) > 1e-2  # the other convention is another number


@pytest.mark.parametrize("microbatch_tokens", [1, 20, 40, 1000])
def test_microbatches_add_up_to_the_loss_and_gradient_of_the_batch(make_policy, make_sequences, microbatch_tokens):
    policy = make_policy()
    sequences = make_sequences([9, 2, 25, 14, 7])
    whole = sft_loss(policy, sequences)
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    total = 0.0
    for group in split_by_tokens([len(s) for s in sequences], microbatch_tokens):
        loss = sft_loss(policy, [sequences[i] for i in group], of=len(sequences))
        loss.backward()
        total += loss.item()
    assert math.isclose(total, whole.item(), rel_tol=1e-5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_sequence_without_a_label_adds_nothing_and_is_not_nan(make_policy, make_sequences):
    policy = make_policy()
    one, other = make_sequences([1, 6])
    torch.testing.assert_close(sft_loss(policy, [one, other]), sft_loss(policy, [other], of=2))
    assert sft_loss(policy, [one]) == 0


def test_golden_bradley_terry_loss_and_accuracy():
    chosen, rejected = torch.tensor([1, 0.2, -0.5, 3]), torch.tensor([0.5, 0.7, -0.5, -1])
    assert math.isclose(bradley_terry_loss(chosen, rejected).item(), 0.5398628, abs_tol=1e-6)
    assert pair_accuracy(chosen, rejected).item() == 0.5  # a tie is an error


def test_bradley_terry_swapped_differs_by_the_margin():
    chosen, rejected = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 3
    difference = bradley_terry_loss(chosen, rejected) - bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(difference, -(chosen - rejected).mean(), rtol=1e-5, atol=1e-5)


def test_identical_texts_give_exactly_ln_2(make_scalar, make_sequences):
    model = make_scalar(bias=False)
    (sequence,) = make_sequences([12])
    chosen, rejected = model.scores([sequence, sequence])
    loss = bradley_terry_loss(chosen[None], rejected[None])
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-7)


def test_bradley_terry_pushes_the_scores_apart_and_survives_large_margins():
    chosen, rejected = torch.tensor([0.0, -200.0], requires_grad=True), torch.tensor([0.0, 200.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor((math.log(2) + 400) / 2))
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.25, -0.5]))
    torch.testing.assert_close(rejected.grad, torch.tensor([0.25, 0.5]))


def test_the_sft_gradient_reaches_query_tokens_too(make_policy, make_sequences):
    # Query tokens are trained on (N+ detail 9): a change of the first label changes the loss.
    policy = make_policy()
    (sequence,) = make_sequences([10])
    packed = pack([sequence], round_to=1)
    labels, counts = next_token_labels(packed)
    hidden = policy.hidden(packed).detach().requires_grad_()
    linear_cross_entropy(hidden, policy.head_weight, labels, sequence_mean_weights(packed, counts, 1)).backward()
    norms = hidden.grad.norm(dim=1)
    assert (norms[:-1] > 0).all() and norms[-1] == 0
    logits = F.linear(hidden, policy.head_weight)
    expected = F.cross_entropy(logits[:-1], labels[:-1]).item()
    assert math.isclose(sft_loss(policy, [sequence]).item(), expected, rel_tol=1e-5)
