"""RLOO and GRPO: PPO without a critic. Several responses to each post, and each is judged by the others.

    python -m experiments.train_rloo --preset tiny                                       RLOO, the embedded tiny world
    python -m experiments.train_rloo --preset tiny --algorithm grpo --kl loss            GRPO as published

Reads the SFT model, reward models and TL;DR posts; writes runs/rloo/final, a policy. The steps are train_ppo.py's, and
so are the names of flags and metrics:

    1. read posts
    2. load policy, reference and reward model: two large models fewer than PPO trains and keeps
    then for each update:
    3. rollout: K responses of R tokens to each of B / K posts
    4. score: log-probs under policy and reference, one score a response
    5. advantages, one a response: its reward minus the mean of the K - 1 others (rloo), or minus the mean of all K and
       over their standard deviation (grpo)
    6. learn: PPO's clipped loss, every token with its response's advantage
    7. log

Where the KL goes (--kl): `reward` subtracts kl_coef times the KL of the whole response from its score, as PPO does; so
the baseline sees it and the gradient is that of the objective. `loss` adds kl_coef times k3 to the loss, as GRPO was
published; the advantage is then of the score alone, and the gradient that of KL(SFT || policy) (docs/methods.md).
Ahmadian et al. 2024; Shao et al. 2024. Left out: PPO's value clipping and GAE (no critic), whitening, exact KL.
"""

import math
import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

import kernels
from experiments.methods import ADVANTAGES, group_loss, token_weights
from nanorlhf import ppo
from nanorlhf.data.encoding import encode_posts, length_report
from nanorlhf.data.tldr import Post, batch_indices, load_posts
from nanorlhf.data.tokenizer import Tokenizer, check_same, load_tokenizer
from nanorlhf.ensemble import RULES, Ensemble, combine, member_scores
from nanorlhf.errors import check
from nanorlhf.evaluation.hacks import Alarms
from nanorlhf.models import Policy, parameter_count
from nanorlhf.monitoring import monitor, preflight
from nanorlhf.optim import SCHEDULES, AdamW
from nanorlhf.packing import in_microbatches, pack, split_by_tokens
from nanorlhf.rollout import Summary, generate, read_responses
from nanorlhf.run.card import write_card
from nanorlhf.run.config import cli
from nanorlhf.run.device import now
from nanorlhf.run.inputs import find_data, find_model, find_models
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.storage.checkpoint import check_folder, load_policy, load_scalar, save_policy


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "rloo"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    resume: bool | Literal["auto"] = False  # continue this run from its last checkpoint; auto: begin if there is none
    seed: int = 1  # order of the data, sampling, order of minibatches
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU; masters and losses are float32
    # -- inputs
    sft_model: str | None = None  # folder or hub id of the SFT model: policy and reference
    reward_model: tuple[str, ...] = ()  # folders or hub ids of reward models, one or several
    ensemble: str = "mean"  # of several reward models' scores: mean, min or mean_minus_std
    data: str | None = None  # folder with tldr/train.jsonl in OpenAI's format
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    # -- algorithm
    algorithm: str = "rloo"  # rloo: leave-one-out baseline; grpo: normalised within the group, mean over each response
    samples_per_query: int = 4  # K, responses to a post
    kl: str = "reward"  # reward or loss: where the KL from the SFT model is penalised
    kl_coef: float = 0.05  # beta, nats to reward
    cliprange: float = 0.2  # epsilon of the policy ratio
    # -- rollout (N+ detail 23)
    response_length: int = 53  # R, tokens sampled for every query, EOS or not
    temperature: float = 0.7  # of sampling, and of every log-prob, KL and ratio
    missing_eos_score: float = -1.0  # the score of a response that does not stop (N+ detail 23.3)
    # -- episodes and optimisation
    batch_size: int = 128  # episodes an update, a multiple of samples_per_query
    total_episodes: int = 116_722  # responses in all; the posts are reshuffled when used up
    max_updates: int | None = None  # updates, if fewer; the schedule is that of the shorter run
    num_ppo_epochs: int = 1  # passes over a batch
    num_minibatches: int = 4  # optimizer steps an epoch; divides batch_size
    microbatch_tokens: int = 16384  # tokens a forward and backward pass: bounds memory, changes no gradient
    lr: float = 1.5e-6  # peak learning rate
    lr_schedule: str = "linear"  # linear, cosine (both to 0), constant, or wsd: constant, then to 0; once an update
    max_grad_norm: float | None = None  # clip the gradient's norm
    # -- logging and saving
    sample_every: int = 50  # updates between tables of samples; 0 for none
    save_every: int = 250  # updates between checkpoints that --resume can use; 0 for none
    keep: int = 1  # newest checkpoints that stay, beside the one being written: 12 bytes a trained parameter each
    on_nan: str = "stop"  # stop at a loss, score or gradient that is not finite, or skip: leave the step out and count
    preflight: bool = True  # check ratio = 1, KL = 0 and more before the first updates


