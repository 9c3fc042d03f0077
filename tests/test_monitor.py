"""What PPO logs, by hand: the golden block of test_ppo.py in both conventions, then the critic and the texts."""

import math
import warnings

import numpy as np
import pytest
import torch
from test_ppo import (
    ACTION,
    ADVANTAGES,
    ANYTHING,
    KL_COEF,
    LOGPROBS,
    MASKED_VALUES,
    NEW_LOGPROBS,
    NEW_VALUES,
    REF_LOGPROBS,
    RETURNS,
    SCORES,
    VALUE,
    WHITENED,
    elsewhere,
)

from nanorlhf.data.tldr import Post
from nanorlhf.monitoring import monitor
from nanorlhf.monitoring.flops import ppo_update_flops
from nanorlhf.ppo import policy_loss
from nanorlhf.rollout import Summary
from nanorlhf.tiny import gold
from nanorlhf.tiny.posts import make_post

# --- objective and learning: the golden block ------------------------------------------------------------------------


@pytest.mark.parametrize("anything", ANYTHING)
def test_golden_objective(anything):
    kl = torch.where(ACTION, LOGPROBS - REF_LOGPROBS, 0.0)
    metrics = monitor.objective(SCORES, elsewhere(LOGPROBS, ACTION, anything), kl, ACTION, KL_COEF)
    expected = {
        "objective/scores": 0.11,
        "objective/kl": 0.84,
        "objective/non_score_reward": -0.042,
        "objective/rlhf_reward": 0.068,
        "objective/entropy": 3.62,
        "objective/entropy_paper": 2.22,  # as the paper's code has it: each of 7 padded slots adds -1, over 5 responses
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert metrics["objective/scores_std"] == pytest.approx(np.std([0.9, -1, 0.8, 0.25, -0.4], ddof=1), abs=1e-5)


def golden_totals(steps: int) -> dict:
    """Sums over equal optimizer steps of what train_ppo.learn returns."""
    _, stats = policy_loss(NEW_LOGPROBS, LOGPROBS, WHITENED, ACTION, 0.2)
    names = {"policy/clipfrac_avg": "clipfrac", "policy/approxkl_avg": "approxkl", "val/ratio": "ratio"}
    names["val/ratio_squared"] = "ratio_squared"
    return {ours: steps * stats[name] for ours, name in names.items()}


@pytest.mark.parametrize("steps", [1, 4])
def test_golden_learning_masked_and_as_the_papers_code_logs_it(steps):
    metrics = monitor.learning(golden_totals(steps), steps, ACTION)
    expected = {
        "policy/clipfrac_avg": 4 / 18,
        "policy/clipfrac_avg_paper": 4 / 25,
        "policy/approxkl_avg": 0.02065,
        "policy/approxkl_avg_paper": 0.014868,
        "val/ratio": 1.05573,
        "val/ratio_paper": 1.0401257,
        "val/ratio_var": np.exp((NEW_LOGPROBS - LOGPROBS)[ACTION].double().numpy()).var(),
    }
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_in_a_critic_warmup_only_what_the_critic_learned_is_averaged():
    totals = {"loss/value_avg": torch.tensor(0.8), "grad_norm": torch.tensor(6.0)}
    metrics = monitor.learning(totals, 4, ACTION)
    assert metrics == pytest.approx({"loss/value_avg": 0.2, "grad_norm": 1.5})


def test_the_papers_averages_are_means_over_all_slots_with_the_padded_ones_neutral():
    log_ratio = torch.where(ACTION, NEW_LOGPROBS - LOGPROBS, 0.0).double()
    metrics = monitor.learning(golden_totals(1), 1, ACTION)
    assert metrics["policy/approxkl_avg_paper"] == pytest.approx((0.5 * log_ratio**2).mean().item(), abs=1e-6)
    assert metrics["val/ratio_paper"] == pytest.approx(log_ratio.exp().mean().item(), abs=1e-6)


def test_without_padding_both_conventions_agree():
    mask = torch.ones(2, 3).bool()
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.2, -0.1]])
    metrics = monitor.objective(torch.zeros(2), logprobs, torch.zeros(2, 3), mask, 0.1)
    assert metrics["objective/entropy"] == metrics["objective/entropy_paper"] == pytest.approx(4.1 / 2)
    totals = {"policy/clipfrac_avg": 0.3, "policy/approxkl_avg": 0.2, "val/ratio": 1.1, "val/ratio_squared": 1.3}
    metrics = monitor.learning({name: torch.tensor(value) for name, value in totals.items()}, 1, mask)
    for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio"):
        assert metrics[f"{name}_paper"] == pytest.approx(metrics[name])


