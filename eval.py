"""Evaluation: what each policy writes on held-out posts, how good it is, and how far to trust the numbers.

    python eval.py                         the last runs on this machine, else the embedded tiny world
    python eval.py --split test            posts that no choice was ever made on
    python eval.py --help                  every flag

Reads the base, SFT and PPO policies, the reward model and TL;DR data; writes runs/eval: metrics.json, samples.jsonl
(every summary with its scores), report.html and report.md. The steps, numbered as in the code:

    1. read held-out posts
    2. generate one summary a post by each policy, each with random numbers of its own
    3. describe them: ROUGE against the references, length, share that stop, copying, diversity, score, gold score
    4. reward model: accuracy on held-out comparisons, beside length alone and the ceiling of the label noise
    5. win rates, PPO against SFT and each against the references: interval by bootstrap over posts, and at equal length
    6. tables on the console, files, report

A policy that is nowhere to be found is left out, with a line that says so. The gold judge knows the truth of the tiny
world; the reward model as a judge (--judge rm) knows only what PPO was trained to please. Left out: bars to pass
(nanorlhf/demo.py has the demo's), judges that read (a language model), several samples a post.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: how long a CPU thread waits awake for the others

import json
import time
from dataclasses import dataclass
from pathlib import Path

import kernels
from nanorlhf.checkpoint import load_policy, load_scalar
from nanorlhf.config import check, cli
from nanorlhf.encoding import encode_posts
from nanorlhf.errors import UserError
from nanorlhf.inputs import find_data, find_model
from nanorlhf.jsonl import append, finite, write_whole
from nanorlhf.judge import (
    JUDGES, OUTCOMES, Pair, check_gold, gold_judge, gold_scores, of_tiny_world, reward_model_judge,
)  # fmt: skip
from nanorlhf.metrics import (
    accuracy_interval, bootstrap_interval, copied_ngrams, distinct_n, length_controlled_interval,
    length_controlled_win_rate, mean, rouge, title_copy, win_rate, words,
)  # fmt: skip
from nanorlhf.report import console, sample_table, tables, write_report
from nanorlhf.rollout import summarise
from nanorlhf.run import Run
from nanorlhf.tiny.annotator import ceilings
from nanorlhf.tldr import Comparison, batch_indices, load_comparisons, load_posts
from nanorlhf.tokenizer import check_matches, check_same, load_tokenizer


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper or tiny: which of the three sets of defaults below
    run_name: str = "eval"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    seed: int = 1  # of the sampled summaries and of the bootstrap
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU
    # -- inputs
    base_model: str | None = None  # Hugging Face folder of the base model
    sft_model: str | None = None  # Hugging Face folder of the SFT policy
    ppo_model: str | None = None  # Hugging Face folder of the PPO policy
    reward_model: str | None = None  # folder that train_rm.py wrote
    data: str | None = None  # folder with tldr/{valid,test}.jsonl and comparisons/ in OpenAI's formats
    split: str = "valid"  # valid, or test: posts that nothing was ever tuned on
    num_posts: int = 6447  # held-out posts, from the first of the split [paper: the whole validation split]
    num_comparisons: int = 8192  # held-out comparisons for the reward model's accuracy, drawn at random from all
    # -- summaries
    temperature: float = 0.01  # of sampling, the same for every policy; 0 is greedy (N+ section 5.1)
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    response_length: int = 53  # tokens sampled, EOS included (N+ detail 4)
    microbatch_tokens: int = 65536  # tokens a forward pass of the reward model: bounds memory, changes no result
    # -- judging
    judge: str = "rm"  # gold (the tiny world's truth) or rm (the reward model, which PPO has optimised)


PRESETS = {
    "llama-1b": {},
    "paper": {},
    # Temperature 0.7 is the one PPO samples at: a win rate then compares what was trained. With 512 posts its standard
    # error is 0.02.
    "tiny": dict(
        num_posts=512, temperature=0.7, max_query_length=104, response_length=32, microbatch_tokens=8192, judge="gold"
    ),
}  # fmt: skip

POLICIES = ("base", "sft", "ppo")
OPPONENTS = (("ppo", "sft"), ("ppo", "reference"), ("sft", "reference"))
SHOWN = ("eval/rm/validation/accuracy", "eval/ppo/gold", "eval/ppo_vs_sft/win_rate", "perf/tokens_per_s")


def find_if_there(stage: str, flag: str | None, flag_name: str, preset: str) -> tuple[Path, str] | None:
    """`find_model`, but None where there is no such model and no flag asked for one."""
    try:
        found = find_model(stage, flag, flag_name, preset)
    except UserError:
        if flag is not None:
            raise
        return None
    return found if found[0].is_dir() else None


def as_raw(comparison: Comparison) -> dict:
    """A raw row as far as the annotator's `ceilings` reads it: which summary was chosen is no part of a ceiling."""
    info = {"id": comparison.post.id, "title": comparison.post.title}
    return {"info": info, "summaries": [{"text": comparison.chosen}, {"text": comparison.rejected}]}


