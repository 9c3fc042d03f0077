"""Pre-flight: what is right passes, in fp32 and in bf16, and each planted fault is stopped by the check for it."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import nanorlhf.models
from nanorlhf import ppo
from nanorlhf.attention import causal
from nanorlhf.errors import UserError
from nanorlhf.models import critic_from, reward_model_from
from nanorlhf.packing import Packed, in_microbatches
from nanorlhf.ppo import Experience
from nanorlhf.preflight import preflight

EOS, R = 2, 6
CFG = SimpleNamespace(temperature=0.7, microbatch_tokens=64)
KL, RATIO, VALUE = r"KL\(policy, SFT\) is", "the ratio is", r"V\(after EOS\) differs from the score by"


class Setup:
    """The four models and one batch of train_ppo.py's steps 3 and 4; a test plants its fault, then calls check()."""

    def __init__(self, make_policy, make_sequences, dtype=torch.float32):
        self.policy = make_policy().to(dtype)
        self.reference = copy.deepcopy(self.policy)
        self.reward_model = reward_model_from(self.policy, seed=0)
        self.reward_model.score_shift = 0.8
        self.critic = critic_from(self.reward_model)
        self.temperature = self.ref_temperature = CFG.temperature
        self.read_further = 0  # tokens that the reward model reads after EOS
        queries = make_sequences([9, 1, 17, 5, 30, 12])
        self.responses = torch.tensor(make_sequences([R] * 6, seed=1))
        for row, last in enumerate([2, 0, 4, R - 1, 3]):  # EOS in the middle, first, late, last; the sixth never stops
            self.responses[row, last] = EOS
        self.sequences = [q + r for q, r in zip(queries, self.responses.tolist(), strict=True)]
        self.lengths = (ppo.last_token(self.responses, EOS) + 1).tolist()

    def forward(self, function, sequences):
        return in_microbatches(function, sequences, CFG.microbatch_tokens, "cpu")[0]

    def measure(self):
        """(episode, ref_logprobs, scores), as train_ppo.py has them before the first update."""
        responses, sequences = self.responses, self.sequences
        logprobs, ref_logprobs = (
            self.forward(lambda packed, i, m=model, T=T: m.response_logprobs(packed, responses[i], T), sequences)
            for model, T in ((self.policy, self.temperature), (self.reference, self.ref_temperature))
        )
        ends = [len(s) - R + n + self.read_further for s, n in zip(sequences, self.lengths, strict=True)]
        finished = [s[:end] for s, end in zip(sequences, ends, strict=True)]
        scores = self.forward(lambda packed, i: [self.reward_model.last_scores(packed)], finished)
        values = self.forward(lambda packed, i: [self.critic.response_values(packed, R)], sequences)
        actions, states = ppo.action_mask(responses, EOS), ppo.value_mask(responses, EOS)
        values, nothing = torch.where(states, values, 0.0), torch.zeros(len(sequences), R)
        return (
            Experience(sequences, responses, actions, states, logprobs, values, nothing, nothing),
            ref_logprobs,
            scores,
        )

    def check(self):
        episode, ref_logprobs, scores = self.measure()
        return preflight(self.policy, episode, ref_logprobs, scores, CFG)


@pytest.fixture
def setup(make_policy, make_sequences):
    return Setup(make_policy, make_sequences)


def stopped_by(named: str):
    return pytest.raises(UserError, match=f"^pre-flight: {named}\\b")


def test_what_is_right_passes(setup):
    found = setup.check()
    assert found.keys() == {"preflight/kl", "preflight/ratio", "preflight/value_error"}
    assert found["preflight/kl"] == 0  # the same forward pass twice
    assert found["preflight/ratio"] == pytest.approx(1, abs=1e-5)
    assert found["preflight/value_error"] < 1e-4


def test_what_is_right_passes_in_bf16(make_policy, make_sequences):
    found = Setup(make_policy, make_sequences, torch.bfloat16).check()
    assert found["preflight/kl"] == 0 and found["preflight/value_error"] < 0.1
    assert found["preflight/ratio"] == pytest.approx(1, abs=2e-2)


