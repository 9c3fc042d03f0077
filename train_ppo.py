"""Stage 3 of 3: PPO. The SFT model learns to write summaries that the reward model scores higher, without leaving
itself too far.

    python train_ppo.py                                 the embedded tiny world on a laptop, Llama-3.2-1B on a large GPU
    python train_ppo.py --batch_size 128 --lr 1.5e-6    the recipe of the llama-1b preset, spelled out
    python train_ppo.py --help                          every flag, with the paper's values

Reads the SFT model, the reward model and TL;DR posts; writes runs/ppo/final (the policy) and runs/ppo/final_critic. The
steps, numbered as in the code:

    1. read posts: queries only, the policy writes the responses
    2. load four models: policy and reference (both the SFT model), critic and reward model (both the reward model; it
       may be several, --ensemble)
    then for each update:
    3. rollout: sample R tokens for each query at temperature 0.7
    4. score: log-probs under policy and reference, values, and one score a response
    5. rewards and advantages: KL penalty a token, score at the end, GAE, whitening
    6. learn: several epochs over the batch with clipped policy and value losses, one AdamW over policy and critic
    7. log

N+ details 20 to 25; the arithmetic is in nanorlhf/ppo.py. Left out: adaptive KL, entropy
bonus. Next: eval.py. The steps with one post's numbers: docs/walk.md, stations 1 to 14.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that can grow

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch

import kernels
from nanorlhf import parallel, ppo
from nanorlhf.data.encoding import encode_posts, length_report
from nanorlhf.data.tldr import batch_indices, load_posts
from nanorlhf.data.tokenizer import check_same, load_tokenizer
from nanorlhf.ensemble import RULES, Ensemble, combine, member_scores
from nanorlhf.errors import check
from nanorlhf.evaluation.hacks import Alarms
from nanorlhf.models import Policy, ScalarModel, critic_from, parameter_count, response_kl
from nanorlhf.monitoring import preflight
from nanorlhf.monitoring.log_update import log_update
from nanorlhf.optim import SCHEDULES, AdamW
from nanorlhf.packing import in_microbatches, microbatches, pack, to_device
from nanorlhf.ppo import Experience
from nanorlhf.rollout import generate, read_responses
from nanorlhf.run.card import write_card
from nanorlhf.run.config import cli
from nanorlhf.run.device import now, side_by_side
from nanorlhf.run.inputs import find_data, find_model, find_models
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.sharding import actor_of, refill
from nanorlhf.storage.checkpoint import check_folder, load_policy, load_scalar, save_policy, save_scalar


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "ppo"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    resume: bool | Literal["auto"] = False  # continue this run from its last checkpoint; auto: begin if there is none
    seed: int = 1  # order of the data, sampling, order of minibatches
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    # fmt: off
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU; masters and all of PPO's
                         # arithmetic are float32
    # fmt: on
    deterministic: bool = False  # the same bits from run to run on a GPU too, attention's backward pass being slower
    track: bool = False  # mirror the metrics to Weights & Biases
    # -- inputs
    sft_model: str | None = None  # folder or hub id of the SFT model: policy and reference
    # fmt: off
    reward_model: tuple[str, ...] = ()  # folders or hub ids of reward models, one or several; the critic starts as the
                                        # first
    # fmt: on
    ensemble: str = "mean"  # of several reward models' scores: mean, min or mean_minus_std
    data: str | None = None  # folder with tldr/train.jsonl in OpenAI's format
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    # -- rollout (N+ detail 23)
    response_length: int = 53  # R, tokens sampled for every query, EOS or not
    temperature: float = 0.7  # of sampling, and of every log-prob, KL and ratio
    # -- episodes (N+ details 20 and 21)
    batch_size: int = 128  # episodes an update [paper: 512]
    total_episodes: int = 116_722  # one pass over the posts [paper: 1,000,000]; the posts are reshuffled when used up
    max_updates: int | None = None  # updates, if fewer; the schedule is that of the shorter run
    num_ppo_epochs: int = 4  # K, passes over a batch
    num_minibatches: int = 1  # optimizer steps an epoch; divides batch_size
    critic_warmup: int = 0  # first updates that train the critic alone; they count as updates [not in the paper]
    microbatch_tokens: int = 16384  # tokens a forward and backward pass: bounds memory, changes no gradient
    activation_checkpointing: bool = False  # a third more time, a tenth of the activations: `python -m bench.plan`
    # -- optimisation
    lr: float = 1.5e-6  # peak learning rate of the policy, and of the critic [paper: 3e-6 at batch 512]
    critic_lr: float | None = None  # peak learning rate of the critic, on the same schedule [paper: that of the policy]
    lr_schedule: str = "linear"  # linear, cosine (both to 0), constant, or wsd: constant, then to 0; once an update
    lr_warmup: int = 0  # first updates of the policy, in which its rate rises to the schedule's [not in the paper]
    max_grad_norm: float | None = None  # clip the gradient's norm [paper: no clipping]
    # -- PPO (Table 7)
    kl_coef: float = 0.05  # beta, nats to reward
    kl_estimator: str = "k1"  # k1: log-ratio of the sampled token [paper]; full: exact, over the whole vocabulary
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    cliprange: float = 0.2  # epsilon of the policy ratio
    cliprange_value: float = 0.2  # of the value, in units of the score
    vf_coef: float = 0.1  # weight of the value loss
    whiten_rewards: bool = False  # scale rewards to unit variance (N+ detail 24: off in the released runs)
    missing_eos_score: float = -1.0  # the score of a response that does not stop (N+ detail 23.3)
    # -- logging and saving
    sample_every: int = 50  # updates between tables of samples; 0 for none
    save_every: int = 250  # updates between checkpoints that --resume can use; 0 for none
    keep: int = 1  # newest checkpoints that stay, beside the one being written: 12 bytes a trained parameter each
    stop_kl: float | None = None  # nats a response: end the run when the KL of an update is above [hacks.py warns]
    on_nan: str = "stop"  # stop at a loss, score or gradient that is not finite, or skip: leave the step out and count
    preflight: bool = True  # check ratio = 1, KL = 0, V(after EOS) = score and more before the first updates


KL_ESTIMATORS = ("k1", "full")

PRESETS = {
    "llama-1b": {},
    "paper": dict(batch_size=512, lr=3e-6, total_episodes=1_000_000),
    # SmolLM2-135M: lengths as in train_sft.py
    "smollm2": dict(lr=1e-5, max_grad_norm=1.0, max_query_length=544, response_length=56, microbatch_tokens=8192,
                    sample_every=10, save_every=50),
    # Sizes of the tiny world, and learning rates for a model a thousand times smaller. The critic starts as the reward
    # model, knows nothing of unfinished summaries, and has one update and a rate of its own to learn it; then one epoch
    # of four small steps is worth four epochs of a large one: docs/robustness.md. Clipping, against single large steps.
    "tiny": dict(lr=3e-4, lr_schedule="wsd", lr_warmup=1, critic_lr=1.5e-3, critic_warmup=1, max_grad_norm=1.0,
                 total_episodes=2048, num_ppo_epochs=1, num_minibatches=4, max_query_length=104, response_length=32,
                 microbatch_tokens=4096, sample_every=8, save_every=8),
}  # fmt: skip


class Scored(NamedTuple):
    """What the four models say about a batch of responses, fp32."""

    logprobs: torch.Tensor  # (B, R)
    entropy: torch.Tensor  # (B, R) of the policy
    ref_logprobs: torch.Tensor  # (B, R)
    full_kl: torch.Tensor | None  # (B, R) with --kl_estimator full
    values: torch.Tensor  # (B, R)
    raw_scores: torch.Tensor  # (B,)
    member_scores: torch.Tensor | None = None  # (B, K): what each of K reward models says

    def must_be_finite(self) -> dict[str, torch.Tensor]:
        names = ("logprobs", "ref_logprobs", "values")
        return {"scores": self.raw_scores} | {name: getattr(self, name) for name in names}


def score(
    policy: Policy, reference: Policy, critic: ScalarModel, reward_model: ScalarModel | Ensemble,
    sequences: list[list[int]], finished: list[list[int]], responses: torch.Tensor, cfg: Config,
) -> Scored:  # fmt: skip
    """Policy, reference and critic read all R tokens of a response, the reward model only what people see.

    args: sequences: queries with their R tokens; finished: the same up to EOS; responses (B, R) int64
    """
    forward = partial(in_microbatches, max_tokens=cfg.microbatch_tokens, device=responses.device)
    R, T = responses.shape[1], cfg.temperature
    logprobs, entropy = forward(lambda p, i: policy.response_logprobs(p, responses[i], T), sequences)
    full_kl = None
    if cfg.kl_estimator == "full":
        both = partial(response_kl, policy, reference)
        full_kl, _, ref_logprobs = forward(lambda p, i: both(p, responses[i], T), sequences)
    else:
        ref_logprobs, _ = forward(lambda p, i: reference.response_logprobs(p, responses[i], T), sequences)
    (values,) = forward(lambda p, i: [critic.response_values(p, R)], sequences)  # (B, R), like the log-probs
    (scores,) = forward(lambda p, i: [member_scores(reward_model, p)], finished)  # (B, K), a column a reward model
    return Scored(logprobs, entropy, ref_logprobs, full_kl, values, combine(scores, cfg.ensemble), scores)


def learn(
    policy: Policy, critic: ScalarModel, episode: Experience, minibatch: np.ndarray, rows: np.ndarray, cfg: Config,
    warming: bool = False, counts: bool = True,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Forward and backward pass over the microbatch `rows` of a minibatch; of the critic alone while it is `warming`.

    Both losses are means over the tokens of the whole minibatch, so gradients and metrics of its microbatches add up,
    also over processes. counts: False has weight 0: where another process has a microbatch more, all must take part.
    """
    e, R = episode, cfg.response_length
    packed = pack([e.sequences[i] for i in rows], e.responses.device)
    minibatch, rows = (to_device(torch.from_numpy(x), e.responses.device) for x in (minibatch, rows))  # copied once
    actions, states = e.action_mask[minibatch].sum(), e.value_mask[minibatch].sum()  # how many there are of each
    responses, old_logprobs, advantages, mask, value_mask = (
        tensor[rows] for tensor in (e.responses, e.logprobs, e.advantages, e.action_mask, e.value_mask)
    )  # (b, R) each
    mask, value_mask = (mask, value_mask) if counts else (mask & False, value_mask & False)

    def learn_policy() -> dict[str, torch.Tensor]:
        # ppo.policy_loss in value and gradient, but fused with the head, so that no logits are kept
        loss, new_logprobs, entropy, clipfrac = policy.response_ppo_loss(
            packed, responses, old_logprobs, advantages, mask / actions, cfg.temperature, cfg.cliprange
        )  # new_logprobs, entropy (b, R)
        loss.backward()
        _, stats = ppo.policy_loss(new_logprobs, old_logprobs, advantages, mask, cfg.cliprange, denominator=actions)
        return {
            "loss/policy_avg": loss.detach(),
            "policy/approxkl_avg": stats["approxkl"],
            "policy/clipfrac_avg": clipfrac,
            "policy/entropy_avg": torch.where(mask, entropy, 0.0).sum() / actions,
            "policy/entropy_avg_paper": counts * entropy.sum() / (len(minibatch) * R),
            "val/ratio": stats["ratio"],
            "val/ratio_squared": stats["ratio_squared"],
        }

    def learn_critic() -> dict[str, torch.Tensor]:
        new_values = critic.response_values(packed, R)  # (b, R)
        loss, stats = ppo.value_loss(
            new_values, e.values[rows], e.returns[rows], value_mask, cfg.cliprange_value, denominator=states
        )
        (cfg.vf_coef * loss).backward()
        return {"loss/value_avg": loss.detach(), "val/clipfrac_avg": stats["clipfrac"]}

    if warming:
        return learn_critic()
    # The two share nothing but the batch.
    of_policy, of_critic = side_by_side(learn_policy, learn_critic, device=responses.device)
    return of_policy | of_critic


