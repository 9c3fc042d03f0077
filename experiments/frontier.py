"""One set of axes: which method gets the most quality for a nat of KL from SFT, and where does each begin to cheat?

    python -m experiments.frontier                  what is missing, in the order of the plan; the budget comes first
    python -m experiments.frontier --plan           the list and the budget, nothing is run
    python -m experiments.frontier --minutes 60     starts no run after an hour
    python -m experiments.frontier --only dpo       runs with this word in their names
    python -m experiments.frontier_report           tables and figure from the results that are there

PPO at five KL coefficients, best-of-n, DPO, RLOO, GRPO, ensembles of reward models, a second round of labels, and PPO
without one detail at a time; 3 seeds each, each seed with an SFT and a reward model of its own. All on the tiny world,
where a summary's real quality is known. Each finished run is a line of experiments/results/frontier.jsonl and is not
run again. Several processes may work on one list: a run, or a step that runs share, belongs to who holds its lock.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import frontier_plan
from experiments.frontier_plan import Run, Step, plan
from nanorlhf.errors import check, one_sentence
from nanorlhf.storage.jsonl import append, read_jsonl

RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"
BASE = "55b9458a033d"  # the base model that RESULTS stand on: first digits of its weights' sha256
POSTS = 512  # of split test
MEASURE_S = 12  # seconds to measure a policy


# --- who does what ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(name: str, wait: bool) -> Iterator[bool]:
    """Whether this process has runs/<name>.lock for itself. A process that ends, however, gives its locks back."""
    with open(Path("runs") / f"{name}.lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def do(step: Step, seed: int) -> bool:
    """One script, unless it is done already; whether it ended well. Its output is runs/<name>.log."""
    log, done = Path("runs") / f"{step.name}.log", Path("runs") / f"{step.name}.done"
    with held(step.name, wait=True):
        if done.exists():
            return True
        flags = ["--preset", "tiny", "--seed", str(seed), "--run_name", step.name, "--overwrite"]
        with open(log, "w", encoding="utf-8") as file:
            status = subprocess.run([sys.executable, *step.words, *flags], stdout=file, stderr=file).returncode
        if status == 0:
            done.touch()
        else:
            print(f"failed  {step.name}: status {status}, see {log}", flush=True)
        return status == 0


def known(results: Path) -> list[dict]:
    return read_jsonl(results, having="run") if results.exists() else []


def missing(runs: Sequence[Run], results: Path) -> list[Run]:
    there = {row["run"] for row in known(results)}
    return [run for run in runs if run.name not in there]


# --- one run ----------------------------------------------------------------------------------------------------------


def perform(run: Run, commit: str) -> list[dict] | None:
    """All steps and the measurement of a run -> its lines; None when a step failed."""
    began = time.monotonic()
    if not all([do(step, _seed_of(step, run)) for step in run.steps]):
        return None
    trained = time.monotonic()
    rows = measure(run)
    spent = {"seconds": round(trained - began), "measure_seconds": round(time.monotonic() - trained)}
    about = {"run": run.name, "part": run.part, "method": run.method, "seed": run.seed}
    about |= {"command": " ".join(run.steps[-1].words) if run.steps else "", "commit": commit} | spent
    return [about | row for row in rows]


def _seed_of(step: Step, run: Run) -> int:
    """A model that runs share has the seed in its name; everything else has the run's."""
    digits = step.name.removeprefix("fr_sft").removeprefix("fr_rm")
    return int(digits) if digits.isdigit() else run.seed