PRESETS = {
    "llama-1b": {},
    "paper": dict(batch_size=512, lr=3e-6, total_episodes=1_000_000),
    "smollm2": dict(lr=1e-5, max_grad_norm=1.0, max_query_length=544, response_length=56, microbatch_tokens=8192,
                    sample_every=10, save_every=50),
    "tiny": dict(lr=4e-4, kl_coef=0.15, max_grad_norm=1.0, total_episodes=2304, max_query_length=104,
                 response_length=32, microbatch_tokens=4096, sample_every=8, save_every=8),
}  # fmt: skip


class Groups(NamedTuple):
    """B episodes as the rollout and the scores leave them, the K of a query one after the other."""

    sequences: list[list[int]]  # B queries with their responses, token ids
    responses: torch.Tensor  # (B, R) int64, as sampled
    action_mask: torch.Tensor  # (B, R) bool
    logprobs: torch.Tensor  # (B, R) fp32, of the policy that sampled
    ref_logprobs: torch.Tensor  # (B, R) fp32
    advantages: torch.Tensor  # (B,) fp32
    # Where they come from: logged, not learned from.
    scores: torch.Tensor  # (B,) fp32, after the missing-EOS rule
    kl: torch.Tensor  # (B, R) fp32, k1, 0 outside action_mask
    entropy: torch.Tensor  # (B, R) fp32


