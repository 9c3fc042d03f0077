"""Will it fit on N GPUs, and how much faster is it? GiB a GPU by phase, and a model of an update's time. Predictions.

    python -m bench.plan --gpus 8 --gpu_gb 80 --model llama-8b       also llama-1b, llama-3b
    python -m bench.several --tables                                 the tables of docs/parallel.md

What a GPU computes is counted as for one GPU (bench/plan.py: the real passes on the meta device), on its share of the
batch, with 2 and with 4 layers. What is in parts is divided: masters, gradients, moments, reference, reward model. To
that comes what FSDP gathers: the block that computes and the next one, and for the length of a pass the rest
(embedding, norm, head); in a backward pass the gradients of a block, and two fp32 buffers of them on their way.

Time is compute at the efficiency that was measured on one H200, over N, and bytes over what the link carries. FSDP
sends while it computes: the truth lies between "hidden" (the longer of the two) and "after" (their sum).
"""

import argparse
import json
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench import plan
from bench.shapes import Shape, random_model, shape_for
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.monitoring.flops import head_flops, ppo_update_flops, trunk_flops
from nanorlhf.packing import share_out
from nanorlhf.run.streams import as_command

GIB = 2**30
MODELS = ("llama-1b", "llama-3b", "llama-8b")
GPUS, CARDS = (1, 2, 4, 8), (24, 48, 80, 141)
NVLINK, NETWORK = 0.8 * 450e9, 0.8 * 50e9  # bytes/s a GPU and direction: NVLink 4, and 400 Gb/s each; 80% of the sheets
FLOPS = 0.52 * 989e12  # FLOP/s in bf16 that learning and scoring reached on an H200 (docs/speed.md)
PREFILL = 0.29 / 0.43 * FLOPS  # a first guess of the same for a prefill: the share of a matmul there
HBM = 4.25e12  # bytes/s of a copy on that card
KERNEL_GAPS = 250 * 2e-6  # seconds a decoding step in which kernels follow one another


@dataclass(frozen=True)
class Weights:
    """Parameters of one model, as FSDP groups them: `root` is what belongs to no block."""

    total: int
    block: int
    root: int
    groups: int  # messages in which the whole model is gathered
    tensors: int
    largest: int  # of one tensor


_known: dict[tuple[str, type], Weights] = {}


def weights(shape: Shape, kind: type = Policy) -> Weights:
    """Of a shape's policy, or of its critic."""
    key = shape.name, kind
    if key not in _known:
        _known[key] = _weights(shape, kind)
    return _known[key]


def _weights(shape: Shape, kind: type) -> Weights:
    options = {} if kind is Policy else {"bias": True}
    model = random_model(kind, shape.config, "meta", torch.bfloat16, **options)
    sizes = [p.numel() for p in model.parameters()]
    block, layers = sum(p.numel() for p in model.model.layers[0].parameters()), len(model.model.layers)
    head = kind is not Policy  # the scalar head is a group of its own
    root = sum(sizes) - layers * block - (sum(p.numel() for p in model.score.parameters()) if head else 0)
    return Weights(sum(sizes), block, root, layers + 1 + head, len(sizes), max(sizes))


# --- memory ----------------------------------------------------------------------------------------------------------


def gathered(w: Weights, backward: bool, itemsize: int = 2) -> int:
    """Bytes that FSDP holds at a time beside the parts: the root and two blocks; backwards also a block's gradients in
    the dtype of the pass, and two buffers of them in fp32."""
    forward = itemsize * (w.root + 2 * w.block)
    return forward + (itemsize + 2 * 4) * w.block if backward else forward


def passes(
    stage: str, shape: Shape, batch: int, microbatch_tokens: int | None = None, recompute: bool = False
) -> dict[str, float]:
    """Bytes that each phase takes beside the states, of one GPU with so many posts. Counted with 2 and with 4 layers:
    every further one takes as much."""
    found = []
    for layers in (2, 4):
        thin = replace(shape, config=replace(shape.config, num_hidden_layers=layers))
        one = plan.predict(stage, thin, microbatch_tokens, recompute, batch_size=batch)
        held = sum(one.states.values())
        found.append(
            {
                name: size - held + (one.states["fp32 gradients"] if name in ("rollout", "score") else 0)
                for name, size in one.phases.items()
            }
        )
    more = (shape.config.num_hidden_layers - 2) / 2
    return {name: size + more * (found[1][name] - size) for name, size in found[0].items()}


