"""How much optimisation is too much: PPO at several KL coefficients, proxy and truth against KL (Gao et al. 2023).

    python -m experiments.overoptimisation                                       5 coefficients x 3 seeds x 50 updates
    python -m experiments.overoptimisation --kl_coefs 0 0.15 --seeds 1 --updates 4

On the tiny world, from the embedded SFT model and reward model, at a constant learning rate, so that the coefficient is
all that differs. Runs that are there already (runs/kl<coefficient>_seed<N>_<updates>) are not run again. Prints a
Markdown table and one JSON line last; draws the figure. About 4 minutes a run on 2 cores: an hour in all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from nanorlhf.evaluation.figures import overoptimisation_figure, png
from nanorlhf.evaluation.metrics import seed_interval
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import finite

EPISODES_AN_UPDATE = 128
LAST = 5  # updates that count as the end of a run


def train(kl_coef: float, seed: int, updates: int) -> list[dict]:
    """The metrics of one run; trained unless it is there, finished."""
    name = f"kl{kl_coef:g}_seed{seed}_{updates}"
    folder = Path("runs") / name
    if not (folder / "final").is_dir():
        flags = {
            "--run_name": name, "--preset": "tiny", "--seed": seed, "--kl_coef": kl_coef, "--lr": 3e-4,
            "--lr_schedule": "constant", "--total_episodes": updates * EPISODES_AN_UPDATE,
            "--sft_model": EMBEDDED / "sft", "--reward_model": EMBEDDED / "rm",
            "--num_ppo_epochs": 4, "--num_minibatches": 1, "--critic_warmup": 0, "--lr_warmup": 0, "--critic_lr": None,
        }  # fmt: skip
        words = [str(word) for flag in flags.items() for word in flag]
        subprocess.run([sys.executable, "train_ppo.py", *words, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder)


def summary(kl_coef: float, logs: list[list[dict]]) -> dict[str, float]:
    """Mean over seeds of the last updates, and half its 95% interval over the seeds (nan for one)."""
    row = {"kl_coef": kl_coef, "seeds": len(logs)}
    for name in ("objective/kl", "objective/scores", "objective/gold"):
        ends = [np.mean([r[name] for r in rows[-LAST:]]) for rows in logs]
        short = name.split("/")[1]
        row |= {
            short: float(np.mean(ends)),
            f"{short} +-": seed_interval(ends),
        }
    row["best gold"] = float(np.mean([max(r["objective/gold"] for r in rows) for rows in logs]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.overoptimisation", description=__doc__.split("\n")[0])
    parser.add_argument("--kl_coefs", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.15, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--figure", type=Path, default=Path("runs/overoptimisation.png"))
    args = parser.parse_args()
    groups, rows = {}, []
    for kl_coef in args.kl_coefs:
        groups[kl_coef] = [train(kl_coef, seed, args.updates) for seed in args.seeds]
        rows.append(summary(kl_coef, groups[kl_coef]))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]), flush=True)
        print("| " + " | ".join(f"{value:.3g}" for value in rows[-1].values()) + " |", flush=True)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    args.figure.write_bytes(png(overoptimisation_figure(groups)))
    print(f"figure {args.figure}")
    print(json.dumps({"bench": "overoptimisation", "updates": args.updates, "rows": [finite(row) for row in rows]}))


if __name__ == "__main__":
    as_command(main)
