"""DPO: the SFT model learns from comparisons directly, without a reward model and without sampling.

    python -m experiments.train_dpo --preset tiny                                    the embedded tiny world
    python -m experiments.train_dpo --preset tiny --beta 0.2 --seed 2 --run_name dpo_far

Reads the SFT model and the comparisons that train_rm.py reads; writes runs/dpo/final, a policy. The steps, numbered as
in the code:

    1. read comparisons: a post, the summary a person chose, the one they rejected
    2. policy and reference: both the SFT model; the reference stays
    3. for each batch: log-probs of both summaries under both models, their post read once (nanorlhf/pairs.py); the
       implicit reward of a summary is beta (log p - log p_ref), and the loss is the reward model's; one AdamW step
    4. save
    5. measure the implicit reward's accuracy on held-out comparisons (N+ detail 19: below the reward model's)

Rafailov et al. 2023. Log-probs are at temperature 1, as there; sampling is at 0.7, as PPO's. beta weighs the KL: more
of it stays nearer to SFT. Left out: other losses on the same margin (IPO, label smoothing), a second round of samples.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import kernels
from experiments.methods import dpo_loss, implicit_rewards
from nanorlhf.data.encoding import encode_comparisons, length_report
from nanorlhf.data.tldr import ComparisonStats, batch_indices, load_comparisons, without_posts_of
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import check
from nanorlhf.losses import pair_accuracy
from nanorlhf.models import Policy, parameter_count
from nanorlhf.monitoring import preflight
from nanorlhf.optim import SCHEDULES, AdamW
from nanorlhf.packing import split_by_tokens, to_device
from nanorlhf.pairs import PackedPairs, pack_pairs
from nanorlhf.run.card import write_card
from nanorlhf.run.config import cli
from nanorlhf.run.device import now
from nanorlhf.run.inputs import find_data, find_model
from nanorlhf.run.run import Run
from nanorlhf.storage.checkpoint import check_folder, load_policy, save_policy
from train_rm import accuracy_by

Pair = tuple[list[int], list[int], list[int]]  # query, chosen, rejected


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "dpo"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    resume: bool | Literal["auto"] = False  # continue this run from its last checkpoint; auto: begin if there is none
    seed: int = 1  # order of the data
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU; masters and losses are float32
    # -- inputs
    sft_model: str | None = None  # folder or hub id of the SFT model: policy and reference
    data: str | None = None  # folder with comparisons/batch*.json in OpenAI's format
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    # -- optimisation
    beta: float = 0.1  # nats to implicit reward: the weight of the KL in the objective that DPO solves
    lr: float = 1e-6  # peak learning rate [Rafailov et al.: 1e-6, 150 steps of warm-up]
    lr_schedule: str = "cosine"  # cosine, linear (both to 0), constant, or wsd: constant, then to 0; once a step
    batch_size: int = 64  # pairs an optimizer step
    num_epochs: int = 1  # passes over the comparisons; the last incomplete batch is dropped
    max_updates: int | None = None  # optimizer steps, if fewer
    max_grad_norm: float | None = None  # clip the gradient's norm
    microbatch_tokens: int = 8192  # tokens a forward and backward pass: bounds memory, changes no gradient
    # -- evaluation and saving
    eval_pairs: int = 100_000  # held-out comparisons for the accuracy, at most
    save_every: int = 400  # optimizer steps between checkpoints that --resume can use; 0 for none
    keep: int = 1  # newest checkpoints that stay, beside the one being written: 12 bytes a trained parameter each
    on_nan: str = "stop"  # stop at a loss or gradient that is not finite, or skip: leave the step out and count
    preflight: bool = True  # check before the first step that policy and reference are the same model, and not one


PRESETS = {
    "llama-1b": {},
    "paper": {},
    "smollm2": dict(lr=1e-5, max_grad_norm=1.0, max_query_length=544, microbatch_tokens=4096, save_every=100),
    # With a noisy annotator beta 0.1 leads far away: after 16 steps of lr 3e-4, seed 1, KL 10.7 nats, gold 3.45,
    # 38% of the summaries without an end; beta 0.5 has KL 3.1 and gold 4.18 (on 256 valid posts).
    "tiny": dict(beta=0.5, lr=1e-4, max_grad_norm=1.0, max_query_length=104, microbatch_tokens=4096, eval_pairs=1024,
                 save_every=80),
}  # fmt: skip


def summary_logprobs(policy: Policy, packed: PackedPairs, queries: Sequence[list[int]]) -> torch.Tensor:
    """Log-prob of each whole summary, EOS included: (2b,) fp32, first of the chosen, then of the rejected ones."""
    sizes, starts = [len(query) for query in queries] * 2, np.cumsum((0, *packed.apart.lengths))
    before = [np.arange(start + q - 1, end - 1) for start, q, end in zip(starts[:-1], sizes, starts[1:], strict=True)]
    rows = to_device(torch.from_numpy(np.concatenate(before)), packed.tokens.device)  # of the state before each token
    hidden = policy.hidden(packed)[packed.spread[rows]]
    logprobs, _ = kernels.linear_logprob(hidden, policy.head_weight, packed.apart.tokens[rows + 1], 1.0)
    return torch.stack([part.sum() for part in logprobs.split([len(part) for part in before])])


def rewards(policy: Policy, reference: Policy, pairs: list[Pair], beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards of the chosen and of the rejected summaries, (b,) fp32 each."""
    queries, chosen, rejected = zip(*pairs, strict=True)
    packed = pack_pairs(queries, chosen, rejected, policy.head_weight.device)
    with torch.no_grad():
        ref_logprobs = summary_logprobs(reference, packed, queries)
    return implicit_rewards(summary_logprobs(policy, packed, queries), ref_logprobs, beta).chunk(2)


