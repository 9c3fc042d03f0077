"""Comparisons from any policies by any judge, in OpenAI's format: `train_rm.py --data runs/labels` learns from them.

    python -m experiments.label --policy sft=runs/sft/final --judge rm --reward_model runs/rm/final      RLAIF
    python -m experiments.label --policy sft=DIR ppo=DIR --judge annotator --with_old                    a second round
    python -m experiments.label --policy sft=DIR --judge claude --num_posts 500             shows the cost, needs --yes

    annotator   the tiny world's simulated person: knows the truth, likes length and the title's words, makes mistakes
    gold        the truth with that person's mistakes, without the likings
    rm          a reward model (--reward_model)
    claude      a Claude model reads both, in both orders (evaluation/claude.py; answers are kept and never paid twice)

For each post two policies are drawn, perhaps the same one twice, and each writes a summary. Where the two texts are
equal, or the judge sees a tie or does not answer the question, there is no comparison: the log counts them. Writes a
data folder, runs/<run_name>: comparisons/ and the posts (tldr/), all of it or nothing. What policies wrote is stored
and found again (evaluation/summaries.py), so a judge that failed costs no second generation.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nanorlhf.data.tldr import Post, load_comparisons, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import check, one_sentence
from nanorlhf.evaluation.claude import MODEL, ClaudeJudge
from nanorlhf.evaluation.evaluation import find_policies
from nanorlhf.evaluation.judge import LOSS, TIE, UNPARSED, WIN, Judge, Pair, check_gold, gold_scores, reward_model_judge
from nanorlhf.evaluation.summaries import Plan, check_not_silent, write
from nanorlhf.run.inputs import find_data, find_model
from nanorlhf.storage.checkpoint import load_scalar
from nanorlhf.tiny.annotator import prefer_probability, utility
from nanorlhf.tiny.posts import facts_from_id
from nanorlhf.tiny.world import confidence

JUDGES = ("annotator", "gold", "rm", "claude")
UNREADABLE = 0.5  # of the judge's answers, at most: beyond it the labels say more about the judge than about the texts
LIMITS = {"tiny": (104, 32, 8192), "other": (512, 53, 65536)}  # tokens of a query, a response, a forward pass

Choice = tuple[int, int | None]  # 0 or 1, the preferred of the two; OpenAI's confidence, 1 to 9, where there is one
Chooser = Callable[[list[Pair]], list[Choice | None]]


# --- who chooses ------------------------------------------------------------------------------------------------------


def noisy_choices(pairs: Sequence[Pair], values: Sequence[tuple[float, float]], seed: int) -> list[Choice]:
    """What a person chooses who sees these values with the annotator's noise: P(first) = sigmoid(0.7 * difference)."""
    choices = []
    for pair, (first, second) in zip(pairs, values, strict=True):
        p = prefer_probability(first, second)
        choice = 0 if random.Random(f"{seed}:{pair.post.id}:{pair.ours}:{pair.theirs}").random() < p else 1
        choices.append((choice, confidence(choice, p)))
    return choices


def annotator(pairs: Sequence[Pair], seed: int) -> list[Choice]:
    check_gold([pair.post for pair in pairs])
    values = []
    for pair in pairs:
        facts = facts_from_id(pair.post.id)
        values.append(tuple(utility(facts, pair.post.title, text) for text in (pair.ours, pair.theirs)))
    return noisy_choices(pairs, values, seed)


def gold(pairs: Sequence[Pair], seed: int) -> list[Choice]:
    posts = [pair.post for pair in pairs]
    first, second = (gold_scores(posts, texts) for texts in zip(*((p.ours, p.theirs) for p in pairs), strict=True))
    return noisy_choices(pairs, list(zip(first, second, strict=True)), seed)