# --- critic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anything", ANYTHING)
def test_golden_critic(anything):
    metrics = monitor.critic(
        elsewhere(MASKED_VALUES, VALUE, anything), elsewhere(RETURNS, VALUE, anything),
        elsewhere(ADVANTAGES, ACTION, anything), ACTION, VALUE,
    )  # fmt: skip
    returns, values = RETURNS[VALUE].double().numpy(), MASKED_VALUES[VALUE].double().numpy()
    expected = {
        "returns_mean": 1.095291 / 21,
        "values_mean": 0.25,
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "advantages_max": 0.72745,  # of tokens: the state after EOS has an advantage too, but no action
    }
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_the_mean_value_counts_the_state_after_eos():
    metrics = monitor.critic(NEW_VALUES, RETURNS, ADVANTAGES, ACTION, VALUE)
    assert metrics["values_mean"] == pytest.approx(6.0 / 21, abs=1e-6)  # without it: 5.4 / 18


@pytest.mark.parametrize("values, explained", [([3.0, -1.0, 4.0], 1), ([2.0, 2.0, 2.0], 0), ([-3.0, 1.0, -4.0], -3)])
def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant(values, explained):
    returns, mask = torch.tensor([[3.0, -1.0, 4.0]]), torch.ones(1, 3).bool()
    metrics = monitor.critic(torch.tensor([values]), returns, returns, mask, mask)
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-6)


# --- texts -----------------------------------------------------------------------------------------------------------


def posts(*titles: str, text: str = "one two three four five six seven") -> list[Post]:
    return [Post(id=f"t3_{i}", subreddit="x", title=title, post=text, summary="s") for i, title in enumerate(titles)]