def learn(policy: Policy, reference: Policy, pairs: list[Pair], cfg: Config) -> dict[str, torch.Tensor]:
    """Forward and backward pass over a batch of pairs, by microbatches -> its metrics, () each."""
    totals = defaultdict(float)
    for group in split_by_tokens([sum(map(len, pair)) for pair in pairs], cfg.microbatch_tokens):
        chosen_rewards, rejected_rewards = rewards(policy, reference, [pairs[i] for i in group], cfg.beta)
        share = len(group) / cfg.batch_size  # microbatches add up to the mean over the batch
        loss = share * dpo_loss(chosen_rewards, rejected_rewards)
        loss.backward()
        totals["train/dpo/loss"] += loss.detach()
        totals["train/dpo/accuracy"] += share * pair_accuracy(chosen_rewards, rejected_rewards)
        totals["train/dpo/chosen_rewards"] += share * chosen_rewards.detach().mean()
        totals["train/dpo/rejected_rewards"] += share * rejected_rewards.detach().mean()
    totals["train/dpo/margin"] = totals["train/dpo/chosen_rewards"] - totals["train/dpo/rejected_rewards"]
    return totals


@torch.no_grad()
def hits(policy: Policy, reference: Policy, pairs: list[Pair], cfg: Config, progress) -> list[bool]:
    """Whether the implicit reward of the chosen summary is the higher one, of each pair."""
    groups = split_by_tokens([sum(map(len, pair)) for pair in pairs], cfg.microbatch_tokens)
    walk = progress(groups, what="scoring")
    scored = (rewards(policy, reference, [pairs[i] for i in group], cfg.beta) for group in walk)
    return [hit for chosen, rejected in scored for hit in (chosen > rejected).tolist()]


def first_step(models: list[Policy], pairs: list[Pair], loss: float, eos_id: int) -> list[preflight.Check]:
    """What holds before the first step: the loss is that of a policy that is still the reference."""
    ends = [summary[-1] == eos_id for _, *summaries in pairs for summary in summaries]
    return [
        preflight.equals("shared tensors", preflight.shared_tensors(models), 0, "policy and reference train together"),
        preflight.equals("sequences that end in EOS", sum(ends) / len(ends), 1, "the policy would not learn to stop"),
        preflight.at_most("first loss - ln 2", abs(loss - math.log(2)), 1e-3, "policy and reference differ in weights"),
    ]


