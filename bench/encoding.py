"""Posts a second, from text to token ids, and how long a start takes when they are remembered.

    python -m bench.encoding --data DIR       a folder of real posts in OpenAI's format (default: the tiny world)
    python -m bench.encoding --data DIR --model models/smollm2       with that model's tokenizer alone

Without --model, learns a tokenizer of Llama 3's format and size, and one of Llama 2's, on one half of the training
posts. Repeats the other half to the 116,722 rows of OpenAI's training split, and encodes them twice, in a process of
its own each time: first anew, then from the cache. Prints a line for each and one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece

from bench.stand_ins import write_llama3_tokenizer
from nanorlhf.data.download import POSTS
from nanorlhf.data.tldr import Post, format_query, load_posts
from nanorlhf.run.streams import as_command
from nanorlhf.tiny.data import ensure_world

START = """
import json, os, sys, time
began = time.perf_counter()
from nanorlhf.data.encoding import encode_posts, length_report
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
imported = time.perf_counter()
posts, tokenizer = load_posts(sys.argv[1], "train"), load_tokenizer(sys.argv[2])
read = time.perf_counter()
queries, responses = encode_posts(posts, tokenizer, 512)
ended = time.perf_counter()
print(json.dumps({"import_s": imported - began, "read_s": read - imported, "encode_s": ended - read,
                  "cpu_s": sum(os.times()[:4]), "lengths": length_report(queries, [responses], 53)}))
"""


def write_posts(folder: Path, posts: list[Post], rows: int) -> float:
    """`rows` posts, each a little different, as OpenAI's file; returns the mean number of words of a post."""
    (folder / "tldr").mkdir(parents=True)
    words = 0
    with open(folder / "tldr" / "train.jsonl", "w", encoding="utf-8") as file:
        for n in range(rows):
            row = vars(posts[n % len(posts)])
            words += len(row["post"].split())
            file.write(json.dumps(row | {"id": f"t3_{n}", "title": f"{row['title']} {n}"}) + "\n")
    return words / rows


def write_llama2_tokenizer(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line),
        model_prefix=str(folder / "tokenizer"), vocab_size=32_000, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip


def start(data: Path, tokenizer: Path, folder: Path) -> dict:
    """One start in a process of its own, with `folder` for its cache."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", START, data, tokenizer]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, encoding="utf-8")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.encoding", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with tldr/train.jsonl")
    parser.add_argument("--model", type=Path, help="folder with a tokenizer: in place of the two learned ones")
    parser.add_argument("--rows", type=int, default=POSTS["train"])
    args = parser.parse_args()
    posts = load_posts(args.data or ensure_world("data/tiny"), "train")
    learn, encode = posts[::2], posts[1::2]
    texts = [format_query(p.subreddit, p.title, p.post) + " " + p.summary for p in learn]
    cores, results = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = write_posts(folder / "data", encode, args.rows)
        print(f"{args.rows:,} posts of {words:.0f} words, {cores} cores")
        tokenizers = {args.model.name: args.model.resolve()} if args.model else {}
        if not tokenizers:
            learned = write_llama3_tokenizer(folder / "llama3", texts)
            write_llama2_tokenizer(folder / "llama2", texts)
            print(f"{learned:,} learned tokens in Llama 3's format")
            tokenizers = {format: folder / format for format in ("llama3", "llama2")}
        for format, path in tokenizers.items():
            first, second = (start(folder / "data", path, folder) for _ in range(2))
            speed = args.rows / first["encode_s"]
            total = second["import_s"] + second["read_s"] + second["encode_s"]
            busy = args.rows / (first["cpu_s"] - second["cpu_s"])
            print(f"{format}: {speed:,.0f} posts/s, {busy:,.0f} a CPU second ({first['lengths']})")
            print(
                f"{format}: second start {total:.1f} s, of which {second['read_s']:.1f} s read the texts and "
                f"{second['encode_s']:.1f} s their tokens"
            )
            results.append({"tokenizer": format, "posts_per_s": speed, "first": first, "second": second})
    print(json.dumps({"bench": "encoding", "rows": args.rows, "words": words, "cores": cores, "results": results}))


if __name__ == "__main__":
    as_command(main)
