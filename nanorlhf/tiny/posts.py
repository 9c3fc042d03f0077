"""Posts of the tiny world. The id is the seed: a post is a pure function of its split and index.

    id = "tiny-{split}-{index:06d}",   make_post(split, index) -> TinyPost,   facts_from_id(id) -> Facts

So nothing has to be stored beside a post to know its truth. Splits differ in their facts, not only in their ids: each
combination of (who, act, obj, rea, q) belongs to exactly one of train (6/8 of them), valid and test (1/8 each).
"""

import random
import zlib
from dataclasses import dataclass
from functools import lru_cache

from nanorlhf.tiny.grammar import (
    CLICKBAIT, Facts, Pick, by_habit, count_pieces, draw_facts, write_post, write_summary, write_title, write_verbose,
)  # fmt: skip
from nanorlhf.tiny.lexicon import WORLD_VERSION
from nanorlhf.data.tldr import format_query

# split -> whose facts it draws from
SPLITS = {
    "train": "train",
    "valid": "valid",
    "test": "test",
    "comparison_train": "train",
    "comparison_valid1": "valid",
    "pretrain": "train",
    "fluency": "train",
}
MAX_QUERY_PIECES = 103  # with BOS at most 104 tokens
MAX_REFERENCE_PIECES = 31  # with EOS at most 32: a policy that may write 32 tokens can say all of it
COVERAGES = ("full", "no_reaction", "no_question", "vague")


@dataclass(frozen=True)
class TinyPost:
    """One row of the TL;DR data, with its truth. `summary` is the author's own: the SFT reference."""

    id: str
    subreddit: str
    title: str
    post: str
    summary: str
    facts: Facts


@lru_cache(maxsize=4096)
def make_post(split: str, index: int, pick: Pick = by_habit) -> TinyPost:
    """Returns post number `index` of a split: always the same one. `pick` chooses how its summary is worded."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not in the tiny world: choose one of {', '.join(SPLITS)}")
    if not 0 <= index < 1_000_000:
        raise ValueError(f"index {index} of split {split!r} is out of range: ids have six digits")
    rng = seeded(f"post:{split}", index)
    while True:
        facts = draw_facts(rng)
        if owner(facts) != SPLITS[split]:
            continue
        title, post = write_title(facts, rng), write_post(facts, rng)
        if count_pieces(format_query(facts.subreddit, title, post)) <= MAX_QUERY_PIECES:
            break
    summary = write_reference(facts, title, rng, pick)
    return TinyPost(f"tiny-{split}-{index:06d}", facts.subreddit, title, post, summary, facts)


def seeded(kind: str, index: int) -> random.Random:
    """A generator that depends on nothing but its name and number (Python hashes the string with SHA-512)."""
    return random.Random(f"{WORLD_VERSION}:{kind}:{index}")


def owner(facts: Facts) -> str:
    """The one of train, valid and test that these five facts belong to."""
    key = f"{facts.who} {facts.act} {facts.obj} {facts.rea} {facts.q}"
    return {0: "valid", 1: "test"}.get(zlib.crc32(key.encode()) % 8, "train")


def write_reference(facts: Facts, title: str, rng: random.Random, pick: Pick = by_habit) -> str:
    """An author's TL;DR, good or bad as on Reddit: 6 % the title, 6 % clickbait, 8 % verbose, 80 % a true summary.

    Only a third of the true ones name all five facts. That is the room PPO has to improve on the references.
    """
    kind = rng.random()
    while True:
        if kind < 0.06:
            text = title
        elif kind < 0.12:
            text = rng.choice(CLICKBAIT)
        elif kind < 0.20:
            text = write_verbose(facts, rng, pick)
        else:
            text = write_summary(facts, rng, rng.choices(COVERAGES, weights=(34, 24, 22, 20))[0], pick)
        if count_pieces(text) <= MAX_REFERENCE_PIECES:
            return text


def facts_from_id(post_id: str) -> Facts:
    """The truth behind a post, from its id alone."""
    parts = post_id.split("-")
    if len(parts) != 3 or parts[0] != "tiny" or not parts[2].isdigit():
        raise ValueError(f"post id {post_id!r} is not of the tiny world: expected something like tiny-valid-000123")
    return make_post(parts[1], int(parts[2])).facts
