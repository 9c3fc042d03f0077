"""Pre-flight: what must hold before the first step, measured on the first real batch.

RLHF fails silently. A temperature missing in one of three places, a shifted index or a critic that is not the reward
model does not crash; it shows as a slow, odd run. These checks cost about one forward pass and stop such a run before
it starts. Each is a number with bounds and the likely cause when it is outside; a script prints them as a table.

    SFT    every label counts once, EOS is a label, the filling is none
    RM     a score does not depend on its neighbours, identical texts have loss ln 2
    PPO    before update 1: the policy is the SFT model and the critic is the reward model, in every number
           before update 2 and after a resume: only what must hold in any update
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanorlhf import parallel, sharding
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.ensemble import Ensemble, member_scores
from nanorlhf.errors import UserError
from nanorlhf.losses import bradley_terry_loss, next_token_labels, sequence_mean_weights
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.packing import in_microbatches, pack, split_by_tokens
from nanorlhf.pairs import pack_pairs
from nanorlhf.ppo import Experience
from nanorlhf.run.run import Run

# By dtype. "Measured" is what rounding does to SmolLM2-135M's real weights: every operation rounded to bf16, in two
# orders of summation, on real posts and their summaries (experiments/rounding.py, 24 posts; the score's head is drawn).
RATIO = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the mean ratio; measured 2e-3, of a run in bf16
# Nats. Measured 2.5e-3: log-probs are rms 0.071 and at most 0.40 apart. T 1 for 0.7 gives 0.012 (experiments.bugs).
APPROXKL = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
# Rms between two ways to compute a score or value of about 1. Measured 0.047 and 0.028 (0.069 the most of six heads);
# the largest of them, 0.13, grows with their number. Read one token early a score is off by 2.3.
SCORE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
# What bf16 moves all scores alike, of a shift measured in fp32. Measured 0.042, the most of six heads, and 0.06 of a
# reward model that was trained.
SHIFT = {torch.float32: 0.0, torch.bfloat16: 0.1}
OF_SCORE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest score: a number near 1e6 moves in steps of 0.1
# Nats, of a log-prob from the same hidden state. Measured 2e-5 in chunks on a CPU; 6e-5 for tensor cores, simulated.
KERNEL = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
MIN_EOS_RATE = 0.1  # an SFT model that has learned to stop is above 0.9
LEAST_REFERENCES, MOST_REFERENCES = 64, 256  # posts whose summaries must have a mean score of 0
STANDARD_ERRORS = 4  # 1 run in 16,000 is stopped by chance
ROWS = 4  # sequences on which the kernels are checked


FourModels = tuple[Policy, Policy, ScalarModel, ScalarModel | Ensemble]  # policy, reference, critic, reward model


class Check(NamedTuple):
    """A number that must lie in [low, high], and why it probably does not when it does not. nan never does."""

    name: str
    value: float
    low: float
    high: float
    cause: str

    @property
    def metric(self) -> str:
        """The name in metrics.jsonl: "V(after EOS) - score" -> v_after_eos_score."""
        return "_".join(re.findall("[a-z0-9]+", self.name.lower()))

    @property
    def passes(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def expected(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.low) or math.isinf(self.high):
            return f"at most {self.high:g}" if math.isinf(self.low) else f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


def at_most(name: str, value: float, high: float, cause: str) -> Check:
    return Check(name, value, -math.inf, high, cause)


def equals(name: str, value: float, expected: float, cause: str) -> Check:
    return Check(name, value, expected, expected, cause)


def rms(differences: Tensor) -> float:
    """Root mean square. Of many roundings the largest grows with their number, and this does not."""
    return differences.float().square().mean().sqrt().item()


def rounding(scores: Tensor, dtype: torch.dtype) -> float:
    """How far two computations of such scores may lie apart for their size alone, however little they differ."""
    return OF_SCORE[dtype] * scores.abs().max().item()


def report(checks: Iterable[Check], say: Callable[[str], None], when: str) -> dict[str, float]:
    """Print the checks as a table -> {"preflight/<metric>": value}. Raises UserError for the first that fails."""
    checks = list(checks)
    width = max(len(check.name) for check in checks)
    for number, check in enumerate(checks):
        head = f"checks  {when}" if number == 0 else ""
        verdict = "ok" if check.passes else "FAILED"
        say(f"{head:<24}  {check.name:<{width}}  {check.value:>10.4g}  {check.expected:<16}  {verdict}")
    for check in checks:
        if not check.passes:
            raise UserError(
                f"pre-flight: {check.name} is {check.value:.4g} {when}, expected {check.expected}: {check.cause}; "
                "--no_preflight goes on all the same"
            )
    return {f"preflight/{check.metric}": check.value for check in checks}


# --- what both models of a kind have ---------------------------------------------------------------------------------


def shared_tensors(models: Iterable[nn.Module]) -> int:
    """How many parameters lie in memory that another one also uses."""
    parts = [sharding.local(parameter) for model in models for parameter in model.parameters()]
    pointers = [part.data_ptr() for part in parts if part.numel()]  # a process may have no row of a small one
    return len(pointers) - len(set(pointers))


@torch.no_grad()
def fingerprint(models: Sequence[nn.Module]) -> list[float]:
    """Two sums a parameter, in float64: when they are the same, so are the models, but for a rare accident."""
    parts = [sharding.local(parameter).double() for model in models for parameter in model.parameters()]
    sums = torch.stack([x for part in parts for x in (part.sum(), part.square().sum())])
    return (parallel.total(sums) if sharding.in_parts(models[0]) else sums).tolist()


@torch.no_grad()
def logprob_error(policy: Policy, sequences: list[list[int]], responses: Tensor, temperature: float) -> float:
    """Largest difference, in nats, of `response_logprobs` from a float64 log-softmax of the same hidden states."""
    packed = pack(sequences[:ROWS], responses.device)
    responses = responses[:ROWS]
    logprobs, _ = policy.response_logprobs(packed, responses, temperature)
    hidden = policy.hidden(packed)[packed.response_rows(responses.shape[1])].double()  # (b, R, D)
    logits = torch.cat([hidden @ rows.double().T for rows in policy.head_weight.split(8192)], dim=-1) / temperature
    exact = logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    return (logprobs - exact).abs().max().item()


# --- PPO -------------------------------------------------------------------------------------------------------------


def before_update(
    run: Run, update: int, models: FourModels, frozen: list[float],
    episode: Experience, said, sampled_logprobs: Tensor, queries: Sequence[list[int]], references: Sequence[list[int]],
    tokenizer: Tokenizer,
) -> dict[str, float]:  # fmt: skip
    """All checks that are due before the learning of this update -> their metrics; raises UserError for one that fails.

    args: said: train_ppo.Scored; queries, references: of the training posts; the others as in `any_update`
    """
    cfg, when, checked = run.cfg, f"before update {update + 1}", {}
    if update == 0:  # first what costs nothing
        checked = report(first_responses(episode.responses, tokenizer), run.say, when)
        run.say("        the others read the batch once more, and as many of the authors' summaries")
    checks = any_update(models, frozen, episode, sampled_logprobs, cfg)
    if update == 0:
        n = how_many_references(cfg.batch_size)
        known = [query + reference for query, reference in zip(queries[:n], references[:n], strict=True)]
        groups = run.progress(split_by_tokens([len(x) for x in known], cfg.microbatch_tokens), what="summaries scored")
        with torch.no_grad():
            parts = [member_scores(models[3], pack([known[i] for i in group], run.device)) for group in groups]
        first, *others = torch.cat(parts).unbind(1)  # (n,) each; the critic started as the first of the reward models
        posts = [member.shift_posts for member in getattr(models[3], "members", [models[3]])]
        checks += first_update(episode, said.ref_logprobs, said.member_scores[:, 0], first, run.dtype, posts[0])
        for k, column in enumerate(others, start=2):
            checks.append(reference_score(column, run.dtype, f" {k}", posts[k - 1]))
    return checked | report(checks, run.say, when)


def in_loss(run: Run, update: int, totals: dict[str, Tensor], checked: dict[str, float]) -> None:
    """Adds to `checked` what the first loss of the policy in this update sees, before its optimizer step."""
    if "val/ratio" in totals and "grad_norm" not in totals:
        checked |= report(first_loss(totals, run.dtype), run.say, f"in update {update + 1}")


def any_update(
    models: FourModels,
    frozen: list[float],
    episode: Experience,
    sampled_logprobs: Tensor,
    cfg,
) -> list[Check]:
    """What holds before every update, the first and those after a resume included.

    args: models: policy, reference, critic, reward model; frozen: `fingerprint` of reference and reward model when they
    were loaded; sampled_logprobs (B, R): what the sampler itself says of its tokens; cfg: temperature and
    microbatch_tokens
    """
    policy, reference, _, reward_model = models
    sequences, responses, mask = episode.sequences, episode.responses, episode.action_mask
    now = fingerprint([reference, reward_model])
    # As a tensor, so that a nan is not lost in a maximum; in float64, so that a small step is not lost in rounding.
    moved = (torch.tensor(now, dtype=torch.float64) - torch.tensor(frozen, dtype=torch.float64)).abs().max().item()

    def second_pass(packed, rows):
        return policy.response_logprobs(packed, responses[rows], cfg.temperature)

    smaller = max(1, cfg.microbatch_tokens // 2)
    new_logprobs, _ = in_microbatches(second_pass, sequences, smaller, responses.device)  # (B, R)
    log_ratio = torch.where(mask, new_logprobs - episode.logprobs, 0.0)
    ratio = torch.where(mask, log_ratio.exp(), 0.0).sum() / mask.sum()
    sampled = torch.where(mask, sampled_logprobs - episode.logprobs, 0.0)
    dtype = policy.head_weight.dtype
    error = logprob_error(policy, sequences, responses, cfg.temperature)
    return [
        equals("shared tensors", shared_tensors(models), 0, "two of the four models are one and train together"),
        equals("frozen weights moved", moved, 0, "a gradient or a copy reaches the reference or the reward model"),
        at_most("kernel error", error, KERNEL[dtype], "the log-prob kernel is wrong here: set NANORLHF_KERNELS=torch"),
        at_most("approxkl of the sampler", (0.5 * sampled**2).sum().item() / mask.sum().item(), APPROXKL[dtype],
                "tokens were sampled by other weights, at another temperature or through a broken cache, or their "
                "log-probs are read at another token"),
        *_ratio("", ratio.item(), (0.5 * log_ratio**2).sum().item() / mask.sum().item(), dtype,
                "log-probs depend on how the batch is cut, or the rollout's are at another temperature"),
    ]  # fmt: skip


def _ratio(where: str, ratio: float, approxkl: float, dtype: torch.dtype, cause: str) -> list[Check]:
    # The mean alone is blind: over samples of the old policy the ratio to *any* new policy has mean 1.
    return [
        Check(f"ratio{where}", ratio, 1 - RATIO[dtype], 1 + RATIO[dtype], cause),
        at_most(f"approxkl{where}", approxkl, APPROXKL[dtype], cause),
    ]


def first_responses(responses: Tensor, tokenizer: Tokenizer) -> list[Check]:
    """What the first responses, (B, R), say of the SFT model. It costs nothing, so it is asked first."""
    eos_rate = (responses == tokenizer.eos_id).any(1).float().mean().item()
    return [
        equals("PAD = EOS", tokenizer.pad_id == tokenizer.eos_id, 0, "masks that drop PAD drop EOS too"),
        Check("EOS rate", eos_rate, MIN_EOS_RATE, math.inf,
              "the SFT model has not learned to stop: was EOS a label in its training, and is response_length enough?"),
    ]  # fmt: skip


def first_update(
    episode: Experience, ref_logprobs: Tensor, scores: Tensor, reference_scores: Tensor, dtype: torch.dtype,
    shift_posts: int | None = None,
) -> list[Check]:  # fmt: skip
    """What holds only while the policy is still the SFT model and the critic still the reward model.

    args: ref_logprobs (B, R); scores (B,) before the missing-EOS rule; reference_scores (n,), of authors' summaries;
    shift_posts: of how many such scores the reward model's shift is the mean, if that is known
    """
    mask, values = episode.action_mask, episode.values
    kl = torch.where(mask, episode.logprobs - ref_logprobs, 0.0).sum(1).abs().max().item()
    after_eos = mask.sum(1).clamp(max=mask.shape[1] - 1)  # (B,) L+1, the index of the state after EOS
    has_slot = ~mask[:, -1]  # a response that fills all R slots has no such state
    allowed = max(SCORE[dtype] * max(1.0, scores.std(unbiased=False).item()), rounding(scores, dtype))
    difference = torch.where(has_slot, values.gather(1, after_eos[:, None])[:, 0] - scores, 0.0)  # (B,)
    return [
        at_most("KL", kl, 1e-3, "policy and reference differ in weights, in temperature or in code"),
        at_most("V(after EOS) - score", rms(difference[has_slot]) if has_slot.any() else 0.0, allowed,
                "the critic did not start as the reward model, one of them reads the wrong token, or EOS is masked"),
        reference_score(reference_scores, dtype, shift_posts=shift_posts),
    ]  # fmt: skip


def reference_score(
    reference_scores: Tensor, dtype: torch.dtype, which: str = "", shift_posts: int | None = None
) -> Check:
    """The authors' summaries, (n,), have mean score 0; which: of several reward models, " 2"; shift_posts: as above."""
    # Standard errors from 0. The shift that should have made it 0 was itself a mean, and has an error of its own; where
    # a folder does not say of how many, of no more than these. And it was perhaps measured in fp32: see SHIFT.
    n = len(reference_scores)
    error = reference_scores.std() * math.sqrt(1 / n + 1 / (shift_posts or n))
    off = ((reference_scores.mean().abs() - SHIFT[dtype]).clamp(min=0) / error.clamp(min=1e-12)).item()
    return at_most(
        f"reference score{which}", off, STANDARD_ERRORS,  # in standard errors
        f"the authors' summaries should have mean score 0: the score_shift of reward model{which} was lost, has the "
        "wrong sign, or was measured on other posts or another format",
    )  # fmt: skip


