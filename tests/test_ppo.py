"""PPO's arithmetic by hand: the golden block of five responses, then each sign, mask and edge on its own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.ppo import (
    action_mask,
    apply_missing_eos,
    gae,
    last_token,
    masked_mean,
    masked_whiten,
    policy_loss,
    token_rewards,
    truncate,
    value_loss,
    value_mask,
)

# --- the golden block: computed in numpy float64 and with the code of Huang et al. -----------------------------------
#
# Rows: EOS in the middle; no EOS; EOS last; EOS first; EOS in the last slot but one.

EOS, PAD, KL_COEF = 9, 0, 0.05
RESPONSES = torch.tensor([[5, 6, 9, 7, 8], [5, 6, 7, 8, 5], [5, 6, 7, 8, 9], [9, 5, 6, 7, 8], [5, 6, 7, 9, 4]])
LOGPROBS = torch.tensor(
    [
        [-1, -2, -0.5, -3, -1.5],
        [-1, -1.2, -0.8, -2, -0.4],
        [-0.7, -0.9, -1.1, -0.3, -0.2],
        [-2.5, -1, -1, -1, -1],
        [-0.6, -1.6, -0.4, -0.9, -2.2],
    ]
)
REF_LOGPROBS = torch.tensor(
    [
        [-1.2, -1.6, -0.9, -2, -1],
        [-1.5, -1, -1, -2.2, -0.9],
        [-0.5, -1.3, -1, -0.8, -0.6],
        [-3.5, -1.1, -0.9, -1.3, -0.7],
        [-1, -1.2, -0.6, -1.5, -2],
    ]
)
VALUES = torch.tensor(
    [
        [0.1, 0.2, 0.3, 0.9, 0.4],
        [-0.2, 0, 0.1, 0.2, 0.3],
        [0.5, 0.4, 0.6, 0.7, 0.8],
        [0, 0.25, 0.5, 0.5, 0.5],
        [0.2, 0.1, -0.1, 0.3, -0.4],
    ]
)
RAW_SCORES = torch.tensor([0.9, 1.7, 0.8, 0.25, -0.4])

ACTION = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
VALUE = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
SCORES = torch.tensor([0.9, -1, 0.8, 0.25, -0.4])
REWARDS = torch.tensor(
    [
        [-0.01, 0.02, -0.02, 0.9, 0],
        [-0.025, 0.01, -0.01, -0.01, -1.025],
        [0.01, -0.02, 0.005, -0.025, 0.78],
        [-0.05, 0.25, 0, 0, 0],
        [-0.02, 0.02, -0.01, -0.03, -0.4],
    ]
)
MASKED_VALUES = torch.tensor(
    [
        [0.1, 0.2, 0.3, 0.9, 0],
        [-0.2, 0, 0.1, 0.2, 0.3],
        [0.5, 0.4, 0.6, 0.7, 0.8],
        [0, 0.25, 0, 0, 0],
        [0.2, 0.1, -0.1, 0.3, -0.4],
    ]
)
ADVANTAGES = torch.tensor(
    [
        [0.72745, 0.671, 0.58, 0, 0],
        [-0.641332, -0.859297, -1.020312, -1.16875, -1.325],
        [0.223776, 0.33029, 0.1582, 0.056, -0.02],
        [0.2, 0, 0, 0, 0],
        [-0.564909, -0.468325, -0.3035, -0.73, 0],
    ]
)
RETURNS = torch.tensor(
    [
        [0.82745, 0.871, 0.88, 0.9, 0],
        [-0.841332, -0.859297, -0.920312, -0.96875, -1.025],
        [0.723776, 0.73029, 0.7582, 0.756, 0.78],
        [0.2, 0.25, 0, 0, 0],
        [-0.364909, -0.368325, -0.4035, -0.43, -0.4],
    ]
)
WHITENED = torch.tensor(
    [
        [1.530062, 1.439928, 1.294629, 0, 0],
        [-0.655468, -1.003491, -1.260584, -1.497594, -1.747078],
        [0.725847, 0.895918, 0.621142, 0.457960, 0.336611],
        [0.687884, 0, 0, 0, 0],
        [-0.533443, -0.379228, -0.116052, -0.797043, 0],
    ]
)
NEW_LOGPROBS = LOGPROBS + torch.tensor(
    [
        [0.1, -0.3, 0.25, 0, 0],
        [0.05, 0, -0.2, 0.3, -0.1],
        [0.2, -0.05, 0.1, -0.3, 0],
        [0.4, 0, 0, 0, 0],
        [-0.25, 0.15, 0.05, 0.22, 0],
    ]
)
NEW_VALUES = torch.tensor(
    [
        [0.4, 0.2, 0.1, 1.3, 0],
        [-0.1, 0.3, 0.1, -0.2, 0.3],
        [0.5, 0.9, 0.6, 0.5, 0.8],
        [0.3, 0.2, 0, 0, 0],
        [0.1, 0.1, 0.2, 0.3, -0.9],
    ]
)
# Any number may stand where a mask is False. nan and inf are no numbers, and must not matter either.
ANYTHING = [0.0, 7.0, -1e9, 1e9, math.inf, math.nan]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=tolerance, check_dtype=False)


def elsewhere(x, mask, anything):
    return x.masked_fill(~mask, anything)


def test_golden_masks_and_truncation():
    assert last_token(RESPONSES, EOS).tolist() == [2, 4, 4, 0, 3]
    assert torch.equal(action_mask(RESPONSES, EOS), ACTION) and ACTION.sum() == 18
    assert torch.equal(value_mask(RESPONSES, EOS), VALUE) and VALUE.sum() == 21
    assert truncate(RESPONSES, EOS, PAD).tolist() == [
        [5, 6, 9, 0, 0],
        [5, 6, 7, 8, 5],
        [5, 6, 7, 8, 9],
        [9, 0, 0, 0, 0],
        [5, 6, 7, 9, 0],
    ]
    assert RESPONSES[0].tolist() == [5, 6, 9, 7, 8]  # truncate has not written into what was sampled


def test_golden_scores_are_replaced_only_where_there_is_no_eos():
    close(apply_missing_eos(RAW_SCORES, RESPONSES, EOS, -1.0), SCORES)
    close(apply_missing_eos(RAW_SCORES, RESPONSES, EOS), SCORES)  # -1 is the default


@pytest.mark.parametrize("anything", ANYTHING)
def test_golden_rewards(anything):
    kl = elsewhere(LOGPROBS - REF_LOGPROBS, ACTION, anything)
    close(token_rewards(SCORES, kl, RESPONSES, EOS, KL_COEF), REWARDS)


def test_golden_objectives():
    kl = torch.where(ACTION, LOGPROBS - REF_LOGPROBS, 0.0)
    rewards = token_rewards(SCORES, kl, RESPONSES, EOS, KL_COEF)
    non_score = token_rewards(torch.zeros(5), kl, RESPONSES, EOS, KL_COEF)
    close(kl.sum(1), [0.2, 1.2, 1.0, 1.0, 0.8])
    close(non_score.sum(1).mean(), -0.042)
    close((rewards - non_score).sum(1), SCORES)
    close(rewards.sum(1).mean(), 0.068)
    close(rewards.sum(1).mean(), SCORES.mean() - KL_COEF * kl.sum(1).mean())


def test_golden_advantages_and_returns():
    masked_values = torch.where(VALUE, VALUES, 0.0)
    close(masked_values, MASKED_VALUES)
    advantages, returns = gae(REWARDS, masked_values, gamma=1.0, lam=0.95)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)


def test_the_return_of_the_finished_response_is_its_score():
    _, returns = gae(REWARDS, MASKED_VALUES, gamma=1.0, lam=0.95)
    for row, slot in ((0, 3), (3, 1), (4, 4)):  # L+1 of the rows that have a slot after EOS
        close(returns[row, slot], SCORES[row])


def test_golden_contrast_the_score_at_eos_gives_other_advantages():
    rewards = REWARDS.clone()
    rewards[0] = torch.tensor([-0.01, 0.02, 0.88, 0, 0])
    close(gae(rewards, MASKED_VALUES, 1.0, 0.95)[0][0], [0.768062, 0.713750, 0.625, -0.9, 0])


def test_golden_contrast_values_masked_like_actions_give_other_advantages():
    values = torch.where(ACTION, VALUES, 0.0)
    close(gae(REWARDS, values, 1.0, 0.95)[0][0], [0.686837, 0.628250, 0.535, 0.9, 0])


@pytest.mark.parametrize("anything", ANYTHING)
def test_golden_whitening(anything):
    x = elsewhere(ADVANTAGES, ACTION, anything)
    mean = masked_mean(x, ACTION)
    close(mean, -0.2308172)
    close(masked_mean((x - mean) ** 2, ACTION), 0.3922431)
    close(masked_whiten(x, ACTION), WHITENED)


def test_golden_reward_whitening_keeps_the_mean():
    mean = masked_mean(REWARDS, VALUE)
    close(mean, 0.0161905)
    close(masked_mean((REWARDS - mean) ** 2, VALUE), 0.1282522)
    whitened = masked_whiten(REWARDS, VALUE, shift_mean=False)
    close(whitened[0], [-0.056942, 0.026828, -0.084865, 2.484083, 0])
    close(masked_mean(whitened, VALUE), mean)


@pytest.mark.parametrize("anything", ANYTHING)
def test_golden_policy_loss_and_its_gradient(anything):
    new_logprobs = elsewhere(NEW_LOGPROBS, ACTION, anything).requires_grad_()
    logprobs = elsewhere(LOGPROBS, ACTION, anything)
    loss, stats = policy_loss(new_logprobs, logprobs, elsewhere(WHITENED, ACTION, anything), ACTION, cliprange=0.2)
    loss.backward()
    close(loss.detach(), 0.0048464)
    close(stats["clipfrac"], 0.2222, 1e-4)
    close(stats["approxkl"], 0.02065)
    close(stats["ratio"], 1.05573)
    assert torch.equal(new_logprobs.grad[~ACTION], torch.zeros(7))
    assert new_logprobs.grad.isfinite().all() and (new_logprobs.grad[ACTION] != 0).sum() == 14  # 18 less the 4 clipped


@pytest.mark.parametrize("anything", ANYTHING)
def test_golden_value_loss_and_its_gradient(anything):
    new_values = elsewhere(NEW_VALUES, VALUE, anything).requires_grad_()
    loss, stats = value_loss(
        new_values, elsewhere(VALUES, VALUE, anything), elsewhere(RETURNS, VALUE, anything), VALUE, cliprange_value=0.2
    )
    loss.backward()
    close(loss.detach(), 0.2116773)
    close(stats["clipfrac"], 0.095238)
    assert torch.equal(new_values.grad[~VALUE], torch.zeros(4))
    assert new_values.grad.isfinite().all() and new_values.grad[VALUE].abs().max() > 0


def test_golden_total_loss():
    policy, _ = policy_loss(NEW_LOGPROBS, LOGPROBS, WHITENED, ACTION, 0.2)
    value, _ = value_loss(NEW_VALUES, VALUES, RETURNS, VALUE, 0.2)
    close(policy + 0.1 * value, 0.0260141)


def test_golden_contrast_microbatches_averaged_with_equal_weight_give_other_losses():
    policy = torch.stack(
        [policy_loss(NEW_LOGPROBS[i], LOGPROBS[i], WHITENED[i], ACTION[i], 0.2)[0] for i in range(5)]
    ).mean()
    value = torch.stack([value_loss(NEW_VALUES[i], VALUES[i], RETURNS[i], VALUE[i], 0.2)[0] for i in range(5)]).mean()
    close(policy, -0.2237260)
    close(value, 0.1856682)
    close(policy + 0.1 * value, -0.2051591)


def test_golden_block_from_responses_to_total_loss():
    kl = LOGPROBS - REF_LOGPROBS  # as it is, also after EOS
    actions, states = action_mask(RESPONSES, EOS), value_mask(RESPONSES, EOS)
    scores = apply_missing_eos(RAW_SCORES, RESPONSES, EOS, -1.0)
    values = torch.where(states, VALUES, 0.0)
    advantages, returns = gae(token_rewards(scores, kl, RESPONSES, EOS, KL_COEF), values, 1.0, 0.95)
    policy, _ = policy_loss(NEW_LOGPROBS, LOGPROBS, masked_whiten(advantages, actions), actions, 0.2)
    value, _ = value_loss(NEW_VALUES, values, returns, states, 0.2)
    close(policy + 0.1 * value, 0.0260141)


# --- masks, scores and rewards at the edges ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, last, actions, states",
    [
        ([9, 5, 5, 5], 0, 1, 2),  # EOS first
        ([5, 9, 5, 9], 1, 2, 3),  # two of them: the first counts
        ([5, 5, 9, 5], 2, 3, 4),
        ([5, 5, 5, 9], 3, 4, 4),  # EOS last
        ([5, 5, 5, 5], 3, 4, 4),  # none
        ([0, 0, 9, 0], 2, 3, 4),  # a sampled PAD before EOS is an ordinary token
        ([9, 9, 9, 9], 0, 1, 2),
    ],
)
def test_masks_come_from_the_first_eos(response, last, actions, states):
    responses = torch.tensor([response])
    assert last_token(responses, EOS).tolist() == [last]
    assert action_mask(responses, EOS)[0].tolist() == [True] * actions + [False] * (4 - actions)
    assert value_mask(responses, EOS)[0].tolist() == [True] * states + [False] * (4 - states)
    assert truncate(responses, EOS, PAD)[0].tolist() == response[:actions] + [PAD] * (4 - actions)


@pytest.mark.parametrize(
    "response, slot",
    [([9, 5, 5], 1), ([5, 9, 5], 2), ([5, 5, 9], 2), ([5, 5, 5], 2)],
    ids=["EOS at 0", "EOS in the middle", "EOS last", "no EOS"],
)
def test_the_score_stands_one_step_after_eos_or_in_the_last_slot(response, slot):
    rewards = token_rewards(torch.tensor([3.0]), torch.zeros(1, 3), torch.tensor([response]), EOS, KL_COEF)
    expected = torch.zeros(1, 3)
    expected[0, slot] = 3.0
    assert torch.equal(rewards, expected)


def test_a_response_of_one_token_has_its_score_there():
    close(token_rewards(torch.tensor([3.0]), torch.tensor([[2.0]]), torch.tensor([[9]]), EOS, KL_COEF), [[2.9]])


responses_strategy = st.integers(1, 7).flatmap(
    lambda r: st.lists(st.lists(st.integers(5, 9), min_size=r, max_size=r), min_size=1, max_size=4)
)


@settings(deadline=None, max_examples=60)
@given(responses_strategy, st.integers(0, 2**31))
def test_rewards_sum_to_the_score_minus_the_penalty_of_the_tokens_up_to_eos(rows, seed):
    responses, generator = torch.tensor(rows), torch.Generator().manual_seed(seed)
    scores, kl = torch.randn(len(rows), generator=generator), torch.randn(responses.shape, generator=generator)
    rewards = token_rewards(scores, kl, responses, EOS, KL_COEF)
    for i, row in enumerate(rows):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert math.isclose(rewards[i].sum(), scores[i] - KL_COEF * kl[i, :length].sum(), abs_tol=1e-5)
    assert (rewards[~value_mask(responses, EOS)] == 0).all()


# --- GAE --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_gae_equals_the_double_sum_of_its_definition(batch, length, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, length, generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, gamma, lam)
    for b in range(batch):
        for t in range(length):
            expected = 0.0
            for k in range(t, length):  # A_t = sum_k (gamma lam)^(k-t) delta_k
                following = values[b, k + 1].item() if k + 1 < length else 0.0
                expected += (gamma * lam) ** (k - t) * (rewards[b, k].item() + gamma * following - values[b, k].item())
            assert math.isclose(advantages[b, t], expected, abs_tol=1e-9)
    close(returns, advantages + values, 1e-12)


def test_with_lambda_1_the_return_is_the_discounted_sum_of_rewards_whatever_the_critic_says():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, -3.0, 0.5]])
    close(gae(rewards, values, gamma=0.5, lam=1.0)[1], [[3.0, 4.0, 4.0]])


def test_with_lambda_0_the_advantage_is_the_one_step_error():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, -3.0, 0.5]])
    close(gae(rewards, values, gamma=1.0, lam=0.0)[0], [[-7.0, 5.5, 3.5]])


def test_gae_leaves_its_arguments_alone():
    rewards, values = REWARDS.clone(), MASKED_VALUES.clone()
    gae(rewards, values, 1.0, 0.95)
    assert torch.equal(rewards, REWARDS) and torch.equal(values, MASKED_VALUES)


# --- masked mean and whitening ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [masked_mean, masked_whiten])
def test_an_empty_mask_is_an_error(function):
    with pytest.raises(ValueError, match="mask"):
        function(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_whitening_divides_by_the_biased_deviation_of_the_masked_elements():
    x, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    close(masked_whiten(x, mask), [[-1.0, 1.0, 0.0]])  # biased variance 1; unbiased it would be 2
    close(masked_whiten(x, mask, shift_mean=False), [[1.0, 3.0, 0.0]])


def test_whitening_one_element_is_zero_and_not_nan():
    close(masked_whiten(torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]])), [[0.0, 0.0]])


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient",
    [
        (2.0, 1.5, -2.4, 0.0),  # good and already likelier by half: clipped, no more push
        (2.0, 0.5, -1.0, -1.0),  # good but less likely: full push back up
        (-2.0, 1.5, 3.0, 3.0),  # bad and likelier: full push down
        (-2.0, 0.5, 1.6, 0.0),  # bad and already less likely: clipped
        (2.0, 1.1, -2.2, -2.2),  # inside the range: the plain surrogate
        (-2.0, 1.1, 2.2, 2.2),
    ],
)
def test_policy_loss_and_gradient_of_one_token(advantage, ratio, loss, gradient):
    new_logprobs = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    got, stats = policy_loss(
        new_logprobs, torch.tensor([[-3.0]]), torch.tensor([[advantage]]), torch.tensor([[True]]), cliprange=0.2
    )
    got.backward()
    close(got.detach(), loss)
    close(new_logprobs.grad, [[gradient]])  # d loss / d new_logprob
    close(stats["clipfrac"], float(gradient == 0))
    close(stats["approxkl"], 0.5 * math.log(ratio) ** 2)


@pytest.mark.parametrize(
    "new_value, value, returns, loss, gradient, clipped",
    [
        (1.0, 0.9, 2.0, 0.5, -1.0, 0.0),  # inside the range: half the squared error
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0, 1.0),  # moved towards the return by more than 0.2: held back, no gradient
        (2.0, 1.0, 0.0, 0.5 * 4.0, 2.0, 0.0),  # moved away from it: the larger, unclipped error counts
    ],
)
def test_value_loss_and_gradient_of_one_state(new_value, value, returns, loss, gradient, clipped):
    new_values = torch.tensor([[new_value]], requires_grad=True)
    got, stats = value_loss(
        new_values, torch.tensor([[value]]), torch.tensor([[returns]]), torch.tensor([[True]]), cliprange_value=0.2
    )
    got.backward()
    close(got.detach(), loss)
    close(new_values.grad, [[gradient]])
    close(stats["clipfrac"], clipped)


def test_before_the_first_update_the_ratio_is_1_and_the_loss_is_0():
    loss, stats = policy_loss(LOGPROBS.clone(), LOGPROBS, WHITENED, ACTION, 0.2)
    assert stats["ratio"] == 1 and stats["approxkl"] == 0 and stats["clipfrac"] == 0
    close(loss, 0.0)  # minus the mean of whitened advantages


@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_losses_stats_and_gradients_of_microbatches_add_up_to_those_of_the_minibatch(cuts):
    def run(pieces):
        new_logprobs, new_values = NEW_LOGPROBS.clone().requires_grad_(), NEW_VALUES.clone().requires_grad_()
        totals: dict[str, torch.Tensor] = {}
        for rows in torch.arange(5).split(pieces):
            policy, policy_stats = policy_loss(
                new_logprobs[rows], LOGPROBS[rows], WHITENED[rows], ACTION[rows], 0.2, ACTION.sum()
            )
            value, value_stats = value_loss(
                new_values[rows], VALUES[rows], RETURNS[rows], VALUE[rows], 0.2, VALUE.sum()
            )
            (policy + 0.1 * value).backward()
            found = {
                "policy": policy.detach(),
                "value": value.detach(),
                "value clipfrac": value_stats["clipfrac"],
                **policy_stats,
            }
            totals = {name: totals.get(name, 0) + x for name, x in found.items()}
        return totals | {"policy gradient": new_logprobs.grad, "value gradient": new_values.grad}

    whole, pieces = run([5]), run(cuts)
    close(whole["policy"], 0.0048464)  # with its own mask as the denominator the loss is the golden one
    for name, expected in whole.items():
        close(pieces[name], expected, 1e-7)


def test_stats_carry_no_graph():
    new_logprobs, new_values = NEW_LOGPROBS.clone().requires_grad_(), NEW_VALUES.clone().requires_grad_()
    _, policy_stats = policy_loss(new_logprobs, LOGPROBS, WHITENED, ACTION, 0.2)
    _, value_stats = value_loss(new_values, VALUES, RETURNS, VALUE, 0.2)
    assert not any(x.requires_grad for x in [*policy_stats.values(), *value_stats.values()])


def test_one_unclipped_epoch_without_a_critic_is_reinforce():
    # K = 1, no clipping, lambda = 1, V = 0: the gradient is that of log-probs weighted with whitened returns.
    logits = torch.randn(5, 5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    new_logprobs = logits.log_softmax(-1).gather(-1, RESPONSES[..., None])[..., 0]
    advantages, _ = gae(REWARDS, torch.zeros(5, 5), gamma=1.0, lam=1.0)
    returns = REWARDS.flip(1).cumsum(1).flip(1)
    close(advantages, returns)
    loss, _ = policy_loss(new_logprobs, new_logprobs.detach(), masked_whiten(advantages, ACTION), ACTION, cliprange=1e9)
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    whitened = (returns - returns[ACTION].mean()) / (returns[ACTION].var(unbiased=False) + 1e-8).sqrt()
    (reinforce,) = torch.autograd.grad(-(new_logprobs * whitened)[ACTION].mean(), logits)
    close(ours, reinforce, 1e-7)
    assert ours[~ACTION].eq(0).all()
