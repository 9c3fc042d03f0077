"""DPO, RLOO, GRPO, best-of-n and ensembles: their arithmetic by hand, against naive float64 code, and against TRL."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.methods import (
    ADVANTAGES,
    best_of,
    best_of_wins,
    dpo_loss,
    group_loss,
    group_normalised,
    implicit_rewards,
    k3,
    kl_bound,
    kl_estimate,
    leave_one_out,
    rank_weights,
    token_weights,
)
from experiments.train_dpo import rewards, summary_logprobs
from nanorlhf.ensemble import Ensemble, combine, member_scores
from nanorlhf.models import critic_from
from nanorlhf.packing import pack
from nanorlhf.pairs import pack_pairs

B, R, K = 8, 6, 4


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)


def batch(seed: int = 0) -> SimpleNamespace:
    """Random log-probs of 8 responses of 1 to 6 tokens, float32; the policy has moved far enough for some clipping."""
    draw = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(B, R, generator=draw)
    lengths = torch.tensor([6, 1, 3, 4, 2, 5, 6, 3])
    return SimpleNamespace(
        logprobs=logprobs,
        new_logprobs=(logprobs + 0.3 * torch.randn(B, R, generator=draw)).requires_grad_(),
        ref_logprobs=logprobs + 0.5 * torch.randn(B, R, generator=draw),
        mask=torch.arange(R) < lengths[:, None],
        advantages=torch.randn(B, generator=draw),
    )


# -- DPO


def test_golden_dpo_loss_and_implicit_rewards():
    chosen = implicit_rewards(tensor(-2.0, -5.0), tensor(-3.0, -5.0), beta=0.5)  # 0.5, 0
    rejected = implicit_rewards(tensor(-4.0, -1.0), tensor(-3.0, -2.0), beta=0.5)  # -0.5, 0.5
    assert chosen.tolist() == [0.5, 0.0] and rejected.tolist() == [-0.5, 0.5]
    # -log sigmoid(1) = 0.313262, -log sigmoid(-0.5) = 0.974077
    assert dpo_loss(chosen, rejected).item() == pytest.approx((0.313262 + 0.974077) / 2, abs=1e-6)


def test_dpo_of_a_policy_that_is_the_reference_is_ln_2_and_its_gradient_pulls_the_two_apart():
    same = tensor(-7.0, -1.0)
    new = same.clone().requires_grad_()
    chosen, rejected = implicit_rewards(new, same, 0.1), implicit_rewards(same.flip(0), same.flip(0), 0.1)
    loss = dpo_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert new.grad.tolist() == pytest.approx([-0.1 * 0.5 / 2] * 2)  # -beta sigmoid(0) / pairs


QUERIES, CHOSEN, REJECTED = [[1, 20, 21, 22], [1, 30]], [[40, 41, 2], [50, 2]], [[60, 2], [51, 52, 53, 2]]


def test_the_logprob_of_a_summary_is_the_sum_over_its_tokens_and_no_others(make_policy):
    policy = make_policy()
    found = summary_logprobs(policy, pack_pairs(QUERIES, CHOSEN, REJECTED), QUERIES)
    for got, query, summary in zip(found.tolist(), QUERIES * 2, CHOSEN + REJECTED, strict=True):
        (logits,) = policy.logits([query + summary])
        logp = logits.double().log_softmax(-1)
        naive = sum(logp[len(query) - 1 + t, token].item() for t, token in enumerate(summary))
        assert got == pytest.approx(naive, abs=1e-4)


def test_dpo_rewards_are_zero_for_equal_models_and_have_a_gradient_in_the_policy_alone(make_policy):
    policy, reference = make_policy(), make_policy()
    pairs = list(zip(QUERIES, CHOSEN, REJECTED, strict=True))
    chosen, rejected = rewards(policy, reference, pairs, beta=0.1)
    assert chosen.abs().max() < 1e-6 and rejected.abs().max() < 1e-6
    dpo_loss(chosen, rejected).backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in reference.parameters())


# -- RLOO and GRPO


def test_golden_leave_one_out_advantages():
    # others of 1: (2 + 3 + 6) / 3 = 3.667; of 6: 2
    found = leave_one_out(tensor(1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0), 4)
    assert found.tolist() == pytest.approx([-2.666667, -1.333333, 0.0, 4.0, 0, 0, 0, 0], abs=1e-5)


def test_golden_group_normalised_advantages():
    # mean 3, unbiased variance (4 + 1 + 0 + 9) / 3 = 4.667, deviation 2.160247
    found = group_normalised(tensor(1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0), 4)
    deviation = 2.160247 + 1e-4
    assert found.tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0, 3 / deviation, 0, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("algorithm", ADVANTAGES)
def test_the_advantages_of_a_query_know_nothing_of_the_others_and_add_up_to_zero(algorithm):
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, generator=draw)
    found = ADVANTAGES[algorithm](rewards, K)
    assert found.view(-1, K).sum(1).abs().max() < 1e-5
    other = ADVANTAGES[algorithm](torch.cat([rewards[:K], 100 * rewards[K:]]), K)
    assert torch.equal(found[:K], other[:K])
    moved = ADVANTAGES[algorithm](rewards + tensor(1.0, 5.0, -3.0).repeat_interleave(K), K)  # a level a query
    torch.testing.assert_close(moved, found, atol=1e-4, rtol=0)


def test_the_leave_one_out_baseline_does_not_move_the_gradients_mean():
    """Two actions of known probability and reward: the mean over all pairs of samples is the exact policy gradient."""
    p, rewards = np.array([0.3, 0.7]), np.array([2.0, -1.0])
    score = np.array([1.0, -0.3 / 0.7])  # d log p(a) / d theta for p(0) = theta, times p(0)
    exact = (p * rewards * score).sum()
    mean = 0.0
    for a, b in itertools.product((0, 1), repeat=2):
        advantages = leave_one_out(torch.tensor([rewards[a], rewards[b]]), 2).numpy()
        mean += p[a] * p[b] * (advantages * score[[a, b]]).mean()
    assert mean == pytest.approx(exact)


def test_golden_k3():
    found = k3(tensor(-1.0, -1.0, -2.0), tensor(-1.0, -2.0, -1.0))  # x = 0, 1, -1
    assert found.tolist() == pytest.approx([0.0, math.exp(-1), math.e - 2], abs=1e-6)


def test_the_mean_of_k3_is_the_kl():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.4, 0.2])
    each = k3(torch.tensor(np.log(p)), torch.tensor(np.log(q))).numpy()
    assert (p * each).sum() == pytest.approx((p * np.log(p / q)).sum())
    assert (each >= 0).all()


def test_golden_token_weights():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert token_weights(mask, "rloo").tolist() == [[0.25, 0.25, 0.25], [0.25, 0, 0]]
    sixth = pytest.approx(1 / 6)
    assert token_weights(mask, "grpo").tolist() == [[sixth, sixth, sixth], [0.5, 0, 0]]


@pytest.mark.parametrize("algorithm", ADVANTAGES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_those_of_a_naive_loop_in_float64(algorithm, kl_coef):
    b = batch()
    weights = token_weights(b.mask, algorithm)
    loss, policy_part, kl = group_loss(
        b.new_logprobs, b.logprobs, b.ref_logprobs, b.advantages, weights, b.mask, 0.2, kl_coef
    )
    loss.backward()
    new = b.new_logprobs.detach().double().requires_grad_()
    total, kls, clipped = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    tokens, lengths = int(b.mask.sum()), b.mask.sum(1).tolist()
    for i, t in b.mask.nonzero().tolist():
        weight = 1 / tokens if algorithm == "rloo" else 1 / (B * lengths[i])
        ratio = torch.exp(new[i, t] - b.logprobs[i, t].double())
        surrogate = torch.minimum(ratio * b.advantages[i], ratio.clamp(0.8, 1.2) * b.advantages[i])
        clipped += bool(surrogate != ratio * b.advantages[i])
        log_ratio = b.ref_logprobs[i, t].double() - new[i, t]
        total, kls = total - weight * surrogate, kls + weight * (log_ratio.exp() - log_ratio - 1)
    (total + kl_coef * kls).backward()
    assert clipped  # the case is there
    assert policy_part.item() == pytest.approx(total.item(), abs=1e-6)
    assert kl.item() == pytest.approx(kls.item(), abs=1e-6)
    torch.testing.assert_close(b.new_logprobs.grad, new.grad.float(), atol=1e-6, rtol=1e-5)


def test_what_follows_eos_reaches_neither_loss_nor_gradient():
    b, other = batch(), batch()
    with torch.no_grad():
        other.new_logprobs[~other.mask], other.ref_logprobs[~other.mask] = -200.0, 90.0  # k3 would overflow
    losses = []
    for x in (b, other):
        arguments = x.new_logprobs, x.logprobs, x.ref_logprobs, x.advantages, token_weights(x.mask, "grpo"), x.mask
        loss, *_ = group_loss(*arguments, 0.2, 0.1)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] and torch.equal(b.new_logprobs.grad, other.new_logprobs.grad)
    assert (b.new_logprobs.grad[~b.mask] == 0).all()


@pytest.mark.parametrize("algorithm, loss_type", [("grpo", "grpo"), ("rloo", "bnpo")])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_loss_is_that_of_trl(algorithm, loss_type, kl_coef):
    """TRL's own code, with log-probs given to it: "grpo" is our grpo, "bnpo", a mean over tokens, our rloo."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed: it is no dependency")
    b = batch()
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (b.new_logprobs, torch.zeros(B, R), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=kl_coef, epsilon_low=0.2, epsilon_high=0.2, loss_type=loss_type,
        use_vllm=False, args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
    )  # fmt: skip
    ids, mask = torch.zeros(B, R, dtype=torch.long), b.mask.long()
    inputs = dict(prompt_ids=ids, prompt_mask=mask, completion_ids=ids, completion_mask=mask, advantages=b.advantages)
    inputs |= dict(old_per_token_logps=b.logprobs, ref_per_token_logps=b.ref_logprobs)
    theirs = up_to_the_loss(trainer.GRPOTrainer._compute_loss, stub, None, inputs)
    ours, *_ = group_loss(
        b.new_logprobs, b.logprobs, b.ref_logprobs, b.advantages, token_weights(b.mask, algorithm), b.mask, 0.2, kl_coef
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_the_dpo_loss_is_that_of_trl():
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed: it is no dependency")
    b = batch()
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu"), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, beta=0.1, loss_types=["sigmoid"], loss_weights=[1.0],
        f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip
    sums = [(x * b.mask).sum(1).chunk(2) for x in (b.new_logprobs, b.ref_logprobs)]
    mask = torch.cat([torch.zeros(B, 1), b.mask], dim=1).long()
    inputs = dict(input_ids=torch.zeros(B, R + 1, dtype=torch.long), completion_mask=mask)
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), sums[1], strict=True))
    model = lambda **_: SimpleNamespace(log_probs=b.new_logprobs * b.mask)  # noqa: E731
    theirs = up_to_the_loss(trainer.DPOTrainer._compute_loss, stub, model, inputs, False)
    chosen, rejected = (implicit_rewards(new, ref, 0.1) for new, ref in zip(*sums, strict=True))
    assert dpo_loss(chosen, rejected).item() == pytest.approx(theirs.item(), abs=1e-6)


