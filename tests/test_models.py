"""Policy, reward model and critic: what is read at which token, and how one is made from another."""

import math

import pytest
import torch
from conftest import TINY, scramble

from nanorlhf import ppo
from nanorlhf.models import Policy, ScalarModel, critic_from, parameter_count, response_kl, reward_model_from
from nanorlhf.packing import pack

R = 6


@pytest.fixture
def batch(make_sequences):
    """(queries, responses (B, R)) with queries of different lengths, one of them a single token."""
    queries = make_sequences([11, 1, 5])
    responses = torch.tensor(make_sequences([R] * 3, seed=1))
    return queries, responses


def join(queries, responses):
    return pack([query + response for query, response in zip(queries, responses.tolist(), strict=True)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_are_log_softmax_of_the_logits_before_each_token(make_policy, batch, temperature, tied):
    policy = make_policy(tie_word_embeddings=tied)
    queries, responses = batch
    with torch.no_grad():
        logprobs, entropy = policy.response_logprobs(join(queries, responses), responses, temperature)
    assert logprobs.shape == entropy.shape == (3, R) and logprobs.dtype == torch.float32
    for row, query in enumerate(queries):
        logits = policy.logits([query + responses[row].tolist()])[0]
        for t in range(R):
            distribution = torch.softmax(logits[len(query) - 1 + t].double() / temperature, -1)
            assert math.isclose(logprobs[row, t], distribution[responses[row, t]].log(), abs_tol=1e-5)
            assert math.isclose(entropy[row, t], -(distribution * distribution.log()).sum(), abs_tol=1e-5)


def test_the_fused_ppo_loss_is_that_of_ppo_policy_loss_in_value_gradient_and_statistics(make_policy, batch):
    queries, responses = batch
    packed, mask = join(queries, responses), torch.arange(R) < torch.tensor([[R], [3], [1]])
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(3, R, generator=generator)
    results = []
    for fused in (False, True):
        policy = make_policy()
        with torch.no_grad():
            old, _ = policy.response_logprobs(packed, responses, 0.7)
        old = old + torch.randn(3, R, generator=torch.Generator().manual_seed(3))
        if fused:
            fields = (packed, responses, old, advantages, mask / mask.sum(), 0.7, 0.2)
            loss, new, entropy, clipfrac = policy.response_ppo_loss(*fields)
            assert not (new.requires_grad or entropy.requires_grad or clipfrac.requires_grad)
        else:
            new, entropy = policy.response_logprobs(packed, responses, 0.7)
            loss, stats = ppo.policy_loss(new, old, advantages, mask, 0.2)
            clipfrac = stats["clipfrac"]
        loss.backward()
        results.append([loss.detach(), new.detach(), entropy.detach(), clipfrac, policy.head_weight.grad])
    assert 0 < results[0][3] < 1 and results[0][4].abs().max() > 0
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_exact_kl_is_that_of_the_two_models_whole_distributions(make_policy, batch):
    queries, responses = batch
    policy, reference = make_policy(seed=0), make_policy(seed=1)
    kl, logprobs, ref_logprobs = response_kl(policy, reference, join(queries, responses), responses, 0.7)
    for row, query in enumerate(queries):
        sequence = query + responses[row].tolist()
        p, q = (model.logits([sequence])[0][len(query) - 1 : -1] / 0.7 for model in (policy, reference))
        p, q = p.log_softmax(-1), q.log_softmax(-1)  # (R, V)
        expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(kl[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logprobs[row], p.gather(1, responses[row][:, None])[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ref_logprobs[row], q.gather(1, responses[row][:, None])[:, 0], rtol=1e-4, atol=1e-5)
    same, logprobs, ref_logprobs = response_kl(policy, policy, join(queries, responses), responses, 0.7)
    assert same.abs().max() < 1e-5 and torch.equal(logprobs, ref_logprobs)


def test_gathered_logprobs_follow_a_known_next_token_table(make_config):
    # A trunk whose hidden state is the token itself: every block adds nothing, so that logits are a table next[token].
    config = make_config(tie_word_embeddings=False, vocab_size=32)
    policy = Policy(config)
    scramble(policy, seed=0)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        policy.model.embed_tokens.weight.copy_(torch.eye(32))
        policy.model.norm.weight.fill_(1 / math.sqrt(32))  # rms of a unit vector is 1/sqrt(D)
        table = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))  # [next, token]
        policy.lm_head.weight.copy_(table)
        responses = torch.tensor([[4, 9], [1, 7]])
        logprobs, _ = policy.response_logprobs(pack([[3, 5, 4, 9], [8, 1, 7]]), responses, 1.0)
    log_table = table.log_softmax(0)
    expected = torch.tensor([[log_table[4, 5], log_table[9, 4]], [log_table[1, 8], log_table[7, 1]]])
    torch.testing.assert_close(logprobs, expected, rtol=1e-3, atol=1e-3)  # the norm's eps of 1e-5 beside 1/32


def test_a_score_is_the_head_at_the_last_token_minus_the_shift(make_scalar, make_sequences):
    model = make_scalar(bias=False, score_shift=0.75)
    sequences = make_sequences([9, 1, 14])
    expected = []
    for sequence in sequences:
        packed = pack([sequence], round_to=1)
        with torch.no_grad():
            hidden = model.model(packed.tokens, packed.positions, lambda layer, q, k, v, read: _attend_slowly(q, k, v))
        expected.append(hidden[-1] @ model.score.weight[0] - 0.75)
    torch.testing.assert_close(model.scores(sequences), torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)
    values = model.values(sequences)
    assert [len(v) for v in values] == [9, 1, 14]
    torch.testing.assert_close(torch.stack([v[-1] for v in values]), model.scores(sequences))


def _attend_slowly(q, k, v):
    """Attention of one sequence, head by head and token by token, from the formula."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for t in range(q.shape[0]):
            weights = torch.softmax(k[: t + 1, head // group] @ q[t, head] / math.sqrt(q.shape[2]), 0)
            out[t, head] = weights @ v[: t + 1, head // group]
    return out


def test_response_values_are_read_before_each_response_token(make_scalar, batch):
    critic = make_scalar(bias=True)
    queries, responses = batch
    with torch.no_grad():
        values = critic.response_values(join(queries, responses), R)
    for row, query in enumerate(queries):
        every = critic.values([query + responses[row].tolist()])[0]
        torch.testing.assert_close(values[row], every[len(query) - 1 : len(query) - 1 + R], rtol=1e-5, atol=1e-5)


def test_before_the_first_update_the_value_after_eos_is_the_score_of_the_response(make_policy, batch):
    reward_model = reward_model_from(make_policy(), seed=3)
    reward_model.score_shift = -0.4
    critic = critic_from(reward_model)
    queries, responses = batch
    with torch.no_grad():
        values = critic.response_values(join(queries, responses), R)
    for row, last in enumerate([0, 2, R - 2]):  # L, where EOS would stand: one slot further is inside the response
        score = reward_model.scores([queries[row] + responses[row, : last + 1].tolist()])[0]
        torch.testing.assert_close(values[row, last + 1], score, rtol=1e-5, atol=1e-5)


def test_a_new_reward_model_has_the_trunk_of_the_policy_and_a_head_of_the_papers_size(make_policy):
    policy = make_policy(hidden_size=2048, intermediate_size=8, num_hidden_layers=1)
    reward_model = reward_model_from(policy, seed=1)
    for (name, ours), theirs in zip(reward_model.model.named_parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    weight = reward_model.score.weight
    assert weight.shape == (1, 2048) and reward_model.score.bias is None and reward_model.score_shift == 0.0
    assert math.isclose(weight.std().item() * math.sqrt(2049), 1, rel_tol=0.05)  # a std of 2048 draws, +- 3 errors
    assert torch.equal(weight, reward_model_from(policy, seed=1).score.weight)
    assert not torch.equal(weight, reward_model_from(policy, seed=2).score.weight)


def test_a_critic_starts_as_the_reward_model_with_the_shift_as_its_bias(make_scalar, make_sequences):
    reward_model = make_scalar(bias=False, score_shift=1.25)
    critic = critic_from(reward_model)
    assert critic.score.bias.item() == -1.25 and critic.score_shift == 0.0
    sequences = make_sequences([7, 12])
    torch.testing.assert_close(critic.scores(sequences), reward_model.scores(sequences), rtol=1e-6, atol=1e-6)


def test_models_made_from_one_another_share_no_storage(make_policy):
    policy = make_policy()
    reward_model = reward_model_from(policy, seed=0)
    critic = critic_from(reward_model)
    pointers = [p.data_ptr() for model in (policy, reward_model, critic) for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    before = [p.clone() for model in (policy, reward_model) for p in model.parameters()]
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1)
    assert all(
        torch.equal(p, b) for p, b in zip([*policy.parameters(), *reward_model.parameters()], before, strict=True)
    )


def test_the_score_of_a_bf16_model_is_computed_in_fp32(make_scalar, make_sequences):
    model = make_scalar(bias=True)
    model.model.to(torch.bfloat16)  # the trunk: the head is fp32 in any model
    sequences = make_sequences([5 + i % 7 for i in range(200)])
    scores = model.scores(sequences)
    assert scores.dtype == torch.float32
    assert len(set(scores.tolist())) > 190  # in bf16, scores around 1 are multiples of 1/128
    packed = pack(sequences[:3])
    with torch.no_grad():
        hidden = model.model(packed.tokens, packed.positions, lambda layer, q, k, v, read: torch.zeros_like(q))
        assert hidden.dtype == torch.bfloat16
        expected = hidden.double() @ model.score.weight[0].double() + model.score.bias.double()
        torch.testing.assert_close(model._head(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_logits_of_a_bf16_model_are_fp32_and_not_rounded_to_bf16(make_policy, make_sequences):
    policy = make_policy().to(torch.bfloat16)
    (sequence,) = make_sequences([40])
    (logits,) = policy.logits([sequence])
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    packed = pack([sequence])
    with torch.no_grad():
        exact = policy.hidden(packed)[:40].double() @ policy.head_weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_reward_model_from_a_bf16_policy_keeps_its_trunk_in_bf16_and_its_head_in_fp32(make_policy, make_sequences):
    reward_model = reward_model_from(make_policy().to(torch.bfloat16), seed=0)
    critic = critic_from(reward_model)
    for model in (reward_model, critic):
        assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
        assert model.score.weight.dtype == torch.float32
        assert model.scores(make_sequences([4])).dtype == torch.float32


def test_parameters_are_counted_once():
    block = 32 * 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32  # qkv, o, mlp, norms
    trunk = 97 * 32 + 2 * block + 32  # embedding, blocks, last norm
    assert parameter_count(Policy(TINY)) == trunk  # the tied head is the embedding
    assert parameter_count(ScalarModel(TINY, bias=True)) == trunk + 32 + 1
