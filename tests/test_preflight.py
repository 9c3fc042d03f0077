"""PPO's pre-flight: what is right passes, in fp32 and in bf16, and each fault is stopped by the check for it."""

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
from nanorlhf.monitoring import preflight
from nanorlhf.packing import Packed, in_microbatches
from nanorlhf.pairs import PackedPairs
from nanorlhf.ppo import Experience

EOS, R = 2, 6
CFG = SimpleNamespace(temperature=0.7, microbatch_tokens=64)
KL, RATIO, KERNEL, VALUE = "KL is", "(ratio|approxkl) is", "kernel error is", r"V\(after EOS\) - score is"


class Setup:
    """The four models and one batch of train_ppo.py's steps 3 and 4; a test plants its fault, then calls check()."""

    def __init__(self, make_policy, make_sequences, dtype=torch.float32):
        self.policy = make_policy().to(dtype)
        self.reference = copy.deepcopy(self.policy)
        self.reward_model = reward_model_from(self.policy, seed=0)
        self.reward_model.score_shift = 0.8
        self.critic = critic_from(self.reward_model)
        self.frozen = preflight.fingerprint([self.reference, self.reward_model])
        self.reference_scores = torch.tensor([-0.5, 1.0, 0.25, -0.5])
        self.tokenizer = SimpleNamespace(eos_id=EOS, pad_id=0)
        self.sampled_logprobs = None  # the same as those of the forward pass
        self.table = []
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

    def check(self, measured=None):
        """As train_ppo.py does before the first update: the metrics, or UserError."""
        episode, ref_logprobs, scores = measured or self.measure()
        models = self.policy, self.reference, self.critic, self.reward_model
        sampled = episode.logprobs if self.sampled_logprobs is None else self.sampled_logprobs
        dtype = self.policy.head_weight.dtype
        free = preflight.first_responses(episode.responses, self.tokenizer)
        found = preflight.report(free, self.table.append, "before update 1")
        checks = preflight.any_update(models, self.frozen, episode, sampled, CFG)
        checks += preflight.first_update(episode, ref_logprobs, scores, self.reference_scores, dtype)
        return found | preflight.report(checks, self.table.append, "before update 1")


@pytest.fixture
def setup(make_policy, make_sequences):
    return Setup(make_policy, make_sequences)


def stopped_by(named: str):
    return pytest.raises(UserError, match=f"^pre-flight: {named}\\b")


def test_what_is_right_passes(setup):
    found = setup.check()
    assert len(found) == len(setup.table) == 11 and all(line.endswith("ok") for line in setup.table)
    assert found["preflight/kernel_error"] < 1e-5 and found["preflight/eos_rate"] == pytest.approx(5 / 6)
    assert found["preflight/kl"] == 0  # the same forward pass twice
    assert found["preflight/ratio"] == pytest.approx(1, abs=1e-5)
    assert found["preflight/v_after_eos_score"] < 1e-4


def test_what_is_right_passes_in_bf16(make_policy, make_sequences):
    found = Setup(make_policy, make_sequences, torch.bfloat16).check()
    assert found["preflight/kl"] == 0 and found["preflight/v_after_eos_score"] < 0.1
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
    setup.frozen = preflight.fingerprint([setup.reference, setup.reward_model])
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
        setup.check((episode, ref_logprobs, scores))


def test_attention_that_sees_the_sequence_before_is_stopped(setup, monkeypatch):
    def leaky(packed):
        N = packed.tokens.shape[0]
        return causal(Packed(packed.tokens, packed.positions, torch.tensor([0, N], dtype=torch.int32), (N,)))

    monkeypatch.setattr(nanorlhf.models, "causal", leaky)
    with stopped_by(RATIO):
        setup.check()


def test_a_sampler_with_other_weights_is_stopped(setup, make_policy):
    setup.policy, policy = make_policy(seed=1), setup.policy  # what a stale copy in a generation engine would be
    setup.sampled_logprobs = setup.measure()[0].logprobs
    setup.policy = policy
    with stopped_by("approxkl of the sampler is"):
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
    "where, named",
    [
        ("logprobs", "approxkl of the sampler is"),
        ("ref_logprobs", KL),
        ("policy", KERNEL),
        ("values", VALUE),
        ("scores", VALUE),
    ],
)
def test_a_nan_is_stopped_wherever_it_comes_from(setup, where, named):
    episode, ref_logprobs, scores = setup.measure()
    if where == "policy":  # of its second pass only: a nan in the weights, but not in what was measured
        with torch.no_grad():
            setup.policy.model.norm.weight[0] = math.nan
    else:
        tensors = episode._asdict() | {"ref_logprobs": ref_logprobs, "scores": scores}
        # One number of row 0, which has its EOS at 2: a token's log-prob, and the state after EOS.
        tensors[where].view(len(scores), -1)[0, 3 if where == "values" else 0] = math.nan
    with stopped_by(f"{named} nan"):
        setup.check((episode, ref_logprobs, scores))


