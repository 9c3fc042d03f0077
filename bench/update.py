"""A whole PPO update, an SFT step and a reward-model step, by phase: seconds, tokens/s, MFU, bandwidth, peak GiB.

    python -m bench.update                 Llama-3.2-1B's shape on a GPU, the tiny world's on a CPU; random weights
    python -m bench.update --compare       also with NANORLHF_KERNELS=torch, and with padding, each in its own process
    torchrun --standalone --nproc_per_node 1 -m bench.update       models in parts (sharding.py), on so many GPUs
    python -m bench.update --padded        as if every query were padded to its longest, as the paper's code does

What runs is the code of the scripts: generate, train_ppo.score, train_ppo.learn and AdamW.step, train_sft.learn and
train_rm.learn, with their presets' batch sizes. Query lengths are drawn from a normal distribution that is cut off
(bench/shapes.py prints as mean and range); a random model never stops, so each response gets an EOS where a written
summary would end. Medians over --repeats after a warm-up. From the time of a step follows that of an epoch: 116,722
posts of SFT and PPO, 92,858 pairs; saving and evaluation are not in it. Shares, on a GPU only, are of a copy and of a
bf16 matmul measured in the same run; MFU is of the data sheet (nanorlhf/monitoring/flops.py). One JSON line last.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that can grow

import argparse
import gc
import json
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import numpy as np
import torch

import kernels
import train_ppo
import train_rm
import train_sft
from bench.kernels import ceilings
from bench.plan import predict
from bench.rows import note
from bench.shapes import PAIRS, POSTS, Shape, four_models, random_model, shape_for
from nanorlhf import parallel, ppo
from nanorlhf.errors import one_sentence
from nanorlhf.models import Policy, ScalarModel, parameter_count
from nanorlhf.monitoring.flops import head_flops, mfu, trunk_flops
from nanorlhf.optim import AdamW
from nanorlhf.packing import microbatches
from nanorlhf.ppo import Experience
from nanorlhf.rollout import generate
from nanorlhf.run.device import device_name, now, pick_device, pick_dtype
from nanorlhf.run.streams import as_command
from nanorlhf.sharding import actor_of, refill

GIB = 2**30


class Clock:
    """Seconds and peak memory by phase. `with clock("learn"): ...` adds up within an update; `lap` ends one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.laps: list[dict[str, float]] = []
        self.peak: dict[str, float] = {}
        self._lap: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = now(self.device)
        yield
        self._lap[phase] += now(self.device) - began
        if self.device.type == "cuda":
            self.peak[phase] = max(self.peak.get(phase, 0.0), torch.cuda.max_memory_allocated(self.device) / GIB)

    def lap(self) -> None:
        self.laps.append(dict(self._lap))
        self._lap.clear()

    def seconds(self) -> dict[str, float]:
        """Median over the laps but the first, which compiles."""
        return {phase: median(lap[phase] for lap in self.laps[1:]) for phase in self.laps[0]}


# --- what runs -------------------------------------------------------------------------------------------------------


