"""Best of n: sample n summaries of a post, keep the one that the reward model scores highest. No training at all.

    python -m experiments.best_of_n --preset tiny                                      the embedded SFT model
    python -m experiments.best_of_n --preset tiny --policy DIR --reward_model DIR --n 1 2 4 8 16 --posts 512

Reads a policy, reward models and held-out posts; writes runs/best_of_n: best_of_n.json and, for each n, the winners in
best_of_<n>.jsonl, which `python eval.py --samples best4=FILE` reads. The steps, numbered as in the code:

    1. read held-out posts
    2. sample M = max(n) + 1 summaries a post at temperature 0.7; score each, by the reward model and by the truth
    3. for each n: gold and proxy score, win rate against one sample, KL

One sampling serves every n: a post's figure is its mean over all subsets of n of the M samples, which is unbiased and
has less noise than one subset (experiments/methods.py); an opponent is never one of the n. So figures of different n
share their noise, and their differences have less of it. The files of winners hold nested sets: best of the first n.
Best of n goes log n - (n-1)/n nats from its policy at most, whatever the reward model: the yardstick of other methods.
Stiennon et al. 2020; Nakano et al. 2021; Gao et al. 2023. Left out: sampling until a score is reached.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import kernels
from experiments.methods import best_of, best_of_wins, kl_bound, kl_estimate
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import check_same, load_tokenizer
from nanorlhf.ensemble import RULES, combine
from nanorlhf.errors import check
from nanorlhf.evaluation.judge import gold_scores, of_tiny_world, reward_model_judge
from nanorlhf.evaluation.metrics import bootstrap_interval
from nanorlhf.rollout import summarise
from nanorlhf.run.config import cli
from nanorlhf.run.inputs import find_data, find_model, find_models
from nanorlhf.run.run import Run
from nanorlhf.storage.checkpoint import check_folder, load_policy, load_scalar
from nanorlhf.storage.jsonl import append, write_whole


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "best_of_n"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    seed: int = 1  # of the samples and of the bootstrap
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU
    # -- inputs
    policy: str | None = None  # folder or hub id of the policy that is sampled: the SFT model
    reward_model: tuple[str, ...] = ()  # folders or hub ids of reward models, one or several
    ensemble: str = "mean"  # of several reward models' scores: mean, min or mean_minus_std
    data: str | None = None  # folder with tldr/{valid,test}.jsonl in OpenAI's format
    split: str = "valid"  # valid or test
    posts: int = 512  # held-out posts, from the first of the split
    # -- samples
    n: tuple[int, ...] = (1, 2, 4, 8, 16)  # how many summaries the reward model chooses from
    temperature: float = 0.7  # of sampling: PPO's
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    response_length: int = 53  # tokens sampled, EOS included (N+ detail 4)
    missing_eos_score: float = -1.0  # the score of a summary that does not stop (N+ detail 23.3)
    microbatch_tokens: int = 65536  # tokens a forward pass: bounds memory, changes no result


PRESETS = {
    "llama-1b": {},
    "paper": {},
    "smollm2": dict(max_query_length=544, response_length=56, microbatch_tokens=16384),
    "tiny": dict(max_query_length=104, response_length=32, microbatch_tokens=8192),
}


def row_of(n: int, scores: np.ndarray, gold: np.ndarray | None, logprobs: np.ndarray, seed: int) -> dict:
    """The figures of one n, with 95% bootstrap intervals over posts. scores, gold, logprobs (posts, M)."""

    def over_posts(figure: Callable[[int], float]) -> tuple[float, tuple[float, float]]:
        values = [figure(i) for i in range(len(scores))]
        return float(np.mean(values)), bootstrap_interval(values, seed)

    figures = {"proxy": lambda i: best_of(scores[i], scores[i], n)}
    if gold is not None:
        figures |= {
            "gold": lambda i: best_of(scores[i], gold[i], n),
            "win_rate": lambda i: best_of_wins(scores[i], gold[i], n),
        }
    figures["kl"] = lambda i: best_of(scores[i], kl_estimate(np.exp(logprobs[i]), n), n)
    row = {"n": n, "kl_bound": kl_bound(n)}
    for name, figure in figures.items():
        row[name], row[f"{name}_interval"] = over_posts(figure)
    return row


def main(cfg: Config) -> None:
    check(bool(cfg.n) and min(cfg.n) >= 1, "n", " ".join(map(str, cfg.n)), "at least 1 each", "1 is the policy itself")
    check(cfg.posts >= 1, "posts", cfg.posts, "at least 1")
    check(cfg.temperature > 0, "temperature", cfg.temperature, "greater than 0", "all n would be the same summary")
    check(cfg.split in ("valid", "test"), "split", repr(cfg.split), "valid or test")
    check(cfg.ensemble in RULES, "ensemble", cfg.ensemble, f"one of {', '.join(RULES)}")

    # 1. posts
    data, data_from = find_data(cfg.data, cfg.preset)
    posts = load_posts(data, cfg.split)
    check(cfg.posts <= len(posts), "posts", cfg.posts, f"at most the {len(posts)} of split {cfg.split}")
    posts = posts[: cfg.posts]
    folder, policy_from = find_model("sft", cfg.policy, "policy", cfg.preset)
    rm_folders, rm_from = find_models("rm", cfg.reward_model, "reward_model", cfg.preset)
    tokenizer = load_tokenizer(folder)
    notes = check_folder(folder, tokenizer)
    for rm_folder in rm_folders:
        check_same(tokenizer, load_tokenizer(rm_folder), "the reward model", folder=rm_folder)
        notes += check_folder(rm_folder, tokenizer, scalar=True)

    show = ["best_of_n/gold", "best_of_n/proxy", "best_of_n/win_rate", "best_of_n/kl"]
    with Run("best_of_n", cfg, total_steps=max(cfg.n), unit="best of", show=show, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {len(posts):,} posts of split {cfg.split}")
        run.say(f"models  policy {folder} ({policy_from}); reward model {', '.join(rm_folders)} ({rm_from})")
        run.say_all(notes)

        # 2. samples and their scores, (posts, M) each; sample m has the same noise whatever M is
        queries, _ = encode_posts(posts, tokenizer, cfg.max_query_length, run.progress)
        policy = load_policy(folder, run.device, run.dtype, tokenizer)
        limits = cfg.max_query_length, cfg.microbatch_tokens
        reward_models = [load_scalar(path, run.device, run.dtype, tokenizer) for path in rm_folders]
        judges = [reward_model_judge(reward_model, tokenizer, *limits) for reward_model in reward_models]
        columns = []
        for m in run.progress(range(max(cfg.n) + 1), what="sampling"):
            noise = cfg.seed << 32 | m  # no other run's: seeds are below 2^32
            summaries = summarise(policy, tokenizer, list(queries), cfg.response_length, cfg.temperature, noise)
            texts = [summary.text for summary in summaries]
            by_model = torch.tensor([judge.scores(posts, texts) for judge in judges], dtype=torch.float64).T
            has_eos = torch.tensor([summary.has_eos for summary in summaries])
            scores = combine(by_model, cfg.ensemble).where(has_eos, cfg.missing_eos_score).numpy()
            gold = gold_scores(posts, texts) if of_tiny_world(posts) else None
            columns.append((summaries, scores, gold, [summary.logprob for summary in summaries]))
        samples, *numbers = zip(*columns, strict=True)  # samples: M lists of posts
        scores, gold, logprobs = (None if x[0] is None else np.array(x, dtype=np.float64).T for x in numbers)

        # 3. the figures of each n, and the winners of nested sets
        rows = []
        for n in sorted(set(cfg.n)):
            rows.append(row_of(n, scores, gold, logprobs, cfg.seed))
            run.log(n, {f"best_of_n/{name}": value for name, value in rows[-1].items() if isinstance(value, float)})
            winners = scores[:, :n].argmax(1)
            path = run.folder / f"best_of_{n}.jsonl"
            append(path, [
                {"id": post.id, "summary": samples[m][i].text, "score": scores[i, m], "logprob": logprobs[i, m]}
                | ({} if gold is None else {"gold": gold[i, m]})
                for i, (post, m) in enumerate(zip(posts, winners, strict=True))
            ])  # fmt: skip
        about = {"policy": str(folder), "reward_model": rm_folders, "ensemble": cfg.ensemble, "data": str(data)}
        about |= {"split": cfg.split, "posts": len(posts), "samples": max(cfg.n) + 1, "seed": cfg.seed}
        write_whole(run.folder / "best_of_n.json", json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
        run.say(f"next    python eval.py --policy sft --samples best{n}={Path(run.folder) / f'best_of_{n}.jsonl'}")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