def score(
    policy: Policy, reference: Policy, reward_model: Ensemble, sequences: list[list[int]], finished: list[list[int]],
    responses: torch.Tensor, cfg: Config,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """-> logprobs, ref_logprobs, entropy of the policy, (B, R) each; what each reward model says, (B, models).

    args: sequences: queries with their R tokens; finished: the same up to EOS; responses (B, R) int64
    """
    forward = partial(in_microbatches, max_tokens=cfg.microbatch_tokens, device=responses.device)
    logprobs, entropy = forward(lambda p, i: policy.response_logprobs(p, responses[i], cfg.temperature), sequences)
    ref_logprobs, _ = forward(lambda p, i: reference.response_logprobs(p, responses[i], cfg.temperature), sequences)
    (by_model,) = forward(lambda p, i: [member_scores(reward_model, p)], finished)
    return logprobs, ref_logprobs, entropy, by_model


def learn(
    policy: Policy, groups: Groups, weights: torch.Tensor, rows: np.ndarray, cfg: Config
) -> dict[str, torch.Tensor]:
    """Forward and backward pass over the microbatch `rows`; weights (B, R): those of its minibatch's tokens, summing to
    1, so that the losses and metrics of microbatches add up."""
    device = groups.responses.device
    packed, rows = pack([groups.sequences[i] for i in rows], device), torch.from_numpy(rows).to(device)
    responses, mask, old_logprobs, ref_logprobs, advantages = (tensor[rows] for tensor in groups[1:6])  # (b, R), (b,)
    new_logprobs, entropy = policy.response_logprobs(packed, responses, cfg.temperature)
    loss, policy_part, kl = group_loss(
        new_logprobs, old_logprobs, ref_logprobs, advantages, weights[rows], mask, cfg.cliprange,
        kl_coef=cfg.kl_coef if cfg.kl == "loss" else 0.0,
    )  # fmt: skip
    loss.backward()
    actions = (weights > 0).sum()  # of the minibatch
    _, stats = ppo.policy_loss(new_logprobs, old_logprobs, advantages[:, None], mask, cfg.cliprange, actions)
    return {
        "loss/policy_avg": policy_part.detach(),
        "loss/kl_avg": kl.detach(),
        "policy/approxkl_avg": stats["approxkl"],
        "policy/clipfrac_avg": stats["clipfrac"],
        "policy/entropy_avg": torch.where(mask, entropy, 0.0).sum().detach() / actions,
        "val/ratio": stats["ratio"],
        "val/ratio_squared": stats["ratio_squared"],
    }


def before_update(
    update: int, models: tuple[Policy, Policy, Ensemble], frozen: list[float], groups: Groups,
    sampled_logprobs: torch.Tensor, tokenizer: Tokenizer, cfg: Config,
) -> list[preflight.Check]:  # fmt: skip
    """PPO's pre-flight without what is about a critic; the level of the scores does not matter, baselines remove it."""
    policy, reference, reward_model = models
    checks = preflight.any_update((policy, reference, nn.Module(), reward_model), frozen, groups, sampled_logprobs, cfg)
    if update == 0:
        largest, cause = groups.kl.sum(1).abs().max().item(), "policy and reference differ in weights or in code"
        checks += preflight.first_responses(groups.responses, tokenizer)
        checks.append(preflight.at_most("KL", largest, 1e-3, cause))
    return checks


def measure(
    groups: Groups, by_model: torch.Tensor, totals: dict[str, torch.Tensor], posts: list[Post],
    summaries: list[Summary], cfg: Config,
) -> dict[str, float]:  # fmt: skip
    """The metrics of an update, by train_ppo.py's names. by_model (B, models); totals: sums over optimizer steps."""
    g = groups
    within = g.scores.view(-1, cfg.samples_per_query).std(1).mean().item()  # 0: nothing to learn from
    return (
        monitor.objective(g.scores, g.logprobs, g.kl, g.action_mask, cfg.kl_coef)
        | {"objective/scores_std_within": within}
        | monitor.ensemble(by_model)
        | monitor.learning(totals, cfg.num_ppo_epochs * cfg.num_minibatches, g.action_mask)
        | monitor.texts(summaries, posts, g.scores, g.entropy, g.action_mask)
    )


def sample_rows(posts: list[Post], summaries: list[Summary], groups: Groups) -> list[dict]:
    rows = zip(posts, summaries, groups.scores.tolist(), groups.kl.sum(1).tolist(), strict=True)
    return [{"title": p.title, "post": p.post, "response": s.text, "score": x, "kl": k} for p, s, x, k in rows]


def updates(cfg: Config) -> int:
    """How many updates there will be, from flags that fit together."""
    choices = {"algorithm": ADVANTAGES, "kl": ("reward", "loss"), "ensemble": RULES, "lr_schedule": SCHEDULES}
    for name, words in choices.items():
        check(getattr(cfg, name) in words, name, getattr(cfg, name), f"one of {', '.join(words)}")
    K, B = cfg.samples_per_query, cfg.batch_size
    check(cfg.temperature > 0, "temperature", cfg.temperature, "greater than 0", "choose 0.7")
    check(K >= 2, "samples_per_query", K, "at least 2", "a response is compared with the others of its post")
    check(B % K == 0, "batch_size", B, f"a multiple of samples_per_query {K}")
    check(B % cfg.num_minibatches == 0, "batch_size", B, f"a multiple of num_minibatches {cfg.num_minibatches}")
    total_updates = min(cfg.total_episodes // B, cfg.max_updates or math.inf)
    check(total_updates > 0, "batch_size", B, f"at most total_episodes {cfg.total_episodes}")
    return total_updates


def main(cfg: Config) -> None:
    total_updates = updates(cfg)

    # 1. posts
    data, data_from = find_data(cfg.data, cfg.preset)
    sft_folder, sft_from = find_model("sft", cfg.sft_model, "sft_model", cfg.preset)
    rm_folders, rm_from = find_models("rm", cfg.reward_model, "reward_model", cfg.preset)
    cfg.data, cfg.sft_model, cfg.reward_model = str(data), str(sft_folder), rm_folders  # what --resume goes on with
    tokenizer = load_tokenizer(sft_folder)
    notes = check_folder(sft_folder, tokenizer)
    for folder in rm_folders:
        check_same(tokenizer, load_tokenizer(folder), "the reward model", folder=folder)
        notes += check_folder(folder, tokenizer, scalar=True)
    posts = load_posts(data, "train")
    eos_id, B, K, R, T = tokenizer.eos_id, cfg.batch_size, cfg.samples_per_query, cfg.response_length, cfg.temperature

    show = ["objective/scores", "objective/kl", "objective/gold", "val/eos_rate", "policy/clipfrac_avg"]
    with Run("rloo", cfg, total_steps=total_updates, unit="update", show=show, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {len(posts):,} posts")
        run.say_all(notes)
        queries, references = encode_posts(posts, tokenizer, cfg.max_query_length, run.progress)
        run.say(f"tokens  {length_report(queries, [references], R)}")

        # 2. models
        policy = load_policy(sft_folder, run.device, run.dtype, tokenizer)
        reference = load_policy(sft_folder, run.device, run.dtype, tokenizer).requires_grad_(False)
        reward_model = Ensemble([load_scalar(folder, run.device, run.dtype, tokenizer) for folder in rm_folders])
        reward_model.requires_grad_(False)
        frozen = preflight.fingerprint([reference, reward_model])
        optimizer = AdamW([policy], lr=cfg.lr)
        run.say(f"models  policy and reference {sft_folder} ({sft_from}): 2 x {parameter_count(policy):,} parameters")
        run.say(f"        reward model {', '.join(rm_folders)} ({rm_from})")
        steps = cfg.num_ppo_epochs * cfg.num_minibatches
        run.say(f"plan    {total_updates} updates of {B} episodes, {K} of each post, and {steps} optimizer steps each")
        start = run.resume(optimizer)
        alarms = Alarms(began=read_metrics(run.folder)[0] if start else {})

        for update in range(start, total_updates):
            lr, began = SCHEDULES[cfg.lr_schedule](update, total_updates, cfg.lr), now(run.device)

            # 3. rollout: the K episodes of a post have their own noise
            batch = batch_indices(len(queries), B // K, cfg.seed, update).repeat(K)  # (B,)
            batch_posts, batch_queries = [posts[i] for i in batch], [queries[i] for i in batch]
            run.at(update + 1, [post.id for post in batch_posts])
            episodes = range(update * B, (update + 1) * B)
            responses, sampled_logprobs = generate(policy, batch_queries, R, T, cfg.seed, episodes)  # (B, R) each
            summaries = read_responses(tokenizer, responses)
            rolled_out = now(run.device)

            # 4. score
            sequences = [query + response for query, response in zip(batch_queries, responses.tolist(), strict=True)]
            finished = [s[: len(s) - R + summary.tokens] for s, summary in zip(sequences, summaries, strict=True)]
            models = policy, reference, reward_model
            logprobs, ref_logprobs, entropy, by_model = score(*models, sequences, finished, responses, cfg)
            raw_scores = combine(by_model, cfg.ensemble)  # (B,)
            run.check_finite(scores=raw_scores, logprobs=logprobs, ref_logprobs=ref_logprobs)

            # 5. advantages
            action_mask = ppo.action_mask(responses, eos_id)  # (B, R)
            scores = ppo.apply_missing_eos(raw_scores, responses, eos_id, cfg.missing_eos_score)  # (B,)
            kl = torch.where(action_mask, logprobs - ref_logprobs, 0.0)  # (B, R), k1
            rewards = scores - cfg.kl_coef * kl.sum(1) if cfg.kl == "reward" else scores  # (B,)
            advantages = ADVANTAGES[cfg.algorithm](rewards, K)  # (B,)
            groups = Groups(sequences, responses, action_mask, logprobs, ref_logprobs, advantages, scores, kl, entropy)
            checked = {}
            if cfg.preflight and (update < 2 or update == start):
                checks = before_update(update, models, frozen, groups, sampled_logprobs, tokenizer, cfg)
                checked = preflight.report(checks, run.say, f"before update {update + 1}")
            scored = now(run.device)

            # 6. learn: an optimizer step a minibatch
            totals = defaultdict(float)  # sums over the steps
            for epoch in range(cfg.num_ppo_epochs):
                order = np.random.default_rng([cfg.seed, update, epoch]).permutation(B)
                for minibatch in np.split(order, cfg.num_minibatches):
                    weights = torch.zeros_like(logprobs)  # (B, R), of the minibatch's tokens
                    weights[minibatch] = token_weights(action_mask[minibatch], cfg.algorithm)
                    for group in split_by_tokens([len(sequences[i]) for i in minibatch], cfg.microbatch_tokens):
                        for name, value in learn(policy, groups, weights, minibatch[group], cfg).items():
                            totals[name] += value
                    if checked:
                        preflight.in_loss(run, update, totals, checked)
                    totals["grad_norm"] += optimizer.step(lr, cfg.max_grad_norm, cfg.on_nan)

            # 7. log, and save when it is time
            seconds = rolled_out - began, scored - rolled_out, now(run.device) - scored
            metrics = {"lr": lr, "episode": (update + 1) * B}
            metrics |= {"perf/tokens_per_s": sum(map(len, sequences)) / sum(seconds)}
            metrics |= dict(zip(("time/rollout", "time/score", "time/learn"), seconds, strict=True)) | checked
            metrics |= measure(groups, by_model, totals, batch_posts, summaries, cfg)
            run.log(update + 1, metrics)
            run.say_all(alarms(metrics))
            if cfg.sample_every and (update + 1) % cfg.sample_every == 0:
                run.samples(update + 1, sample_rows(batch_posts, summaries, groups))
            run.end_step(update + 1, optimizer)

        save_policy(policy, run.folder / "final", tokenizer, temperature=T)
        write_card(run.folder)
        run.say(f"policy  saved to {run.folder / 'final'}")
        run.say(f"next    python eval.py --policy sft {cfg.algorithm}={run.folder / 'final'}")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
