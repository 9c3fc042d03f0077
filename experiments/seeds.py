"""How steady is the demo? Its pipeline on several seeds, and each under several roundings of the processor.

    python -m experiments.seeds                       8 seeds x 3 roundings, two processes side by side on 2 cores
    python -m experiments.seeds --seeds 9 10          more seeds
    python -m experiments.seeds --table               only the tables (and --figure), from what is there

Each seed has an SFT and a reward model of its own; PPO and the evaluation are run once for each rounding. Another order
of the same sums is enough to make another run of PPO: what a rounding changes in the seventh digit, sampling turns into
another token. Reads the embedded base; writes runs/seed<N>_{sft,rm} and runs/seed<N>_<rounding>_{ppo,eval}, and appends
a line for each result to experiments/results/seeds.jsonl: what is there is not run again, so an experiment that was
stopped goes on where it was. Prints two Markdown tables: every bar of the demo with the mean, the standard deviation
and the worst of all results, and how many standard deviations lie between mean and bar; and every result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanorlhf.evaluation.figures import GREY, PROXY, draw_curve, new_axes, png
from nanorlhf.evaluation.tables import number
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import append, read_jsonl
from nanorlhf.tiny.demo import BARS, STAGES, judge_bars, measure, read_runs

RESULTS = Path(__file__).parent / "results" / "seeds.jsonl"
BEFORE = RESULTS.with_name("before.jsonl")  # explained variance of two runs by the recipe of before
SEEDS = range(101, 109)  # nothing was tuned on them
# By what PPO and the evaluation are rounded: instructions that oneDNN, torch and MKL may use, kernels, threads.
ROUNDINGS = {
    "default": {"OMP_NUM_THREADS": "1"},
    "avx2": {
        "OMP_NUM_THREADS": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "torch, 2 threads": {"OMP_NUM_THREADS": "2", "NANORLHF_KERNELS": "torch"},
}
WIDTH = 3.5  # standard deviations that should lie between the mean and the bar


def script(name: str, run: str, seed: int, rounding: dict[str, str], *flags: str) -> None:
    """Run one of the four scripts; a run that is finished already is left as it is."""
    folder = Path("runs") / run
    done = (folder / "metrics.json").is_file() if name == "eval.py" else (folder / "final" / "config.json").is_file()
    if done and not _unfinished(folder):
        return
    command = [sys.executable, name, "--preset", "tiny", "--run_name", run, "--seed", str(seed), "--overwrite", *flags]
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, env=os.environ | rounding, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}: see {folder}.log")


def _unfinished(folder: Path) -> bool:
    """Whether the run of this folder was stopped: its log does not end with "done"."""
    log = Path(f"{folder}.log")
    return not log.is_file() or not log.read_text(encoding="utf-8").rstrip().rsplit("\n", 1)[-1].startswith("done")


def models(seed: int) -> None:
    """SFT and reward model of a seed, both under the first rounding."""
    first = next(iter(ROUNDINGS.values()))
    script("train_sft.py", f"seed{seed}_sft", seed, first)
    script("train_rm.py", f"seed{seed}_rm", seed, first, "--sft_model", f"runs/seed{seed}_sft/final")


def result(seed: int, rounding: str) -> dict:
    """PPO and evaluation of a seed under a rounding -> what the bars of the demo read, and what one wants to know."""
    name, began = f"seed{seed}_{rounding.split(',')[0]}", time.monotonic()
    final = {stage: f"runs/seed{seed}_{stage}/final" for stage in ("sft", "rm")} | {"ppo": f"runs/{name}_ppo/final"}
    rm = ["--reward_model", final["rm"]]
    script("train_ppo.py", f"{name}_ppo", seed, ROUNDINGS[rounding], "--sft_model", final["sft"], *rm)
    policies = ["--policy", "base", f"sft={final['sft']}", f"ppo={final['ppo']}"]
    script("eval.py", f"{name}_eval", seed, ROUNDINGS[rounding], *policies, *rm)
    folders = {stage: Path("runs") / f"seed{seed}_{stage}" for stage in ("sft", "rm")}
    folders |= {stage: Path("runs") / f"{name}_{stage}" for stage in ("ppo", "eval")}
    runs = read_runs({stage: folders[stage] for stage in STAGES})
    policies = runs["results"]["policies"]
    values = {key: round(value, 6) for key, value in measure(runs).items()}
    more = {"gold_ppo": policies["ppo"]["gold"], "words": policies["ppo"]["length"]}
    more |= {"explained_variance": [round(row["explained_variance"], 3) for row in runs["ppo"]]}
    return {"seed": seed, "rounding": rounding} | values | more | {"seconds": round(time.monotonic() - began)}


def known(rows: list[dict]) -> list[tuple]:
    """The bars of today that these results can be held against: older ones lack what was not a bar then."""
    return [bar for bar in BARS if all(bar[0] in row for row in rows)]


def table(rows: list[dict]) -> str:
    """The bars of the demo over all results, in Markdown."""
    lines = [
        f"| {len(rows)} results | bar | mean | standard deviation | worst | (mean - bar) / sd |",
        "|---|---|---|---|---|---|",
    ]
    for name, relation, bound, words in known(rows):
        values = [row[name] for row in rows]
        mean, sd = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        upwards = relation.startswith(">")
        worst, distance = (min(values), mean - bound) if upwards else (max(values), bound - mean)
        far = f"{distance / sd:.1f}" if sd else "-"
        words = words.replace("|", r"\|")  # else the cell would end there
        lines.append(f"| {words} | {relation} {bound:g} | {mean:.3g} | {sd:.2g} | {worst:.3g} | {far} |")
    return "\n".join(lines)


def every_result(rows: list[dict]) -> str:
    """One line a result, in Markdown."""
    columns = {
        "SFT ROUGE-L": "sft_rouge", "RM accuracy": "rm_accuracy", "gold SFT": "gold_sft",
        "gold PPO": "gold_ppo", "PPO vs SFT": "ppo_vs_sft", "its low end": "ppo_vs_sft_low",
        "PPO vs reference": "ppo_vs_reference", "EOS rate": "eos_rate", "largest KL": "max_kl", "words": "words",
    }  # fmt: skip
    lines = ["| seed | rounding | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for row in sorted(rows, key=lambda row: (row["seed"], list(ROUNDINGS).index(row["rounding"]))):
        numbers = " | ".join(number(row.get(name), ".3g") for name in columns.values())
        lines.append(f"| {row['seed']} | {row['rounding']} | {numbers} |")
    return "\n".join(lines)


def passes(row: dict) -> bool:
    """Whether `make demo` would have been green."""
    return all(passed for *_, passed in judge_bars(row, known([row])))


def figure(rows: list[dict], before: list[dict]) -> bytes:
    """How well the critic predicts, update by update: runs of before in grey, the results in colour. A PNG."""
    drawing, axes = new_axes("explained variance of the critic", "update", size=(6.0, 3.2))
    for runs, colour in ((before, GREY), (rows, PROXY)):
        curves = [[{"step": i, "ev": y} for i, y in enumerate(run["explained_variance"], start=1)] for run in runs]
        draw_curve(axes, curves, "ev", colour)
    axes.set_ylim(-2, 1)
    return png(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2, help="side by side")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of a line a result; grows")
    parser.add_argument("--figure", type=Path, help="draw the critic's curves here: docs/explained_variance.png")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    rows = read_jsonl(args.results, having="seed") if args.results.exists() else []
    there = {(row["seed"], row["rounding"]) for row in rows}
    missing = [(seed, name) for name in ROUNDINGS for seed in args.seeds if (seed, name) not in there]
    if missing and not args.table:
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], encoding="utf-8").strip()
        Path("runs").mkdir(exist_ok=True)
        args.results.parent.mkdir(parents=True, exist_ok=True)

        def one(task: tuple[int, str]) -> None:
            row = result(*task) | {"commit": commit}
            append(args.results, [row])
            said = f"PPO vs SFT {row['ppo_vs_sft']:.3f}, {row['seconds']} s"
            print(f"seed {row['seed']}, {row['rounding']}: {said}", flush=True)

        with ThreadPoolExecutor(args.processes) as pool:  # a thread waits for its process; what fails ends all
            list(pool.map(models, sorted({seed for seed, _ in missing})))
            list(pool.map(one, missing))
        rows = read_jsonl(args.results, having="seed")
    rows = [row for row in rows if row["seed"] in args.seeds]
    print(table(rows), every_result(rows), sep="\n\n")
    if args.figure:
        args.figure.write_bytes(figure(rows, read_jsonl(BEFORE, having="seed")))
    green, commits = sum(map(passes, rows)), sorted({row["commit"] for row in rows})
    print(json.dumps({"experiment": "seeds", "results": len(rows), "all bars passed": green, "commits": commits}))


if __name__ == "__main__":
    as_command(main)