def add(totals: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    """Adds what a microbatch gave; under torchrun what those of all processes gave, as their gradients add up too."""
    for name, value in parallel.summed(more).items():
        totals[name] += value


def updates(cfg: Config) -> int:
    """How many updates there will be, from flags that fit together."""
    check(cfg.temperature > 0, "temperature", cfg.temperature, "greater than 0", "choose 0.7")
    check(cfg.lr_schedule in SCHEDULES, "lr_schedule", cfg.lr_schedule, f"one of {', '.join(SCHEDULES)}")
    check(cfg.kl_estimator in KL_ESTIMATORS, "kl_estimator", cfg.kl_estimator, f"one of {', '.join(KL_ESTIMATORS)}")
    parallel.check_enough("batch_size", cfg.batch_size)
    check(cfg.ensemble in RULES, "ensemble", cfg.ensemble, f"one of {', '.join(RULES)}")
    parts = f"a multiple of num_minibatches {cfg.num_minibatches}"
    check(cfg.batch_size % cfg.num_minibatches == 0, "batch_size", cfg.batch_size, parts)
    total_updates = cfg.total_episodes // cfg.batch_size
    total_updates = min(total_updates, cfg.max_updates or total_updates)
    check(total_updates > 0, "batch_size", cfg.batch_size, f"at most total_episodes {cfg.total_episodes}")
    most = f"at most the number of updates, {total_updates}"
    check(cfg.critic_warmup <= total_updates, "critic_warmup", cfg.critic_warmup, most, "leave some for the policy")
    return total_updates


def learning_rates(update: int, total_updates: int, cfg: Config) -> tuple[float, float]:
    """Of policy and critic in this update: both on one schedule; the policy's is 0 while the critic warms up."""
    critic_peak = cfg.lr if cfg.critic_lr is None else cfg.critic_lr
    schedule = SCHEDULES[cfg.lr_schedule]
    lr, critic_lr = (schedule(update, total_updates, peak) for peak in (cfg.lr, critic_peak))
    return lr * min(1.0, max(0, update + 1 - cfg.critic_warmup) / (cfg.lr_warmup + 1)), critic_lr


def plan(cfg: Config, total_updates: int, mean_query: float) -> list[str]:
    """What is about to be done, for the console."""
    steps, passes = cfg.num_ppo_epochs * cfg.num_minibatches, 2 * cfg.num_ppo_epochs  # passes of policy and critic
    tokens, scorings = round(cfg.batch_size * (mean_query + cfg.response_length)), 3 + len(cfg.reward_model)
    lines = [f"plan    {total_updates} updates of {cfg.batch_size} episodes and {steps} optimizer steps each"]
    if cfg.critic_warmup:
        lines.append(f"        the first {cfg.critic_warmup} train the critic alone")
    lines.append(
        f"        about {tokens:,} tokens an update: sampled once, scored {scorings} times, learned from {passes} times"
    )
    tiny_lr = PRESETS["tiny"]["lr"]
    if cfg.preset == "tiny" and cfg.lr < 0.1 * tiny_lr:
        lines.append(f"note    lr {cfg.lr:g} suits a large model; the tiny one hardly moves below {tiny_lr:g}")
    return lines


def main(cfg: Config) -> None:
    total_updates = updates(cfg)

    # 1. posts (the walk's stations 1 and 2)
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
    eos_id, B, R, T = tokenizer.eos_id, cfg.batch_size, cfg.response_length, cfg.temperature

    show = ["objective/scores", "objective/kl", "objective/gold", "val/eos_rate", "policy/clipfrac_avg"]
    with Run("ppo", cfg, total_steps=total_updates, unit="update", show=show, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {len(posts):,} posts")
        run.say_all(notes)
        queries, references = encode_posts(posts, tokenizer, cfg.max_query_length, run.progress)
        run.say(f"tokens  {length_report(queries, [references], R)}")

        # 2. models (stations 3 and 4)
        loaded = run.device, run.dtype, tokenizer  # under torchrun a part of every weight on each process: sharding.py
        policy = load_policy(sft_folder, *loaded, parts="masters")
        reference = load_policy(sft_folder, *loaded, parts="frozen").requires_grad_(False)
        reward_models = [load_scalar(folder, *loaded, parts="frozen") for folder in rm_folders]
        critic = critic_from(reward_models[0]).requires_grad_(True)
        reward_model = Ensemble(reward_models).requires_grad_(False)
        frozen = preflight.fingerprint([reference, reward_model])
        for trained in (policy, critic):
            trained.model.activation_checkpointing = cfg.activation_checkpointing
        optimizer = AdamW([policy, critic], lr=cfg.lr)
        scored_by = f"critic and reward model {rm_folders[0]} ({rm_from})"
        run.say(f"models  policy and reference {sft_folder} ({sft_from}); {scored_by}")
        for folder in rm_folders[1:]:
            run.say(f"        one more reward model {folder}: the score is the {cfg.ensemble} of {len(rm_folders)}")
        scalars = 1 + len(rm_folders)
        run.say(f"        2 x {parameter_count(policy):,} + {scalars} x {parameter_count(critic):,} parameters")
        for line in plan(cfg, total_updates, np.mean(queries.lengths)):
            run.say(line)
        start = run.resume(optimizer)
        actor = actor_of(policy)  # samples and scores, whole on every process; of one process the policy itself
        models = actor, reference, critic, reward_model
        alarms = Alarms(began=read_metrics(run.folder)[0] if start else {})

        for update in range(start, total_updates):
            rates, warming = learning_rates(update, total_updates, cfg), update < cfg.critic_warmup
            began = now(run.device)

            # 3. rollout (station 5): under torchrun each process samples its share of the rows, and all get all of them
            batch = batch_indices(len(queries), B, cfg.seed, update)  # (B,)
            batch_posts, batch_queries = [posts[i] for i in batch], [queries[i] for i in batch]
            run.at(update + 1, [post.id for post in batch_posts])
            episodes = range(update * B, (update + 1) * B)  # their numbers name the sampling noise
            responses, sampled_logprobs = generate(actor, batch_queries, R, T, cfg.seed, episodes)  # (B, R) each
            summaries = read_responses(tokenizer, responses)
            rolled_out = now(run.device)

            # 4. score (stations 6 and 7): shared out and gathered alike
            sequences = [query + response for query, response in zip(batch_queries, responses.tolist(), strict=True)]
            finished = [s[: len(s) - R + summary.tokens] for s, summary in zip(sequences, summaries, strict=True)]
            said = score(*models, sequences, finished, responses, cfg)
            run.check_finite(**said.must_be_finite())
            scored = now(run.device)

            # 5. rewards and advantages (stations 8 to 10): of all rows, on every process the same
            action_mask, value_mask = ppo.action_mask(responses, eos_id), ppo.value_mask(responses, eos_id)  # (B, R)
            scores = ppo.apply_missing_eos(said.raw_scores, responses, eos_id, cfg.missing_eos_score)  # (B,)
            kl = torch.where(action_mask, said.logprobs - said.ref_logprobs, 0.0)  # (B, R), k1: a token's may be < 0
            full_kl = None if said.full_kl is None else torch.where(action_mask, said.full_kl, 0.0)  # (B, R), exact
            penalised_kl = kl if full_kl is None else full_kl
            values = torch.where(value_mask, said.values, 0.0)
            rewards = ppo.token_rewards(scores, penalised_kl, responses, eos_id, cfg.kl_coef)  # (B, R)
            if cfg.whiten_rewards:
                rewards = ppo.masked_whiten(rewards, value_mask, shift_mean=False)
            raw_advantages, returns = ppo.gae(rewards, values, cfg.gamma, cfg.lam)  # (B, R) each
            advantages = ppo.masked_whiten(raw_advantages, action_mask)
            episode = Experience(
                sequences, responses, action_mask, value_mask, said.logprobs, values, advantages, returns,
                scores, kl, full_kl, rewards, raw_advantages,
            )  # fmt: skip
            checked = {}
            if cfg.preflight and (update < 2 or update in (start, cfg.critic_warmup)):
                checked = preflight.before_update(
                    run, update, models, frozen, episode, said, sampled_logprobs, queries, references, tokenizer
                )

            # 6. learn (stations 11 to 14): K passes, a step a minibatch; shared out, gradients and sums add up
            totals = defaultdict(float)  # sums over the steps
            for epoch in range(cfg.num_ppo_epochs):
                order = np.random.default_rng([cfg.seed, update, epoch]).permutation(B)
                for minibatch in np.split(order, cfg.num_minibatches):
                    for group, counts in microbatches([len(sequences[i]) for i in minibatch], cfg.microbatch_tokens):
                        add(totals, learn(policy, critic, episode, minibatch, minibatch[group], cfg, warming, counts))
                    if checked:
                        preflight.in_loss(run, update, totals, checked)
                    totals["grad_norm"] += optimizer.step(rates, cfg.max_grad_norm, cfg.on_nan)
            refill(actor, policy)  # gathers its weights, where they are in parts

            # 7. log, and save when it is time
            log_update(
                run, update, actor, tokenizer, batch_posts, summaries, said, episode, totals, checked,
                alarms, rates, (began, rolled_out, scored, now(run.device)),
            )  # fmt: skip
            run.end_step(update + 1, optimizer)

        save_policy(actor, run.folder / "final", tokenizer, temperature=T)
        save_scalar(critic, run.folder / "final_critic", tokenizer)
        for final in ("final", "final_critic"):
            write_card(run.folder, final)
        run.say(f"policy  saved to {run.folder / 'final'}; next: python eval.py")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
