"""How many floating-point operations `make demo` costs, stage by stage, from the presets alone: nothing is trained.

    python -m experiments.demo_cost             today's tiny presets, beside the recipe of before

Counted as in nanorlhf/flops.py: what the mathematics needs, a multiplication and an addition being 2 operations, a
backward pass twice a forward one. Lengths are those of the tiny world's first posts and pairs.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import eval as evaluation
import train_ppo
import train_rm
import train_sft
from nanorlhf.data.encoding import encode_comparisons, encode_posts
from nanorlhf.data.tldr import load_comparisons, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.llama import LlamaConfig
from nanorlhf.monitoring.flops import head_flops, ppo_update_flops, trunk_flops
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.streams import as_command
from nanorlhf.storage.model_config import read_config
from nanorlhf.tiny.data import ensure_world

SAMPLE = 1024  # posts and pairs whose lengths are taken
# The recipe that the present one replaced, where it differs from the presets.
BEFORE = {
    "sft": dict(lr=2e-3, batch_size=64, max_updates=96, eval_posts=256),
    "rm": dict(lr=1.5e-3, batch_size=64, max_updates=None, eval_pairs=1024),
    "ppo": dict(lr=3e-4, critic_lr=None, critic_warmup=0, lr_warmup=0, kl_coef=0.15, num_ppo_epochs=4, num_minibatches=1,
                batch_size=128, total_episodes=3072),
    "eval": dict(num_posts=512, diversity_posts=64),
}  # fmt: skip


class World(NamedTuple):
    """Lengths in tokens of the tiny world's posts and pairs, and the model that reads them."""

    model: LlamaConfig
    posts: int
    pairs: int
    held_out_pairs: int
    queries: list[int]
    summaries: list[int]
    chosen: list[tuple[int, int, int]]  # (query, chosen, rejected)

    def trunk(self, lengths: list[int], number: int, read: int | None = None) -> float:
        """A forward pass over `number` sequences of lengths like these, of each of which `read` tokens are read (all)."""
        read = None if read is None else read * len(lengths)
        return trunk_flops(self.model, lengths, read) * number / len(lengths)

    def with_summaries(self) -> list[int]:
        return [q + s for q, s in zip(self.queries, self.summaries, strict=True)]

    def with_responses(self, length: int) -> list[int]:
        return [q + length for q in self.queries]


@cache
def world() -> World:
    folder, tokenizer = ensure_world(Path("data/tiny")), load_tokenizer(EMBEDDED / "base")
    posts, pairs = load_posts(folder, "train"), load_comparisons(folder, "train")
    queries, summaries = encode_posts(posts[:SAMPLE], tokenizer, 104)
    three = zip(*encode_comparisons(pairs[:SAMPLE], tokenizer, 104), strict=True)
    counts = len(posts), len(pairs), len(load_comparisons(folder, "valid"))
    lengths = [len(q) for q in queries], [len(s) for s in summaries], [(len(a), len(b), len(c)) for a, b, c in three]
    return World(read_config(EMBEDDED / "base"), *counts, *lengths)


def sft_flops(cfg: train_sft.Config, w: World) -> float:
    """Training, then loss and summaries of the held-out posts."""
    steps, sequences = min(cfg.max_updates or w.posts, w.posts // cfg.batch_size), w.with_summaries()

    def read(number: int) -> float:  # trunk and head at every token
        return w.trunk(sequences, number) + head_flops(w.model, number * sum(sequences) // len(sequences))

    written = w.trunk(w.with_responses(cfg.response_length), cfg.eval_posts, cfg.response_length)
    written += head_flops(w.model, cfg.eval_posts * cfg.response_length)
    return 3 * read(steps * cfg.batch_size) + read(cfg.eval_posts) + written


def rm_flops(cfg: train_rm.Config, w: World) -> float:
    """Training, the query of a pair being read once; the shift; accuracy on held-out pairs."""
    steps = min(cfg.max_updates or w.pairs, w.pairs // cfg.batch_size)
    shift = w.trunk(w.with_summaries(), min(cfg.shift_posts, w.posts), 1)
    alone = [q + c for q, c, _ in w.chosen] + [q + r for q, _, r in w.chosen]
    held_out = w.trunk(alone, 2 * min(cfg.eval_pairs, w.held_out_pairs), 1)
    return 3 * w.trunk([sum(three) for three in w.chosen], steps * cfg.batch_size, 2) + shift + held_out


def ppo_flops(cfg: train_ppo.Config, w: World) -> float:
    """All updates; what the pre-flight and the looks at samples read again is left out."""
    updates = cfg.total_episodes // cfg.batch_size
    updates = min(updates, cfg.max_updates or updates)
    lengths, finished = w.with_responses(cfg.response_length), w.with_summaries()
    share = cfg.batch_size / len(lengths)
    warm, full = (
        share * ppo_update_flops(w.model, lengths, finished, cfg.response_length, cfg.num_ppo_epochs, warming)
        for warming in (True, False)
    )
    return cfg.critic_warmup * warm + (updates - cfg.critic_warmup) * full


def eval_flops(cfg: evaluation.Config, w: World, policies: int = 3) -> float:
    """Summaries and loss of each policy, samples for diversity and their exact KL, the reward model's scores."""
    responses, sequences, R = w.with_responses(cfg.response_length), w.with_summaries(), cfg.response_length

    def write(number: int) -> float:
        return w.trunk(responses, number, R) + head_flops(w.model, number * R)

    loss = w.trunk(sequences, cfg.num_posts) + head_flops(w.model, cfg.num_posts * sum(w.summaries) // len(w.summaries))
    each = write(cfg.num_posts) + loss + write(cfg.diversity_samples * cfg.diversity_posts)
    exact_kl = write(cfg.diversity_posts) + 2 * write(cfg.diversity_posts)  # sampled, then read by both
    alone = [q + c for q, c, _ in w.chosen] + [q + r for q, _, r in w.chosen]
    scores = w.trunk(sequences, (policies + 1) * cfg.num_posts, 1)
    scores += w.trunk(alone, 2 * min(cfg.num_comparisons, w.held_out_pairs), 1)
    return policies * each + (policies - 1) * exact_kl + scores


STAGES = {
    "sft": (train_sft, sft_flops), "rm": (train_rm, rm_flops), "ppo": (train_ppo, ppo_flops),
    "eval": (evaluation, eval_flops),
}  # fmt: skip


def cost(recipe: dict[str, dict]) -> dict[str, float]:
    """{stage: operations} of the tiny presets with these settings on top."""
    found = {}
    for stage, (script, count) in STAGES.items():
        found[stage] = count(script.Config(**(script.PRESETS["tiny"] | recipe.get(stage, {}))), world())
    return found


def main() -> None:
    before, now = cost(BEFORE), cost({})
    print("| stage | TFLOP before | TFLOP now | now / before |\n|---|---|---|---|")
    rows = [(stage, before[stage], now[stage]) for stage in STAGES]
    for stage, old, new in [*rows, ("all", sum(before.values()), sum(now.values()))]:
        print(f"| {stage} | {old / 1e12:.2f} | {new / 1e12:.2f} | {new / old:.2f} |")
    print(json.dumps({"experiment": "demo_cost", "before": before, "now": now}))


if __name__ == "__main__":
    as_command(main)
