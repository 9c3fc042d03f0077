"""Does a run depend on the number of its processes? The scripts on 1 to 4 CPU processes, beside one plain process.

    python -m bench.parallel            the tables of docs/parallel.md; 100 s of processor time
    python -m bench.parallel --short    what the tests run: PPO on 2 processes

CPU processes talk over gloo, so this shows that the numbers are right and counts what is sent. It says nothing of
speed: for that, `bench.plan --gpus` has a model, and a machine with several GPUs the truth. Differences are in fp32, of
weights |a - b| / |b| of the worst tensor, of metrics |a - b| / max(|a|, |b|, 1) of the worst one. One JSON line last.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: as torchrun sets it, and a pool of threads does not survive a fork

import torch
from safetensors.torch import load_file

import train_ppo
import train_rm
import train_sft
from bench.launch import Launched
from bench.shapes import random_model
from nanorlhf import parallel
from nanorlhf.models import Policy, ScalarModel, critic_from, parameter_count
from nanorlhf.optim import AdamW
from nanorlhf.packing import pack
from nanorlhf.run.config import cli
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.streams import as_command
from nanorlhf.sharding import actor_of, local
from nanorlhf.storage.checkpoint import load_policy, load_scalar, save_policy, save_scalar
from nanorlhf.storage.jsonl import read_jsonl
from nanorlhf.storage.model_config import read_config
from nanorlhf.tiny.data import write_world

SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
FLAGS = {
    "sft": "--batch_size 8 --eval_posts 8 --max_updates 4 --save_every 2",
    "rm": "--batch_size 4 --eval_pairs 8 --shift_posts 8 --max_updates 4 --save_every 2",
    "ppo": "--batch_size 4 --max_updates 2 --num_ppo_epochs 1 --save_every 1 --sample_every 1",
}
CLOCKS = ("time", "perf/", "preflight/")  # a resumed run repeats the pre-flight


def script(stage: str, more: str = ""):
    """What a process does that is started as `python train_<stage>.py ...`."""
    models = {"sft": f"--model {EMBEDDED / 'base'}", "rm": f"--sft_model {EMBEDDED / 'sft'}"}
    models["ppo"] = f"--sft_model {EMBEDDED / 'sft'} --reward_model {EMBEDDED / 'rm'}"
    argv = f"--preset tiny --device cpu --data data {FLAGS[stage]} {models[stage]} {more}".split()

    def work() -> None:
        sys.argv = [f"train_{stage}.py", *argv]
        module = SCRIPTS[stage]
        cli(module.main, module.Config, module.PRESETS, module.__doc__, argv)

    return work


def plain(stage: str, more: str = "") -> None:
    """The same by one process, without torchrun."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(os.open("plain.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            script(stage, more)()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, Path("plain.log").read_text(encoding="utf-8")[-2000:]


def run(stage: str, processes: int, name: str, more: str = "", plain_flags: str = "") -> Path:
    """A run folder; of 0 processes by a plain one."""
    flags = f"--run_name {name} {more}"
    if not processes:
        plain(stage, flags)
    else:
        launched = Launched(script(stage, flags), processes)
        statuses = launched.wait()
        assert not any(statuses), f"{name}: {statuses}\n" + "\n".join(said[-2000:] for said in launched.said)
    return Path("runs") / name


