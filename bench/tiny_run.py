"""The tiny pipeline here against the committed one, which ran on a CPU: the same seeds, posts and flags.

    python -m bench.tiny_run                         a GPU: in fp32 and in bf16, six runs side by side
    python -m bench.tiny_run --stages sft --updates 2 --device cpu       a check of this file

Each stage begins from the embedded checkpoints (nanorlhf/tiny/checkpoints), as the committed run of it did, whose
metrics lie beside its weights. The first step differs by rounding alone, and its bound says so. After that roundings
grow: a token is sampled otherwise now and then, and from there on two runs are two samples. So what is compared at the
end are means, with wide bounds. One JSON line last; exit status 1 when a bound is broken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.rows import note
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command

ROOT = Path(__file__).parents[1]
STAGES, DTYPES = ("sft", "rm", "ppo"), ("float32", "bfloat16")
LAST = 4  # steps whose mean is the end of a run


class Bound(NamedTuple):
    """A metric at the first step or at the end, and by how much the two may differ, in fp32 and in bf16."""

    stage: str
    metric: str
    where: str  # first, end
    float32: float
    bfloat16: float


BOUNDS = (
    Bound("sft", "train/sft/loss", "first", 1e-3, 2e-2),
    Bound("sft", "validation/sft/loss", "end", 0.01, 0.02),  # nats a token
    Bound("rm", "train/rm/loss", "first", 1e-3, 2e-2),
    Bound("rm", "eval/rm/validation/accuracy", "end", 0.03, 0.03),
    Bound("ppo", "objective/scores", "first", 0.05, 0.2),
    Bound("ppo", "objective/kl", "first", 0.0, 0.0),
    Bound("ppo", "objective/scores", "end", 0.3, 0.3),
    Bound("ppo", "objective/kl", "end", 0.35, 0.35),  # nats a response
    Bound("ppo", "objective/gold", "end", 0.25, 0.25),
)


def at(rows: list[dict], bound: Bound) -> float:
    values = [row[bound.metric] for row in rows if bound.metric in row]
    chosen = values[:1] if bound.where == "first" else values[-LAST:]
    return sum(chosen) / len(chosen)


def same_flags(ours: list[dict], theirs: list[dict]) -> bool:
    """Whether the committed run took its first step with the batch and the learning rate of this one: a preset that has
    changed since makes two runs of it, and nothing to compare."""
    return all(ours[0][key] == theirs[0][key] for key in ("episode", "lr"))


def compare(stage: str, dtype: str, ours: list[dict], theirs: list[dict], whole: bool) -> list[dict]:
    """One dict a bound of this stage. whole: the run went to its end."""
    found = []
    for bound in BOUNDS:
        if bound.stage == stage and (whole or bound.where == "first"):
            here, there = at(ours, bound), at(theirs, bound)
            apart, allowed = abs(here - there), getattr(bound, dtype)
            found.append({"stage": stage, "dtype": dtype, "metric": bound.metric, "where": bound.where, "here": here,
                          "committed": there, "apart": apart, "bound": allowed, "holds": apart <= allowed})  # fmt: skip
    return found


def command(stage: str, dtype: str, device: str, updates: int | None) -> list[str]:
    few = ["--max_updates", str(updates)] if updates else []
    flags = ["--preset", "tiny", "--save_every", "0", "--device", device, "--dtype", dtype, "--overwrite"]
    return [sys.executable, str(ROOT / f"train_{stage}.py"), *flags, *few]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiny_run", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--updates", type=int, help="only so many steps: the ends are not compared")
    args = parser.parse_args()
    found, seconds, failed, other_flags = [], {}, [], []
    with tempfile.TemporaryDirectory() as temporary:
        runs = {}
        for stage in args.stages:
            for dtype in args.dtypes:
                folder = Path(temporary) / f"{stage}_{dtype}"
                folder.mkdir()
                log = open(folder / "log", "w", encoding="utf-8")
                arguments = command(stage, dtype, args.device, args.updates)
                runs[stage, dtype] = folder, subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log)
        try:
            for (stage, dtype), (folder, child) in runs.items():
                if child.wait():
                    failed.append(f"{stage} in {dtype}")
                    print(
                        f"{failed[-1]}: exit status {child.returncode}\n{(folder / 'log').read_text(encoding='utf-8')[-3000:]}"
                    )
                    continue
                rows, committed = read_metrics(folder / "runs" / stage), read_metrics(EMBEDDED / stage)
                seconds[f"{stage} {dtype}"] = rows[-1]["time"] - rows[0]["time"]
                if same_flags(rows, committed):
                    compared = compare(stage, dtype, rows, committed, whole=args.updates is None)
                    found += compared
                    for row in compared:
                        note(row)
                else:
                    other_flags.append(f"{stage} in {dtype}")
        finally:
            for _, child in runs.values():
                child.kill()
                child.wait()
    print("| stage | dtype | metric | at | here | committed, CPU | apart | bound |\n|---|---|---|---|---|---|---|---|")
    for row in found:
        numbers = " | ".join(f"{row[key]:.5g}" for key in ("here", "committed", "apart", "bound"))
        print(f"| {row['stage']} | {row['dtype']} | {row['metric']} | {row['where']} | {numbers} |")
    if other_flags:
        print(f"the committed run had other flags, nothing is compared: {', '.join(other_flags)}")
    broken = [f"{row['stage']} {row['dtype']} {row['metric']} {row['where']}" for row in found if not row["holds"]]
    print(json.dumps({"bench": "tiny_run", "results": found, "seconds": seconds, "failed": failed, "broken": broken,
                      "other_flags": other_flags}))  # fmt: skip
    sys.exit(bool(failed or broken))


if __name__ == "__main__":
    as_command(main)
