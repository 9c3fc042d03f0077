"""Stage 1 of 3: supervised fine-tuning (SFT). A base model learns to follow a Reddit post by its author's own summary.

    python train_sft.py                    the embedded tiny world on a laptop, Llama-3.2-1B on a large GPU
    python train_sft.py --help             every flag

Reads a base model and TL;DR posts; writes runs/sft/final, a Hugging Face folder. The steps, numbered as in the code:

    1. read posts: query "SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:" and response " summary<EOS>", as token ids
    2. load the base model
    3. for each batch: pack queries with their responses, next-token cross-entropy on all tokens, one AdamW step
    4. save
    5. measure on held-out posts: loss, ROUGE of generated summaries, share that stop

The loss counts the query's tokens too, as in the paper (N+ detail 9); there is no
dropout, no warm-up and no gradient clipping in the paper's recipe. Left out: LoRA,
sequence packing across the attention mask. Next: train_rm.py.

With one post's numbers: docs/walk.md, station 3.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that can grow

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

import kernels
from nanorlhf import parallel
from nanorlhf.data.encoding import encode_posts, length_report
from nanorlhf.data.tldr import Post, batch_indices, load_posts
from nanorlhf.data.tokenizer import Tokenizer, load_tokenizer
from nanorlhf.errors import check
from nanorlhf.evaluation.metrics import rouge, without_words
from nanorlhf.losses import next_token_labels, sequence_mean_weights
from nanorlhf.models import Policy, parameter_count
from nanorlhf.monitoring import preflight
from nanorlhf.optim import SCHEDULES, AdamW
from nanorlhf.packing import microbatches, pack
from nanorlhf.rollout import Summary, summarise
from nanorlhf.run.card import write_card
from nanorlhf.run.config import cli
from nanorlhf.run.device import now
from nanorlhf.run.inputs import find_data, find_model
from nanorlhf.run.run import Run
from nanorlhf.sharding import actor_of
from nanorlhf.storage.checkpoint import check_folder, load_policy, save_policy


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "sft"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    resume: bool | Literal["auto"] = False  # continue this run from its last checkpoint; auto: begin if there is none
    seed: int = 1  # order of the data
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU; masters and losses are float32
    deterministic: bool = False  # the same bits from run to run on a GPU too, attention's backward pass being slower
    track: bool = False  # mirror the metrics to Weights & Biases
    # -- inputs
    model: str | None = None  # folder or hub id of the base model [llama-1b: meta-llama/Llama-3.2-1B; smollm2: its own]
    data: str | None = None  # folder with tldr/{train,valid}.jsonl in OpenAI's format [llama-1b: data/openai]
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    response_length: int = 53  # tokens sampled in the evaluation, EOS included (N+ detail 4)
    # -- optimisation (N+ detail 9)
    lr: float = 3e-6  # peak learning rate
    lr_schedule: str = "cosine"  # cosine, linear (both to 0), constant, or wsd: constant, then to 0; once a step
    batch_size: int = 128  # posts an optimizer step
    num_epochs: int = 1  # passes over the posts; the last incomplete batch is dropped
    max_updates: int | None = None  # optimizer steps, if fewer
    max_grad_norm: float | None = None  # clip the gradient's norm [paper: no clipping]
    microbatch_tokens: int = 16384  # tokens a forward and backward pass: bounds memory, changes no gradient
    activation_checkpointing: bool = False  # a third more time, a tenth of the activations: `python -m bench.plan`
    # -- evaluation and saving
    eval_posts: int = 512  # held-out posts for loss and ROUGE after training
    eval_temperature: float = 0.01  # of the generated summaries (N+ section 5.1)
    save_every: int = 400  # optimizer steps between checkpoints that --resume can use; 0 for none
    keep: int = 1  # newest checkpoints that stay, beside the one being written: 12 bytes a trained parameter each
    on_nan: str = "stop"  # stop at a loss, score or gradient that is not finite, or skip: leave the step out and count
    preflight: bool = True  # check before the first step that the loss counts each label once, and EOS


PRESETS = {
    "llama-1b": {},
    "paper": {},
    # SmolLM2-135M on a GPU of 8 GB or more, and on CPUs by the hour. Its tokenizer writes a few more tokens a post than
    # the paper's: 544 and 56 cut none of 1,000 of OpenAI's posts and summaries, 512 would cut 2.1% of the posts.
    # lr: of 1e-4, 3e-4 and 1e-3 the lowest loss on held-out posts after 16 steps of 8 (docs/small_model.md).
    "smollm2": dict(lr=3e-4, max_grad_norm=1.0, max_query_length=544, response_length=56, microbatch_tokens=8192,
                    save_every=100),
    # The tiny model is a thousand times smaller, so its learning rate is several hundred times larger. batch_size keeps
    # the number of steps small; the rest is the sizes of its world.
    "tiny": dict(lr=2e-3, batch_size=64, max_updates=40, max_grad_norm=1.0, max_query_length=104, response_length=32,
                 microbatch_tokens=8192, eval_posts=256, save_every=20),
}  # fmt: skip


def learn(policy: Policy, sequences: list[list[int]], cfg: Config) -> torch.Tensor:
    """Forward and backward pass over a batch, a microbatch at a time -> its loss, (). Under torchrun each process goes
    through its share; gradients add up in the backward pass, the loss at the end."""
    device = policy.head_weight.device
    total = torch.zeros((), device=device)
    for group, counts_here in microbatches([len(s) for s in sequences], cfg.microbatch_tokens):
        packed = pack([sequences[i] for i in group], device)
        labels, counts = next_token_labels(packed)  # (N,), (N,)
        weights = sequence_mean_weights(packed, counts, sequences=cfg.batch_size)  # (N,)
        loss = policy.cross_entropy(packed, labels, weights if counts_here else torch.zeros_like(weights))
        loss.backward()
        total += loss.detach()
    return parallel.total(total)


@torch.no_grad()
def measure(
    policy: Policy, posts: list[Post], tokenizer: Tokenizer, cfg: Config, progress: Callable
) -> tuple[dict[str, float], list[Summary]]:
    """On held-out posts: the loss, and ROUGE against the authors' summaries of what the policy writes."""
    queries, references = encode_posts(posts, tokenizer, cfg.max_query_length)
    sequences = [query + reference for query, reference in zip(queries, references, strict=True)]
    loss = 0.0
    for group, counts_here in microbatches([len(s) for s in sequences], cfg.microbatch_tokens):
        packed = pack([sequences[i] for i in group], policy.head_weight.device)
        labels, counts = next_token_labels(packed)  # (N,), (N,)
        weights = sequence_mean_weights(packed, counts, sequences=len(posts))  # (N,)
        loss += counts_here * policy.cross_entropy(packed, labels, weights).item()
    loss = sum(parallel.gathered(loss))
    summaries = summarise(
        policy, tokenizer, queries, cfg.response_length, cfg.eval_temperature, seed=cfg.seed, progress=progress
    )
    scores = rouge([s.text for s in summaries], [post.summary for post in posts])
    metrics = {"validation/sft/loss": loss} | {f"validation/sft/rouge/{name}": f for name, f in scores.items()}
    return metrics | {"validation/sft/eos_rate": sum(s.has_eos for s in summaries) / len(summaries)}, summaries