def asked(judge: Judge, pairs: Sequence[Pair]) -> list[Choice | None]:
    """The choices of a judge of evaluation/judge.py, None where it saw a tie or did not answer; it says how often.

    Raises UserError when more than half of its answers cannot be read: it did not understand the question.
    """
    verdicts = [judgement.verdict for judgement in judge.compare(pairs)]
    counts = Counter(verdicts)
    print(f"judge   {judge.name}: {counts[TIE]:,} ties, {counts[UNPARSED]:,} unreadable of {len(pairs):,}", flush=True)
    check(
        counts[UNPARSED] <= UNREADABLE * len(pairs), f"judge {judge.name}",
        f"with {counts[UNPARSED]} unreadable answers of {len(pairs)}", f"readable in {1 - UNREADABLE:.0%} of them",
        "nothing was written and its answers are kept; read some of them, or take another --judge_model",
    )  # fmt: skip
    choice = {WIN: (0, None), LOSS: (1, None), TIE: None, UNPARSED: None}
    return [choice[verdict] for verdict in verdicts]


# --- pairs and rows ---------------------------------------------------------------------------------------------------


def draw_pairs(posts: Sequence[Post], texts: dict[str, list[list[str]]], seed: int) -> list[tuple[Pair, str, str]]:
    """Two summaries a post, each of a policy drawn at random -> (pair, who wrote the first, who the second). Pairs of
    equal texts are left out.

    args: texts: {policy: [its first summary of every post, its second]}
    """
    names, found = sorted(texts), []
    for i, post in enumerate(posts):
        drawn = random.Random(f"{seed}:{post.id}").choices(names, k=2)
        first, second = texts[drawn[0]][0][i], texts[drawn[1]][1][i]
        if first != second:
            found.append((Pair(post, first, second), *drawn))
    return found


def row(pair: Pair, policies: tuple[str, str], choice: Choice, judge: str, batch: str, split: str) -> dict:
    """A comparison as OpenAI's files have it."""
    post, (preferred, sure) = pair.post, choice
    summaries = zip((pair.ours, pair.theirs), policies, strict=True)
    return {
        "info": {"id": post.id, "post": post.post, "title": post.title, "subreddit": post.subreddit},
        "summaries": [{"text": " " + text.strip(), "policy": policy, "note": None} for text, policy in summaries],
        "choice": preferred,
        "worker": judge,
        "batch": batch,
        "split": split,
        "extra": {"confidence": sure},
    }


def label(drawn: dict[str, list[tuple[Pair, str, str]]], judge: str, batch: str, choose: Chooser) -> list[dict]:
    """The rows of {split: what draw_pairs returned}. The judge sees all pairs at once: one that costs money asks once.

    Raises UserError for a split in which nothing is left to learn from.
    """
    every = [(split, *three) for split, threes in drawn.items() for three in threes]
    choices = choose([pair for _, pair, *_ in every])
    rows = [
        row(pair, (first, second), choice, judge, batch, split)
        for (split, pair, first, second), choice in zip(every, choices, strict=True)
        if choice is not None
    ]
    for split, threes in drawn.items():
        kept = sum(made["split"] == split for made in rows)
        fix = "sample more posts, hotter, or other policies"
        check(kept > 0, f"judge {judge}", f"without a preference in {len(threes)} pairs of {split}", "of any use", fix)
        print(f"labels  {split}: {len(threes):,} pairs of different texts, {kept:,} with a preference", flush=True)
    return rows


