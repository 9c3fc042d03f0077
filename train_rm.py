"""Stage 2 of 3: the reward model. The SFT model learns to score summaries so that people's choices become likely.

    python train_rm.py                     the embedded tiny world on a laptop, Llama-3.2-1B on a large GPU
    python train_rm.py --help              every flag

Reads the SFT model, comparisons and TL;DR posts; writes runs/rm/final, a Hugging Face
folder. The steps, numbered as in the code:

    1. read comparisons: a post, the summary a person chose, the one they rejected
    2. start from the SFT model's trunk with a new linear head, drawn from N(0, 1/sqrt(D+1))
    3. for each batch: score both summaries at their EOS in one forward pass, which reads their post once
       (nanorlhf/pairs.py), Bradley-Terry loss, one AdamW step
    4. shift the scores so that the authors' own summaries of the SFT set have mean 0
    5. save
    6. measure accuracy on held-out comparisons, by batch, split and confidence

Bradley-Terry sees differences only, so the level of the scores is arbitrary until step 4,
which PPO depends on: a response without EOS is given -1, and the critic starts as this
model (N+ details 10 to 16). Left out: margins, ensembles. Next: train_ppo.py.

With one post's numbers: docs/walk.md, station 4.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that can grow

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import kernels
from nanorlhf import parallel
from nanorlhf.data.encoding import encode_comparisons, encode_posts, length_report
from nanorlhf.data.tldr import (
    Comparison,
    ComparisonStats,
    batch_indices,
    load_comparisons,
    load_posts,
    without_posts_of,
)
from nanorlhf.data.tokenizer import Tokenizer, load_tokenizer
from nanorlhf.errors import check
from nanorlhf.losses import bradley_terry_loss, pair_accuracy
from nanorlhf.models import ScalarModel, parameter_count, reward_model_from
from nanorlhf.monitoring import preflight
from nanorlhf.optim import SCHEDULES, AdamW
from nanorlhf.packing import in_microbatches, microbatches
from nanorlhf.pairs import pack_pairs
from nanorlhf.run.card import write_card
from nanorlhf.run.config import cli
from nanorlhf.run.device import now
from nanorlhf.run.inputs import find_data, find_model
from nanorlhf.run.run import Run
from nanorlhf.storage.checkpoint import check_folder, load_policy, save_scalar

SHOWN = 256  # comparisons in samples.jsonl


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "rm"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    resume: bool | Literal["auto"] = False  # continue this run from its last checkpoint; auto: begin if there is none
    seed: int = 1  # order of the data, initial head
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU; masters and losses are float32
    deterministic: bool = False  # the same bits from run to run on a GPU too, attention's backward pass being slower
    track: bool = False  # mirror the metrics to Weights & Biases
    # -- inputs
    sft_model: str | None = None  # folder or hub id of the SFT model
    data: str | None = None  # folder with comparisons/batch*.json and tldr/train.jsonl in OpenAI's formats
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    # -- optimisation (N+ detail 10)
    lr: float = 3e-6  # peak learning rate
    lr_schedule: str = "cosine"  # cosine, linear (both to 0), constant, or wsd: constant, then to 0; once a step
    batch_size: int = 64  # pairs an optimizer step
    num_epochs: int = 1  # passes over the comparisons; the last incomplete batch is dropped
    max_updates: int | None = None  # optimizer steps, if fewer
    max_grad_norm: float | None = None  # clip the gradient's norm [paper: no clipping]
    microbatch_tokens: int = 16384  # tokens a forward and backward pass: bounds memory, changes no gradient
    activation_checkpointing: bool = False  # a third more time, a tenth of the activations: `python -m bench.plan`
    # -- evaluation and saving
    shift_posts: int = 116_722  # SFT posts whose references are given mean score 0 (N+ detail 15: all)
    eval_pairs: int = 100_000  # held-out comparisons for the accuracy, at most
    save_every: int = 400  # optimizer steps between checkpoints that --resume can use; 0 for none
    keep: int = 1  # newest checkpoints that stay, beside the one being written: 12 bytes a trained parameter each
    on_nan: str = "stop"  # stop at a loss, score or gradient that is not finite, or skip: leave the step out and count
    preflight: bool = True  # check before the first step that a score is a function of its text alone, read at EOS


PRESETS = {
    "llama-1b": {},
    "paper": {},
    # SmolLM2-135M: lengths as in train_sft.py
    "smollm2": dict(lr=3e-5, max_grad_norm=1.0, max_query_length=544, microbatch_tokens=8192, save_every=100),
    # The tiny model is a thousand times smaller, its learning rate 200 times larger; the rest are the sizes of
    # its world. A larger rate loses what the base knows of right and wrong: docs/robustness.md.
    "tiny": dict(lr=6e-4, max_updates=96, max_grad_norm=1.0, max_query_length=104, microbatch_tokens=8192,
                 shift_posts=1024, eval_pairs=1024, save_every=48),
}  # fmt: skip


@torch.no_grad()
def score(model: ScalarModel, sequences: list[list[int]], microbatch_tokens: int, progress) -> torch.Tensor:
    """Scores of any number of sequences, (n,) fp32, a microbatch at a time."""
    device, walk = model.score.weight.device, partial(progress, what="scoring")
    return in_microbatches(lambda packed, _: [model.last_scores(packed)], sequences, microbatch_tokens, device, walk)[0]


def accuracy_by(comparisons: list[Comparison], correct: list[bool]) -> dict[str, float]:
    """Accuracy overall and by split, batch and confidence (N+ detail 16), under the published runs' names."""
    groups = defaultdict(list)
    for comparison, hit in zip(comparisons, correct, strict=True):
        own = f"/split/{comparison.split}", f"/batch/{comparison.batch}", f"/confidence/{comparison.confidence}"
        for key in ("", *own):
            groups[f"eval/rm/validation/accuracy{key}"].append(hit)
    return {name: sum(hits) / len(hits) for name, hits in groups.items()}