def ppo_update(shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[Clock, dict]:
    cfg = train_ppo.Config(**train_ppo.PRESETS[shape.preset])
    B, R, eos_id = cfg.batch_size, cfg.response_length, shape.config.eos_token_id
    policy, reference, critic, reward_model = four_models(shape.config, device, dtype)
    optimizer = AdamW([policy, critic], lr=cfg.lr)
    actor = actor_of(policy)  # of one process the policy itself
    models = actor, reference, critic, reward_model
    queries = shape.queries(B)
    written = [min(len(summary), R) for summary in shape.summaries(B)]  # tokens, EOS included
    clock = Clock(device)
    for _ in range(repeats + 1):
        with clock("rollout"):
            responses, _ = generate(actor, queries, R, cfg.temperature, cfg.seed)
            responses.masked_fill_(responses == eos_id, 0)
            responses[torch.arange(B), torch.tensor(written) - 1] = eos_id
            answers = responses.tolist()
        with clock("score"):
            sequences = [query + answer for query, answer in zip(queries, answers, strict=True)]
            finished = [query + answer[:n] for query, answer, n in zip(queries, answers, written, strict=True)]
            scored = train_ppo.score(*models, sequences, finished, responses, cfg)
            actions, states = ppo.action_mask(responses, eos_id), ppo.value_mask(responses, eos_id)
            values = torch.where(states, scored.values, 0.0)
            kl = torch.where(actions, scored.logprobs - scored.ref_logprobs, 0.0)
            rewards = ppo.token_rewards(scored.raw_scores, kl, responses, eos_id, cfg.kl_coef)
            advantages, returns = ppo.gae(rewards, values, cfg.gamma, cfg.lam)
            advantages = ppo.masked_whiten(advantages, actions)
            episode = Experience(sequences, responses, actions, states, scored.logprobs, values, advantages, returns)
        lengths = [len(sequence) for sequence in sequences]
        for epoch in range(cfg.num_ppo_epochs):
            order = np.random.default_rng(epoch).permutation(B)
            for minibatch in np.split(order, cfg.num_minibatches):
                with clock("learn"):
                    for group, counts in microbatches([lengths[i] for i in minibatch], cfg.microbatch_tokens):
                        train_ppo.learn(policy, critic, episode, minibatch, minibatch[group], cfg, counts=counts)
                with clock("optimizer"):
                    optimizer.step(cfg.lr, cfg.max_grad_norm)
        with clock("optimizer"):
            refill(actor, policy)
        clock.lap()

    trunk, head = trunk_flops(shape.config, lengths, B * R), head_flops(shape.config, B * R)
    read = trunk_flops(shape.config, [len(x) for x in finished], B)
    tokens, steps = sum(lengths), cfg.num_ppo_epochs * cfg.num_minibatches
    trained = sum(parameter_count(model) for model in (policy, critic))
    element, c = actor.head_weight.element_size(), shape.config
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * element  # bytes a token
    seen = sum(len(query) + t for query in queries for t in range(R))  # cached tokens that decoding reads
    work = {
        "rollout": {"tokens": tokens, "flops": trunk + head,
                    "bytes": R * parameter_count(policy) * element + seen * cached},
        "score": {"tokens": 3 * tokens + sum(len(x) for x in finished), "flops": 3 * trunk + 2 * head + read},
        "learn": {"tokens": 2 * cfg.num_ppo_epochs * tokens, "flops": 3 * cfg.num_ppo_epochs * (2 * trunk + head)},
        "optimizer": {"bytes": steps * trained * adam_bytes(dtype)},
    }  # fmt: skip
    return clock, work


def adam_bytes(dtype: torch.dtype) -> int:
    """Bytes a parameter that a step moves: reads weight, gradient, moments; writes weight, moments; the bf16 copy."""
    return 28 + (0 if dtype == torch.float32 else 6)


def training_step(stage: str, shape: Shape, device, dtype: torch.dtype, repeats: int) -> tuple[Clock, dict]:
    """One optimizer step of SFT or of the reward model."""
    script = {"sft": train_sft, "rm": train_rm}[stage]
    cfg = script.Config(**script.PRESETS[shape.preset])
    if stage == "sft":
        model = random_model(Policy, shape.config, device, dtype, "masters")
        batch = shape.with_summaries(cfg.batch_size)
        lengths = [len(s) for s in batch]
        read = rows = sum(lengths)  # the head reads every token
    else:
        model = random_model(ScalarModel, shape.config, device, dtype, "masters", bias=False)
        batch = shape.pairs(cfg.batch_size)
        lengths = [sum(map(len, pair)) for pair in batch]  # the query once
        read, rows = 2 * len(batch), 0
    optimizer = AdamW([model], lr=cfg.lr)
    clock = Clock(device)
    for _ in range(repeats + 1):
        with clock("learn"):
            script.learn(model, batch, cfg)
        with clock("optimizer"):
            optimizer.step(cfg.lr, cfg.max_grad_norm)
        clock.lap()
    flops = 3 * (trunk_flops(shape.config, lengths, read) + head_flops(shape.config, rows))
    work = {"learn": {"tokens": sum(lengths), "flops": flops},
            "optimizer": {"bytes": parameter_count(model) * adam_bytes(dtype)}}  # fmt: skip
    return clock, work


# --- what is said ----------------------------------------------------------------------------------------------------


def rows(stage: str, clock: Clock, work: dict, ceiling: dict[str, float], device: torch.device) -> list[dict]:
    """One dict a phase, and one for the whole."""
    seconds, found = clock.seconds(), []
    for phase, s in seconds.items():
        did = work[phase]
        row = {"stage": stage, "phase": phase, "s": s}
        row |= {"tokens_per_s": did["tokens"] / s} if "tokens" in did else {}
        if device.type == "cuda":  # a CPU's ceilings move with its load, and its matmul is not the one that we call
            row |= {"of_matmul": did["flops"] / s / 1e12 / ceiling["TFLOP"]} if "flops" in did else {}
            row |= {"of_copy": did["bytes"] / s / 1e9 / ceiling["GB"]} if "bytes" in did else {}
            row |= {"mfu": mfu(did["flops"] / parallel.size(), s, device)} if "flops" in did else {}
        row |= {"peak_gib": clock.peak[phase]} if phase in clock.peak else {}
        found.append(row)
    whole = sum(seconds.values())
    tokens = work["rollout" if stage == "ppo" else "learn"]["tokens"]
    share = mfu(sum(did.get("flops", 0.0) for did in work.values()), whole, device)
    total = {"stage": stage, "phase": "whole", "s": whole, "tokens_per_s": tokens / whole}
    total |= {} if share is None else {"mfu": share}
    total |= {"peak_gib": max(clock.peak.values())} if clock.peak else {}
    return [*found, total]


def epochs(seconds: dict[str, float], shape: Shape) -> dict[str, float]:
    """Hours of one pass over OpenAI's training splits, stage by stage, by the measured time of a step."""
    sizes = {stage: script.Config(**script.PRESETS[shape.preset]).batch_size
             for stage, script in (("sft", train_sft), ("rm", train_rm), ("ppo", train_ppo))}  # fmt: skip
    items = {"sft": POSTS, "rm": PAIRS, "ppo": POSTS}
    hours = {stage: items[stage] // sizes[stage] * s / 3600 for stage, s in seconds.items()}
    return hours | {"pipeline": sum(hours.values())}


def measure(args: argparse.Namespace) -> dict:
    device = pick_device(args.device)
    dtype, shape = pick_dtype("auto", device), shape_for(device)
    if args.padded:
        shape = replace(shape, name=f"{shape.name}, padded to {shape.most}", mean=shape.most, spread=0)
    ceiling = ceilings()
    lengths = shape.lengths(128)
    print(f"{shape.name} on {device_name(device)}, {str(dtype).removeprefix('torch.')}, kernels: {kernels.chosen()}")
    print(f"128 queries of {min(lengths)} to {max(lengths)} tokens, mean {np.mean(lengths):.0f}; ceilings: copy "
          f"{ceiling['GB']:.0f} GB/s, matmul {ceiling['TFLOP']:.3g} TFLOP/s")  # fmt: skip
    print(
        "\n| stage | phase | s | tokens/s | of matmul | of copy | MFU | peak GiB |\n|---|---|---|---|---|---|---|---|"
    )
    found = []
    for stage in args.stages:
        run = ppo_update if stage == "ppo" else lambda *rest, stage=stage: training_step(stage, *rest)
        clock, work = run(shape, device, dtype, args.repeats)
        for row in rows(stage, clock, work, ceiling, device):
            found.append(row)
            note(row)
            cells = [row.get("of_matmul"), row.get("of_copy"), row.get("mfu")]
            shares = " | ".join("" if x is None else f"{x:.0%}" for x in cells)
            speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
            peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
            print(f"| {stage} | {row['phase']} | {row['s']:.3f} | {speed} | {shares} | {peak} |", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result = {"bench": "update", "shape": shape.name, "device": device_name(device), "torch": torch.__version__,
              "kernels": kernels.chosen(), "mean_query": float(np.mean(lengths)), "ceilings": ceiling,
              "results": found}  # fmt: skip
    if device.type == "cuda":
        result["planned_gib"] = {stage: predict(stage, shape).peak / GIB for stage in args.stages}  # to compare with
    whole = {row["stage"]: row["s"] for row in found if row["phase"] == "whole"}
    if device.type == "cuda" and len(whole) == 3:
        result["hours"] = epochs(whole, shape)
        print("\nby these step times: " + ", ".join(f"{name} {h:.2f} h" for name, h in result["hours"].items()))
    return result


def child(flags: list[str], **environment: str) -> dict:
    """The JSON line of this benchmark in a process of its own."""
    command = [sys.executable, "-m", "bench.update", *flags]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(flags: list[str]) -> dict:
    """Ours, the references of the kernels, and ours on padded queries, one after the other."""
    runs = {
        "ours": child(flags),
        "torch": child(flags, NANORLHF_KERNELS="torch"),
        "padded": child([*flags, "--padded"]),
    }
    seconds = {name: {(row["stage"], row["phase"]): row["s"] for row in run["results"]} for name, run in runs.items()}
    print("| stage | phase | ours, s | kernels=torch | padded |\n|---|---|---|---|---|")
    for key, ours in seconds["ours"].items():
        others = (f"{seconds[name][key]:.3f} ({seconds[name][key] / ours:.2f}x)" for name in ("torch", "padded"))
        print(f"| {key[0]} | {key[1]} | {ours:.3f} | {' | '.join(others)} |")
    return runs["ours"] | {"compare": {name: run["results"] for name, run in runs.items() if name != "ours"}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.update", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--stages", nargs="+", choices=("sft", "rm", "ppo"), default=["sft", "rm", "ppo"])
    parser.add_argument("--repeats", type=int, default=2, help="measured updates and steps, after a warm-up")
    parser.add_argument("--padded", action="store_true", help="every query as long as the longest there may be")
    parser.add_argument("--compare", action="store_true", help="also kernels=torch and padded")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"got --repeats {args.repeats}, expected 1 or more")
    flags = ["--device", args.device, "--repeats", str(args.repeats), "--stages", *args.stages]
    with parallel.one_voice(), one_sentence(), parallel.group(args.device):
        print(json.dumps(compare(flags) if args.compare else measure(args)))


if __name__ == "__main__":
    as_command(main)