def up_to_the_loss(function, *arguments) -> torch.Tensor:
    """The local `loss` of a method of TRL's at the line where it begins to log, for which the stub has no means."""
    found = {}

    def watch(frame, event, _):
        if frame.f_code is function.__code__:
            found.update(frame.f_locals)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        function(*arguments)
    except AttributeError as error:
        assert "loss" in found, error  # before it was computed: the stub lacks something
    finally:
        sys.settrace(before)
    return found["loss"]


# -- best of n


def test_golden_rank_weights():
    assert rank_weights(4, 1).tolist() == [0.25] * 4
    assert rank_weights(4, 4).tolist() == [0, 0, 0, 1]
    assert rank_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=6), rng.normal(size=6)
    subsets = itertools.combinations(range(6), n)
    naive = np.mean([values[max(subset, key=lambda i: scores[i])] for subset in subsets])
    assert best_of(scores, values, n) == pytest.approx(naive)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_win_rate_is_the_mean_over_all_opponents_and_all_subsets_of_the_others(n):
    rng = np.random.default_rng(1)
    scores, gold = rng.normal(size=5), np.array([1.0, 2.0, 2.0, 0.5, 3.0])
    outcomes = []
    for opponent in range(5):
        for subset in itertools.combinations([i for i in range(5) if i != opponent], n):
            margin = gold[max(subset, key=lambda i: scores[i])] - gold[opponent]
            outcomes.append(0.5 if margin == 0 else float(margin > 0))
    assert best_of_wins(scores, gold, n) == pytest.approx(np.mean(outcomes))
    if n == 1:
        assert best_of_wins(scores, gold, n) == pytest.approx(0.5)