def learn(
    model: ScalarModel, pairs: list[tuple[list[int], list[int], list[int]]], cfg: Config
) -> dict[str, torch.Tensor]:
    """Forward and backward pass over a batch of (query, chosen, rejected), by microbatches -> its metrics, () each.
    Under torchrun each process goes through its share; gradients add up in the backward pass, metrics at the end."""
    device, totals = model.score.weight.device, defaultdict(float)
    for group, counts in microbatches([sum(map(len, pair)) for pair in pairs], cfg.microbatch_tokens):
        packed = pack_pairs(*zip(*(pairs[i] for i in group), strict=True), device)  # the query of a pair once
        chosen_scores, rejected_scores = model.last_scores(packed).chunk(2)  # (b,) each, read at EOS
        share = counts * len(group) / cfg.batch_size  # microbatches add up to the mean over the batch
        loss = share * bradley_terry_loss(chosen_scores, rejected_scores)
        loss.backward()
        totals["train/rm/loss"] += loss.detach()
        totals["train/rm/accuracy"] += share * pair_accuracy(chosen_scores, rejected_scores)
        totals["train/rm/chosen_scores"] += share * chosen_scores.detach().mean()
        totals["train/rm/rejected_scores"] += share * rejected_scores.detach().mean()
    return parallel.summed(totals)


def measure(
    model: ScalarModel, comparisons: list[Comparison], tokenizer: Tokenizer, cfg: Config, progress: Callable
) -> tuple[dict[str, float], list[dict]]:
    """Accuracy on held-out comparisons, beside the baseline that knows only length; and the first rows, to be read."""
    queries, chosen, rejected = encode_comparisons(comparisons, tokenizer, cfg.max_query_length)
    chosen_scores, rejected_scores = (
        score(model, [q + r for q, r in zip(queries, side, strict=True)], cfg.microbatch_tokens, progress)
        for side in (chosen, rejected)
    )  # (n,) each
    longer = sum(len(c) > len(r) for c, r in zip(chosen, rejected, strict=True)) / len(comparisons)
    metrics = accuracy_by(comparisons, (chosen_scores > rejected_scores).tolist())
    rows = [
        {"post": c.post.post, "chosen": c.chosen, "chosen_score": a, "rejected": c.rejected, "rejected_score": b}
        for c, a, b in zip(
            comparisons[:SHOWN], chosen_scores[:SHOWN].tolist(), rejected_scores[:SHOWN].tolist(), strict=True
        )
    ]
    return metrics | {"eval/rm/validation/accuracy_longer_wins": longer}, rows


def hardly_above_length(accuracy: float, longer_wins: float, pairs: int) -> bool:
    """Whether the accuracy on so many held-out pairs is less than three of its standard errors above what always taking
    the longer summary gets, or always the shorter one."""
    return accuracy < max(longer_wins, 1 - longer_wins) + 3 * math.sqrt(0.25 / pairs)