def test_what_stands_after_eos_does_not_matter(setup):
    episode, ref_logprobs, scores = setup.measure()
    setup.sampled_logprobs = episode.logprobs.clone()
    ref_logprobs[~episode.action_mask] = math.nan
    episode.logprobs[~episode.action_mask] = math.inf
    episode.values[~episode.value_mask] = math.nan
    found = setup.check((episode, ref_logprobs, scores))
    assert found["preflight/ratio"] == pytest.approx(1, abs=1e-5)


# --- the other checks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one, other", [("reference", "policy"), ("critic", "reward_model")])
def test_two_models_that_are_one_are_stopped(setup, one, other):
    setattr(setup, one, getattr(setup, other))
    with stopped_by("shared tensors is"):
        setup.check()


@pytest.mark.parametrize("model", ["reference", "reward_model"])
def test_a_frozen_model_that_moved_is_stopped(setup, model):
    with torch.no_grad():
        next(getattr(setup, model).parameters())[0, 0] += 1e-3
    with stopped_by("frozen weights moved is"):
        setup.check()


def test_after_the_first_update_only_what_must_hold_then_is_checked(setup):
    with torch.no_grad():
        setup.policy.model.norm.weight.mul_(1.1)  # the policy has learned: KL and V are free now
        setup.critic.score.bias.add_(1)
    episode, _, _ = setup.measure()
    models = setup.policy, setup.reference, setup.critic, setup.reward_model
    found = preflight.report(preflight.any_update(models, setup.frozen, episode, episode.logprobs, CFG), print, "now")
    names = ["shared_tensors", "frozen_weights_moved", "kernel_error", "approxkl_of_the_sampler", "ratio", "approxkl"]
    assert list(found) == [f"preflight/{name}" for name in names]


def test_a_kernel_that_is_off_is_stopped(setup, monkeypatch):
    right = nanorlhf.models.linear_logprob
    wrong = lambda *args: tuple(x + 1e-3 for x in right(*args))  # noqa: E731
    monkeypatch.setattr(nanorlhf.models, "linear_logprob", wrong)  # in rollout and update alike: the ratio is 1
    with stopped_by(KERNEL):
        setup.check()


def test_references_whose_mean_score_is_not_0_are_stopped(setup):
    setup.reference_scores = setup.reference_scores + 5
    with stopped_by("reference score is"):
        setup.check()


def test_a_shift_measured_in_fp32_on_few_posts_is_no_fault_in_bf16():
    """As measured: 256 references, std 0.47, in bf16 0.06 further from 0 than the shift's own error on 64 posts."""
    scores = torch.linspace(-1, 1, 256)
    scores = scores / scores.std() * 0.47 + 0.156
    mask, zeros = torch.ones(8, R, dtype=torch.bool), torch.zeros(8, R)
    episode = Experience([], zeros.long(), mask, mask, zeros, zeros, zeros, zeros)

    def off(scores, dtype, shift_posts=64) -> float:
        found = preflight.first_update(episode, zeros, torch.randn(8), scores, dtype, shift_posts)
        return {check.name: check.value for check in found}["reference score"]

    assert off(scores, torch.bfloat16) < 1 < off(scores + 0.5, torch.bfloat16) / 4
    assert 2 < off(scores, torch.float32) < preflight.STANDARD_ERRORS < off(scores, torch.float32, 10**5)
    assert off(scores, torch.float32, None) == off(scores, torch.float32, 256)  # a folder that does not say it


def test_a_healthy_shift_of_few_posts_is_refused_as_seldom_as_four_standard_errors_say():
    """Scores of one distribution: 64 of them make the shift, 256 are the references. 0 in 2,000 where 0.13 are due;
    with the error of the 256 alone it would be 1 run in 13."""
    generator = torch.Generator().manual_seed(0)
    mask, zeros = torch.ones(8, R, dtype=torch.bool), torch.zeros(8, R)
    episode = Experience([], zeros.long(), mask, mask, zeros, zeros, zeros, zeros)
    refused = alone = 0
    for _ in range(2000):
        shift = torch.randn(64, generator=generator).mean()
        references = torch.randn(256, generator=generator) - shift
        checks = preflight.first_update(episode, zeros, torch.randn(8), references, torch.float32, 64)
        refused += not checks[-1].passes
        alone += (references.mean().abs() / references.std() * 16).item() > preflight.STANDARD_ERRORS
    assert refused == 0 and alone > 100


