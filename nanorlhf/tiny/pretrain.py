"""Pretrain the tiny world's base model from nothing: what Llama-3.2-1B's pretraining is to the real pipeline.

    python -m nanorlhf.tiny.pretrain --run_name half
    python -m nanorlhf.tiny.pretrain --model runs/half/final

Reads nothing else (the documents are made as they are needed); writes runs/base/final. A 0.9 M-parameter Llama reads
13 M tokens of posts, comments and copy drills (corpus.py), then, from `--model`, 13 M tokens of retellings with slips
(slips.py): what large models call mid-training. Watch `probe/...`: the share of facts of an unseen post that the model
copies into a comment (copying appears within a few hundred steps, all at once, and the loss hardly shows it), and
`slip/...`: how well it tells a wrong fact from a right one, 0.5 by chance and 1 always.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import linear_cross_entropy
from nanorlhf.data.tldr import format_query
from nanorlhf.data.tokenizer import Tokenizer, load_tokenizer
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.losses import next_token_labels
from nanorlhf.models import Policy, parameter_count
from nanorlhf.optim import AdamW
from nanorlhf.packing import pack
from nanorlhf.run.config import cli
from nanorlhf.run.run import Run
from nanorlhf.storage.checkpoint import load_policy, save_policy
from nanorlhf.tiny import corpus, slips
from nanorlhf.tiny.grammar import fill, wrong_value
from nanorlhf.tiny.posts import make_post
from nanorlhf.tiny.slips import true_wordings, wording

MODEL = dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # only tiny: the base of a real run is downloaded, not trained here
    run_name: str = "base"  # folder under runs/
    model: str | None = None  # None: the first half, from nothing; a folder: the second half, on from there
    overwrite: bool = False  # delete an earlier run of this name first
    seed: int = 0  # initial weights
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16
    # -- optimisation
    lr: float | None = None  # peak learning rate, cosine to 0; None: 3e-3 in the first half, 2e-3 in the second
    warmup_steps: int = 100  # optimizer steps
    steps: int = 3200  # optimizer steps, in each half
    batch_tokens: int = 4096  # tokens a step: about 40 documents


SLOTS = ("who", "act", "obj", "rea", "q")
SECOND_HALF = 500_000  # number of its first document: other posts than those of the first half

PRESETS = {"tiny": {}, "llama-1b": {}}
# What each fact's slot follows in the probe's comment:
# "So your boss broke your laptop and he refuses to pay? You should ..."
PROBE = (
    ("So your", None), ("{who}", "who"), ("{act}", "act"), ("your", None), ("{obj}", "obj"), ("and", None),
    ("{he}", "he"), ("{rea}", "rea"), ("? You should", None), ("{ask}", "q"),
)  # fmt: skip


def copy_probe(policy: Policy, tokenizer: Tokenizer, posts: int = 64) -> dict[str, float]:
    """Share of held-out posts in which the most likely next token begins the right fact, by fact."""
    sequences, targets = [], []
    for index in range(posts):
        post = make_post("valid", index)
        text = format_query(post.subreddit, post.title, post.post).removesuffix("\n\nTL;DR:") + "\n\nCOMMENT:"
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        for piece, fact in PROBE:
            tokens = tokenizer.encode(piece[0] == "?" and piece or " " + fill(piece, post.facts))
            if fact:
                targets.append((fact, index, len(ids) - 1, tokens[0]))  # the token before predicts it
            ids += tokens
        sequences.append(ids)
    predictions = [logits.argmax(-1) for logits in policy.logits(sequences)]
    right: dict[str, list[bool]] = {}
    for fact, index, position, token in targets:
        right.setdefault(fact, []).append(predictions[index][position].item() == token)
    return {f"probe/{fact}": sum(hits) / len(hits) for fact, hits in right.items()}


def slip_probe(policy: Policy, tokenizer: Tokenizer, posts: int = 64) -> dict[str, float]:
    """How often "I mean" is likelier after a wrong value of a fact than after a right one, by fact.

    The area under the ROC curve over held-out posts: 0.5 by chance, 1 if every slip is noticed.
    """
    rng = random.Random(0)
    before = (" My", "", " my", " and {he}", ", should I")  # the words before who, act, obj, rea, q
    sequences, asked = [], []
    for index in range(posts):
        post = make_post("valid", index)
        facts, text = post.facts, format_query(post.subreddit, post.title, post.post).removesuffix("\n\nTL;DR:")
        ids = [tokenizer.bos_id, *tokenizer.encode(text + "\n\nEDIT:")]
        for (slot, right), words in zip(true_wordings(facts, rng).items(), before, strict=True):
            wrong = wording(slot, wrong_value(slot, facts, rng), facts, rng)
            slipped = rng.random() < 0.5
            ids += tokenizer.encode(f"{fill(words, facts)} {wrong if slipped else right}")
            asked.append((slot, slipped, len(sequences), len(ids) - 1))
            if slipped:
                ids += tokenizer.encode(f" I mean {right}")
        sequences.append(ids)
    mark = tokenizer.encode(" I")[-1]
    logprobs = [logits.log_softmax(-1)[:, mark] for logits in policy.logits(sequences)]
    found = {}
    for name in SLOTS:
        after = {
            kind: torch.stack([logprobs[i][at] for slot, slipped, i, at in asked if (slot, slipped) == (name, kind)])
            for kind in (True, False)
        }
        found[f"slip/{name}"] = (after[True][:, None] > after[False]).float().mean().item()
    return found


def main(cfg: Config) -> None:
    second = cfg.model is not None
    document = slips.document if second else corpus.document
    peak = (2e-3 if second else 3e-3) if cfg.lr is None else cfg.lr
    tokenizer = load_tokenizer(Path(__file__).parent)
    facts = [f"slip/{slot}" for slot in SLOTS] if second else [f"probe/{name}" for _, name in PROBE if name]
    run = Run("base", cfg, total_steps=cfg.steps, show=["train/loss", *facts])
    if second:
        policy = load_policy(cfg.model).to(run.device, run.dtype)
    else:
        config = LlamaConfig(
            vocab_size=tokenizer.vocab_size, **MODEL, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
            max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        )  # fmt: skip
        policy = Policy(config).to(run.device, run.dtype)
        initialise(policy, seed=cfg.seed)
    optimizer = AdamW([policy], lr=peak, eps=1e-8, beta2=0.98)
    run.say(f"{parameter_count(policy):,} parameters, {cfg.steps * cfg.batch_tokens / 1e6:.1f} M tokens")

    index = SECOND_HALF if second else 0
    with run:
        for step in range(cfg.steps):
            began = time.monotonic()
            sequences, tokens = [], 0
            while tokens < cfg.batch_tokens:
                sequences.append([tokenizer.bos_id, *tokenizer.encode(document(index)), tokenizer.eos_id])
                tokens += len(sequences[-1])
                index += 1
            packed = pack(sequences, device=run.device)
            labels, counts = next_token_labels(packed)  # (N,) each
            weights = counts.float() / counts.sum()  # the plain mean over tokens
            loss = linear_cross_entropy(policy.hidden(packed), policy.head_weight, labels, weights)
            loss.backward()
            warmup = min(1.0, (step + 1) / cfg.warmup_steps)
            lr = peak * warmup * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
            optimizer.step(lr, max_grad_norm=1.0)
            if (step + 1) % 50 == 0:
                metrics = {"train/loss": loss, "lr": lr, "perf/tokens_per_s": tokens / (time.monotonic() - began)}
                probes = copy_probe(policy, tokenizer) | (slip_probe(policy, tokenizer) if second else {})
                run.log(step + 1, metrics | probes)
        save_policy(policy, run.folder / "final", tokenizer, dtype=torch.bfloat16)


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