def main(cfg: Config) -> None:
    check(cfg.lr_schedule in SCHEDULES, "lr_schedule", cfg.lr_schedule, f"one of {', '.join(SCHEDULES)}")
    parallel.check_enough("batch_size", cfg.batch_size)

    # 1. comparisons
    data, data_from = find_data(cfg.data, cfg.preset)
    folder, sft_from = find_model("sft", cfg.sft_model, "sft_model", cfg.preset)
    cfg.data, cfg.sft_model = str(data), str(folder)  # what --resume goes on with
    tokenizer = load_tokenizer(folder)
    notes = check_folder(folder, tokenizer)
    stats = ComparisonStats()
    train, held_out = load_comparisons(data, "train", stats), load_comparisons(data, "valid")
    valid = without_posts_of(train, held_out)
    shared = len(held_out) - len(valid)
    check(
        len(valid) > 0, "data", data, "split by post", "every held-out comparison is about a post of the training split"
    )
    if len(valid) > cfg.eval_pairs:
        valid = [valid[i] for i in batch_indices(len(valid), cfg.eval_pairs, seed=0, step=0)]  # not by batch: at random
    total_steps = cfg.num_epochs * (len(train) // cfg.batch_size)
    total_steps = min(total_steps, cfg.max_updates or total_steps)
    check(total_steps > 0, "batch_size", cfg.batch_size, f"at most the {len(train)} comparisons of {data}")

    show = ["train/rm/loss", "train/rm/accuracy", "train/rm/margin", "lr", "perf/tokens_per_s"]
    with Run("rm", cfg, total_steps=total_steps, show=show, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {stats}; {len(valid):,} held out")
        run.say_all(notes)
        if shared:
            run.say(f"note    {shared:,} held-out comparisons are left out: the training split has their posts too")
        queries, chosen, rejected = encode_comparisons(train, tokenizer, cfg.max_query_length, run.progress)
        run.say(f"tokens  {length_report(queries, [chosen, rejected])}")

        # 2. model and optimizer
        policy = load_policy(folder, run.device, run.dtype, tokenizer, parts="frozen")  # under torchrun: sharding.py
        model = reward_model_from(policy, cfg.seed)
        del policy
        model.model.activation_checkpointing = cfg.activation_checkpointing
        optimizer = AdamW([model], lr=cfg.lr)
        run.say(f"model   {folder} ({sft_from}): {parameter_count(model):,} parameters")
        run.say(f"plan    {total_steps} steps of {cfg.batch_size} pairs")
        step = run.resume(optimizer)

        # 3. train
        while step < total_steps:
            began = now(run.device)
            lr = SCHEDULES[cfg.lr_schedule](step, total_steps, cfg.lr)
            batch = batch_indices(len(train), cfg.batch_size, cfg.seed, step)
            run.at(step + 1, [train[i].post.id for i in batch])
            pairs = [(queries[i], chosen[i], rejected[i]) for i in batch]
            if cfg.preflight and step == 0:
                preflight.report(preflight.reward_model(model, pairs, tokenizer), run.say, "before step 1")
            totals = learn(model, pairs, cfg)
            grad_norm = optimizer.step(lr, cfg.max_grad_norm, cfg.on_nan)
            step += 1
            margin = totals["train/rm/chosen_scores"] - totals["train/rm/rejected_scores"]
            speed = {"perf/tokens_per_s": sum(len(part) for pair in pairs for part in pair) / (now(run.device) - began)}
            more = {"train/rm/margin": margin, "lr": lr, "grad_norm": grad_norm, "episode": step * cfg.batch_size}
            run.log(step, totals | more | speed)
            run.end_step(step, optimizer)

        # 4. shift: the authors' summaries get mean 0
        posts = load_posts(data, "train")[: cfg.shift_posts]
        references = [q + r for q, r in zip(*encode_posts(posts, tokenizer, cfg.max_query_length), strict=True)]
        reference_scores = score(model, references, cfg.microbatch_tokens, run.progress)
        model.score_shift = reference_scores.mean().item()
        model.shift_posts = len(posts)

        # 5. save
        save_scalar(model, run.folder / "final", tokenizer)
        run.say(f"model   saved to {run.folder / 'final'}")

        # 6. accuracy on held-out comparisons
        metrics, rows = measure(model, valid, tokenizer, cfg, run.progress)
        metrics |= {
            "eval/rm/reference_mean_before_shift": model.score_shift,
            "eval/rm/reference_std": reference_scores.std().item(),
        }
        accuracy = "eval/rm/validation/accuracy"
        run.console.show = [accuracy, f"{accuracy}_longer_wins", "eval/rm/reference_std"]
        run.log(total_steps, metrics)
        if hardly_above_length(metrics[accuracy], metrics[f"{accuracy}_longer_wins"], len(valid)):
            run.say("note    hardly above what length alone tells: perhaps that is all it knows. Try another --seed")
        run.samples(total_steps, rows)
        write_card(run.folder)
        run.say("next    python train_ppo.py")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
