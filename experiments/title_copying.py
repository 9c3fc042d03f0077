"""How much of their titles do people and models copy? On real text, without running a model.

    python -m experiments.title_copying --data ../shared/data
    python -m experiments.title_copying --data DIR --samples runs/eval/samples.jsonl      and what an evaluation wrote

Of a title's words, how many stand in the summary in the title's order (the longest common subsequence over the title's
length: `title_copy` of nanorlhf, whose alarm watches it during PPO)? For the posts' own TL;DRs, both sides of the
comparisons by who wrote them (`ref`: the post's author, as OpenAI filtered them; `sup4_ppo_rm4`: OpenAI's 1.3B model
after PPO), and each policy of an evaluation. Also: does the judge of the comparisons like it? Intervals: 95% of a
bootstrap over posts. Prints markdown and one JSON line last.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from experiments.small_model_report import copies_of, table, title_table
from nanorlhf.data.tldr import Comparison, Post, load_comparisons, load_posts
from nanorlhf.errors import UserError, one_sentence
from nanorlhf.evaluation.metrics import bootstrap_interval
from nanorlhf.run.inputs import find_data
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import read_jsonl


def texts_of(data: Path) -> dict[str, tuple[list[str], list[Post]]]:
    """{who wrote: (texts, their posts)} of a data folder."""
    found = {}
    for split in ("train", "valid"):
        posts = load_posts(data, split)
        found[f"authors' own TL;DR, {split}"] = [post.summary for post in posts], posts
    sides = defaultdict(lambda: ([], []))
    for c in comparisons_of(data):
        for text, policy in ((c.chosen, c.chosen_policy), (c.rejected, c.rejected_policy)):
            sides[f"comparisons: {policy}"][0].append(text)
            sides[f"comparisons: {policy}"][1].append(c.post)
    return found | dict(sorted(sides.items()))


def comparisons_of(data: Path) -> list[Comparison]:
    return load_comparisons(data, "train") + load_comparisons(data, "valid")


def preferred(comparisons: list[Comparison]) -> dict[str, float]:
    """Does the judge prefer the text that copies more? Pairs in which one side copies more of the title."""
    more = []
    for c in comparisons:
        chosen, rejected = copies_of([c.chosen, c.rejected], [c.post] * 2) or (0.0, 0.0)
        if chosen != rejected:
            more.append(float(chosen > rejected))
    low, high = bootstrap_interval(more, seed=1)
    return {"pairs": len(more), "share": float(np.mean(more)), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.title_copying", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with tldr/ and comparisons/ in OpenAI's formats [data/openai]")
    parser.add_argument("--samples", nargs="*", type=Path, default=[], help="samples.jsonl of evaluations")
    args = parser.parse_args()
    with one_sentence():
        data, _ = find_data(args.data, "smollm2")
        texts = texts_of(data)
        for path in args.samples:
            if not path.is_file():
                raise UserError(f"samples: {path} is not a file, expected samples.jsonl of an evaluation")
            rows = read_jsonl(path, having="id")
            posts = [Post(row["id"], row["subreddit"], row["title"], row["post"], "") for row in rows]
            known = {"step", "id", "subreddit", "title", "post", "disagreement"}
            names = [name for name in rows[0] if name not in known and "/" not in name]
            texts |= {f"{path.parent.name}: {name}": ([row[name] for row in rows], posts) for name in names}
        lines, numbers = title_table(texts)
        likes = preferred(comparisons_of(data))
        print("\n".join(lines))
        said = [likes["pairs"], likes["share"], f"{likes['low']:.3f} to {likes['high']:.3f}"]
        print("\n".join(table(["pairs in which one side copies more", "that side is preferred", "95%"], [said])))
        print(json.dumps({"experiment": "title_copying", "texts": numbers, "preferred": likes}))


if __name__ == "__main__":
    as_command(main)