def test_a_policy_that_never_stops_is_stopped(setup):
    setup.responses[setup.responses == EOS] = 5
    with stopped_by("EOS rate is 0 .* was EOS a label"):
        setup.check()


def test_pad_that_is_eos_is_stopped(setup):
    setup.tokenizer.pad_id = EOS
    with stopped_by("PAD = EOS is 1"):
        setup.check()


def test_a_ratio_whose_mean_is_1_does_not_hide_a_policy_that_is_another():
    # Over samples of the old policy any other policy has a mean ratio of 1: its square sees the difference.
    totals = {"val/ratio": torch.tensor(1.0), "policy/approxkl_avg": torch.tensor(0.012)}
    for dtype in (torch.float32, torch.bfloat16):
        with stopped_by("approxkl in the loss is 0.012"):
            preflight.report(preflight.first_loss(totals, dtype), print, "in update 1")
    totals["policy/approxkl_avg"] = torch.tensor(1e-9)
    assert preflight.report(preflight.first_loss(totals, torch.float32), print, "in update 1")


def test_a_failed_check_is_marked_in_the_table_and_the_others_are_still_shown(setup):
    setup.ref_temperature = 1.0
    with pytest.raises(UserError, match="--no_preflight goes on all the same"):
        setup.check()
    assert [line.split()[-1] for line in setup.table] == ["ok"] * 8 + ["FAILED"] + ["ok"] * 2


def test_what_costs_nothing_is_asked_before_anything_is_computed(setup, monkeypatch):
    """A model that never stops is found in its responses: 15 minutes of scoring on an old CPU are not waited for."""
    measured = setup.measure()
    setup.responses[setup.responses == EOS] = 5
    monkeypatch.setattr(setup.policy.model, "forward", lambda *_: pytest.fail("a forward pass"))
    with stopped_by("EOS rate is 0"):
        setup.check(measured)


def test_before_the_first_update_the_cheap_checks_come_first_and_the_rest_says_how_far_it_is(setup, make_sequences):
    """By `before_update`, as the script calls it."""
    episode, ref_logprobs, scores = setup.measure()
    shown, said = [], SimpleNamespace(ref_logprobs=ref_logprobs)

    def progress(groups, what):
        shown.append((what, len(setup.table)))
        return groups

    cfg = SimpleNamespace(**vars(CFG), batch_size=len(scores))
    run = SimpleNamespace(cfg=cfg, say=setup.table.append, progress=progress, device="cpu", dtype=torch.float32)
    models = setup.policy, setup.reference, setup.critic, setup.reward_model
    posts = make_sequences([9] * 70), make_sequences([5] * 70, seed=1)
    setup.reward_model.score_shift += setup.reward_model.scores([q + r for q, r in zip(*posts, strict=True)]).mean()
    setup.critic.score.bias.data.copy_(-torch.as_tensor(setup.reward_model.score_shift))
    measured = setup.measure()
    said.member_scores = measured[2][:, None]
    found = preflight.before_update(
        run, 0, models, setup.frozen, measured[0], said, measured[0].logprobs, *posts, setup.tokenizer
    )
    assert list(found)[:2] == ["preflight/pad_eos", "preflight/eos_rate"] and len(found) == 11
    assert shown == [("summaries scored", 3)]  # after the two lines of the cheap checks, and one that says what comes


@pytest.mark.parametrize("batch, expected", [(4, 64), (64, 64), (128, 128), (512, 256)])
def test_as_many_references_are_scored_as_a_batch_has(batch, expected):
    assert preflight.how_many_references(batch) == expected


def test_rounding_as_it_was_measured_stops_no_run():
    """V(after EOS) and the score come from two passes: their difference has the rms that real weights show in bf16
    (preflight.py), at scores of any size; the largest of 128 differences is three to five times that."""
    generator, zeros = torch.Generator().manual_seed(0), torch.zeros(128, R)
    mask = torch.arange(R).repeat(128, 1) < 3
    for size in (0.4, 1.0, 5.0):
        for _ in range(50):
            scores = size * torch.randn(128, generator=generator)
            noise = max(1.0, size) * 0.047 * torch.randn(128, generator=generator)
            values = zeros.index_add(1, torch.tensor([3]), (scores + noise)[:, None])
            episode = Experience([], zeros.long(), mask, mask, zeros, values, zeros, zeros)
            checks = preflight.first_update(episode, zeros, scores, scores - scores.mean(), torch.bfloat16)
            found = preflight.report(checks, print, "before update 1")
            assert found["preflight/v_after_eos_score"] < checks[1].high / 2