def measure(run: Run) -> list[dict]:
    from experiments import frontier_measure as m  # here: --plan should not wait for torch
    from nanorlhf.data.tldr import load_posts
    from nanorlhf.run.inputs import find_data

    posts = load_posts(find_data(None, "tiny")[0], "test")[:POSTS]
    sft, first = frontier_plan.sft(run.seed), frontier_plan.rm(run.seed)
    theirs = m.judged(sft, run.reward_model, posts, noise=run.seed)
    if run.policy is None:
        return m.best_of_n(Path("runs") / run.steps[-1].name, theirs, posts, run.seed)
    noise = zlib.crc32(run.name.encode())  # every policy has noise of its own
    ours = m.judged(run.policy, run.reward_model, posts, noise=noise)
    row = m.against(ours, theirs, seed=run.seed) | m.distance(run.policy, sft, posts, noise)
    if run.reward_model != first:  # what the model of the first round says of the same texts
        sides = (m.judged(run.policy, first, posts, noise), m.judged(sft, first, posts, run.seed))
        old = m.against(*sides, seed=run.seed)
        row |= {f"first_{name}": old[name] for name in ("proxy_gain", "agreement")}
    row |= {"posts": len(posts), "strength": run.strength}
    return [m.rounded(row) | {"curve": m.curve(run.policy.parent)}]


# --- the list ---------------------------------------------------------------------------------------------------------


def budget(runs: Sequence[Run]) -> dict[str, float]:
    """Minutes of one thread by method, of what is not done. A step that several runs share is counted once."""
    counted, minutes = set(), {}
    for run in runs:
        new = [step for step in run.steps if step.name not in counted and not _done(step)]
        counted |= {step.name for step in new}
        seconds = sum(step.seconds for step in new) + MEASURE_S
        minutes[run.method] = minutes.get(run.method, 0.0) + seconds / 60
    return minutes


def _done(step: Step) -> bool:
    return (Path("runs") / f"{step.name}.done").exists()


def processor() -> str:
    """The processor's name and the number of cores that this process may use."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} core{'s' * (cores != 1)}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def check_base() -> None:
    """Models that stand on another base would be compared with the ones that are there."""
    weights = frontier_plan.EMBEDDED / "base" / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    fix = "pass --results FILE for a comparison of its own, or check out 17af441 to finish that one"
    check(found == BASE, "base model", found, f"{BASE}, on which the lines of {RESULTS.name} stand", fix)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.frontier", description=__doc__.split("\n")[0])
    parser.add_argument("--plan", action="store_true", help="print the list and the budget only")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--max_runs", type=int, help="start so many at most")
    parser.add_argument("--only", nargs="+", default=[""], help="runs with one of these words in their names")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of a line a result; grows")
    args = parser.parse_args(argv)
    wanted = [run for run in plan() if any(word in run.name for word in args.only)]
    todo = missing(wanted, args.results)
    for method, minutes in budget(todo).items():
        names = [f"{run.strength}, seed {run.seed}" for run in todo if run.method == method]
        print(f"plan    {method}: {len(names)} runs, {minutes:.0f} min of one thread", flush=True)
        if args.plan:
            print("\n".join(f"        {name}" for name in names))
    total = sum(budget(todo).values())
    print(f"plan    {len(wanted) - len(todo)} of {len(wanted)} runs are there, {total:.0f} min of one thread to do")
    if args.plan or not todo:
        return
    if args.results == RESULTS:
        check_base()
    Path("runs").mkdir(exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], encoding="utf-8").strip()
    began, failed, ran = time.monotonic(), [], 0
    for run in todo:
        if time.monotonic() - began > 60 * args.minutes or ran == args.max_runs:
            break
        with held(f"run_{zlib.crc32(run.name.encode())}", wait=False) as mine:
            if not mine or not missing([run], args.results):
                continue  # another process is at it, or was
            ran += 1
            rows = perform(run, commit)
            if rows is None:
                failed.append(run.name)
                continue
            append(args.results, [row | {"machine": processor()} for row in rows])
        said = ", ".join(f"{name} {rows[-1][name]:.3f}" for name in ("gold", "win_rate", "kl"))
        print(f"run     {run.name}: {said}; {rows[-1]['seconds']} s", flush=True)
    left = len(missing(wanted, args.results))
    print(json.dumps({"experiment": "frontier", "ran": ran, "failed": failed, "not_run": left}))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with one_sentence("the same command goes on"):
        main()
