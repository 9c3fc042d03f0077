"""Kill the training scripts at any moment, break what they wrote, fill their disk: is the end bit for bit the same?

    python -m bench.faults                              the full harness: an hour or so on one core
    python -m bench.faults --kills 3 --operations 3 --others 1      some of each: what `make test` runs

Each stage is trained once without a fault, on a small random model with a checkpoint after every step. Then, in forked
processes of the real scripts, again and again with one:

    random       SIGKILL at random moments, one after another, each resumed with --resume auto, until the run is through
    operations   SIGKILL just before the n-th file operation (open for writing, rename, remove, mkdir, truncate ...)
    signals      SIGTERM, SIGINT, or SIGINT twice at a random moment: exit status 143 or 130, then resumed
    damage       the newest of two checkpoints is cut or one of its bits is flipped, after a SIGKILL
    full         no file may grow past a random size (RLIMIT_FSIZE): exit status 2 and one sentence, then resumed
    two          two processes start on one run folder at once: one is refused

A trial survives when the run that is left ends with the same weights (every byte of final/ and final_critic/), the same
samples, traces and metrics (but for clocks, and pre-flight checks, which a resumed run repeats) as the one without a
fault. Meanwhile a reader tails metrics.jsonl: every line that has its end must be whole. One JSON line last.
"""

import argparse
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a pool of threads does not survive a fork

import torch

import train_ppo
import train_rm
import train_sft
from nanorlhf.checkpoint import save_policy, save_scalar
from nanorlhf.config import cli
from nanorlhf.encoding import encode_posts
from nanorlhf.jsonl import read_jsonl
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.resume import checkpoints
from nanorlhf.tiny.data import write_world
from nanorlhf.tldr import load_posts
from nanorlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
FLAGS = {
    "sft": "--model models/base --batch_size 8 --eval_posts 4 --max_updates 6",
    "rm": "--sft_model models/base --batch_size 4 --eval_pairs 8 --shift_posts 8 --max_updates 6",
    "ppo": "--sft_model models/base --reward_model models/rm --batch_size 8 --total_episodes 48 --response_length 16 "
    "--num_ppo_epochs 2 --sample_every 2",
}
COMMON = "--preset tiny --device cpu --data data --save_every 1 --keep 2"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def prepare(folder: Path) -> None:
    """Small random models, and a small tiny world."""
    tokenizer = load_tokenizer(ROOT / "nanorlhf" / "tiny")
    data = write_world(folder / "data", posts={"train": 64, "valid": 16}, comparisons={"train": 32, "valid1": 16})
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    policy = Policy(config)
    initialise(policy, seed=0)
    with torch.no_grad():  # what all tokens have in common makes EOS the likeliest: half of the responses stop
        policy.model.embed_tokens.weight.add_(0.05)
        policy.model.embed_tokens.weight[tokenizer.eos_id] = 0.16
    save_policy(policy, folder / "models" / "base", tokenizer)
    reward_model = reward_model_from(policy, seed=0)
    pairs = zip(*encode_posts(load_posts(data, "train"), tokenizer, 104), strict=True)
    reward_model.score_shift = reward_model.scores([query + reference for query, reference in pairs]).mean().item()
    save_scalar(reward_model, folder / "models" / "rm", tokenizer)


