"""Evaluation: what each policy writes on held-out posts, how good it is, and how far to trust the numbers.

    python eval.py                                       the last runs on this machine, else the embedded tiny world
    python eval.py --policy sft=DIR ppo=DIR              any checkpoints, by any names; a bare base, sft or ppo is found
    python eval.py --samples theirs=summaries.jsonl      text that somebody else's model wrote, beside the above
    python eval.py --judge claude --num_posts 500        a language model judges; shows the cost first, needs --yes
    python eval.py --help                                every flag

Reads policies, the reward model and TL;DR data; writes runs/eval: metrics.json, samples.jsonl (every summary with its
scores and verdicts), report.html and report.md. The steps, numbered as in the code:

    1. read held-out posts; find policies, files of samples, reward model, judge
    2. generate: one summary a post by each policy, and several of some posts; what was generated before is found again
    3. describe them: ROUGE, loss, length, share that stop, and the panel of hacks (nanorlhf/evaluation/hacks.py)
    4. reward model's card: accuracy by kind of pair, calibration, what it falls for (nanorlhf/evaluation/rm_card.py)
    5. win rates: the last policy against the others, each against the references; at equal length, too
    6. tables on the console, files, report

The gold judge knows the truth of the tiny world; the reward model as a judge (--judge rm) knows only what PPO was
trained to please, unless --judge_model names another one; claude reads. A policy that is nowhere to be found is left
out, with a line that says so. Left out: bars to pass (nanorlhf/tiny/demo.py has the demo's).
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that can grow

import json
import time
from dataclasses import dataclass
from pathlib import Path

import kernels
from nanorlhf import parallel
from nanorlhf.evaluation import rm_card
from nanorlhf.storage.checkpoint import check_folder, load_scalar
from nanorlhf.evaluation.claude import MODEL, ClaudeJudge
from nanorlhf.errors import UserError, check
from nanorlhf.run.config import cli
from nanorlhf.evaluation.divergence import kl_from_sft
from nanorlhf.evaluation.evaluation import (
    REFERENCE, STAGES, compare, describe, describe_reference, disagreement, find_policies, find_samples,
)  # fmt: skip
from nanorlhf.run.inputs import find_data, find_model
from nanorlhf.storage.jsonl import append, finite, write_whole
from nanorlhf.evaluation.judge import (
    JUDGES,
    OUTCOMES,
    check_gold,
    gold_judge,
    gold_scores,
    of_tiny_world,
    reward_model_judge,
)
from nanorlhf.evaluation.metrics import bootstrap_interval, mean, without_words
from nanorlhf.evaluation.report import write_report
from nanorlhf.run.run import Run
from nanorlhf.evaluation.summaries import Plan, check_not_silent, read_samples, write
from nanorlhf.tiny.annotator import ceilings
from nanorlhf.evaluation.tables import console, sample_table, tables
from nanorlhf.data.tldr import Comparison, batch_indices, load_comparisons, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.storage.weights import check_weights


@dataclass
class Config:
    # -- run
    preset: str = "auto"  # auto, llama-1b, paper, smollm2 or tiny: which of the four sets of defaults below
    run_name: str = "eval"  # folder under runs/
    overwrite: bool = False  # delete an earlier run of this name first
    seed: int = 1  # of the sampled summaries and of the bootstrap
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    dtype: str = "auto"  # of weights and activations: bfloat16 on CUDA, float32 on CPU
    # -- inputs
    policy: tuple[str, ...] = ()  # name=DIR ...: Hugging Face folders; bare base, sft, ppo: found; none: those three
    samples: tuple[str, ...] = ()  # name=FILE.jsonl ...: summaries (id, summary a line) that another model wrote
    reward_model: str | None = None  # folder that train_rm.py wrote
    data: str | None = None  # folder with tldr/{valid,test}.jsonl and comparisons/ in OpenAI's formats
    split: str = "valid"  # valid, or test: posts that nothing was ever tuned on
    num_posts: int = 6447  # held-out posts, from the first of the split [paper: the whole validation split]
    num_comparisons: int = 8192  # held-out comparisons for the reward model's card, drawn at random from all
    # -- summaries
    temperature: float = 0.01  # of sampling, the same for every policy; 0 is greedy (N+ section 5.1)
    max_query_length: int = 512  # tokens; longer posts lose their last lines (N+ detail 2)
    response_length: int = 53  # tokens sampled, EOS included (N+ detail 4)
    diversity_samples: int = 4  # samples a post for edit distance and entropy; 0 for none
    diversity_posts: int = 512  # posts they are drawn for
    diversity_temperature: float = 0.7  # of these samples: PPO's
    microbatch_tokens: int = 65536  # tokens a forward pass: bounds memory, changes no result
    # -- metrics
    rouge_stemmer: bool = False  # stem words before ROUGE, as some papers do [paper: no]; labelled in every table
    # -- judging
    judge: str = "rm"  # gold (the tiny world's truth), rm (a reward model) or claude
    judge_model: str | None = None  # of --judge rm: another reward model's folder; of --judge claude: a model's name
    judge_cache: str | None = None  # file of claude's answers; none: runs/judge/<model>-<prompt>.jsonl
    batch: bool = False  # claude: the Message Batches API, at half the price within a day; resumable
    yes: bool = False  # claude: agree to the cost


PRESETS = {
    "llama-1b": {},
    "paper": {},
    # SmolLM2-135M: lengths as in train_sft.py
    "smollm2": dict(max_query_length=544, response_length=56, microbatch_tokens=16384),
    # Temperature 0.7 is the one PPO samples at: a win rate then compares what was trained. With 512 posts its standard
    # error is 0.02.
    "tiny": dict(
        num_posts=512, temperature=0.7, max_query_length=104, response_length=32, diversity_posts=64,
        microbatch_tokens=8192, judge="gold"
    ),
}  # fmt: skip

SHOWN = ("eval/rm/validation/accuracy", "eval/ppo/gold", "eval/ppo_vs_sft/win_rate", "perf/tokens_per_s")
EXAMPLE_POSTS = 64  # for the sets of example summaries


def short(path: Path) -> str:
    """The path from the current folder, where it lies below: a report is shown to others."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def as_raw(comparison: Comparison) -> dict:
    """A raw row as far as the annotator's `ceilings` reads it: which summary was chosen is no part of a ceiling."""
    info = {"id": comparison.post.id, "title": comparison.post.title}
    return {"info": info, "summaries": [{"text": comparison.chosen}, {"text": comparison.rejected}]}