def main(cfg: Config) -> None:
    check(cfg.split in ("valid", "test"), "split", repr(cfg.split), "valid or test")
    check(cfg.judge in JUDGES, "judge", repr(cfg.judge), f"one of {', '.join(JUDGES)}")
    began = time.monotonic()

    # 1. posts, and which models there are
    data, data_from = find_data(cfg.data, cfg.preset)
    posts = load_posts(data, cfg.split)[: cfg.num_posts]
    found = {
        "base": find_if_there("base", cfg.base_model, "base_model", cfg.preset),
        "sft": find_if_there("sft", cfg.sft_model, "sft_model", cfg.preset),
        "ppo": find_if_there("ppo", cfg.ppo_model, "ppo_model", cfg.preset),
        "rm": find_if_there("rm", cfg.reward_model, "reward_model", cfg.preset),
    }
    models = {stage: model for stage, model in found.items() if model}
    policies = [stage for stage in POLICIES if stage in models]
    if not policies:
        raise UserError(
            "no policy found, expected base, SFT or PPO: run `python train_sft.py`, or pass --sft_model DIR"
        )
    if cfg.judge == "rm" and "rm" not in models:
        raise UserError("--judge rm needs a reward model: run `python train_rm.py` first, or pass --reward_model DIR")
    with_gold = of_tiny_world(posts)
    if cfg.judge == "gold":
        check_gold(posts)
    tokenizer = load_tokenizer(models[policies[0]][0])
    first = f"that of the {policies[0]} policy ({models[policies[0]][0]}, {models[policies[0]][1]})"

    with Run("eval", cfg, show=SHOWN, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {len(posts):,} posts of split {cfg.split}")
        for stage in found:
            where = f"{models[stage][0]} ({models[stage][1]})" if stage in models else "not found, left out"
            run.say(f"model   {stage}: {where}")
        queries, references = encode_posts(posts, tokenizer, cfg.max_query_length, run.progress)
        reward_model = None
        if "rm" in models:
            scalar = load_scalar(models["rm"][0], run.device, run.dtype)
            check_matches(tokenizer, scalar.config.vocab_size, scalar.config.eos_token_id)
            check_same(tokenizer, load_tokenizer(models["rm"][0]), "the reward model", first)
            limits = cfg.max_query_length, cfg.microbatch_tokens
            reward_model = reward_model_judge(scalar, tokenizer, *limits, run.progress)

        # 2. one summary a post by each policy
        texts = {"reference": [post.summary for post in posts]}
        tokens = {"reference": [len(ids) for ids in references]}  # EOS included, here and below
        eos_rates = {}
        generated, generation_began = 0, time.monotonic()
        for stage in policies:
            policy = load_policy(models[stage][0], run.device, run.dtype)
            check_matches(tokenizer, policy.config.vocab_size, policy.config.eos_token_id)
            check_same(tokenizer, load_tokenizer(models[stage][0]), f"the {stage} policy", first)
            # Shared random numbers would make similar policies write the same text, and count their agreement as ties.
            noise = len(POLICIES) * cfg.seed + POLICIES.index(stage)
            sampling = cfg.response_length, cfg.temperature, noise
            summaries = summarise(policy, tokenizer, queries, *sampling, progress=run.progress)
            texts[stage] = [summary.text for summary in summaries]
            tokens[stage] = [summary.tokens for summary in summaries]
            eos_rates[stage] = sum(summary.has_eos for summary in summaries) / len(summaries)
            generated += len(posts) * cfg.response_length
            del policy  # one at a time on the device
        generation_seconds = time.monotonic() - generation_began

        # 3. describe them
        scores = {stage: reward_model.scores(posts, texts[stage]) for stage in texts} if reward_model else {}
        gold = {stage: gold_scores(posts, texts[stage]) for stage in texts} if with_gold else {}
        described = {}
        for stage, written in texts.items():
            row = rouge(written, texts["reference"]) if stage != "reference" else {}
            row["words"] = mean([len(words(text)) for text in written])
            row["tokens"] = mean(tokens[stage])
            row["eos_rate"] = eos_rates.get(stage)
            row["title_copy"] = mean([title_copy(text, post.title) for text, post in zip(written, posts, strict=True)])
            row["copy4"] = mean([copied_ngrams(text, post.post) for text, post in zip(written, posts, strict=True)])
            row["distinct2"] = distinct_n(written)
            row["score"] = mean(scores[stage]) if scores else None
            row["gold"] = mean(gold[stage]) if gold else None
            described[stage] = {name: value for name, value in row.items() if value is not None}

        # 4. the reward model
        card = {}
        if reward_model:
            every = load_comparisons(data, "valid")  # in the order of OpenAI's batches, so a part is drawn, not cut off
            number = min(cfg.num_comparisons, len(every))
            comparisons = [every[i] for i in batch_indices(len(every), number, cfg.seed, step=0)]
            compared = [comparison.post for comparison in comparisons]
            chosen = reward_model.scores(compared, [comparison.chosen for comparison in comparisons])
            rejected = reward_model.scores(compared, [comparison.rejected for comparison in comparisons])
            correct = sum(a > b for a, b in zip(chosen, rejected, strict=True))  # a tie is an error (N+ detail 10)
            gaps = [len(words(comparison.chosen)) - len(words(comparison.rejected)) for comparison in comparisons]
            longer, equal, shorter = (sum(pick) for pick in zip(*((g > 0, g == 0, g < 0) for g in gaps), strict=True))
            card = {"comparisons": number, "accuracy": correct / number, "interval": accuracy_interval(correct, number)}
            card["length_baseline"] = win_rate(longer, equal, shorter)
            if of_tiny_world(compared):
                ceiling = ceilings([as_raw(comparison) for comparison in comparisons])
                card |= {"ceiling": ceiling["bayes"], "gold_ceiling": ceiling["gold"]}

        # 5. win rates
        judge = gold_judge() if cfg.judge == "gold" else reward_model
        win_rates = []
        for ours, theirs in OPPONENTS:
            if ours not in texts or theirs not in texts:
                continue
            pairs = [Pair(post, a, b) for post, a, b in zip(posts, texts[ours], texts[theirs], strict=True)]
            verdicts = judge.compare(pairs)
            outcomes = [OUTCOMES[verdict] for verdict in verdicts]
            wins, ties, losses = (verdicts.count(verdict) for verdict in OUTCOMES)
            row = {"ours": ours, "theirs": theirs, "n": len(pairs), "wins": wins, "ties": ties, "losses": losses}
            row |= {"rate": win_rate(wins, ties, losses), "interval": bootstrap_interval(outcomes, cfg.seed)}
            lengths = [[len(words(text)) for text in texts[side]] for side in (ours, theirs)]
            row["length_controlled"] = length_controlled_win_rate(outcomes, *lengths)
            row["length_controlled_interval"] = length_controlled_interval(outcomes, *lengths, seed=cfg.seed)
            win_rates.append(row)

        # 6. tables, files, report
        told = ("preset", "split", "temperature", "response_length", "judge", "seed")
        about = {"posts": len(posts), "data": str(data)} | {name: getattr(cfg, name) for name in told}
        results = {
            "about": about,
            "models": {stage: {"folder": str(folder), "from": origin} for stage, (folder, origin) in models.items()},
            "policies": {stage: finite(row) for stage, row in described.items()},
            "reward_model": card,
            "win_rates": win_rates,
        }
        rows = []
        for i, post in enumerate(posts):
            row = {"step": 0, "id": post.id, "subreddit": post.subreddit, "title": post.title, "post": post.post}
            row |= {stage: texts[stage][i] for stage in texts}
            row |= {f"gold/{stage}": gold[stage][i] for stage in gold}
            row |= {f"score/{stage}": scores[stage][i] for stage in scores}
            rows.append(finite(row))
        run.begin()
        append(run.folder / "samples.jsonl", rows)
        write_whole(run.folder / "metrics.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        report = write_report(run.folder)

        for table in [*(sample_table(row) for row in rows[:2]), *tables(results)]:
            run.say(console(table))
        numbers = {f"eval/{stage}/{name}": value for stage, row in described.items() for name, value in row.items()}
        numbers |= {f"eval/{row['ours']}_vs_{row['theirs']}/win_rate": row["rate"] for row in win_rates}
        numbers |= {"eval/rm/validation/accuracy": card["accuracy"]} if card else {}
        speed = {"perf/tokens_per_s": generated / generation_seconds, "time/rollout": generation_seconds}
        run.log(0, numbers | speed | {"time/total_s": time.monotonic() - began})
        run.say(f"report  {report}")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