def predict(
    stage: str, shape: Shape, gpus: int, microbatch_tokens: int | None = None, recompute: bool = False
) -> plan.Plan:
    """The plan of one of `gpus` GPUs, which share the batch of the preset; of 1, that of a plain process."""
    script = plan.STAGES[stage][1]
    cfg = script.Config(**script.PRESETS[shape.preset])
    tokens = microbatch_tokens or cfg.microbatch_tokens
    took = passes(stage, shape, -(-cfg.batch_size // gpus), tokens, recompute)
    policy, scalar = weights(shape), weights(shape, ScalarModel)
    trained = policy.total + scalar.total if stage == "ppo" else (policy if stage == "sft" else scalar).total
    frozen = policy.total + scalar.total if stage == "ppo" else 0
    part = ", a part" if gpus > 1 else ""
    states = {f"fp32 masters{part}": 4 * trained // gpus}
    if gpus == 1:
        states |= {"weights": 2 * (trained + frozen)}
    elif stage == "ppo":
        states |= {"actor, whole": 2 * policy.total, "reference and reward model, a part": 2 * frozen // gpus}
    gradients = 4 * trained // gpus
    states |= {f"fp32 gradients{part}": gradients, f"Adam's two moments{part}": 8 * trained // gpus}
    held, learning, several = sum(states.values()), policy if stage != "rm" else scalar, gpus > 1
    at_work = took["learn"] + several * gathered(learning, backward=True)
    at_its_end = several * (2 + 2 + 4) * learning.root  # the root's weights, gradients, and those in fp32 on their way
    phases = {"learn": held + max(at_work, at_its_end)}
    if stage == "ppo":
        phases["score"] = held - gradients + took["score"] + several * gathered(policy, backward=False)
        phases["rollout"] = held - gradients + took["rollout"]
    if stage == "ppo" and several:
        phases["gather the actor"] = held - gradients + 2 * 2 * policy.largest
    return plan.Plan(stage, tokens, recompute, states, {name: int(size) for name, size in phases.items()})


@cache
def _predicted(stage: str, model: str, gpus: int, tokens: int, recompute: bool) -> plan.Plan:
    return predict(stage, shape_for("meta", model), gpus, tokens, recompute)


def propose(stage: str, model: str, gpus: int, gpu_gb: float) -> plan.Proposal:
    """The first that fits: the preset's microbatch_tokens, its halves, those with checkpointing; else the smallest."""
    script, shape = plan.STAGES[stage][1], shape_for("meta", model)
    cfg = script.Config(**script.PRESETS[shape.preset])
    tokens = [cfg.microbatch_tokens]
    while tokens[-1] > plan.SMALLEST:
        tokens.append(tokens[-1] // 2)
    ways = [(n, recompute) for recompute in (False, True) for n in tokens]
    if not _predicted(stage, model, gpus, *ways[-1]).fits(gpu_gb):
        return plan.Proposal(_predicted(stage, model, gpus, *ways[-1]), False, "")
    for n, recompute in ways:
        one = _predicted(stage, model, gpus, n, recompute)
        if one.fits(gpu_gb):
            break
    flags = [f"--microbatch_tokens {n}"] * (n != tokens[0]) + ["--activation_checkpointing"] * recompute
    return plan.Proposal(one, True, " ".join(flags))


# --- messages --------------------------------------------------------------------------------------------------------


@dataclass
class Messages:
    """Collectives of one process, and the bytes that they are about: of a gather what comes out, of a scatter what goes
    in. What a GPU sends and receives is (N - 1) / N of it."""

    gathers: int = 0
    gather_bytes: int = 0
    scatters: int = 0
    scatter_bytes: int = 0

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> "Messages":
        return Messages(*(times * value for value in vars(self).values()))

    @property
    def bytes(self) -> int:
        return self.gather_bytes + self.scatter_bytes


def forward(w: Weights, itemsize: int = 2) -> Messages:
    """A forward pass that leaves nothing behind: each group is gathered once."""
    return Messages(w.groups, itemsize * w.total)


def forward_and_backward(w: Weights, itemsize: int = 2) -> Messages:
    """Each group is gathered before its forward and before its backward pass; its gradients are summed in fp32."""
    return Messages(2 * w.groups, 2 * itemsize * w.total, w.groups, 4 * w.total)


def ppo_update(policy: Weights, scalar: Weights, score_turns: int, learn_turns: int, itemsize: int = 2) -> Messages:
    """An update of PPO by a process that goes through so many microbatches in each: reference, critic and reward model
    score, policy and critic learn, and the actor is filled, a tensor at a time."""
    scoring = forward(policy, itemsize) + forward(scalar, itemsize) * 2
    learning = forward_and_backward(policy, itemsize) + forward_and_backward(scalar, itemsize)
    return scoring * score_turns + learning * learn_turns + Messages(policy.tensors, itemsize * policy.total)


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one PPO update on one of N GPUs."""

    compute: float
    sent: float  # over the link
    rollout: float

    @property
    def hidden(self) -> float:
        return self.rollout + max(self.compute, self.sent)

    @property
    def after(self) -> float:
        return self.rollout + self.compute + self.sent


def update_times(shape: Shape, gpus: int, link: float, batch: int = 128, epochs: int = 4, tokens: int = 16384) -> Times:
    """Of an update with the preset llama-1b's numbers. link: bytes/s a GPU and direction."""
    R, config = 53, shape.config
    lengths = [n + R for n in shape.lengths(batch)]
    finished = [n - R + shape.response for n in lengths]
    shares = share_out(lengths, tokens, gpus)
    turns = len(shares[0])
    # In every turn the processes wait for the one with the most tokens.
    slowest = sum(max(sum(lengths[i] for i in share[turn]) for share in shares) for turn in range(turns)) / sum(lengths)
    whole = ppo_update_flops(config, lengths, finished, R, epochs)
    rolling = trunk_flops(config, lengths, len(lengths) * R) + head_flops(config, len(lengths) * R)
    policy, scalar = weights(shape), weights(shape, ScalarModel)
    optimizer = 7 * 4 * (policy.total + scalar.total) / HBM * epochs / gpus  # reads 4 numbers, writes 3
    compute = (whole - rolling) / FLOPS * slowest + optimizer
    sent = ppo_update(policy, scalar, turns, epochs * turns).bytes * (gpus - 1) / gpus / link
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * sum(lengths) / gpus
    step = (2 * policy.total + cache) / HBM + KERNEL_GAPS * config.num_hidden_layers / 16
    return Times(compute, sent, rolling / PREFILL / gpus + (R - 1) * step)


# --- tables ----------------------------------------------------------------------------------------------------------


def memory_tables() -> list[str]:
    lines = []
    for stage in ("sft", "rm", "ppo"):
        lines += [f"| {stage}, GiB a GPU and flags | GPUs | {' | '.join(f'{gb} GB' for gb in CARDS)} |"]
        lines += ["|" + "---|" * (len(CARDS) + 2)]
        for model in MODELS:
            shape = shape_for("meta", model)
            for gpus in GPUS:
                cells = [cell(model, stage, gpus, gb) for gb in CARDS]
                lines.append(f"| {shape.name} | {gpus} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def cell(model: str, stage: str, gpus: int, gb: float) -> str:
    found, fits, flags = propose(stage, model, gpus, gb)
    if not fits:
        return "no"
    short = flags.replace("--microbatch_tokens ", "").replace("--activation_checkpointing", "ckpt")
    return f"{found.peak / GIB:.1f}" + (f" ({short})" if short else "")


def time_table() -> list[str]:
    lines = ["| model | GPUs | compute, s | rollout, s | sent, GB | over NVLink, s | efficiency | over a network, s | "
             "efficiency |", "|" + "---|" * 9]  # fmt: skip
    for model in MODELS:
        shape = shape_for("meta", model)
        alone = update_times(shape, 1, NVLINK).after
        for gpus in GPUS:
            cells = []
            for link in (NVLINK, NETWORK):
                times = update_times(shape, gpus, link)
                best, worst = (alone / gpus / t for t in (times.hidden, times.after))
                cells += [f"{times.sent:.2f}", f"{worst:.0%} to {best:.0%}"]
            sent = times.sent * NETWORK / 1e9
            lines.append(f"| {shape.name} | {gpus} | {times.compute:.2f} | {times.rollout:.2f} | {sent:.0f} | "
                         f"{' | '.join(cells)} |")  # fmt: skip
    return lines


def report(model: str, gpus: int, gpu_gb: float) -> None:
    """What `bench.plan --gpus` prints."""
    shape = shape_for("meta", model)
    free = plan.budget(gpu_gb) / GIB
    print(f"{shape.name} in bf16 on {gpus} GPUs of {gpu_gb:g} GB: {free:.1f} GiB each for torch. Predictions.")
    results = []
    for stage in plan.STAGES:
        found, fits, flags = propose(stage, model, gpus, gpu_gb)
        with_it = ", with checkpointing" * found.checkpointing
        print(f"\n{stage}, {found.microbatch_tokens} tokens a microbatch{with_it}")
        for name, size in (found.states | {f"peak of {name}": size for name, size in found.phases.items()}).items():
            print(f"    {name:42} {size / GIB:6.1f} GiB")
        launch = f"torchrun --standalone --nproc_per_node {gpus} train_{stage}.py {flags}".rstrip()
        print(f"    fits: {launch}" if fits else f"    does not fit: {found.peak / GIB:.1f} of {free:.1f} GiB")
        results.append({"stage": stage, "fits": fits, "flags": flags, "peak_gib": found.peak / GIB,
                        "states_gib": {name: size / GIB for name, size in found.states.items()},
                        "phases_gib": {name: size / GIB for name, size in found.phases.items()}})  # fmt: skip
    alone, times = update_times(shape, 1, NVLINK).after, update_times(shape, gpus, NVLINK)
    print(f"\nan update of PPO: {times.hidden:.2f} to {times.after:.2f} s over NVLink, "
          f"{alone / gpus / times.after:.0%} to {alone / gpus / times.hidden:.0%} of {gpus} times one GPU")  # fmt: skip
    print(json.dumps({"bench": "plan", "gpus": gpus, "gpu_gb": gpu_gb, "budget_gib": free, "results": results,
                      "ppo_update_s": {"hidden": times.hidden, "after": times.after}}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.several", description=__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true", required=True, help="Markdown, for docs/parallel.md")
    parser.parse_args()
    print("\n".join([*memory_tables(), *time_table()]))


if __name__ == "__main__":
    as_command(main)
