"""What do busy cores cost? The same work on all cores, alone and beside processes that want those cores for themselves.

    python -m bench.busy                  alone and with one busy process beside, for three settings: 5 minutes
    python -m bench.busy --beside 0 1 2   how many of them

A layer is shared out to as many threads as there are cores, and who is done waits for the others: awake for a while,
which saves a fraction of a millisecond, then asleep. When another process has taken a thread's core, those that wait
awake keep theirs from being used at all. GNU's OpenMP has 300,000 turns of that waiting loop; the scripts set 30,000
where they start alone and 1,000 where others run (nanorlhf/run/waiting.py). The work is train_sft.learn and a rollout
of the embedded SFT model, each in a process of its own, all settings in turn, a few rounds. Seconds are medians and
belong to the machine. One JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from statistics import median

import train_sft
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import check
from nanorlhf.rollout import generate
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.memory import keep_freed_memory
from nanorlhf.run.streams import as_command
from nanorlhf.run.waiting import ALONE, BESIDE_OTHERS
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.tiny.data import ensure_world

SPINS = {"300000": "OpenMP's own", str(ALONE): "the scripts' alone", str(BESIDE_OTHERS): "the scripts' beside others"}
BUSY = [sys.executable, "-c", "while True: pass"]


def work(passes: int = 8) -> dict[str, float]:
    """Median seconds of a pass after the first: learning from a batch, and sampling for it."""
    keep_freed_memory()  # as every run does
    policy, tokenizer = load_policy(EMBEDDED / "sft"), load_tokenizer(EMBEDDED / "sft")
    cfg = train_sft.Config(**train_sft.PRESETS["tiny"])
    posts = load_posts(ensure_world("data/tiny"), "train")[: cfg.batch_size]
    queries, summaries = encode_posts(posts, tokenizer, cfg.max_query_length)
    both = [query + summary for query, summary in zip(queries, summaries, strict=True)]
    took = defaultdict(list)
    for _ in range(passes + 1):
        began = time.perf_counter()
        train_sft.learn(policy, both, cfg)
        between = time.perf_counter()
        generate(policy, queries, cfg.response_length, temperature=0.7)
        took["learn"].append(between - began)
        took["rollout"].append(time.perf_counter() - between)
    return {name: median(seconds[1:]) for name, seconds in took.items()}


def measure(spins: str, beside: int) -> dict[str, float]:
    """`work` in a process with this setting, beside so many busy ones."""
    others = [subprocess.Popen(BUSY) for _ in range(beside)]
    try:
        said = subprocess.check_output(
            [sys.executable, "-m", "bench.busy", "--work"], env=os.environ | {"GOMP_SPINCOUNT": spins}, encoding="utf-8"
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    return json.loads(said.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.busy", description=__doc__.split("\n")[0])
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1], help="busy processes")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each setting; the median counts")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work()))
        return
    check(args.rounds >= 1, "rounds", args.rounds, "at least 1")
    check(min(args.beside) >= 0, "beside", args.beside, "no number below 0")
    seconds = defaultdict(list)
    for _ in range(args.rounds):
        for beside in args.beside:
            for spins in SPINS:
                for name, took in measure(spins, beside).items():
                    seconds[name, beside, spins].append(took)
    found = {key: median(values) for key, values in seconds.items()}
    print("| work | busy processes beside | " + " | ".join(f"{words}, s" for words in SPINS.values()) + " |")
    print("|---|---|---|---|---|")
    for name in ("learn", "rollout"):
        for beside in args.beside:
            print(f"| {name} | {beside} | " + " | ".join(f"{found[name, beside, spins]:.3f}" for spins in SPINS) + " |")
    rows = [{"work": key[0], "beside": key[1], "spins": key[2], "seconds": value} for key, value in found.items()]
    print(json.dumps({"bench": "busy", "cores": os.cpu_count(), "results": rows}))


if __name__ == "__main__":
    as_command(main)
