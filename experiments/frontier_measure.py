"""How good is a policy, and how far from SFT? One row of the frontier's results, on posts that nothing was tuned on.

Truth: the gold score, and the win rate over SFT by it, plain and at equal length. Proxy: the score of the reward model
that was optimised. Distance: the exact KL from SFT of a sampled summary, in nats. Intervals are 95%, bootstrap over
posts: the noise within a run. That between runs is frontier_report.py's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanorlhf.data.tldr import Post
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.evaluation.divergence import kl_from_sft
from nanorlhf.evaluation.hacks import ALARMS
from nanorlhf.evaluation.judge import OUTCOMES, gold_scores, reward_model_judge, verdict
from nanorlhf.evaluation.metrics import (
    bootstrap_interval,
    length_controlled_interval,
    length_controlled_win_rate,
    mean,
    words,
)
from nanorlhf.evaluation.summaries import Plan, Written, write
from nanorlhf.run.run import read_metrics
from nanorlhf.storage.checkpoint import load_scalar
from nanorlhf.storage.jsonl import read_jsonl

TEMPERATURE, RESPONSE, QUERY, TOKENS = 0.7, 32, 104, 8192  # eval.py's preset tiny
CURVE = ("objective/gold", "objective/scores", *(name for name, *_ in ALARMS))
CPU, FLOAT32 = torch.device("cpu"), torch.float32


@dataclass(frozen=True)
class Judged:
    """What a policy wrote for the held-out posts, with the truth and the proxy of each text."""

    texts: list[str]
    gold: list[float]
    scores: list[float]
    eos_rate: float


def quiet(items: Sequence, what: str = "", total: int | None = None) -> Sequence:
    return items


def judged(policy: Path, reward_model: Path, posts: list[Post], noise: int) -> Judged:
    """Sampled at PPO's temperature. noise: seed of the sampling, another one for each policy."""
    plan = Plan(TEMPERATURE, RESPONSE, QUERY, noise, samples=0, sample_posts=0, sample_temperature=TEMPERATURE)
    written: Written = write(policy, posts, plan, CPU, FLOAT32, TOKENS, quiet)
    tokenizer = load_tokenizer(reward_model)
    judge = reward_model_judge(load_scalar(reward_model, CPU, FLOAT32, tokenizer), tokenizer, QUERY, TOKENS)
    eos_rate = sum(summary.has_eos for summary in written.summaries) / len(posts)
    return Judged(written.texts, gold_scores(posts, written.texts), judge.scores(posts, written.texts), eos_rate)


def against(ours: Judged, theirs: Judged, seed: int) -> dict[str, float | list[float]]:
    """Levels of ours, gains over theirs on the same posts, win rates. Every number with its interval over posts.

    -> gold, proxy, gold_gain, proxy_gain, win_rate, lc_win_rate, each also as <name>_interval; length in words;
    agreement: of the posts on which truth and proxy both differ, the share on which they prefer the same text, None
    where there is none
    """
    outcomes = [OUTCOMES[verdict(a, b)] for a, b in zip(ours.gold, theirs.gold, strict=True)]
    lengths = [[len(words(text)) for text in side.texts] for side in (ours, theirs)]
    samples = {
        "gold": np.array(ours.gold),
        "proxy": np.array(ours.scores),
        "gold_gain": np.array(ours.gold) - np.array(theirs.gold),
        "proxy_gain": np.array(ours.scores) - np.array(theirs.scores),
        "win_rate": np.array(outcomes),
    }
    row = {}
    for name, values in samples.items():
        row |= {name: float(values.mean()), f"{name}_interval": list(bootstrap_interval(values, seed))}
    row["lc_win_rate"] = length_controlled_win_rate(outcomes, *lengths)
    row["lc_win_rate_interval"] = list(length_controlled_interval(outcomes, *lengths, seed=seed, resamples=400))
    signs = np.sign(samples["gold_gain"].round(6)) * np.sign(samples["proxy_gain"])
    row["agreement"] = float((signs[signs != 0] > 0).mean()) if signs.any() else None
    return row | {"length": mean(lengths[0]), "eos_rate": ours.eos_rate}


def best_of_n(folder: Path, theirs: Judged, posts: list[Post], seed: int) -> list[dict]:
    """A row for each n of a run of experiments/best_of_n.py: its own figures, over all subsets of the samples; gains
    over its n = 1; and, from its files of winners, what it does not have: length, and the win rate at equal length."""
    rows = json.loads((folder / "best_of_n.json").read_text(encoding="utf-8"))["rows"]
    found = []
    for row in rows:
        written = {w["id"]: w for w in read_jsonl(folder / f"best_of_{row['n']}.jsonl", having="id")}
        winners = [written[post.id] for post in posts]
        texts, gold, scores = ([winner[name] for winner in winners] for name in ("summary", "gold", "score"))
        extra = against(Judged(texts, gold, scores, float("nan")), theirs, seed)
        figures = ("gold", "proxy", "win_rate", "kl")
        line = {name: row[name] for figure in figures for name in (figure, f"{figure}_interval")}
        line |= {f"{name}_gain": row[name] - rows[0][name] for name in ("gold", "proxy")}
        line |= {name: extra[name] for name in ("lc_win_rate", "lc_win_rate_interval", "length", "agreement")}
        line |= {"kl_bound": row["kl_bound"], "posts": len(posts), "strength": f"n {row['n']}"}
        found.append(rounded(line))
    assert rows[0]["n"] == 1, "gains are over a single sample: the first n is to be 1"
    return found


def distance(policy: Path, sft: Path, posts: list[Post], noise: int) -> dict[str, float | list[float]]:
    """The exact KL from SFT, nats a summary; 0 of SFT itself."""
    if policy == sft:
        return {"kl": 0.0, "kl_interval": [0.0, 0.0]}
    values = kl_from_sft(policy, sft, posts, QUERY, RESPONSE, TEMPERATURE, noise, TOKENS, CPU, FLOAT32)
    return {"kl": mean(values), "kl_interval": list(bootstrap_interval(values, noise))}


def curve(run: Path) -> dict[str, list[float | None]]:
    """Truth, proxy and what the alarms look at, update by update: what early_warning.py grades. Empty for a run without
    updates of that kind."""
    path = run / "metrics.jsonl"
    rows = [row for row in read_metrics(run) if "objective/gold" in row] if path.is_file() else []
    found = {name: [row.get(name) for row in rows] for name in CURVE if any(row.get(name) is not None for row in rows)}
    return {name: [None if value is None else round(value, 4) for value in values] for name, values in found.items()}


def rounded(row: dict) -> dict:
    """Numbers to five digits: what a line of results needs."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.5g}")
        return [short(part) for part in value] if isinstance(value, list) else value

    return {name: short(value) for name, value in row.items()}