def difference(folder: Path, other: Path) -> dict[str, float]:
    """Largest differences of a run from another one, in its metrics, its gradient norms, and its final weights."""
    found = {"metrics": 0.0, "gradient norm": 0.0, "weights": 0.0}
    rows, others = (read_jsonl(path / "metrics.jsonl") for path in (folder, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others], f"{folder}: other steps than {other}"
    for row, theirs in zip(rows, others, strict=True):
        assert row.keys() == theirs.keys(), row.keys() ^ theirs.keys()
        for name in row:
            a, b = row[name], theirs[name]
            if name.startswith(CLOCKS) or a == b:
                continue
            kind = "gradient norm" if name == "grad_norm" else "metrics"
            found[kind] = max(found[kind], abs(a - b) / max(abs(a), abs(b), 1.0))
    for path in sorted(other.glob("final*/*.safetensors")):
        mine, theirs = load_file(folder / path.relative_to(other)), load_file(path)
        assert mine.keys() == theirs.keys()
        for name, b in theirs.items():
            gap = (mine[name].double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
            found["weights"] = max(found["weights"], gap.item())
    return found


def begun(run: Path, name: str) -> Path:
    """A copy of a run folder that `--resume --run_name name` goes on with, from its last checkpoint."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    record = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    record["config"]["run_name"] = name
    (copy / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return copy


def rows(short: bool):
    """(what, difference) of every comparison, one after another."""
    ppo = run("ppo", 0, "ppo")
    for processes in (2,) if short else (1, 2, 3, 4):
        yield (
            f"PPO, {processes} process{'es' if processes > 1 else ', in parts'}",
            difference(run("ppo", processes, f"ppo_{processes}"), ppo),
        )
    if short:
        return
    two = "--num_minibatches 2"
    for what, processes, flags in (
        ("PPO, 2 processes, --kl_estimator full", 2, "--kl_estimator full"),
        ("PPO, 2 processes, --activation_checkpointing", 2, "--activation_checkpointing"),
        ("PPO, 3 processes, minibatches of 2 rows", 3, two),
    ):
        other = ppo if "checkpointing" in flags else run("ppo", 0, "other", f"{flags} --overwrite")
        yield what, difference(run("ppo", processes, "those", f"{flags} --overwrite"), other)
    for to in (3, 0):
        begun(Path("runs/ppo_2"), f"from_2_to_{to}")
        name = "a plain one" if to == 0 else f"{to}"
        yield f"PPO, from 2 processes resumed on {name}", difference(run("ppo", to, f"from_2_to_{to}", "--resume"), ppo)
    for stage in ("sft", "rm"):
        other = run(stage, 0, stage)
        for processes in (2, 3):
            what = f"{stage.upper()}, {processes} processes"
            yield what, difference(run(stage, processes, f"{stage}_{processes}"), other)


# --- memory ----------------------------------------------------------------------------------------------------------

MIB = 2**20


def write_model(folder: Path) -> int:
    """A policy and a reward model of 27 million random parameters each, as Hugging Face folders. Returns how many."""
    config = replace(
        read_config(EMBEDDED / "sft"), vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    nobody = SimpleNamespace(bos_id=1, eos_id=2, pad_id=0, save=lambda folder: None)
    policy = random_model(Policy, config, "cpu", torch.float32)
    save_policy(policy, folder / "policy", nobody)
    save_scalar(random_model(ScalarModel, config, "cpu", torch.float32, bias=False), folder / "rm", nobody)
    return parameter_count(policy)


def resident() -> dict[str, int]:
    """Bytes of this process's own memory now, and the most that was resident since the peak was forgotten."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS", "VmHWM")}


def four_models_of_ppo() -> None:
    """What train_ppo.py holds after its first step, on one process; writes what it took."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
    policy = load_policy(Path("policy"), parts="masters")
    peak = resident()["VmHWM"] - before["VmRSS"]
    reference = load_policy(Path("policy"), parts="frozen").requires_grad_(False)
    reward_model = load_scalar(Path("rm"), parts="frozen").requires_grad_(False)
    critic = critic_from(reward_model).requires_grad_(True)
    optimizer, actor = AdamW([policy, critic], lr=1e-6), actor_of(policy)
    packed = pack([[5, 6, 7]])
    policy.response_logprobs(packed, torch.tensor([[6, 7]]), 0.7)[0].sum().backward()
    critic.response_values(packed, 2).sum().backward()
    gradients = [local(parameter.grad).nbytes for parameter in optimizer.masters]
    optimizer.step(1e-6)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what is free
    states = resident()["RssAnon"] - before["RssAnon"] + sum(gradients)  # they are given up by the step
    del actor, reference, reward_model  # alive until here
    found = {"loading_peak": peak, "states": states}
    Path(f"memory_{parallel.rank()}.json").write_text(json.dumps(found), encoding="utf-8")


def memory(processes: int) -> dict[str, int]:
    """Of the process that takes most. 0: a plain one, without torchrun."""

    def work() -> None:
        if not processes:
            del os.environ["RANK"]
        with parallel.one_voice(), parallel.group("cpu"):
            four_models_of_ppo()

    launched = Launched(work, max(processes, 1))
    assert not any(launched.wait()), launched.said
    found = [json.loads(path.read_text(encoding="utf-8")) for path in Path().glob("memory_*.json")]
    for path in Path().glob("memory_*.json"):
        path.unlink()
    return {name: max(one[name] for one in found) for name in found[0]}


def memory_table() -> dict[str, dict[str, int]]:
    size = write_model(Path())
    heads = f"{size / 1e6:.0f} M parameters in fp32, MiB a process | states, predicted | measured"
    print(f"\n| {heads} | peak while a policy of {4 * size / MIB:.0f} MiB is read |\n|---|---|---|---|")
    found = {}
    for processes in (0, 1, 2, 4):
        one = memory(processes)
        # two masters with gradients and moments, two frozen models, and the actor where there is one
        one["predicted"] = (2 * 16 + 2 * 4) * size // max(processes, 1) + (4 * size if processes else 0)
        name = f"{processes} process{'es' if processes > 1 else ', in parts'}" if processes else "a plain process"
        found[name] = one
        cells = (f"{one[key] / MIB:.0f}" for key in ("predicted", "states", "loading_peak"))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="PPO on 2 processes, nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, found, here = time.monotonic(), {}, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_world(Path("data"), posts={"train": 64, "valid": 16, "test": 8}, comparisons={"train": 32, "valid1": 16})
        print("| run, against one plain process | metrics | gradient norm | weights |\n|---|---|---|---|")
        for what, differences in rows(args.short):
            found[what] = differences
            cells = " | ".join(f"{value:.1e}" if value else "0" for value in differences.values())
            print(f"| {what} | {cells} |", flush=True)
        taken = {} if args.short else memory_table()
        os.chdir(here)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"bench": "parallel", "differences": found, "memory": taken, "seconds": seconds}))


if __name__ == "__main__":
    as_command(main)