def test_golden_kl_of_best_of_n():
    assert kl_bound(1) == 0 and kl_bound(2) == pytest.approx(0.193147) and kl_bound(16) == pytest.approx(1.835089)
    assert kl_estimate(np.array([0.0]), 4)[0] == pytest.approx(kl_bound(4))  # nothing occurs twice
    assert kl_estimate(np.array([1.0]), 4)[0] == pytest.approx(0, abs=1e-9)  # one response only: nothing to choose
    assert np.abs(kl_estimate(np.array([0.1, 0.5, 0.9]), 1)).max() < 1e-9
    # the best of two has probability 1/2, the other half is spread: 0.75 log 1.5 + 0.25 (log 2 - 1/2 + log 1/2)
    assert kl_estimate(np.array([0.5]), 2)[0] == pytest.approx(0.75 * math.log(1.5) - 0.125)


def test_the_estimate_lies_below_the_bound_and_near_the_exact_kl_where_responses_repeat():
    p = np.array([0.5, 0.2, 0.1] + [0.2 / 200] * 200)  # three that occur often, many that hardly do
    order = np.random.default_rng(0).permutation(len(p))  # of their scores
    for n in (2, 4, 8):
        below = np.cumsum(p[order]) - p[order]
        best = np.empty_like(p)
        best[order] = (below + p[order]) ** n - below**n
        exact = (best * np.log(best / p)).sum()
        estimate = (best * kl_estimate(p, n)).sum()
        assert exact < kl_bound(n) and estimate <= kl_bound(n)
        assert abs(estimate - exact) < abs(kl_bound(n) - exact)