def main(cfg: Config) -> None:
    check(cfg.split in ("valid", "test"), "split", repr(cfg.split), "valid or test")
    check(cfg.judge in JUDGES, "judge", repr(cfg.judge), f"one of {', '.join(JUDGES)}")
    check(cfg.diversity_samples != 1, "diversity_samples", 1, "0 or at least 2", "choose 4")
    check(cfg.judge != "gold" or not cfg.judge_model, "--judge_model", cfg.judge_model, "used by --judge gold")
    for name in ("judge_cache", "batch", "yes"):
        given = getattr(cfg, name)
        check(cfg.judge == "claude" or not given, f"--{name}", given, f"used by --judge {cfg.judge}")
    began = time.monotonic()

    # 1. posts, and which models there are
    data, data_from = find_data(cfg.data, cfg.preset)
    posts = load_posts(data, cfg.split)[: cfg.num_posts]
    models, missing = find_policies(cfg.policy, cfg.preset)
    files = find_samples(cfg.samples, models)
    if not models and not files:
        raise UserError(
            "no policy found, expected base, SFT or PPO: run `python train_sft.py`, or pass --policy sft=DIR"
        )
    try:
        rm_folder, rm_from = find_model("rm", cfg.reward_model, "reward_model", cfg.preset)
    except UserError:
        if cfg.reward_model is not None:
            raise
        rm_folder, rm_from = None, "not found, left out"
    if cfg.judge == "rm" and not (rm_folder or cfg.judge_model):
        raise UserError("--judge rm needs a reward model: run `python train_rm.py` first, or pass --reward_model DIR")
    parallel.check_enough("num_posts", len(posts))
    with_gold = of_tiny_world(posts)
    if cfg.judge == "gold":
        check_gold(posts)

    with Run("eval", cfg, show=SHOWN, kernels=kernels.chosen()) as run:
        run.say(f"data    {data} ({data_from}): {len(posts):,} posts of split {cfg.split}")
        for name, (folder, origin) in models.items():
            run.say(f"model   {name}: {folder} ({origin})")
        for name, why in missing.items():
            run.say(f"model   {name}: not found, left out ({why})")
        run.say(f"model   rm: {rm_folder} ({rm_from})" if rm_folder else f"model   rm: {rm_from}")

        def load_judge(folder: Path):
            tokenizer = load_tokenizer(folder)
            run.say_all(check_folder(folder, tokenizer, scalar=True))
            scalar = load_scalar(folder, run.device, run.dtype, tokenizer)
            limits = cfg.max_query_length, cfg.microbatch_tokens
            first = reward_model_judge(scalar, tokenizer, *limits).scores  # a number, or an error before hours of work
            first(posts[:1], [posts[0].summary])
            return reward_model_judge(scalar, tokenizer, *limits, run.progress, run.say)

        reward_model = load_judge(rm_folder) if rm_folder else None
        match cfg.judge:
            case "gold":
                judge = gold_judge()
            case "rm":
                judge = load_judge(Path(cfg.judge_model)) if cfg.judge_model else reward_model
            case "claude" if parallel.first():  # under torchrun one process asks
                cache = Path(cfg.judge_cache) if cfg.judge_cache else None
                options = dict(batch=cfg.batch, yes=cfg.yes, say=run.say, progress=run.progress)
                judge = ClaudeJudge(cache, cfg.judge_model or MODEL, **options)
        written = {name: read_samples(path, name, posts) for name, path in files.items()}
        for folder, _ in models.values():  # before the first one is asked to write
            run.say_all(check_folder(folder, load_tokenizer(folder)))
            check_weights(folder)

        # 2. summaries
        generated, generation_began = 0, time.monotonic()
        for i, (name, (folder, _)) in enumerate(models.items()):
            plan = Plan(
                cfg.temperature, cfg.response_length, cfg.max_query_length, noise=len(STAGES) * cfg.seed + i,
                samples=cfg.diversity_samples, sample_posts=cfg.diversity_posts if cfg.diversity_samples else 0,
                sample_temperature=cfg.diversity_temperature,
            )  # fmt: skip
            written[name] = write(folder, posts, plan, run.device, run.dtype, cfg.microbatch_tokens, run.progress)
            if written[name].reused:
                run.say(f"reused  {name}: its summaries were generated before, with the same model, posts and settings")
            else:
                generated += (len(posts) + sum(map(len, written[name].samples))) * cfg.response_length
        generation_seconds = time.monotonic() - generation_began
        kls = {}
        if "sft" in models and cfg.diversity_samples:
            sampling = cfg.max_query_length, cfg.response_length, cfg.diversity_temperature, cfg.seed
            for name in run.progress([name for name in models if name != "sft"], what="exact KL from SFT"):
                pair = models[name][0], models["sft"][0]
                hardware = cfg.microbatch_tokens, run.device, run.dtype
                kls[name] = kl_from_sft(*pair, posts[: cfg.diversity_posts], *sampling, *hardware)
        written = {name: written[name] for name in [*files, *models]}
        for name in written:
            check_not_silent(name, written[name].texts)

        # 3. describe them
        texts = {REFERENCE: [post.summary for post in posts]} | {name: w.texts for name, w in written.items()}
        if unseen := without_words([text for some in texts.values() for text in some]):
            run.say(unseen)
        scores = {name: reward_model.scores(posts, texts[name]) for name in texts} if reward_model else {}
        gold = {name: gold_scores(posts, texts[name]) for name in texts} if with_gold else {}
        described = {REFERENCE: describe_reference(posts, scores.get(REFERENCE), gold.get(REFERENCE))}
        for name in run.progress(written if parallel.first() else (), what="describing"):
            numbers = scores.get(name), gold.get(name)
            described[name] = describe(written[name], posts, *numbers, cfg.rouge_stemmer, run.progress)
            described[name] |= {"objective/kl_full": mean(kls[name])} if name in kls else {}

        # 4. the reward model
        card, example_sets = {}, []
        if reward_model:
            every = load_comparisons(data, "valid")  # in the order of OpenAI's batches, so a part is drawn, not cut off
            number = min(cfg.num_comparisons, len(every))
            comparisons = [every[i] for i in batch_indices(len(every), number, cfg.seed, step=0)]
            compared = [comparison.post for comparison in comparisons]
            chosen = reward_model.scores(compared, [comparison.chosen for comparison in comparisons])
            rejected = reward_model.scores(compared, [comparison.rejected for comparison in comparisons])
            card = rm_card.card(comparisons, chosen, rejected)
            if of_tiny_world(compared):
                ceiling = ceilings([as_raw(comparison) for comparison in comparisons])
                card |= {"ceiling": ceiling["bayes"], "gold_ceiling": ceiling["gold"]}
            shown = posts[:EXAMPLE_POSTS]
            for title, kinds in rm_card.examples(shown, cfg.seed).items():
                for kind, made in kinds.items():
                    values = reward_model.scores(shown, made)
                    row = {"set": title, "kind": kind, "n": len(shown), "example": made[0], "score": mean(values)}
                    row["interval"] = bootstrap_interval(values, cfg.seed)
                    example_sets.append(row | ({"gold": mean(gold_scores(shown, made))} if with_gold else {}))

        # 5. win rates: under torchrun all processes generate and score their share; from here on no model is needed
        if cfg.judge != "rm" and not parallel.first():
            return
        win_rates, judgements = compare(judge, posts, texts, scores, cfg.seed, run.progress)

        # 6. tables, files, report
        if not parallel.first():
            return
        told = ("preset", "split", "temperature", "response_length", "judge", "seed", "rouge_stemmer")
        about = {"posts": len(posts), "data": short(data)} | {name: getattr(cfg, name) for name in told}
        told = ("diversity_samples", "diversity_posts", "diversity_temperature")
        about |= {name: getattr(cfg, name) for name in told}
        about["judge_model"] = short(Path(cfg.judge_model)) if cfg.judge == "rm" and cfg.judge_model else None
        about["judge_details"] = judge.about() if cfg.judge == "claude" else {}
        origins = models | ({"rm": (rm_folder, rm_from)} if rm_folder else {})
        origins |= {name: (path, "--samples") for name, path in files.items()}
        origins = {name: {"folder": short(folder), "from": origin} for name, (folder, origin) in origins.items()}
        results = {
            "about": about,
            "models": origins,
            "policies": {name: finite(row) for name, row in described.items()},
            "reward_model": card,
            "examples": example_sets,
            "win_rates": [finite(row) for row in win_rates],
        }
        rows = []
        for i, post in enumerate(posts):
            row = {"step": 0, "id": post.id, "subreddit": post.subreddit, "title": post.title, "post": post.post}
            row |= {name: texts[name][i] for name in texts}
            row |= {f"gold/{name}": gold[name][i] for name in gold}
            row |= {f"score/{name}": scores[name][i] for name in scores}
            for (ours, theirs), made in judgements.items():
                row[f"verdict/{ours}_vs_{theirs}"] = made[i].verdict
            ours, theirs = next(iter(judgements))
            if scores:
                outcome = OUTCOMES.get(row[f"verdict/{ours}_vs_{theirs}"])
                row["disagreement"] = disagreement(outcome, scores[ours][i], scores[theirs][i])
            rows.append(finite(row))
        run.begin()
        append(run.folder / "samples.jsonl", rows)
        write_whole(run.folder / "metrics.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        report = write_report(run.folder)

        for table in [*(sample_table(row) for row in rows[:2]), *tables(results)]:
            run.say(console(table))
        numbers = {f"eval/{name}/{key}": value for name, row in described.items() for key, value in row.items()}
        numbers |= {f"eval/{row['ours']}_vs_{row['theirs']}/win_rate": row["rate"] for row in win_rates}
        numbers |= {"eval/rm/validation/accuracy": card["accuracy"]} if card else {}
        if generated:
            numbers |= {"perf/tokens_per_s": generated / generation_seconds, "time/rollout": generation_seconds}
        run.log(0, numbers | {"time/total_s": time.monotonic() - began})
        run.say(f"report  {report}")


if __name__ == "__main__":
    cli(main, Config, PRESETS, __doc__)
