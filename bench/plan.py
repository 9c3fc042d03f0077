"""Will it fit? GiB by phase of SFT, the reward model and PPO on one GPU, before anything is started.

    python -m bench.plan --gpu_gb 80                        24, 48, 80 or 141: what the card is sold as, in 10^9 bytes
    python -m bench.plan --gpu_gb 80 --microbatch_tokens 8192
    python -m bench.plan --gpu_gb 8 --model smollm2         also smollm2-360m
    python -m bench.plan --gpu_gb 80 --gpus 8 --model llama-8b      several (bench/several.py); also llama-3b

No GPU is needed: the real passes of train_sft.py, train_rm.py and train_ppo.py run at the shape of the model on the
meta device, which has shapes and lifetimes but no data, and bench/memory.py counts the storages. When the preset's
--microbatch_tokens does not fit, halves of it are tried, then the same with --activation_checkpointing, which keeps the
inputs of each block and computes the rest again, then, of PPO, half the batch. Of an 80 GB card, 0.6 GiB are CUDA's own
and 3% are left for fragmentation. One JSON line last.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import train_ppo
import train_rm
import train_sft
from bench.memory import Meter, saved_bytes
from bench.shapes import MODELS, Shape, four_models, random_model, shape_for
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.optim import AdamW
from nanorlhf.packing import pack, split_by_tokens
from nanorlhf.ppo import Experience
from nanorlhf.rollout import generate
from nanorlhf.run.streams import as_command

GIB = 2**30
CONTEXT = 0.6 * GIB  # of the CUDA context: outside torch's allocator
MATMUL_WORKSPACE = (
    2 * 32 * 2**20
)  # cuBLAS's, through torch's allocator: one for the forward and one for backward passes
LEFT_FREE = 0.03  # of the card, for fragmentation
SMALLEST = 1024  # microbatch_tokens below which no proposal goes: two sequences


class CudaMemory:
    """What a Meter tells, from torch's allocator: so that a GPU can hold the prediction to account."""

    live = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated())

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


@dataclass
class Plan:
    """Bytes of one stage. states: what stays from update to update; phases: the peak of each, states included."""

    stage: str
    microbatch_tokens: int
    checkpointing: bool
    states: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def fits(self, gpu_gb: float) -> bool:
        return self.peak <= budget(gpu_gb)


def budget(gpu_gb: float) -> float:
    """Bytes that torch's allocator can hand out on a card of that many 10^9 bytes."""
    return gpu_gb * 1e9 * (1 - LEFT_FREE) - CONTEXT


# --- the passes, on meta or on a GPU -------------------------------------------------------------------------------


class _States:
    """Weights, masters, moments, gradients: measured one after the other while they are made."""

    def __init__(self, memory, recompute: bool):
        self.memory, self.recompute = memory, recompute
        self.bytes: dict[str, int] = {}
        self._held: list[torch.Tensor] = []
        self._before = memory.live

    def note(self, name: str) -> None:
        self.bytes[name] = self.memory.live - self._before
        self._before = self.memory.live

    def trained(self, *models: Policy | ScalarModel) -> AdamW:
        """The optimizer of these models, its masters noted."""
        optimizer = AdamW(list(models), lr=1e-6)
        self.note("fp32 masters")
        for model in models:
            model.model.activation_checkpointing = self.recompute
        return optimizer

    def first_step(self, optimizer: AdamW) -> None:
        """Notes the gradients that are there, then takes the step from which on there are moments."""
        self.note("fp32 gradients")
        if optimizer.masters[0].is_meta:  # no step without data: what it would leave behind
            self._held = [torch.empty_like(master) for master in optimizer.masters for _ in range(2)]
            optimizer.adam.zero_grad(set_to_none=True)
        else:
            optimizer.step(lr=1e-6)
        self._before -= self.bytes["fp32 gradients"]
        self.note("Adam's two moments")


def _peak(memory, work) -> int:
    """The most there is while work() runs, with cuBLAS's workspace, which a GPU counts itself."""
    memory.reset()
    work()
    return memory.peak + (MATMUL_WORKSPACE if isinstance(memory, Meter) else 0)


