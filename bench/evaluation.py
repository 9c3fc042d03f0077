"""How long an evaluation takes without generation: tokenising, every metric without a judge, the report.

    python -m bench.evaluation                      6,447 posts x 3 checkpoints, as on the paper's validation split
    python -m bench.evaluation --posts 500

Five posts of the tiny world in a row make one, and three references a reference, so that both are about as long as
Reddit's; the tokenizer is the tiny world's. Samples for diversity: 4 of each of 512 posts.
Prints seconds by step and one JSON line last.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import Post
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.evaluation.evaluation import REFERENCE, compare, describe, describe_reference
from nanorlhf.evaluation.judge import ScoreJudge
from nanorlhf.evaluation.report import write_report
from nanorlhf.evaluation.summaries import Written
from nanorlhf.rollout import Summary
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import append
from nanorlhf.tiny.posts import make_post

SAMPLE_POSTS, SAMPLES = 512, 4


def long_post(i: int, n: int) -> Post:
    parts = [make_post("train", (5 * i + j) % (5 * n)) for j in range(5)]
    text = "\n".join(part.post for part in parts)
    return Post(f"p{i}", parts[0].subreddit, parts[0].title, text, " ".join(part.summary for part in parts[:3]))


def altered(post: Post, rng: random.Random) -> str:
    """A summary that shares most of its words with the reference."""
    return " ".join(word for word in post.summary.split() if rng.random() < 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--posts", type=int, default=6447)
    args = parser.parse_args()
    rng, clock, took = random.Random(0), time.monotonic, {}
    progress = lambda items, what, total=None: items  # noqa: E731
    posts = [long_post(i, args.posts) for i in range(args.posts)]

    began = clock()
    tokenizer = load_tokenizer(EMBEDDED / "sft")
    for _ in range(3):
        encode_posts(posts, tokenizer, 512)
    took["tokenise"] = clock() - began

    written = {}
    for name in ("base", "sft", "ppo"):
        summaries = [Summary(altered(post, rng), tokens=40, has_eos=True) for post in posts]
        samples = [[altered(post, rng) for _ in range(SAMPLES)] for post in posts[:SAMPLE_POSTS]]
        written[name] = Written(summaries, samples, entropy=1.0, loss=2.0)
    texts = {REFERENCE: [post.summary for post in posts]} | {name: w.texts for name, w in written.items()}
    scores = {name: [rng.gauss(0, 1) for _ in posts] for name in texts}

    began = clock()
    described = {REFERENCE: describe_reference(posts, scores[REFERENCE], None)}
    for name in written:
        described[name] = describe(written[name], posts, scores[name], None, False, progress)
    took["metrics"] = clock() - began

    began = clock()
    judge = ScoreJudge("rm", lambda posts, summaries: [float(len(text)) for text in summaries])
    win_rates, _ = compare(judge, posts, texts, scores, seed=1)
    took["win rates, intervals"] = clock() - began

    began = clock()
    about = {"posts": args.posts, "split": "valid", "temperature": 0.01, "response_length": 53, "judge": "rm"}
    about |= {"diversity_samples": SAMPLES, "diversity_posts": SAMPLE_POSTS, "diversity_temperature": 0.7}
    models = {name: {"folder": str(EMBEDDED / name), "from": "embedded"} for name in written}
    results = {"about": about, "models": models, "policies": described, "win_rates": win_rates, "reward_model": {}}
    rows = []
    for i, post in enumerate(posts):
        row = {"step": 0, "id": post.id, "title": post.title, "post": post.post}
        rows.append(row | {n: texts[n][i] for n in texts} | {f"score/{n}": scores[n][i] for n in texts})
    with tempfile.TemporaryDirectory() as folder:
        append(Path(folder) / "samples.jsonl", rows)
        (Path(folder) / "metrics.json").write_text(json.dumps(results), encoding="utf-8")
        size = write_report(folder).stat().st_size
    took["report"] = clock() - began

    for step, seconds in took.items():
        print(f"{step:24} {seconds:6.1f} s")
    total = sum(took.values())
    print(
        f"{'all':24} {total:6.1f} s for {args.posts:,} posts x {len(written)} checkpoints; report {size / 1e6:.1f} MB"
    )
    print(json.dumps({"bench": "evaluation", "posts": args.posts, "seconds": total, **took}))


if __name__ == "__main__":
    as_command(main)