# --- files ------------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, data: Path, rows: list[dict], with_old: bool) -> None:
    """A data folder as train_rm.py reads it: these comparisons, the old ones if wanted, and the posts of `data`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tldr = next(path for path in (data / "tldr", data / "tldr_3_filtered") if path.is_dir())
        shutil.copytree(tldr, draft / "tldr")
        (draft / "comparisons").mkdir()
        for path in sorted((data / "comparisons").glob("*.json")) if with_old else ():
            shutil.copy(path, draft / "comparisons" / path.name)
        file = draft / "comparisons" / f"{folder.name}.json"
        check(not file.exists(), "run_name", folder.name, "free", f"{data} has comparisons of this name")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for split in ("train", "valid"):
            load_comparisons(draft, split)  # train_rm.py will be able to read them
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# --- the command ------------------------------------------------------------------------------------------------------


def quiet(items: Sequence, what: str = "", total: int | None = None) -> Sequence:
    return items


def summaries_of(folder: Path, posts: list[Post], args, number: int, limits: tuple[int, int, int]) -> list[list[str]]:
    """Two summaries a post: [all first ones, all second ones], each sampled with noise of its own."""
    query, response, tokens = limits
    found = []
    for which in range(2):
        noise = (args.seed * 64 + number) * 2 + which
        plan = Plan(args.temperature, response, query, noise, samples=0, sample_posts=0, sample_temperature=1.0)
        written = write(folder, posts, plan, torch.device(args.device), torch.float32, tokens, quiet)
        check_not_silent(str(folder), written.texts)
        found.append(written.texts)
    return found


def chooser(args, limits: tuple[int, int, int]) -> Chooser:
    match args.judge:
        case "annotator":
            return lambda pairs: annotator(pairs, args.seed)
        case "gold":
            return lambda pairs: gold(pairs, args.seed)
        case "rm":
            folder, _ = find_model("rm", args.reward_model, "reward_model", args.preset)
            tokenizer = load_tokenizer(folder)
            model = load_scalar(folder, args.device, torch.float32, tokenizer)
            judge = reward_model_judge(model, tokenizer, limits[0], limits[2], say=print)
        case "claude":
            judge = ClaudeJudge(args.judge_cache, args.judge_model or MODEL, batch=args.batch, yes=args.yes)
    return lambda pairs: asked(judge, pairs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.label", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", nargs="+", required=True, metavar="NAME=DIR", help="who writes; bare: sft, ppo")
    parser.add_argument("--judge", required=True, choices=JUDGES)
    parser.add_argument("--reward_model", help="folder, of --judge rm")
    parser.add_argument("--judge_model", help="a model's name, of --judge claude")
    parser.add_argument("--judge_cache", type=Path, help="file of claude's answers")
    parser.add_argument("--batch", action="store_true", help="claude: half the price, within a day")
    parser.add_argument("--yes", action="store_true", help="claude: agree to the cost")
    parser.add_argument("--preset", default="tiny", help="tiny, or another for Llama's lengths")
    parser.add_argument("--data", help="folder with tldr/ (and comparisons/) in OpenAI's format")
    parser.add_argument("--with_old", action="store_true", help="copy the comparisons of --data, too")
    parser.add_argument("--num_posts", type=int, default=4096, help="of the training split")
    parser.add_argument("--valid_posts", type=int, default=512, help="of the validation split")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1, help="of samples, pairs and noise")
    parser.add_argument("--run_name", default="labels", help="folder under runs/")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    for name in ("num_posts", "valid_posts"):
        check(getattr(args, name) > 0, name, getattr(args, name), "at least 1")
    check(args.temperature > 0 and math.isfinite(args.temperature), "temperature", args.temperature, "greater than 0",
          "greedy summaries are all the same: choose 0.7")  # fmt: skip
    folder = Path("runs") / args.run_name
    check(args.overwrite or not folder.exists(), "run_name", folder, "free", "choose another, or pass --overwrite")
    data, _ = find_data(args.data, args.preset)
    policies, _ = find_policies(args.policy, args.preset)
    limits = LIMITS.get(args.preset, LIMITS["other"])
    choose = chooser(args, limits)  # before anything is generated: it may refuse
    posts = {"train": load_posts(data, "train")[: args.num_posts]}
    posts["valid1"] = load_posts(data, "valid")[: args.valid_posts]
    drawn = {}
    for split in posts:
        texts = {
            name: summaries_of(path, posts[split], args, number, limits)
            for number, (name, (path, _)) in enumerate(sorted(policies.items()))
        }
        drawn[split] = draw_pairs(posts[split], texts, args.seed)
    rows = label(drawn, args.judge, args.run_name, choose)
    write_folder(folder, data, rows, args.with_old)
    print(json.dumps({"experiment": "label", "judge": args.judge, "rows": len(rows), "folder": str(folder)}))


if __name__ == "__main__":
    with one_sentence("the same command goes on"):
        main()
