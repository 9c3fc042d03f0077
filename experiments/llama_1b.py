"""Llama-3.2-1B's real shape on this machine: files, loading, one forward pass, one optimizer step of each stage.

    python -m experiments.llama_1b                all of it, on a CPU, in a temporary folder (3 GB of disk, 8 GB of RAM)
    python -m experiments.llama_1b load forward   some of it

    load      time and peak memory of load_policy, in bf16 and fp32, beside a plain read of the file
    forward   all 16 layers: logits and log-probs of a few sequences against transformers'
    sft, rm   one optimizer step of the real script on a 2-layer model of the same width and vocabulary (7 GB)
    ppo       the same; its four models and two optimizers take 15 GB, so it is left out where less is free:
              --vocabulary 16000 makes the 2-layer model smaller (6 GB)

The model is bench/stand_ins.py's: the real config.json and sizes, random weights, a tokenizer of 128,256 ids. Each step
runs in a process of its own. Prints a line for each and one JSON line last.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanorlhf.run.streams import as_command

ROOT = Path(__file__).parents[1]
STEPS = ("load", "forward", "sft", "rm", "ppo")
LENGTHS = (5, 64, 300)  # tokens of the sequences of the forward pass


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- steps, each in its own process -----------------------------------------------------------------------------------


def make(folder: Path, vocabulary: int, whole: bool) -> dict:
    """The folders the steps need. whole: also the one with all layers, which `load` and `forward` read."""
    from bench.stand_ins import write_llama, write_llama3_tokenizer
    from nanorlhf.data.tldr import load_posts
    from nanorlhf.tiny.data import write_world

    began = time.perf_counter()
    world = write_world(folder / "data", {"train": 64, "valid": 4, "test": 4}, {"train": 16, "valid1": 8})
    texts = [post.post for post in load_posts(world, "train")]
    learned = write_llama3_tokenizer(folder / "2_layers", texts, vocabulary)
    result = {"learned_tokens": learned, "parameters_2_layers": write_llama(folder / "2_layers", 2, vocabulary)}
    if whole:
        write_llama3_tokenizer(folder / "1b", texts)
        result["parameters"] = write_llama(folder / "1b")
    return result | {"seconds": time.perf_counter() - began}


def load(folder: Path, dtype: str) -> dict:
    import torch

    from nanorlhf.storage.checkpoint import load_policy

    with open(folder / "1b" / "model.safetensors", "rb", buffering=0) as file:  # how fast the disk (or its cache) is
        buffer = bytearray(2**24)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        read = time.perf_counter() - began
    before, began = peak_gib(), time.perf_counter()
    policy = load_policy(folder / "1b", dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - began
    size = sum(parameter.nbytes for parameter in policy.parameters())
    peak = peak_gib() - before
    began = time.perf_counter()
    torch.zeros(size, dtype=torch.uint8).fill_(1)  # how fast this machine hands out memory
    memory = time.perf_counter() - began
    return {"dtype": dtype, "seconds": seconds, "size_gib": size / 2**30, "peak_gib": peak,
            "peak_over_size": peak * 2**30 / size, "plain_read_s": read, "plain_memory_s": memory}  # fmt: skip


def sequences() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [[128000, *torch.randint(0, 128000, (n - 1,), generator=generator).tolist()] for n in LENGTHS]


def forward(folder: Path, whose: str) -> dict:
    """Logits of the last token and log-probs of the tokens that follow, saved for the comparison."""
    import torch
    from safetensors.torch import save_file

    found = {}
    began = time.perf_counter()
    with torch.no_grad():
        if whose == "ours":
            from nanorlhf.storage.checkpoint import load_policy

            logits = load_policy(folder / "1b").logits(sequences())
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                folder / "1b", dtype=torch.float32, attn_implementation="eager"
            )
            logits = [model(torch.tensor([ids])).logits[0] for ids in sequences()]
        for ids, rows in zip(sequences(), logits, strict=True):
            found[f"last.{len(ids)}"] = rows[-1].clone()
            found[f"logprobs.{len(ids)}"] = rows[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    save_file(found, folder / f"{whose}.safetensors")
    return {"seconds": time.perf_counter() - began, "peak_gib": peak_gib()}


def compare(folder: Path) -> dict:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / f"{whose}.safetensors") for whose in ("ours", "theirs"))
    apart = {kind: max((ours[name] - theirs[name]).abs().max().item() for name in ours if name.startswith(kind))
             for kind in ("last", "logprobs")}  # fmt: skip
    last = ours[f"last.{LENGTHS[-1]}"]
    return {"logits_apart": apart["last"], "logprobs_apart": apart["logprobs"], "logits_mean": last.mean().item(),
            "logits_std": last.std().item(), "argmax_equal": all(
                (ours[f"last.{n}"].argmax() == theirs[f"last.{n}"].argmax()).item() for n in LENGTHS)}  # fmt: skip


def train(folder: Path, stage: str) -> dict:
    """One optimizer step of train_<stage>.py, as typed by a user."""
    runs = folder / "runs"
    flags = {
        "sft": ["--model", folder / "2_layers", "--batch_size", "8", "--eval_posts", "2", "--response_length", "8"],
        "rm": ["--sft_model", runs / "sft" / "final", "--batch_size", "4", "--eval_pairs", "4",
               "--shift_posts", "8"],
        "ppo": ["--sft_model", runs / "sft" / "final", "--reward_model", runs / "rm" / "final", "--batch_size", "4",
                "--total_episodes", "4", "--num_ppo_epochs", "1", "--response_length", "8",
                "--no_preflight"],  # one step after random weights, a policy does not stop yet, and the check says so
    }  # fmt: skip
    shared = ["--preset", "llama-1b", "--device", "cpu", "--data", folder / "data", "--max_updates", "1"]
    command = [sys.executable, ROOT / f"train_{stage}.py", *shared, "--microbatch_tokens", "512", *flags[stage]]
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    rows = [json.loads(line) for line in open(runs / stage / "metrics.jsonl", encoding="utf-8")]
    shown = {"sft": ["train/sft/loss"], "rm": ["train/rm/loss"], "ppo": ["val/ratio", "objective/kl", "grad_norm"]}[
        stage
    ]
    return {"seconds": time.perf_counter() - began, "peak_gib": peak} | {name: rows[0][name] for name in shown}


# --- the whole --------------------------------------------------------------------------------------------------------


def free_gb() -> float:
    """Memory that a new process can have (Linux: what is free and what the page cache would give up)."""
    lines = dict(line.split(":") for line in open("/proc/meminfo", encoding="utf-8"))
    return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9


def alone(function: str, *arguments) -> dict:
    """A step in a process of its own, so that its peak memory is its own."""
    program = (
        f"import json; from pathlib import Path; from bench import llama_1b; print(json.dumps(llama_1b.{function}("
    )
    program += ", ".join(f"Path({str(a)!r})" if isinstance(a, Path) else repr(a) for a in arguments) + ")))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.llama_1b", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="ids of the 2-layer model")
    args = parser.parse_args()
    steps = list(args.steps or STEPS)
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"step is {unknown[0]!r}, expected one of {', '.join(STEPS)}")
    for stage, before in (("ppo", "rm"), ("rm", "sft")):  # a stage starts from the models of those before it
        if stage in steps and before not in steps:
            steps.append(before)
    results = {}

    def say(step: str, result: dict) -> None:
        results[step] = result
        print(f"{step:14}", {k: round(v, 6) if isinstance(v, float) else v for k, v in result.items()}, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("make", alone("make", folder, args.vocabulary, bool({"load", "forward"} & set(steps))))
        ppo_gb = 10 * 4 * results["make"]["parameters_2_layers"] / 1e9  # 4 models; gradient and two moments for 2
        if "load" in steps:
            for dtype in ("bfloat16", "float32"):
                say(f"load {dtype}", alone("load", folder, dtype))
        if "forward" in steps:
            for whose in ("ours", "theirs"):
                say(f"forward {whose}", alone("forward", folder, whose))
            say("compare", alone("compare", folder))
        for stage in ("sft", "rm", "ppo"):
            if stage in steps:
                if stage == "ppo" and free_gb() < ppo_gb + 1:
                    print(f"ppo            left out: {free_gb():.0f} GB of memory are free, it takes {ppo_gb:.0f}")
                    continue
                say(stage, alone("train", folder, stage))
    print(json.dumps({"bench": "llama_1b", "cores": len(os.sched_getaffinity(0)), "results": results}))


if __name__ == "__main__":
    as_command(main)