def main(cfg: Config) -> None:
    check(cfg.lr_schedule in SCHEDULES, "lr_schedule", cfg.lr_schedule, f"one of {', '.join(SCHEDULES)}")
    parallel.check_enough("batch_size", cfg.batch_size)

    # 1. posts
    data, data_from = find_data(cfg.data, cfg.preset)
    folder, model_from = find_model("base", cfg.model, "model", cfg.preset)
    cfg.data, cfg.model = str(data), str(folder)  # what --resume goes on with
    tokenizer = load_tokenizer(folder)
    notes = check_folder(folder, tokenizer)
    train, valid = load_posts(data, "train"), load_posts(data, "valid")[: cfg.eval_posts]
    total_steps = cfg.num_epochs * (len(train) // cfg.batch_size)
    total_steps = min(total_steps, cfg.max_updates or total_steps)
    check(total_steps > 0, "batch_size", cfg.batch_size, f"at most the {len(train)} posts of {data}")

    show = ["train/sft/loss", "lr", "perf/tokens_per_s"]
    with Run("sft", cfg, total_steps=total_steps, show=show, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {len(train):,} posts, {len(valid):,} held out")
        run.say_all(notes)
        queries, responses = encode_posts(train, tokenizer, cfg.max_query_length, run.progress)
        run.say(f"tokens  {length_report(queries, [responses], cfg.response_length)}")

        # 2. model and optimizer
        policy = load_policy(folder, run.device, run.dtype, tokenizer, parts="masters")  # under torchrun: sharding.py
        policy.model.activation_checkpointing = cfg.activation_checkpointing
        optimizer = AdamW([policy], lr=cfg.lr)
        run.say(f"model   {folder} ({model_from}): {parameter_count(policy):,} parameters")
        run.say(f"plan    {total_steps} steps of {cfg.batch_size} posts")
        step = run.resume(optimizer)

        # 3. train
        while step < total_steps:
            began = now(run.device)
            lr = SCHEDULES[cfg.lr_schedule](step, total_steps, cfg.lr)
            batch = batch_indices(len(train), cfg.batch_size, cfg.seed, step)
            run.at(step + 1, [train[i].id for i in batch])
            sequences = [queries[i] + responses[i] for i in batch]  # ids are joined as they are, never encoded again
            if cfg.preflight and step == 0:
                preflight.report(preflight.sft(policy, sequences, tokenizer), run.say, "before step 1")
            loss = learn(policy, sequences, cfg)
            grad_norm = optimizer.step(lr, cfg.max_grad_norm, cfg.on_nan)
            step += 1
            metrics = {"train/sft/loss": loss, "lr": lr, "grad_norm": grad_norm, "episode": step * cfg.batch_size}
            tokens = sum(len(s) for s in sequences)
            run.log(step, metrics | {"perf/tokens_per_s": tokens / (now(run.device) - began)})
            run.end_step(step, optimizer)

        # 4. save
        policy = actor_of(policy)  # whole again, on every process
        save_policy(policy, run.folder / "final", tokenizer)
        run.say(f"model   saved to {run.folder / 'final'}")

        # 5. measure on held-out posts
        metrics, summaries = measure(policy, valid, tokenizer, cfg, run.progress)
        if unseen := without_words([post.summary for post in valid]):
            run.say(unseen)
        if metrics["validation/sft/eos_rate"] < preflight.MIN_EOS_RATE:
            run.say("note    it has hardly learned to stop: PPO's pre-flight will refuse it")
        run.log(total_steps, metrics)
        pairs = zip(valid, summaries, strict=True)
        run.samples(total_steps, [{"post": p.post, "reference": p.summary, "sft": s.text} for p, s in pairs])
        write_card(run.folder)
        run.say("next    python train_rm.py")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
