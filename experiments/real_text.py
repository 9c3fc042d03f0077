"""The tiny architecture on real Reddit posts, from random weights, with the real scripts: does the data path carry a
signal?

    python -m experiments.real_text --data DIR      a folder of real posts and comparisons in OpenAI's formats

Learns a tokenizer of 4,096 tokens on the training posts, then runs train_sft.py and train_rm.py for a few minutes. A
model of this size learns how Reddit sounds and little more; what is asked is that the loss falls well below that of
token frequencies alone, and, of the reward model, whether a thousand comparisons teach it more than "the longer wins".
Prints both answers and one JSON line last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from math import log
from pathlib import Path

import sentencepiece

from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import format_query, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import read_config, save_policy

ROOT = Path(__file__).parents[1]
VOCABULARY, QUERY = 4096, 256  # tokens
SFT = ["--batch_size", "32", "--lr", "2e-3", "--eval_posts", "64", "--save_every", "0"]
RM = ["--batch_size", "32", "--lr", "5e-4", "--shift_posts", "256", "--save_every", "0"]


def base_model(data: Path, folder: Path) -> None:
    """A random model of the tiny world's size, with a tokenizer learned on these posts."""
    posts = load_posts(data, "train")
    lines = (line for p in posts for line in f"{format_query(p.subreddit, p.title, p.post)} {p.summary}".split("\n"))
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, pad_id=3, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    size = vars(read_config(ROOT / "nanorlhf" / "tiny" / "checkpoints" / "base"))
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    policy = Policy(LlamaConfig(**size | {"vocab_size": tokenizer.vocab_size} | ids))
    initialise(policy)
    save_policy(policy, folder, tokenizer)


def frequency_loss(data: Path, folder: Path) -> float:
    """Nats a token of held-out posts for a model that knows only how frequent each token is."""
    tokenizer = load_tokenizer(folder)
    counts = Counter()
    queries, responses = encode_posts(load_posts(data, "train"), tokenizer, QUERY)
    counts.update(queries.tokens.tolist() + responses.tokens.tolist())
    total = sum(counts.values()) + VOCABULARY
    queries, responses = encode_posts(load_posts(data, "valid")[:64], tokenizer, QUERY)
    tokens = queries.tokens.tolist() + responses.tokens.tolist()
    return -sum(log((counts[token] + 1) / total) for token in tokens) / len(tokens)


def train(stage: str, data: Path, folder: Path, *flags) -> list[dict]:
    shared = ["--preset", "tiny", "--device", "cpu", "--data", data, "--max_query_length", str(QUERY)]
    command = [sys.executable, ROOT / f"train_{stage}.py", *shared, "--microbatch_tokens", "8192", *flags]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "runs" / stage)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.real_text", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tldr/ and comparisons/")
    parser.add_argument("--updates", type=int, default=240, help="optimizer steps of SFT")
    args = parser.parse_args()
    data, began = args.data.resolve(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base_model(data, folder / "base")
        unigram = frequency_loss(data, folder / "base")
        rows = train("sft", data, folder, "--model", folder / "base", *SFT, "--max_updates", str(args.updates))
        sft = [row["train/sft/loss"] for row in rows if "train/sft/loss" in row]
        held_out = rows[-1]["validation/sft/loss"]
        fell = f"loss {sft[0]:.2f} -> {sum(sft[-10:]) / 10:.2f} in {len(sft)} steps, held out {held_out:.2f}"
        print(f"SFT: {fell}; token frequencies alone {unigram:.2f}; {time.monotonic() - began:.0f} s", flush=True)
        rows = train("rm", data, folder, "--sft_model", folder / "runs" / "sft" / "final", *RM, "--num_epochs", "2")
        accuracy = rows[-1]["eval/rm/validation/accuracy"]
        longer = rows[-1]["eval/rm/validation/accuracy_longer_wins"]
        seconds = time.monotonic() - began
        print(f"RM: {accuracy:.3f} of held-out comparisons; the longer wins {longer:.3f}; {seconds:.0f} s")
    result = {"sft_first": sft[0], "sft_last": sum(sft[-10:]) / 10, "sft_held_out": held_out, "frequencies": unigram}
    result |= {"rm_accuracy": accuracy, "rm_longer_wins": longer, "seconds": seconds}
    print(json.dumps({"bench": "real_text", **result}))


if __name__ == "__main__":
    as_command(main)