def main(cfg: Config) -> None:
    check(cfg.lr_schedule in SCHEDULES, "lr_schedule", cfg.lr_schedule, f"one of {', '.join(SCHEDULES)}")
    check(0 < cfg.beta < math.inf, "beta", cfg.beta, "greater than 0, and finite", "choose 0.1")

    # 1. comparisons
    data, data_from = find_data(cfg.data, cfg.preset)
    folder, sft_from = find_model("sft", cfg.sft_model, "sft_model", cfg.preset)
    cfg.data, cfg.sft_model = str(data), str(folder)  # what --resume goes on with
    tokenizer = load_tokenizer(folder)
    notes, stats = check_folder(folder, tokenizer), ComparisonStats()
    train = load_comparisons(data, "train", stats)
    valid = without_posts_of(train, load_comparisons(data, "valid"))
    check(len(valid) > 0, "data", data, "split by post", "every held-out comparison is about a post of training")
    if len(valid) > cfg.eval_pairs:
        valid = [valid[i] for i in batch_indices(len(valid), cfg.eval_pairs, seed=0, step=0)]  # those of train_rm.py
    total_steps = cfg.num_epochs * (len(train) // cfg.batch_size)
    total_steps = min(total_steps, cfg.max_updates or total_steps)
    check(total_steps > 0, "batch_size", cfg.batch_size, f"at most the {len(train)} comparisons of {data}")

    show = ["train/dpo/loss", "train/dpo/accuracy", "train/dpo/margin", "lr", "perf/tokens_per_s"]
    with Run("dpo", cfg, total_steps=total_steps, show=show, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {stats}; {len(valid):,} held out")
        run.say_all(notes)
        queries, chosen, rejected = encode_comparisons(train, tokenizer, cfg.max_query_length, run.progress)
        same = [i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a == b]
        which = f"comparison of post {train[same[0]].post.id}" if same else ""
        check(not same, which, "with the same tokens twice", "a choice between two summaries", "remove the line")
        run.say(f"tokens  {length_report(queries, [chosen, rejected])}")

        # 2. models and optimizer
        policy = load_policy(folder, run.device, run.dtype, tokenizer)
        reference = load_policy(folder, run.device, run.dtype, tokenizer).requires_grad_(False)
        optimizer = AdamW([policy], lr=cfg.lr)
        run.say(f"models  policy and reference {folder} ({sft_from}): 2 x {parameter_count(policy):,} parameters")
        run.say(f"plan    {total_steps} steps of {cfg.batch_size} pairs")
        step = run.resume(optimizer)

        # 3. train
        while step < total_steps:
            began = now(run.device)
            lr = SCHEDULES[cfg.lr_schedule](step, total_steps, cfg.lr)
            batch = batch_indices(len(train), cfg.batch_size, cfg.seed, step)
            run.at(step + 1, [train[i].post.id for i in batch])
            pairs = [(queries[i], chosen[i], rejected[i]) for i in batch]
            totals, checked = learn(policy, reference, pairs, cfg), {}
            if cfg.preflight and step == 0:
                checks = first_step([policy, reference], pairs, totals["train/dpo/loss"].item(), tokenizer.eos_id)
                checked = preflight.report(checks, run.say, "before step 1")
            grad_norm = optimizer.step(lr, cfg.max_grad_norm, cfg.on_nan)
            step += 1
            speed = {"perf/tokens_per_s": sum(len(part) for pair in pairs for part in pair) / (now(run.device) - began)}
            more = {"lr": lr, "grad_norm": grad_norm, "episode": step * cfg.batch_size}
            run.log(step, totals | more | speed | checked)
            run.end_step(step, optimizer)

        # 4. save
        save_policy(policy, run.folder / "final", tokenizer)
        run.say(f"policy  saved to {run.folder / 'final'}")

        # 5. accuracy of the implicit reward on held-out comparisons
        pairs = list(zip(*encode_comparisons(valid, tokenizer, cfg.max_query_length), strict=True))
        correct = hits(policy, reference, pairs, cfg, run.progress)
        metrics = {name.replace("/rm/", "/dpo/"): value for name, value in accuracy_by(valid, correct).items()}
        run.console.show = ["eval/dpo/validation/accuracy"]
        run.log(total_steps, metrics)
        write_card(run.folder)
        run.say(f"next    python eval.py --policy sft dpo={run.folder / 'final'}")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
