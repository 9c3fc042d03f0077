"""A PPO rollout: our generate against transformers' with the same weights, queries, temperature and number of tokens.

    python -m bench.rollout                     a GPU: Llama-3.2-1B's shape, random weights in bf16, lengths as on TL;DR
                                                a CPU: the embedded tiny checkpoint on its posts, at 1 and 2 threads
    python -m bench.rollout --static            beside transformers' static cache too, which a GPU compiles for

transformers' is called as its users do: queries padded on the left, full sampling, no stop at EOS. Ours returns
log-probs as well. All take turns in one process; a ratio is the median over rounds of theirs / ours. Prints prefill,
milliseconds a decoding step, tokens/s, the share of the card's memory bandwidth, tokens with and without padding, peak
memory above the weights, how far the sampler's log-probs are from the training forward's, and one JSON line last.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that can grow

import argparse
import copy
import functools
import gc
import json
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import transformers

from bench.rows import note
from bench.stand_ins import LLAMA_32_1B
from nanorlhf import decoder
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.decoder import decoder_for
from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy
from nanorlhf.packing import in_microbatches
from nanorlhf.rollout import generate, uniforms
from nanorlhf.run.device import device_name, now, pick_device
from nanorlhf.run.inputs import EMBEDDED, find_data
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.storage.weights import file_parts

BATCH, TEMPERATURE = 128, 0.7
BANDWIDTH = {"GH200": 4.0e12, "H200": 4.8e12, "H100": 3.35e12}  # bytes/s, NVIDIA's data sheets
MICROBATCH_TOKENS = 16384  # of the training forward
STATIC = "transformers, static cache"


class Contender(NamedTuple):
    whole: Callable[[], object]  # R tokens
    first: Callable[[], object]  # the first of them only: the prefill


def llama_1b(device: torch.device) -> tuple[Policy, list[list[int]], int]:
    """(Llama-3.2-1B's shape with random weights, made on the device; 128 queries of random tokens; R).

    Lengths as on TL;DR: N(352, 100), at least 64, cut off at 512.
    """
    config = LlamaConfig(**{key: LLAMA_32_1B.get(key) for key in LlamaConfig.__dataclass_fields__})
    with torch.device("meta"):
        policy = Policy(config).bfloat16()
    policy.to_empty(device=device)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)
    rng = np.random.default_rng(0)
    lengths = rng.normal(352, 100, BATCH).round().clip(64, 512).astype(int)
    return policy, [rng.integers(3, 128_000, length).tolist() for length in lengths], 53


def tiny(device: torch.device) -> tuple[Policy, list[list[int]], int]:
    """(the embedded SFT model, 128 posts of its world, R), as in `make demo`."""
    posts = load_posts(find_data(None, "tiny")[0], "train")[:BATCH]
    queries, _ = encode_posts(posts, load_tokenizer(EMBEDDED / "sft"), 104)
    return load_policy(EMBEDDED / "sft", device), [list(queries[i]) for i in range(BATCH)], 32


def in_transformers(policy: Policy) -> transformers.LlamaForCausalLM:
    """The same weights in transformers' model, with the attention that it takes by default (torch's fused one)."""
    raw = {key: getattr(policy.config, key) for key in LlamaConfig.__dataclass_fields__}
    rope = {"rope_theta": raw.pop("rope_theta"), **(raw.pop("rope_scaling") or {"rope_type": "default"})}
    config = transformers.LlamaConfig(**raw, rope_parameters=rope)
    with torch.device(policy.head_weight.device):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=policy.head_weight.dtype).eval()
    weights = theirs.state_dict()
    with torch.no_grad():
        for _, name, part in file_parts(policy):
            weights[name].copy_(part)
    return theirs


def their_generate(theirs, queries: list[list[int]], R: int, cache: str | None) -> Contender:
    """transformers' generate on the batch padded on the left."""
    width = max(map(len, queries))
    gaps = [width - len(query) for query in queries]
    rows = [[0] * gap + query for gap, query in zip(gaps, queries, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    ids, mask = (torch.tensor(x, device=theirs.device) for x in (rows, mask))

    @torch.no_grad()
    def run(tokens: int) -> None:
        theirs.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0,
            cache_implementation=cache,
        )  # fmt: skip
        out = theirs.generate(ids, attention_mask=mask)
        assert out.shape[1] == width + tokens, f"{out.shape[1] - width} tokens, asked for {tokens}"

    return Contender(lambda: run(R), lambda: run(1))


def our_generate(policy: Policy, queries: list[list[int]], R: int, use_graph: bool = True) -> Contender:
    size = len(queries), max(map(len, queries)), R, TEMPERATURE

    def single_steps() -> None:
        decoder_for(policy, *size).decode(policy, queries, uniforms(0, list(range(BATCH)), R), use_graph=False)

    @torch.no_grad()
    def first() -> None:
        loop = decoder_for(policy, *size)
        loop.cache.clear()
        loop.t.zero_()
        loop.write(policy, loop.prefill(policy, queries))

    return Contender(lambda: generate(policy, queries, R, TEMPERATURE) if use_graph else single_steps(), first)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    began = now(device)
    run()
    return now(device) - began


def warm_up(contender: Contender, device: torch.device) -> int | None:
    """Runs both of it once. -> bytes of GPU memory that it takes above what was there, the weights"""
    if device.type != "cuda":
        contender.whole(), contender.first()
        return None
    decoder._kept.clear()  # each allocates a cache of its own
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contender.whole(), contender.first()
    return torch.cuda.max_memory_allocated(device) - before


def step_bytes(policy: Policy, lengths: list[int], tokens: int) -> float:
    """What a decoding step cannot but read, on average: all weights once, and the keys and values seen so far."""
    config, weight = policy.config, policy.head_weight
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    seen = sum(lengths) + len(lengths) * tokens / 2
    return sum(parameter.nbytes for parameter in policy.parameters()) + slot * seen


def log_prob_error(policy: Policy, queries: list[list[int]], tokens: int) -> dict:
    """How far the sampler's log-probs are from the training forward's, which PPO computes again for that reason."""
    responses, logprobs = generate(policy, queries, tokens, TEMPERATURE)
    sequences = [query + response for query, response in zip(queries, responses.tolist(), strict=True)]
    forward = lambda packed, i: policy.response_logprobs(packed, responses[i], TEMPERATURE)  # noqa: E731
    again, _ = in_microbatches(forward, sequences, MICROBATCH_TOKENS, responses.device)
    apart = logprobs - again
    return {"max": apart.abs().max().item(), "mean": apart.abs().mean().item(), "ratio_std": apart.exp().std().item()}


def measure(contenders: dict[str, Contender], R: int, rounds: int, device: torch.device) -> dict[str, dict]:
    """All in turn, medians; ours is the first."""
    whole, first = {name: [] for name in contenders}, {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            whole[name].append(seconds(contender.whole, device))
            first[name].append(seconds(contender.first, device))
    ours, results = next(iter(contenders)), {}
    for name in contenders:
        total, prefill = statistics.median(whole[name]), statistics.median(first[name])
        ratios = [theirs / mine for theirs, mine in zip(whole[name], whole[ours], strict=True)]
        results[name] = {
            "seconds": total, "prefill_s": prefill, "step_ms": 1e3 * (total - prefill) / (R - 1),
            "tokens_per_s": BATCH * R / total, "over_ours": statistics.median(ratios),
        }  # fmt: skip
    return results


def logits_apart(policy: Policy, theirs, query: list[int]) -> float:
    """Largest difference of a logit between the two models: that they are the same model."""
    with torch.no_grad():
        logits = theirs(torch.tensor([query], device=theirs.device)).logits[0].float()
    return (policy.logits([query])[0] - logits).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU")
    parser.add_argument("--static", action="store_true", help="transformers' static cache too; a GPU takes minutes")
    args = parser.parse_args()
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    policy, queries, R = (llama_1b if on_gpu else tiny)(device)
    theirs = in_transformers(policy)
    lengths = [len(query) for query in queries]
    packed, padded = sum(lengths), BATCH * max(lengths)
    moved = step_bytes(policy, lengths, R)
    peak = next((rate for name, rate in BANDWIDTH.items() if name in device_name(device)), None)

    ours = functools.partial(our_generate, policy, queries, R)
    contenders = {"ours": ours()} | ({"ours, without the graph": ours(use_graph=False)} if on_gpu else {})
    contenders |= {"transformers": their_generate(theirs, queries, R, None)}
    contenders |= {STATIC: their_generate(theirs, queries, R, "static")} if args.static else {}
    print(f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{BATCH} queries, {min(lengths)} to {max(lengths)} tokens, {R} new ones; prefill: {packed:,} tokens packed, "
          f"{padded:,} padded ({padded / packed:.2f}x)")  # fmt: skip
    apart = logits_apart(policy, theirs, queries[0])
    print(f"largest difference of a logit between the two models: {apart:.1e}")
    memory = {name: warm_up(contender, device) for name, contender in contenders.items()}
    errors = {}
    for model in [policy] if on_gpu else [policy, copy.deepcopy(policy).bfloat16()]:
        dtype = str(model.head_weight.dtype).removeprefix("torch.")
        error = errors[dtype] = log_prob_error(model, queries, R)
        print(f"log-probs, sampler - training forward, {dtype}: mean {error['mean']:.1e}, max {error['max']:.1e}, "
              f"std of the ratio {error['ratio_std']:.1e}")  # fmt: skip

    results = {}
    for threads in [1] if on_gpu else args.threads:
        torch.set_num_threads(threads)
        head = "" if on_gpu else f"{threads} thread{'s' * (threads > 1)}"
        columns = f"{'s':>8}{'prefill s':>11}{'ms/step':>9}{'tokens/s':>10}{'bandwidth':>11}{'GiB':>6}{'x ours':>8}"
        print(f"\n{head:28}{columns}")
        rows = results[str(threads)] = measure(contenders, R, args.rounds, device)
        for name, row in rows.items():
            rate = moved / (row["step_ms"] / 1e3)
            row |= {"bytes_per_s": rate, "of_bandwidth": rate / peak if peak else None, "peak_bytes": memory[name]}
            note({"threads": threads, "who": name} | row)
            share = f"{rate / peak:.0%}" if peak else f"{rate / 1e9:.0f} GB/s"
            gib = "" if memory[name] is None else f"{memory[name] / 2**30:.2f}"
            times = f"{row['seconds']:8.3f}{row['prefill_s']:11.3f}{row['step_ms']:9.2f}{row['tokens_per_s']:10,.0f}"
            print(f"{name:28}{times}{share:>11}{gib:>6}{row['over_ours']:8.2f}")
    about = {"device": device_name(device), "torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"batch": BATCH, "response_length": R, "packed_tokens": packed, "padded_tokens": padded}
    about |= {"rounds": args.rounds, "logits_apart": apart, "logprob_error": errors}
    print(json.dumps({"bench": "rollout", **about, "threads": results}))


if __name__ == "__main__":
    as_command(main)