def texts(written: list[str], titles: list[str], scores: list[float], has_eos=(True, True, True)) -> dict:
    summaries = [Summary(text, tokens=9, has_eos=eos) for text, eos in zip(written, has_eos, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's word for a division by 0
        entropy = torch.tensor([[0.5, 0.25, 100.0]] * len(written))
        mask = torch.tensor([[True, True, False]] * len(written))
        return monitor.texts(summaries, posts(*titles), torch.tensor(scores), entropy, mask)


def test_texts_by_hand():
    written = ["one two three four zebra", "one two", "five Six, seven eight"]
    metrics = texts(written, ["two zebra", "", "none of it"], [1.0, 3.0, 2.0], has_eos=(True, False, True))
    expected = {
        "val/num_eos_tokens": 2,
        "val/eos_rate": 2 / 3,
        "hack/entropy": 0.375,  # of the tokens that count
        "hack/length": (5 + 2 + 4) / 3,
        "hack/empty": 0.0,
        "hack/repetition": 0.0,
        "hack/title_copy_50": 1 / 2,
        "hack/title_copy_80": 1 / 2,
        "hack/title_copy_100": 1 / 2,
        "hack/title_copy": (1 + 0) / 2,  # a post without a title does not count
        "hack/copy4": (0.5 + 0) / 2,  # nor does a summary of fewer than four words
        "hack/distinct2": 7 / 8,  # "one two" stands twice among 4 + 1 + 3
        # deviations (4, -5, 1)/3 of the lengths, (-1, 1, 0) of the scores: covariance -3, norms sqrt(42)/3 and sqrt(2)
        "hack/length_score_corr": -3 / (math.sqrt(42) / 3 * math.sqrt(2)),
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_a_reward_for_length_shows_as_a_correlation_of_one():
    for sign in (1, -1):
        metrics = texts(["a", "a b", "a b c"], ["t"] * 3, [sign * x for x in (0.1, 0.2, 0.3)])
        assert metrics["hack/length_score_corr"] == pytest.approx(sign)


@pytest.mark.parametrize(
    "written, scores",
    [
        (["a b", "c d", "e f"], [1.0, 2.0, 3.0]),  # equally long
        (["a", "a b", "a b c"], [-1.0, -1.0, -1.0]),  # none of them stops, so all have missing_eos_score
    ],
)
def test_where_nothing_varies_there_is_no_correlation(written, scores):
    assert texts(written, ["t"] * 3, scores)["hack/length_score_corr"] == 0.0


def test_copying_the_post_shows():
    metrics = texts(["three four five six"] * 3, ["t"] * 3, [1.0, 2.0, 3.0])
    assert metrics["hack/copy4"] == 1.0 and metrics["hack/distinct2"] == pytest.approx(3 / 9)


def test_the_gold_score_is_logged_in_the_tiny_world_only():
    assert "objective/gold" not in texts(["a", "b", "c"], ["t"] * 3, [1.0, 2.0, 3.0])
    world = [make_post("valid", index) for index in range(2)]
    tiny = [Post(id=p.id, subreddit=p.subreddit, title=p.title, post=p.post, summary="") for p in world]
    written = ["my cat left.", "i asked for help?"]
    summaries = [Summary(text, tokens=4, has_eos=True) for text in written]
    metrics = monitor.texts(summaries, tiny, torch.tensor([0.0, 1.0]), torch.ones(2, 1), torch.ones(2, 1).bool())
    expected = sum(gold.judge(p.id, text) for p, text in zip(tiny, written, strict=True)) / 2
    assert tiny[0].id.startswith("tiny-") and metrics["objective/gold"] == pytest.approx(expected)


# --- diversity and trace ---------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token i reads " w<i>"."""

    eos_id = 2

    def decode(self, ids) -> str:
        return "".join(f" w{i}" for i in ids if i > 2)


def test_diversity_is_0_for_samples_that_agree_and_grows_with_the_temperature(make_policy, make_sequences):
    policy, queries = make_policy(), make_sequences([5, 9, 7])
    cold, warm = (
        monitor.diversity(policy, Letters(), queries, 8, temperature, seed=0)["hack/edit_distance"]
        for temperature in (1e-4, 2.0)
    )
    assert cold == 0.0 and 0.3 < warm <= 1.0
    assert monitor.diversity(policy, Letters(), queries, 8, 2.0, seed=0)["hack/edit_distance"] == warm


def test_the_trace_is_the_tensors_up_to_the_state_after_eos():
    response = torch.tensor([5, 6, 2, 7, 8])
    action = torch.tensor([True, True, True, False, False])
    value = torch.tensor([True, True, True, True, False])
    numbers = torch.tensor([0.5, -0.25, 1.0, 2.0, 99.0])
    row = monitor.trace(Letters(), posts("a title")[0], response, action, value, rewards=numbers)
    assert row["tokens"] == [" w5", " w6", "<EOS>", " w7"] and row["ids"] == [5, 6, 2, 7]
    assert row["rewards"] == [0.5, -0.25, 1.0, 2.0]
    assert row["action_mask"] == [True, True, True, False] and row["value_mask"] == [True] * 4
    assert row["title"] == "a title"


def test_speed_is_tokens_of_the_update_over_its_seconds_and_mfu_where_the_peak_is_known(make_config, monkeypatch):
    sequences, finished = [[1] * 30, [1] * 20], [[1] * 28, [1] * 20]
    numbers = make_config(), sequences, finished, 8, 4, 2.0
    row = monitor.speed(*numbers, torch.device("cpu"))
    assert row["perf/tokens_per_s"] == 25 and row["perf/peak_gib"] > 0 and "perf/mfu" not in row
    monkeypatch.setattr(monitor, "mfu", lambda flops, seconds, device: flops / seconds)
    expected = ppo_update_flops(make_config(), [30, 20], [28, 20], 8, 4) / 2.0
    assert monitor.speed(*numbers, torch.device("cpu"))["perf/mfu"] == expected > 0
    of_critic = ppo_update_flops(make_config(), [30, 20], [28, 20], 8, 4, warming=True) / 2.0
    assert monitor.speed(*numbers, torch.device("cpu"), warming=True)["perf/mfu"] == of_critic < expected
