"""Kill one of several processes, at any moment: do the others end, is it said once, is the end bit for bit the same?

    python -m faults.ranks                        60 SIGKILLs, on 2 and 3 CPU processes: ten minutes or so of one core
    python -m faults.ranks --kills 2 --signals 1 --processes 2        some of them: what `make test` runs

For each number of processes the PPO script runs once undisturbed, on a small random model with a checkpoint after every
update. Then, as torchrun would start it (bench/launch.py), again and again, with one of these:

    kills     SIGKILL for a random process at a random moment, one after another, each resumed with --resume auto, until
              the run is through
    signals   SIGTERM for a random process alone, or SIGINT for all: saved once, exit status 143 or 130, then resumed

After each the others must end by themselves within WITHIN seconds, at most one sentence may be said by all of them
together, and a reader of metrics.jsonl must find every line whole. A run survives when it ends with the same weights,
samples, traces and metrics as the undisturbed one (faults/harness.py says which). One JSON line last.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.launch import Launched
from faults.harness import ROOT, result, script, tail, where, write_small_models, write_small_world
from faults.process import watch
from nanorlhf.run.streams import as_command

SHORT = "--batch_size 4 --total_episodes 12 --response_length 8 --num_ppo_epochs 1 --sample_every 1 --no_preflight"
WITHIN = 60.0  # seconds in which all processes are gone after one of them is; a few are usual


def last_words(launched: Launched) -> list[str]:
    """The lines with which the processes say why they end."""
    lines = [line for said in launched.said for line in said.splitlines()]
    return [line for line in lines if line.startswith(("error: ", "stopped by ", "interrupted"))]


class Ranks:
    """The trials on one number of processes. `counts` adds up what happened; `failures` what did not survive."""

    def __init__(self, processes: int, models: dict[str, str], seed: int):
        self.processes, self.models, self.random = processes, models, random.Random(f"{processes} {seed}")
        self.counts, self.killed_while, self.failures, self.slowest = Counter(), Counter(), [], 0.0
        shutil.rmtree("runs", ignore_errors=True)
        began = time.monotonic()
        launched = self.start("")
        assert not any(launched.wait()), "\n".join(launched.said)
        self.seconds, self.expected = time.monotonic() - began, result("ppo")

    def start(self, more: str = "--resume auto") -> Launched:
        return Launched(script("ppo", self.models, f"{SHORT} {more}"), self.processes)

    def look(self) -> None:
        tail(Path("runs", "ppo", "metrics.jsonl"))

    def after(self, launched: Launched, number: int, target: int | None) -> list[int]:
        """Sends a signal at a random moment, and notes how long the others go on. Returns the exit statuses."""
        watch(self.random.uniform(0, self.seconds), self.look)
        if launched.poll():
            return launched.statuses
        launched.send(number, target)
        began = time.monotonic()
        statuses = launched.wait()
        if number == signal.SIGKILL:
            self.slowest = max(self.slowest, time.monotonic() - began)
        self.look()
        said = last_words(launched)
        if len(said) > 1 or any("Traceback" in one for one in launched.said):
            self.failures.append(f"{self.processes} processes, signal {number}: they say {said} {launched.said}")
        self.counts["said"] += len(said)
        return statuses

    def finish(self, kind: str) -> None:
        launched = self.start()
        statuses = launched.wait()
        ok = not any(statuses) and result("ppo") == self.expected
        self.counts[f"{kind}_runs"] += 1
        self.counts[f"{kind}_survived"] += ok
        if not ok:
            self.failures.append(f"{self.processes} processes, {kind}: {statuses} {launched.said}"[-3000:])

    def kills(self, number: int) -> None:
        done = 0
        while done < number:
            shutil.rmtree("runs", ignore_errors=True)
            while done < number:
                statuses = self.after(self.start(), signal.SIGKILL, self.random.randrange(self.processes))
                if 137 not in statuses:
                    break  # it was through before
                done += 1
                self.killed_while[where("ppo")] += 1
                print(f"{self.processes} processes: {done} kills", flush=True)
            self.finish("kills")
        self.counts["kills"] += done

    def signals(self, number: int) -> None:
        for trial in range(number):
            shutil.rmtree("runs", ignore_errors=True)
            which, target = [(signal.SIGTERM, self.random.randrange(self.processes)), (signal.SIGINT, None)][trial % 2]
            statuses = self.after(self.start(), which, target)
            if not set(statuses) <= {0, 1, 128 + which, 128 + signal.SIGTERM}:
                self.failures.append(f"{self.processes} processes, {which.name}: exit statuses {statuses}")
            self.finish("signals")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="random SIGKILLs for each number of processes")
    parser.add_argument("--signals", type=int, default=4, help="other signals for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, counts, killed_while, failures, slowest = time.monotonic(), Counter(), Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        models = write_small_models(Path(folder, "models"), write_small_world(Path(folder, "data")))
        for processes in args.processes:
            trials = Ranks(processes, models, args.seed)
            print(f"{processes} processes: {trials.seconds:.2f} s undisturbed", flush=True)
            trials.kills(args.kills)
            trials.signals(args.signals)
            print(f"{processes} processes: {dict(trials.counts)}", flush=True)
            counts += trials.counts
            killed_while += trials.killed_while
            failures += trials.failures
            slowest = max(slowest, trials.slowest)
        os.chdir(ROOT)
    if slowest > WITHIN:
        failures.append(f"the others went on for {slowest:.1f} s after a kill, expected at most {WITHIN:g}")
    for failure in failures[:10]:
        print(f"FAILED {failure}")
    seconds = round(time.monotonic() - began)
    print(json.dumps({**counts, "killed_while": killed_while, "slowest_end_s": round(slowest, 2),
                      "failures": len(failures), "seconds": seconds}))  # fmt: skip
    sys.exit(bool(failures))


if __name__ == "__main__":
    as_command(main)
