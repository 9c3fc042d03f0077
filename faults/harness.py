"""Kill the training scripts at any moment, break what they wrote, fill their disk: is the end bit for bit the same?

    python -m faults                              the full harness: an hour or so on one core
    python -m faults --kills 3 --operations 3 --others 1      some of each: what `make test` runs

Each stage is trained once without a fault, on a small random model with a checkpoint after every step. Then, in forked
processes of the real scripts, again and again with one:

    random       SIGKILL at random moments, one after another, each resumed with --resume auto, until the run is through
    operations   SIGKILL just before the n-th file operation (open for writing, rename, remove, mkdir, truncate ...)
    signals      SIGTERM, SIGINT, or SIGINT twice at a random moment: exit status 143 or 130, then resumed
    damage       the newest of two checkpoints is cut or one of its bits is flipped, after a SIGKILL
    full         no file may grow past a random size (RLIMIT_FSIZE): exit status 2 and one sentence, then resumed
    read_only    runs/, or something in it from a random moment on, is read-only: the same
    clock        both clocks jump back and forth by hours: no time left below 0, nothing else
    two          two processes start on one run folder at once: one is refused

A trial survives when the run that is left ends with the same weights (every byte of final/ and final_critic/), the same
samples, traces and metrics (but for clocks, and pre-flight checks, which a resumed run repeats) as the one without a
fault. Meanwhile a reader tails metrics.jsonl: every line that has its end must be whole.

What is fetched and what is paid for is killed too, at random moments and before file operations, until it is through
(fault_fetches.py): the download of the data, and the questions to a judge. One JSON line last.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a pool of threads does not survive a fork

from stages import write_small_models, write_small_world

import train_ppo
import train_rm
import train_sft
from faults.fetches import Download, Questions
from faults.process import Process, read_only, send, watch
from nanorlhf.run.config import cli
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import read_jsonl
from nanorlhf.storage.resume import checkpoints

ROOT = Path(__file__).parents[1]
SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
FLAGS = {
    "sft": "--batch_size 8 --eval_posts 4 --max_updates 6",
    "rm": "--batch_size 4 --eval_pairs 8 --shift_posts 8 --max_updates 6",
    "ppo": "--batch_size 8 --total_episodes 48 --response_length 16 --num_ppo_epochs 2 --sample_every 2",
}
FETCHES = {"download": Download, "judge": Questions}
COMMON = "--preset tiny --device cpu --data data --save_every 1 --keep 2"


def script(stage: str, models: dict[str, str], more: str) -> Callable[[], None]:
    """What a process does that is started as `python train_<stage>.py ...`."""
    argv = f"{COMMON} {FLAGS[stage]} {models[f'train_{stage}']} --run_name {stage} {more}".split()

    def work():
        sys.argv = [f"train_{stage}.py", *argv]
        module = SCRIPTS[stage]
        cli(module.main, module.Config, module.PRESETS, module.__doc__, argv)

    return work


def tail(path: Path) -> None:
    """What a reader sees at this moment: every line that has its end is whole."""
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            assert "step" in json.loads(line), f"{path}: half a line {line[:80]}"


def result(stage: str) -> dict:
    """All of a finished run that must not depend on how often it was killed."""
    run = Path("runs") / stage
    found = {str(path): path.read_bytes() for path in sorted(run.glob("final*/*.safetensors"))}
    for name in ("metrics", "samples", "trace"):
        if (path := run / f"{name}.jsonl").exists():
            clocks = ("time", "perf/", "preflight/")
            found[name] = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_jsonl(path)]
    return found


def where(stage: str) -> str:
    """What a killed run was doing, from what it left."""
    run = Path("runs") / stage
    if not (run / "config.json").exists():
        return "starting"
    if any(run.rglob("*.partial")) or any(run.rglob("*.old")):
        return "saving"
    if (run / "final").exists():
        return "after the last step"
    return "training"


class Harness:
    """One stage's trials. `counts` adds up what happened; `failures` describes what did not survive."""

    def __init__(self, stage: str, models: dict[str, str], seed: int):
        self.models = models
        self.stage, self.random = stage, random.Random(f"{stage} {seed}")
        self.counts, self.killed_while, self.failures = Counter(), Counter(), []
        began = time.monotonic()
        process = self.start("", counter="operations")
        assert process.wait() == 0, process.said
        self.seconds = time.monotonic() - began
        self.operations = int(Path("operations").read_text(encoding="utf-8"))
        self.expected = result(stage)

    def fresh(self) -> None:
        shutil.rmtree("runs", ignore_errors=True)

    def moment(self) -> float:
        return self.random.uniform(0, self.seconds)

    def start(self, more: str = "--resume auto", **options) -> Process:
        return Process(script(self.stage, self.models, more), **options)

    def look(self) -> None:
        tail(Path("runs", self.stage, "metrics.jsonl"))

    def after(self, process: Process, seconds: float, *signals: int) -> int:
        """Send signals to a process after that time, tailing its metrics meanwhile. Returns its exit status."""
        watch(seconds, self.look)
        return send(process, *signals)

    def finish(self, kind: str, what: str) -> str:
        """The run goes on to its end, and is compared. Returns what it printed."""
        process = self.start()
        status = process.wait()
        ok = status == 0 and result(self.stage) == self.expected
        self.counts[f"{kind}_trials"] += 1
        self.counts[f"{kind}_survived"] += ok
        if not ok:
            self.failures.append(f"{self.stage} {kind} {what}: exit status {status}: {process.said[-600:]}")
        return process.said

    def random_kills(self, kills: int) -> None:
        done = 0
        while done < kills:
            self.fresh()
            moments = []
            while done < kills:
                moments.append(self.moment())
                status = self.after(self.start(), moments[-1], signal.SIGKILL)
                if status != 137:
                    break  # through, or broken: finish() says which
                done += 1
                self.killed_while[where(self.stage)] += 1
            self.finish("random", f"kills after {[round(m, 3) for m in moments]} s")
        self.counts["random_kills"] += done

    def kills_before_operations(self, number: int) -> None:
        numbers = range(1, self.operations + 1)
        if number and number < self.operations:
            numbers = sorted(self.random.sample(numbers, number))
        for n in numbers:
            self.fresh()
            assert self.start(kill_before=n).wait() == 137
            self.counts["operations_kills"] += 1
            self.killed_while[where(self.stage)] += 1
            self.finish("operations", f"before operation {n}")

    def signals(self, number: int) -> None:
        for trial in range(number):
            self.fresh()
            sent = [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]][trial % 3]
            process, moment = self.start(), self.moment()
            status, said = self.after(process, moment, *sent), process.said
            if status == 128 + sent[0] and Path("runs", self.stage, "config.json").exists():
                command = f"python train_{self.stage}.py --resume --device cpu"
                if said.splitlines()[-1] not in (command, "interrupted: continue with --resume"):
                    self.failures.append(f"{self.stage} signals: its last line is {said.splitlines()[-1]}")
            elif status not in (0, 128 + sent[0]):
                self.failures.append(f"{self.stage} signals {sent} after {moment} s: status {status}: {said[-600:]}")
            if "Traceback" in said and "Exception ignored in" not in said:  # a __del__
                self.failures.append(f"{self.stage} signals {sent} after {moment} s: {said[-900:]}")
            self.finish("signals", f"{sent} after {moment:.3f} s")

    def damage(self, number: int) -> None:
        for _ in range(number):
            self.fresh()
            process = self.start("")
            while len(checkpoints(Path("runs", self.stage))) < 2:
                time.sleep(0.001)
            self.after(process, self.moment() / 4, signal.SIGKILL)
            newest = checkpoints(Path("runs", self.stage))[-1]
            path = self.random.choice(sorted(newest.iterdir()))
            content, place = bytearray(path.read_bytes()), self.random.randrange(path.stat().st_size)
            if cut := self.random.random() < 0.5:
                del content[place:]
            else:
                content[place] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
            said = self.finish("damage", f"{path.name} {'cut' if cut else 'flipped'} at byte {place}")
            if f"warning {newest} is damaged" not in said:
                self.failures.append(f"{self.stage} damage: no warning names {newest}")

    def full(self, number: int) -> None:
        largest = max(path.stat().st_size for path in Path("runs", self.stage).rglob("*") if path.is_file())
        for _ in range(number):
            self.fresh()
            limit = int(2 ** self.random.uniform(4, largest.bit_length()))
            process = self.start(max_file=limit)
            status, said = process.wait(), process.said
            if status not in (0, 2) or "Traceback" in said:
                self.failures.append(f"{self.stage} full at {limit} bytes: exit status {status}: {said[-600:]}")
            self.counts["full_stopped"] += status == 2
            self.finish("full", f"at {limit} bytes")

    def read_only(self, number: int) -> None:
        for in_the_middle in (False, True) * number:
            self.fresh()
            path = Path("runs")
            path.mkdir()
            if in_the_middle:
                process = self.start(unprivileged=True)
                watch(self.moment(), self.look)
                path = self.random.choice([path, *sorted(path.rglob("*"))])
            with read_only(path) if path.exists() else contextlib.nullcontext():  # what is .partial may be gone
                process = process if in_the_middle else self.start(unprivileged=True)
                status, said = process.wait(), process.said
            if status not in (2, 0 if in_the_middle else 2) or "Traceback" in said:
                self.failures.append(f"{self.stage} read-only {path}: exit status {status}: {said[-600:]}")
            self.counts["read_only_stopped"] += status == 2
            self.finish("read_only", str(path))

    def clock(self, number: int) -> None:
        for trial in range(number):
            self.fresh()
            process = self.start(jumps=trial)
            status, said = process.wait(), process.said
            if status or re.search(r"-\d+:\d\d|ETA -", said):
                self.failures.append(f"{self.stage} clock {trial}: exit status {status}: {said[-600:]}")
            self.finish("clock", f"of seed {trial}")

    def two(self, number: int) -> None:
        for _ in range(number):
            self.fresh()
            statuses = sorted(process.wait() for process in [self.start(""), self.start("")])
            if statuses != [0, 2]:
                self.failures.append(f"{self.stage} two at once: exit statuses {statuses}")
            self.counts["two_trials"] += 1
            self.counts["two_survived"] += result(self.stage) == self.expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="random SIGKILLs a stage")
    parser.add_argument("--operations", type=int, default=0, help="file operations to be killed before; 0: all")
    parser.add_argument("--others", type=int, default=30, help="trials of each other kind a stage")
    parser.add_argument("--stages", nargs="+", default=[*SCRIPTS, *FETCHES], choices=[*SCRIPTS, *FETCHES])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, counts, killed_while, failures = time.monotonic(), Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        models = write_small_models(Path(folder, "models"), write_small_world(Path(folder, "data")))
        for name in args.stages:
            began_here = time.monotonic()
            if name in FETCHES:
                trials = FETCHES[name](args.seed)
                trials.kills(args.kills)
            else:
                trials = Harness(name, models, args.seed)
                print(f"{name}: {trials.seconds:.2f} s, {trials.operations} file operations undisturbed", flush=True)
                trials.full(args.others)
                trials.random_kills(args.kills)
                trials.kills_before_operations(args.operations)
                trials.signals(args.others)
                trials.damage(args.others)
                trials.read_only(args.others)
                trials.clock(args.others)
                trials.two(min(args.others, 5))
                killed_while += trials.killed_while
            print(f"{name}: {dict(trials.counts)} in {time.monotonic() - began_here:.0f} s", flush=True)
            counts += trials.counts
            failures += trials.failures
        os.chdir(ROOT)
    for failure in failures[:10]:
        print(f"FAILED {failure}")
    seconds = round(time.monotonic() - began)
    print(json.dumps({**counts, "killed_while": killed_while, "failures": len(failures), "seconds": seconds}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    as_command(main)