class Process:
    """A forked process that runs a stage's script in the current folder.

    kill_before: it kills itself before its n-th file operation; max_file: no file may grow past so many bytes; counter:
    a file that gets the number of its operations.
    """

    def __init__(self, stage: str, more: str = "", *, kill_before: int = 0, max_file: int = 0, counter: str = ""):
        reader, writer = os.pipe()  # not a file: max_file would hit it
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)
        argv = f"{COMMON} {FLAGS[stage]} --run_name {stage} {more}".split()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            run(stage, argv, kill_before, max_file, counter)
        os.close(writer)
        self._reader, self.said = reader, ""

    def wait(self) -> int:
        """Its exit status as a shell says it: 137 for a SIGKILL. Then `said` is what it printed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with open(self._reader, encoding="utf-8", errors="replace") as output:
            self.said = output.read()
        return code if code >= 0 else 128 - code


def run(stage: str, argv: list[str], kill_before: int, max_file: int, counter: str) -> NoReturn:
    """The life of the forked process."""
    status, operations = 70, 0

    def hook(event, args):
        nonlocal operations
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            operations += 1
            if operations == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = [f"train_{stage}.py", *argv]
        sys.addaudithook(hook)
        if max_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
        script = SCRIPTS[stage]
        cli(script.main, script.Config, script.PRESETS, script.__doc__, argv)
        if counter:
            Path(counter).write_text(str(operations))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


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

    def __init__(self, stage: str, seed: int):
        self.stage, self.random = stage, random.Random(f"{stage} {seed}")
        self.counts, self.killed_while, self.failures = Counter(), Counter(), []
        began = time.monotonic()
        process = Process(stage, counter="operations")
        assert process.wait() == 0, process.said
        self.seconds = time.monotonic() - began
        self.operations = int(Path("operations").read_text())
        self.expected = result(stage)

    def fresh(self) -> None:
        shutil.rmtree("runs", ignore_errors=True)

    def moment(self) -> float:
        return self.random.uniform(0, self.seconds)

    def after(self, process: Process, seconds: float, *signals: int) -> int:
        """Send signals to a process after that time, tailing its metrics meanwhile. Returns its exit status."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            tail(Path("runs", self.stage, "metrics.jsonl"))
            time.sleep(min(0.005, max(0.0, end - time.monotonic())))
        for number in signals:
            os.kill(process.pid, number)
            time.sleep(0.01)
        return process.wait()

    def finish(self, kind: str, what: str) -> str:
        """The run goes on to its end, and is compared. Returns what it printed."""
        process = Process(self.stage, "--resume auto")
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
                status = self.after(Process(self.stage, "--resume auto"), moments[-1], signal.SIGKILL)
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
            assert Process(self.stage, "--resume auto", kill_before=n).wait() == 137
            self.counts["operations_kills"] += 1
            self.killed_while[where(self.stage)] += 1
            self.finish("operations", f"before operation {n}")

    def signals(self, number: int) -> None:
        for trial in range(number):
            self.fresh()
            sent = [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]][trial % 3]
            process, moment = Process(self.stage, "--resume auto"), self.moment()
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
            process = Process(self.stage)
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
            process = Process(self.stage, "--resume auto", max_file=limit)
            status, said = process.wait(), process.said
            if status not in (0, 2) or "Traceback" in said:
                self.failures.append(f"{self.stage} full at {limit} bytes: exit status {status}: {said[-600:]}")
            self.counts["full_stopped"] += status == 2
            self.finish("full", f"at {limit} bytes")

    def two(self, number: int) -> None:
        for _ in range(number):
            self.fresh()
            statuses = sorted(process.wait() for process in [Process(self.stage), Process(self.stage)])
            if statuses != [0, 2]:
                self.failures.append(f"{self.stage} two at once: exit statuses {statuses}")
            self.counts["two_trials"] += 1
            self.counts["two_survived"] += result(self.stage) == self.expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="random SIGKILLs a stage")
    parser.add_argument("--operations", type=int, default=0, help="file operations to be killed before; 0: all")
    parser.add_argument("--others", type=int, default=30, help="trials of each other kind a stage")
    parser.add_argument("--stages", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, counts, killed_while, failures = time.monotonic(), Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(Path(folder))
        for stage in args.stages:
            harness = Harness(stage, args.seed)
            print(f"{stage}: {harness.seconds:.2f} s and {harness.operations} file operations undisturbed", flush=True)
            for trials, number in (
                (harness.full, args.others),
                (harness.random_kills, args.kills),
                (harness.kills_before_operations, args.operations),
                (harness.signals, args.others),
                (harness.damage, args.others),
                (harness.two, min(args.others, 5)),
            ):
                before = time.monotonic()
                trials(number)
                print(f"{stage}: {trials.__name__} took {time.monotonic() - before:.0f} s", flush=True)
            print(f"{stage}: {dict(harness.counts)}", flush=True)
            counts += harness.counts
            killed_while += harness.killed_while
            failures += harness.failures
        os.chdir(ROOT)
    for failure in failures[:10]:
        print(f"FAILED {failure}")
    seconds = round(time.monotonic() - began)
    print(json.dumps({**counts, "killed_while": killed_while, "failures": len(failures), "seconds": seconds}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