# -- ensembles


def test_golden_combinations_of_scores():
    scores = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
    assert combine(scores, "mean").tolist() == [3.0, 2.0]
    assert combine(scores, "min").tolist() == [1.0, 2.0]
    assert combine(scores, "mean_minus_std").tolist() == pytest.approx([3 - math.sqrt(8 / 3), 2.0])


@pytest.mark.parametrize("rule", ["mean", "min", "mean_minus_std"])
def test_one_reward_model_is_an_ensemble_of_one_bit_for_bit(rule, make_scalar, make_sequences):
    model, packed = make_scalar(bias=False, score_shift=0.7), pack(make_sequences([9, 4, 17]))
    assert torch.equal(combine(member_scores(Ensemble([model]), packed), rule), model.last_scores(packed))
    assert torch.equal(member_scores(model, packed), member_scores(Ensemble([model]), packed))


def test_each_member_subtracts_its_own_shift_before_they_are_combined(make_scalar, make_sequences):
    low, high = (make_scalar(bias=False, score_shift=shift) for shift in (0.0, 2.0))
    packed = pack(make_sequences([9, 4, 17]))
    scores = member_scores(Ensemble([low, high]), packed)
    torch.testing.assert_close(scores[:, 0], scores[:, 1] + 2, atol=1e-5, rtol=0)
    assert torch.equal(combine(scores, "min"), scores[:, 1])
    critic = critic_from(Ensemble([low, high]).members[0])
    torch.testing.assert_close(critic.last_scores(packed), scores[:, 0], atol=1e-5, rtol=0)


def test_the_naive_dpo_loss_in_float64():
    draw = torch.Generator().manual_seed(3)
    new, ref = torch.randn(2, 16, generator=draw), torch.randn(2, 16, generator=draw)
    ours = dpo_loss(implicit_rewards(new[0], ref[0], 0.3), implicit_rewards(new[1], ref[1], 0.3))
    margin = 0.3 * ((new[0] - ref[0]).double() - (new[1] - ref[1]).double())
    assert ours.item() == pytest.approx(F.softplus(-margin).mean().item(), abs=1e-6)
