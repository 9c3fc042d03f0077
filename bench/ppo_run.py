"""train_ppo.py itself at full depth, twenty updates: does it hold? Pre-flight, memory and time from update to update.

    python -m bench.ppo_run                       Llama-3.2-1B's shape on a GPU: 8 GB of disk, 20 updates of 6 s
    python -m bench.ppo_run --make FOLDER         only writes the models and posts, to be used later with --from FOLDER
    python -m bench.ppo_run --device cpu --updates 2       two small layers, as a check of this file

Models have random weights, a tokenizer of the right size (bench/stand_ins.py), and two corrections without which the
pre-flight would rightly stop them: EOS is made so likely that responses end after some 16 tokens, and the
reward model's shift is measured. Posts are random words, as long as on TL;DR (bench/shapes.py). What a run that ends
would save is not waited for. One JSON line last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.rows import note
from bench.shapes import Shape, random_model, shape_for
from bench.stand_ins import SPECIALS, write_llama3_tokenizer
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import format_query, load_posts
from nanorlhf.data.tokenizer import Tokenizer, load_tokenizer
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.run.device import pick_device, pick_dtype
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import save_policy, save_scalar
from nanorlhf.tiny.data import write_world

ROOT = Path(__file__).parents[1]
SMALL_VOCABULARY = 2048  # of the check on a CPU
PHASES = ("time/rollout", "time/score", "time/learn")
SMALL = "--batch_size 8 --response_length 16 --microbatch_tokens 2048 --num_ppo_epochs 2"
# With random weights nothing is learned, so the learning rate is that of the recipe and no more than a formality.
FLAGS = "--preset llama-1b --run_name ppo --overwrite --save_every 0 --sample_every 0"


def shape_of(device: torch.device) -> Shape:
    """Llama-3.2-1B's, or on a CPU two layers of it, narrow."""
    shape = shape_for("meta")
    if device.type == "cuda":
        return shape
    small = dict(vocab_size=SMALL_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
                 num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return replace(shape, config=replace(shape.config, **small), mean=120, spread=20, least=90)


def make(folder: Path, device: torch.device, posts: int) -> dict:
    """folder/{data,sft,rm}. Returns what was chosen."""
    began, shape = time.perf_counter(), shape_of(device)
    world = write_world(folder / "world", {"train": 64, "valid": 4, "test": 4}, {"train": 16, "valid1": 8})
    texts = [post.post for post in load_posts(world, "train")]
    vocabulary = shape.config.vocab_size
    write_llama3_tokenizer(folder / "tokenizer", texts, vocabulary)
    ids = dict(bos_token_id=vocabulary - SPECIALS, eos_token_id=vocabulary - SPECIALS + 1)
    (folder / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "llama"} | ids), encoding="utf-8")
    tokenizer = load_tokenizer(folder / "tokenizer")
    words = [w for w in sorted(set(" ".join(texts).split())) if w.isalpha() and len(tokenizer.encode(f" {w}")) == 1]
    write_posts(folder / "data", tokenizer, shape, words, posts)
    ids |= dict(pad_token_id=tokenizer.pad_id)
    torch.manual_seed(0)
    config = replace(shape.config, **ids)
    policy = random_model(Policy, config, device, pick_dtype("auto", device))
    few = load_posts(folder / "data", "train")[:64]
    queries, summaries = encode_posts(few, tokenizer, shape.most)
    scale = make_it_stop(policy, list(queries)[:16], tokenizer.eos_id, shape.response // 2)
    save_policy(policy, folder / "sft", tokenizer)
    reward_model = reward_model_from(policy, seed=0)
    known = [q + s for q, s in zip(queries, summaries, strict=True)]
    scores = torch.cat([reward_model.scores(known[i : i + 16]) for i in range(0, len(known), 16)])
    reward_model.score_shift = scores.mean().item()
    save_scalar(reward_model, folder / "rm", tokenizer)
    return {"make_s": time.perf_counter() - began, "eos_scale": scale, "score_std": scores.std().item(),
            "mean_query": float(np.mean(queries.lengths))}  # fmt: skip


def write_posts(folder: Path, tokenizer: Tokenizer, shape: Shape, words: list[str], count: int) -> None:
    """TL;DR's format, with queries and summaries of the lengths of `shape`."""
    (folder / "tldr").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    frame = 1 + len(tokenizer.encode(format_query("bench", "a title", "")))
    summaries = rng.integers(shape.response // 2, 3 * shape.response // 2, count)
    with open(folder / "tldr" / "train.jsonl", "w", encoding="utf-8") as file:
        for i, (n, m) in enumerate(zip(shape.lengths(count), summaries, strict=True)):
            post, summary = (" ".join(rng.choice(words, k)) for k in (max(1, n - frame), m))
            row = dict(id=f"b{i}", subreddit="r/bench", title="a title", post=post, summary=summary)
            file.write(json.dumps(row) + "\n")


@torch.no_grad()
def make_it_stop(policy: Policy, queries: list[list[int]], eos_id: int, tokens: int, temperature: float = 0.7) -> float:
    """Lengthen the head's row of EOS until its probability is 1/tokens on average. Returns by how much."""
    logits = torch.cat([rows[len(rows) // 2 :] for query in queries for rows in policy.logits([query])])  # (n, V)
    eos = logits[:, eos_id].clone()
    logits[:, eos_id] = -torch.inf
    others = (logits / temperature).logsumexp(-1)

    def rate(scale: float) -> float:
        return torch.sigmoid(scale * eos / temperature - others).mean().item()

    low, high = 1.0, 1e3
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rate(middle) < 1 / tokens else (low, middle)
    policy.head_weight[eos_id] *= high
    return high


def watch(command: list[str], folder: Path, updates: int) -> tuple[int | None, list[dict]]:
    """Run until `updates` are logged, and no further: (exit status or None, the metrics)."""
    child, noted = subprocess.Popen(command, cwd=folder, stdout=sys.stderr), 0
    try:
        while child.poll() is None:
            rows = read_metrics(folder / "runs" / "ppo") if (folder / "runs/ppo/metrics.jsonl").exists() else []
            for row in rows[noted:]:
                note(row)
            noted = len(rows)
            if len(rows) >= updates:
                break
            time.sleep(0.2)
        return child.poll(), read_metrics(folder / "runs" / "ppo")
    finally:
        child.kill()
        child.wait()


def flat(values: list[float]) -> dict[str, float]:
    """How the second half of a series differs from the first, and how far its extremes are from its median."""
    half = len(values) // 2
    middle = median(values)
    return {"median": middle, "least": min(values), "most": max(values),
            "drift": median(values[half:]) / median(values[:half]) - 1}  # fmt: skip


def summary(rows: list[dict]) -> dict:
    """The first update also captures graphs and checks: it is left out of the times."""
    later = rows[1:]
    seconds = [sum(row[name] for name in PHASES) for row in later]
    found = {"updates": len(rows), "seconds": flat(seconds)}
    found |= {name.removeprefix("time/"): flat([row[name] for row in later]) for name in PHASES}
    peaks = [row["perf/peak_gib"] for row in rows]
    found |= {"peak_gib": peaks[-1], "peak_growth": peaks[-1] / peaks[min(1, len(peaks) - 1)] - 1}
    found |= {"mfu": median(row["perf/mfu"] for row in later)} if "perf/mfu" in later[0] else {}
    found["preflight"] = {k.removeprefix("preflight/"): v for k, v in rows[0].items() if k.startswith("preflight/")}
    return found | {"per_update": [{name: row[name] for name in (*PHASES, "perf/peak_gib")} for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ppo_run", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--updates", type=int, default=20, help="at least 3")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write models and posts here, run nothing")
    parser.add_argument("--from", dest="made", type=Path, metavar="FOLDER", help="that --make has written")
    args = parser.parse_args()
    if args.updates < 3:
        parser.error(f"got --updates {args.updates}, expected 3 or more: the first is a warm-up")
    device = pick_device(args.device)
    posts = max(640, 128 * args.updates) if device.type == "cuda" else 64
    if args.make:
        print(json.dumps({"bench": "ppo_run", "made": make(args.make, device, posts)}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.made or Path(temporary)
        about = {}
        if not (folder / "rm" / "config.json").exists():  # by a process of its own: what it holds of the GPU goes
            command = [sys.executable, "-m", "bench.ppo_run", "--device", args.device, "--updates", str(args.updates)]
            done = subprocess.run(
                [*command, "--make", folder], cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8"
            )
            about = json.loads(done.stdout.splitlines()[-1])["made"]
        flags = f"{FLAGS} {'' if device.type == 'cuda' else SMALL} --device {args.device} --max_updates {args.updates}"
        models = ["--sft_model", folder / "sft", "--reward_model", folder / "rm", "--data", folder / "data"]
        began = time.perf_counter()
        command = [sys.executable, ROOT / "train_ppo.py", *flags.split(), *map(str, models)]
        status, rows = watch(command, folder, args.updates)
        if len(rows) < args.updates:
            sys.exit(f"train_ppo.py ended with status {status} after {len(rows)} of {args.updates} updates")
        about |= {"wall_s": time.perf_counter() - began, "device": str(device), "torch": torch.__version__}
    print(json.dumps({"bench": "ppo_run", "shape": shape_of(device).name if device.type == "cuda" else "small",
                      **about, **summary(rows)}))  # fmt: skip


if __name__ == "__main__":
    as_command(main)