def ppo(shape: Shape, memory, device: str, cfg: train_ppo.Config, recompute: bool, dtype=torch.bfloat16) -> Plan:
    """Two updates' worth of passes of train_ppo.py."""
    B, R = cfg.batch_size, cfg.response_length
    queries = shape.queries(B)
    sequences = [query + [0] * R for query in queries]
    largest = _largest([len(s) for s in sequences], cfg.microbatch_tokens)
    one = [sequences[i] for i in largest]  # a microbatch: the others need no more
    with memory:
        states = _States(memory, recompute)
        models = policy, _, critic, _ = four_models(shape.config, device, dtype)
        states.note("weights of four models")
        optimizer = states.trained(policy, critic)
        numbers, mask = torch.zeros(B, R, device=device), torch.ones(B, R, device=device, dtype=torch.bool)
        responses = torch.zeros(B, R, device=device, dtype=torch.int64)
        episode = Experience(sequences, responses, mask, mask, *(numbers,) * 4)

        def learn() -> None:
            train_ppo.learn(policy, critic, episode, np.arange(B), np.array(largest), cfg)

        learn()
        states.first_step(optimizer)
        rollout = partial(generate, policy, queries, R, cfg.temperature)
        phases = {"rollout": _peak(memory, rollout)}  # its cache stays
        phases["score"] = _peak(memory, lambda: train_ppo.score(*models, one, one, responses[: len(one)], cfg))
        learn()  # the next one finds gradients
        phases["learn"] = _peak(memory, learn)
    return Plan("ppo", cfg.microbatch_tokens, recompute, states.bytes, phases)


def _largest(lengths: list[int], microbatch_tokens: int) -> list[int]:
    """The microbatch with the most tokens."""
    return max(split_by_tokens(lengths, microbatch_tokens), key=lambda group: sum(lengths[i] for i in group))


def sft(shape: Shape, memory, device: str, cfg: train_sft.Config, recompute: bool, dtype=torch.bfloat16) -> Plan:
    sequences = shape.with_summaries(cfg.batch_size)
    sequences = [sequences[i] for i in _largest([len(s) for s in sequences], cfg.microbatch_tokens)]
    make = partial(random_model, Policy, shape.config, device, dtype)
    return _of_one_model("sft", memory, cfg, recompute, make, lambda model: train_sft.learn(model, sequences, cfg))


def rm(shape: Shape, memory, device: str, cfg: train_rm.Config, recompute: bool, dtype=torch.bfloat16) -> Plan:
    pairs = shape.pairs(cfg.batch_size)
    pairs = [pairs[i] for i in _largest([sum(map(len, pair)) for pair in pairs], cfg.microbatch_tokens)]
    make = partial(random_model, ScalarModel, shape.config, device, dtype, bias=False)
    return _of_one_model("rm", memory, cfg, recompute, make, lambda model: train_rm.learn(model, pairs, cfg))


def _of_one_model(stage: str, memory, cfg, recompute: bool, make: Callable, learn: Callable) -> Plan:
    """A script that trains one model. make() -> the model; learn(model): forward and backward pass of a microbatch."""
    with memory:
        states = _States(memory, recompute)
        model = make()
        states.note("weights")
        optimizer = states.trained(model)
        learn(model)
        states.first_step(optimizer)
        learn(model)  # the next one finds gradients
        phases = {"learn": _peak(memory, partial(learn, model))}
    return Plan(stage, cfg.microbatch_tokens, recompute, states.bytes, phases)


STAGES = {"sft": (sft, train_sft), "rm": (rm, train_rm), "ppo": (ppo, train_ppo)}


def predict(stage: str, shape: Shape, microbatch_tokens: int | None = None, recompute: bool = False, **kwargs) -> Plan:
    """The plan of a stage with its preset's settings. kwargs: dtype; other fields of the script's Config."""
    passes, script = STAGES[stage]
    dtype = kwargs.pop("dtype", torch.bfloat16)
    flags = script.PRESETS[shape.preset] | kwargs
    flags |= {} if microbatch_tokens is None else {"microbatch_tokens": microbatch_tokens}
    return passes(shape, Meter(), "meta", script.Config(**flags), recompute, dtype)


# --- proposals -------------------------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    plan: Plan  # that fits, or the smallest tried
    fits: bool
    flags: str  # to type, "" for the preset's own


