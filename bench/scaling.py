"""Cost grows linearly with tokens: seconds of a learning pass and of a rollout over batch size and over query length.

    python -m bench.scaling                      on a CPU, the tiny model; writes docs/scaling.png
    python -m bench.scaling --out other.png

Each line is fitted as seconds = c * tokens^exponent (least squares on the logarithms); 1 is linear. Attention grows
with the square of a length, so beside each stands the exponent of the FLOPs (flops.py). Sizes take turns, the
clock is CPU time of one thread, and each point is the fastest of --repeats: other jobs only ever slow a run down. One
JSON line last.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import train_ppo
from bench.shapes import four_models, shape_for
from nanorlhf.evaluation.figures import GREY, KL, PROXY, dress
from nanorlhf.monitoring.flops import head_flops, trunk_flops
from nanorlhf.packing import split_by_tokens
from nanorlhf.ppo import Experience
from nanorlhf.rollout import generate
from nanorlhf.run.memory import keep_freed_memory
from nanorlhf.run.streams import as_command

BATCHES, LENGTHS = (16, 32, 64, 128, 256), (64, 128, 256, 512, 1024)
FIXED_LENGTH, FIXED_BATCH = 128, 32  # tokens of a query while the batch grows, queries while they grow


def learn(models, queries: list[list[int]], cfg: train_ppo.Config) -> None:
    """One pass of train_ppo.learn over the batch, forward and backward, policy and critic."""
    policy, _, critic, _ = models
    B, R = len(queries), cfg.response_length
    sequences = [query + [5] * R for query in queries]
    numbers, mask = torch.zeros(B, R), torch.ones(B, R, dtype=torch.bool)
    episode = Experience(sequences, torch.full((B, R), 5), mask, mask, *(numbers,) * 4)
    for group in split_by_tokens([len(s) for s in sequences], cfg.microbatch_tokens):
        train_ppo.learn(policy, critic, episode, np.arange(B), np.array(group), cfg)
    for parameter in [*policy.parameters(), *critic.parameters()]:
        parameter.grad = None


def rollout(models, queries: list[list[int]], cfg: train_ppo.Config) -> None:
    generate(models[0], queries, cfg.response_length, cfg.temperature)


WORK = {"learn": learn, "rollout": rollout}


def exponent(tokens: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log tokens: 1 is linear, 2 quadratic."""
    return float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0])


def measure(models, work: str, sizes: list[tuple[int, int]], cfg: train_ppo.Config, repeats: int) -> list[dict]:
    """Seconds at each (queries, tokens a query)."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(3, models[0].config.vocab_size, size).tolist() for size in sizes]
    best = [float("inf")] * len(sizes)
    for turn in range(repeats + 1):  # the first prepares the matrix kernels of these shapes
        for place, queries in enumerate(batches):
            began = time.process_time()
            WORK[work](models, queries, cfg)
            if turn:
                best[place] = min(best[place], time.process_time() - began)
    R = cfg.response_length
    return [
        {"queries": b, "length": t, "tokens": b * (t + R), "s": s, "flops": flops_of(models[0].config, work, b, t, R)}
        for (b, t), s in zip(sizes, best, strict=True)
    ]


def flops_of(config, work: str, queries: int, length: int, R: int) -> float:
    trunk, head = trunk_flops(config, [length + R] * queries, queries * R), head_flops(config, queries * R)
    return trunk + head if work == "rollout" else 3 * (2 * trunk + head)


def draw(lines: dict[str, list[dict]], exponents: dict[str, float], out: Path) -> None:
    """Two panels, one a kind of growth; log-log, with a dotted line of slope 1 for the eye."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.3), layout="constrained")
    titles = {"batch": f"more queries of {FIXED_LENGTH} tokens", "length": f"longer queries, {FIXED_BATCH} of them"}
    for axes, (growth, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        dress(axes, title, "tokens, queries and responses")
        for work, colour in (("learn", PROXY), ("rollout", KL)):
            points = lines[f"{work} {growth}"]
            x, y = [p["tokens"] for p in points], [p["s"] for p in points]
            label = f"{work}: exponent {exponents[f'{work} {growth}']:.2f}"
            axes.plot(x, y, marker="o", markersize=4, color=colour, label=label)
            linear = "linear" if work == "rollout" else None  # named once
            axes.plot(x, [y[0] * tokens / x[0] for tokens in x], linestyle=":", color=GREY, label=linear)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("seconds of one CPU thread", fontsize=9, color=GREY)
        ticks = [p["tokens"] for p in points]
        axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, labelcolor=GREY)
    figure.savefig(out, dpi=130, transparent=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=int, default=len(BATCHES), help="of each line, from the smallest on")
    parser.add_argument("--out", type=Path, default=Path("docs/scaling.png"))
    args = parser.parse_args()
    keep_freed_memory()  # as every run does
    if not 2 <= args.points <= len(BATCHES) or args.repeats < 1:
        parser.error(f"got --points {args.points} --repeats {args.repeats}, expected 2 to {len(BATCHES)} and 1 or more")
    shape = shape_for("cpu")
    cfg = train_ppo.Config(**train_ppo.PRESETS["tiny"])
    models = four_models(shape.config, "cpu", torch.float32)
    sizes = {"batch": [(b, FIXED_LENGTH) for b in BATCHES], "length": [(FIXED_BATCH, t) for t in LENGTHS]}
    torch.set_num_threads(1)
    lines, exponents, by_flops = {}, {}, {}
    for growth, all_sizes in sizes.items():
        for work in WORK:
            name = f"{work} {growth}"
            lines[name] = measure(models, work, all_sizes[: args.points], cfg, args.repeats)
            tokens = [p["tokens"] for p in lines[name]]
            exponents[name] = exponent(tokens, [p["s"] for p in lines[name]])
            by_flops[name] = exponent(tokens, [p["flops"] for p in lines[name]])
            print(f"{name:15} exponent {exponents[name]:.2f}, of FLOPs {by_flops[name]:.2f}: " +
                  ", ".join(f"{p['tokens']:,} tokens {p['s']:.3f} s" for p in lines[name]), flush=True)  # fmt: skip
    draw(lines, exponents, args.out)
    print(json.dumps({"bench": "scaling", "exponents": exponents, "by_flops": by_flops, "lines": lines}))


if __name__ == "__main__":
    as_command(main)
