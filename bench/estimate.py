"""How long will `make demo` take here? One second of the demo's own work is timed, the rest is counted.

    python -m bench.estimate
    this machine learns at 155 GFLOP/s on 2 threads, and the demo is 8.4 TFLOP: about a minute and a half

The second is forward and backward passes of the SFT model over a batch of tiny posts, as train_sft.py makes them, so
the rate has matmuls, attention and elementwise work in it, and whatever else keeps the cores busy just now. The
floating-point operations follow from the scripts' settings (nanorlhf/monitoring/flops.py). What has no such count is in
STARTS and SLOWER. It is an estimate to plan a coffee by: a machine that gets busy or hot later takes longer, and each
stage shows its own ETA.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others

import time

import torch

import eval as evaluation
import train_ppo
import train_rm
import train_sft
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.models import Policy
from nanorlhf.monitoring.flops import head_flops, ppo_update_flops, trunk_flops
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.memory import keep_freed_memory
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.tiny.data import COMPARISONS, ensure_world

# From the command to the prompt `make demo` took 86, 109 and 198 s where learning has 155, 123 and 71 GFLOP/s: on 2
# cores of an AMD EPYC (Zen 5), by its AVX2 alone and by SSE4.1, at e02e560. The estimate says 91, 111 and 184.
STARTS = 12.0  # seconds of six starts of Python
SLOWER = 1.45  # than learning: sampling a token at a time, texts, metrics


def learning_flops(policy: Policy, sequences: list[list[int]]) -> float:
    """Forward and backward pass over the sequences, with the head at every token."""
    lengths = [len(sequence) for sequence in sequences]
    return 3 * (trunk_flops(policy.config, lengths) + head_flops(policy.config, sum(lengths)))


def demo_flops(policy: Policy, queries: list[list[int]], summaries: list[list[int]]) -> float:
    """All stages of `make demo`, from a few of their posts."""
    sft, rm, ppo = (s.Config(**s.PRESETS["tiny"]) for s in (train_sft, train_rm, train_ppo))
    n = len(queries)
    both = [query + summary for query, summary in zip(queries, summaries, strict=True)]
    pairs = [query + 2 * summary for query, summary in zip(queries, summaries, strict=True)]  # one query, two summaries
    steps = rm.num_epochs * (COMPARISONS["train"] // rm.batch_size)
    steps = min(steps, rm.max_updates or steps)
    updates = ppo.total_episodes // ppo.batch_size
    updates = min(updates, ppo.max_updates or updates)
    sampled = [len(query) + ppo.response_length for query in queries]
    one_update = ppo_update_flops(
        policy.config, sampled, [len(s) for s in both], ppo.response_length, ppo.num_ppo_epochs
    )
    # The evaluation samples from base, SFT and PPO, and scores what they wrote.
    posts = evaluation.PRESETS["tiny"]["num_posts"]
    R, config = ppo.response_length, policy.config
    read = 3 * trunk_flops(config, sampled, n * R) + 3 * trunk_flops(config, sampled, n) + 3 * head_flops(config, n * R)
    return (
        read * posts / n
        + learning_flops(policy, both) * sft.max_updates * sft.batch_size / n
        + 3 * trunk_flops(config, [len(pair) for pair in pairs], 2 * n) * steps * rm.batch_size / n
        + one_update * updates * ppo.batch_size / n
    )


def rate(policy: Policy, sequences: list[list[int]], seconds: float = 1.0, clock=time.perf_counter) -> float:
    """FLOP/s of train_sft.learn on this machine; the first pass warms up."""
    cfg = train_sft.Config(**train_sft.PRESETS["tiny"] | {"batch_size": len(sequences)})
    train_sft.learn(policy, sequences, cfg)
    began, passes = clock(), 0
    while clock() - began < seconds:
        train_sft.learn(policy, sequences, cfg)
        passes += 1
    return passes * learning_flops(policy, sequences) / (clock() - began)


def minutes(seconds: float) -> str:
    """In words, no finer than an estimate is."""
    if seconds < 45:
        return "less than a minute"
    if seconds < 105:
        return "about a minute" if seconds < 75 else "about a minute and a half"
    return f"about {seconds / 60:.0f} minutes"


def main() -> None:
    keep_freed_memory()  # as every run does
    tokenizer, policy = load_tokenizer(EMBEDDED / "sft"), load_policy(EMBEDDED / "sft")
    posts = load_posts(ensure_world("data/tiny"), "train")[:64]
    queries, summaries = (
        list(x) for x in encode_posts(posts, tokenizer, train_sft.PRESETS["tiny"]["max_query_length"])
    )
    work = demo_flops(policy, queries, summaries)
    speed = rate(policy, [query + summary for query, summary in zip(queries, summaries, strict=True)])
    threads = torch.get_num_threads()
    on = f"{threads} threads" if threads > 1 else "one thread"
    print(
        f"this machine learns at {speed / 1e9:.0f} GFLOP/s on {on}, and the demo is {work / 1e12:.1f} TFLOP: "
        f"{minutes(STARTS + SLOWER * work / speed)}",
        flush=True,
    )


if __name__ == "__main__":
    as_command(main)