def propose(stage: str, shape: Shape, gpu_gb: float, microbatch_tokens: int | None = None) -> Proposal:
    """The first that fits: the preset's microbatch_tokens, its halves down to SMALLEST, the same with checkpointing."""
    preset = {field.name: field.default for field in fields(STAGES[stage][1].Config)} | STAGES[stage][1].PRESETS[
        shape.preset
    ]
    own = preset["microbatch_tokens"]
    first = microbatch_tokens or own
    # PPO's rollout leaves its cache, which grows with the batch: where nothing else helps, half the batch does.
    batches = [preset["batch_size"], preset["batch_size"] // 2] if stage == "ppo" else [preset["batch_size"]]
    for batch in batches:
        least = predict(stage, shape, min(SMALLEST, first), recompute=True, batch_size=batch)
        if least.fits(gpu_gb):
            break
    else:
        return Proposal(least, False, "")
    other_batch = [f"--batch_size {batch}"] if batch != batches[0] else []
    for recompute in (False, True):
        tokens = first
        while tokens >= min(SMALLEST, first):
            plan = predict(stage, shape, tokens, recompute, batch_size=batch)
            if plan.fits(gpu_gb):
                flags = other_batch + ([f"--microbatch_tokens {tokens}"] if tokens != own else [])
                return Proposal(plan, True, " ".join(flags + ["--activation_checkpointing"] * recompute))
            tokens //= 2
    flags = [*other_batch, f"--microbatch_tokens {least.microbatch_tokens}", "--activation_checkpointing"]
    return Proposal(least, True, " ".join(flags))


def table(plan: Plan) -> str:
    fixed = sum(plan.states.values())
    lines = [f"    {name:42} {size / GIB:6.1f} GiB" for name, size in plan.states.items()]
    lines.append(f"    {'together':42} {fixed / GIB:6.1f}")
    for name, size in plan.phases.items():
        without = fixed - (plan.states["fp32 gradients"] if name in ("rollout", "score") else 0)
        note = f"states {without / GIB:.1f}, passes {(size - without) / GIB:.1f}"
        lines.append(f"    peak of {name:34} {size / GIB:6.1f}      {note}")
    return "\n".join(lines)


def saved_per_token(shape: Shape, recompute: bool = False, dtype=torch.bfloat16) -> float:
    """Bytes a token that a trunk keeps for its backward pass."""
    policy = random_model(Policy, shape.config, "meta", dtype)
    policy.model.activation_checkpointing = recompute
    packed = pack([[0] * 512] * 8, "meta")
    return saved_bytes(lambda: policy.hidden(packed), list(policy.parameters())) / packed.tokens.shape[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu_gb", type=float, default=80, help="memory of the card in 10^9 bytes, as it is sold")
    parser.add_argument("--model", choices=MODELS, default="llama-1b")
    parser.add_argument("--microbatch_tokens", type=int, help="where to begin [the preset's]")
    parser.add_argument("--gpus", type=int, default=1, help="on one machine, by torchrun")
    args = parser.parse_args()
    if args.gpu_gb <= 0 or (args.microbatch_tokens or 1) < 1 or args.gpus < 1:
        parser.error(
            f"got --gpu_gb {args.gpu_gb:g} --microbatch_tokens {args.microbatch_tokens} --gpus {args.gpus}, expected "
            "all above 0"
        )
    shape = shape_for("meta", args.model)
    if args.gpus > 1:
        from bench.several import report  # it counts with what stands above

        report(args.model, args.gpus, args.gpu_gb)
        return
    per_token = {name: saved_per_token(shape, flag) for name, flag in (("kept", False), ("checkpointing", True))}
    free = budget(args.gpu_gb) / GIB
    smaller = "; --model smollm2 is an eighth of it" if args.model == "llama-1b" else ""
    print(f"{shape.name} in bf16 on {args.gpu_gb:g} GB: {free:.1f} GiB for torch. All figures are predictions.")
    kept, less = (per_token[name] / 1e6 for name in ("kept", "checkpointing"))
    print(f"a trunk keeps {kept:.2f} MB a token for its backward pass, {less:.2f} with --activation_checkpointing")
    results = []
    for stage in STAGES:
        plan, fits, flags = propose(stage, shape, args.gpu_gb, args.microbatch_tokens)
        last = f"{'with checkpointing ' if plan.checkpointing else ''}at {plan.microbatch_tokens} tokens a microbatch"
        print(f"\n{stage}, {last}")
        print(table(plan))
        states = sum(plan.states.values()) / GIB
        if fits:
            preset = f"--preset {shape.preset} " if shape.preset != "llama-1b" else ""
            print(f"    fits: python train_{stage}.py {preset}{flags}".rstrip())
        elif states > free:
            print(f"    does not fit, and no flag helps: its states alone are {states:.1f} of {free:.1f} GiB{smaller}")
        else:
            print(f"    does not fit with any of the flags here: {plan.peak / GIB:.1f} of {free:.1f} GiB")
        results.append({"stage": stage, "fits": fits, "flags": flags, "microbatch_tokens": plan.microbatch_tokens,
                        "checkpointing": plan.checkpointing, "peak_gib": plan.peak / GIB,
                        "states_gib": {name: size / GIB for name, size in plan.states.items()},
                        "phases_gib": {name: size / GIB for name, size in plan.phases.items()}})  # fmt: skip
    print(json.dumps({"bench": "plan", "gpu_gb": args.gpu_gb, "budget_gib": free, "saved_bytes_per_token": per_token,
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    as_command(main)