def test_scores_near_a_million_may_differ_by_their_own_steps_in_fp32_and_by_no_more():
    """All alike but for one part in 10^6: an fp32 number of this size moves in steps of 1/16, and sums of them in more.
    The spread of the scores, 1, would allow 0.001."""
    generator, zeros = torch.Generator().manual_seed(0), torch.zeros(128, R)
    mask = torch.arange(R).repeat(128, 1) < 3
    scores = 1e6 + torch.randn(128, generator=generator)
    for noise, passes in ((0.5, True), (50.0, False)):
        off = noise * torch.randn(128, generator=generator)
        values = zeros.index_add(1, torch.tensor([3]), (scores + off)[:, None])
        episode = Experience([], zeros.long(), mask, mask, zeros, values, zeros, zeros)
        check = preflight.first_update(episode, zeros, scores, scores - scores.mean(), torch.float32)[1]
        assert (check.value <= check.high) == passes


def test_a_value_read_at_the_wrong_token_is_far_outside_the_bound_in_bf16(make_policy, make_sequences, monkeypatch):
    setup = Setup(make_policy, make_sequences, torch.bfloat16)
    right = Packed.response_rows
    monkeypatch.setattr(Packed, "response_rows", lambda packed, R: (right(packed, R) - 1).clamp(min=0))
    with pytest.raises(UserError, match=VALUE) as stopped:
        setup.check()
    off = float(str(stopped.value).split(" is ")[1].split()[0])
    assert off > 3 * preflight.SCORE[torch.bfloat16]


# --- SFT and the reward model ----------------------------------------------------------------------------------------


def sft_checks(make_policy, sequences, pad_id=0):
    checks = preflight.sft(make_policy(), sequences, SimpleNamespace(eos_id=EOS, pad_id=pad_id))
    return preflight.report(checks, print, "before step 1")


def test_sft_passes_on_sequences_that_end_in_eos(make_policy, make_sequences):
    found = sft_checks(make_policy, [s + [EOS] for s in make_sequences([4, 9, 30])])
    assert found["preflight/rows_with_one_eos_label"] == 1 and found["preflight/weight_of_no_label"] == 0


@pytest.mark.parametrize("tail", [[], [EOS, EOS]], ids=["no EOS", "two of them"])
def test_sft_stops_on_a_row_without_exactly_one_eos(make_policy, make_sequences, tail):
    first, second = make_sequences([4, 9])
    with stopped_by("rows with one EOS label is 0.5"):
        sft_checks(make_policy, [first + [EOS], second + tail])


def test_sft_stops_when_pad_is_eos(make_policy, make_sequences):
    with stopped_by("PAD = EOS is 1"):
        sft_checks(make_policy, [s + [EOS] for s in make_sequences([4])], pad_id=EOS)


def rm_checks(model, make_sequences, eos=EOS):
    queries, chosen, rejected = make_sequences([20, 3, 8]), make_sequences([4, 9, 5]), make_sequences([6, 2, 7], seed=1)
    pairs = [(q, c + [EOS], r + [eos]) for q, c, r in zip(queries, chosen, rejected, strict=True)]
    checks = preflight.reward_model(model, pairs, SimpleNamespace(eos_id=EOS, pad_id=0))
    return preflight.report(checks, print, "before step 1")


def test_a_new_reward_model_passes(make_policy, make_sequences):
    found = rm_checks(reward_model_from(make_policy(), seed=0), make_sequences)
    assert found["preflight/score_alone_in_a_batch"] < 1e-4 and found["preflight/identical_texts_loss_ln_2"] < 1e-6


def test_a_reward_model_whose_sequences_lost_their_eos_is_stopped(make_policy, make_sequences):
    with stopped_by("sequences that end in EOS is 0.5"):
        rm_checks(reward_model_from(make_policy(), seed=0), make_sequences, eos=5)


def test_a_score_that_depends_on_its_neighbours_is_stopped(make_policy, make_sequences, monkeypatch):
    right = PackedPairs.last_rows
    monkeypatch.setattr(PackedPairs, "last_rows", lambda packed: right(packed).roll(1))
    with stopped_by("score alone - in a batch is"):
        rm_checks(reward_model_from(make_policy(), seed=0), make_sequences)