def test_preflight_leaves_no_gradient(setup):
    setup.check()
    assert all(p.grad is None for model in (setup.policy, setup.critic) for p in model.parameters())


# --- KL = 0 ----------------------------------------------------------------------------------------------------------


def test_a_temperature_missing_in_the_reference_is_stopped(setup):
    setup.ref_temperature = 1.0
    with stopped_by(KL):
        setup.check()


def test_a_reference_with_other_weights_is_stopped(setup):
    with torch.no_grad():
        setup.reference.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    with stopped_by(KL):
        setup.check()


# --- ratio = 1 -------------------------------------------------------------------------------------------------------


def test_a_temperature_missing_in_both_logprobs_of_the_rollout_is_stopped(setup):
    setup.temperature = setup.ref_temperature = 1.0  # KL is 0, as both are wrong alike
    with stopped_by(RATIO):
        setup.check()


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_slice_shifted_in_the_rollout_is_stopped(setup, monkeypatch, shift):
    right = Packed.response_rows
    with monkeypatch.context() as patch:
        patch.setattr(Packed, "response_rows", lambda packed, R: (right(packed, R) + shift).clamp(min=0))
        episode, ref_logprobs, scores = setup.measure()
    with stopped_by(RATIO):
        preflight(setup.policy, episode, ref_logprobs, scores, CFG)


def test_attention_that_sees_the_sequence_before_is_stopped(setup, monkeypatch):
    def leaky(packed):
        N = packed.tokens.shape[0]
        return causal(Packed(packed.tokens, packed.positions, torch.tensor([0, N], dtype=torch.int32), (N,)))

    monkeypatch.setattr(nanorlhf.models, "causal", leaky)
    with stopped_by(RATIO):
        setup.check()


# --- V(after EOS) = score --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_slice_shifted_everywhere_is_stopped(setup, monkeypatch, shift):
    right = Packed.response_rows  # log-probs are then wrong alike in all places, and only the critic shows it
    monkeypatch.setattr(Packed, "response_rows", lambda packed, R: (right(packed, R) + shift).clamp(min=0))
    with stopped_by(VALUE):
        setup.check()


def test_a_different_critic_is_stopped(setup, make_policy):
    setup.critic = critic_from(reward_model_from(make_policy(), seed=1))  # the same trunk, another head
    with stopped_by(VALUE):
        setup.check()


def test_a_critic_without_the_reward_models_shift_is_stopped(setup):
    with torch.no_grad():
        setup.critic.score.bias.zero_()
    with stopped_by(VALUE):
        setup.check()


def test_a_reward_model_that_reads_past_eos_is_stopped(setup):
    setup.read_further = 1
    with stopped_by(VALUE):
        setup.check()


# --- nan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, named", [("logprobs", KL), ("ref_logprobs", KL), ("policy", RATIO), ("values", VALUE), ("scores", VALUE)]
)
def test_a_nan_is_stopped_wherever_it_comes_from(setup, where, named):
    episode, ref_logprobs, scores = setup.measure()
    if where == "policy":  # of its second pass only: a nan in the weights, but not in what was measured
        with torch.no_grad():
            setup.policy.model.norm.weight[0] = math.nan
    else:
        tensors = {"ref_logprobs": ref_logprobs, "scores": scores} | episode._asdict()
        # One number of row 0, which has its EOS at 2: a token's log-prob, and the state after EOS.
        tensors[where].view(len(scores), -1)[0, 3 if where == "values" else 0] = math.nan
    with stopped_by(f"{named} nan"):
        preflight(setup.policy, episode, ref_logprobs, scores, CFG)


def test_what_stands_after_eos_does_not_matter(setup):
    episode, ref_logprobs, scores = setup.measure()
    ref_logprobs[~episode.action_mask] = math.nan
    episode.logprobs[~episode.action_mask] = math.inf
    episode.values[~episode.value_mask] = math.nan
    found = preflight(setup.policy, episode, ref_logprobs, scores, CFG)
    assert found["preflight/ratio"] == pytest.approx(1, abs=1e-5)