def how_many_references(batch_size: int) -> int:
    """Posts whose summaries are scored: as many as a batch has, so that it costs a quarter of scoring one, and in any
    case enough to know a mean by."""
    return min(MOST_REFERENCES, max(LEAST_REFERENCES, batch_size))


def first_loss(totals: dict[str, Tensor], dtype: torch.dtype) -> list[Check]:
    """What the loss itself sees before the first optimizer step of an update: its new log-probs are the rollout's."""
    cause = "the update computes log-probs otherwise than the rollout: temperature, slice or mask"
    found = (totals[name].item() for name in ("val/ratio", "policy/approxkl_avg"))
    return _ratio(" in the loss", *found, dtype, cause)


# --- SFT and reward model --------------------------------------------------------------------------------------------


@torch.no_grad()
def sft(policy: Policy, sequences: list[list[int]], tokenizer: Tokenizer) -> list[Check]:
    """Before the first step of SFT. args: sequences: queries joined with their responses."""
    packed = pack(sequences, policy.head_weight.device)
    labels, counts = next_token_labels(packed)
    weights = sequence_mean_weights(packed, counts, sequences=len(sequences))
    is_eos = (labels == tokenizer.eos_id) & counts
    once = [part.sum().item() == 1 for part in packed.unpack(is_eos)]
    outside = weights[sum(packed.lengths) :].sum() + weights[packed.last_rows()].sum()
    return [
        equals("PAD = EOS", tokenizer.pad_id == tokenizer.eos_id, 0, "the loss would skip EOS: it never stops"),
        equals("rows with one EOS label", sum(once) / len(once), 1, "responses without EOS never teach it to stop"),
        equals("weight of no label", outside.item(), 0, "the loss counts filling or runs into the next sequence"),
        Check("sum of weights", weights.sum().item(), 1 - 1e-4, 1 + 1e-4, "the loss is not a mean over sequences"),
    ]


@torch.no_grad()
def reward_model(
    model: ScalarModel, pairs: list[tuple[list[int], list[int], list[int]]], tokenizer: Tokenizer
) -> list[Check]:
    """Before the first step of the reward model. args: pairs: (query, chosen, rejected)"""
    dtype, device = sharding.dtype_of(model), model.score.weight.device
    few = pairs[:ROWS]
    together = model.last_scores(pack_pairs(*zip(*few, strict=True), device))
    sequences = [q + chosen for q, chosen, _ in few] + [q + rejected for q, _, rejected in few]
    alone = torch.cat([model.scores([sequence]) for sequence in sequences])
    twice = model.scores([sequences[0], sequences[0]])
    loss = bradley_terry_loss(twice[:1], twice[1:]).item()
    ends = [summary[-1] == tokenizer.eos_id for _, *summaries in pairs for summary in summaries]
    return [
        equals("sequences that end in EOS", sum(ends) / len(ends), 1, "the score is read at EOS, which was cut off"),
        at_most("score alone - in a batch", rms(together - alone), max(SCORE[dtype], rounding(alone, dtype)),
                "a score depends on its neighbours: attention, positions or the index of the last token, or the two "
                "summaries see each other"),
        at_most("identical texts: loss - ln 2", abs(loss - math.log(2)), SCORE[dtype],
                "the two summaries of a pair are not read alike"),
    ]  # fmt: skip
