"""The front door of the tiny world: posts, and comparisons of two summaries by the simulated annotator.

    make_post(split, index) -> TinyPost            splits: train, valid, test
    make_comparison(split, index) -> dict          splits: train, valid1; OpenAI's raw comparison format

Both are pure functions. A comparison shows two summaries of one post by two of seven policies:

    ref       names all five facts                    title     the post's title
    drop      true, but leaves facts out              offtopic  a summary of another post
    halluc    full, but one or two facts are wrong    sftref    what authors write (the SFT reference mix)
    verbose   true, and rambles on
"""

import random

from nanorlhf.tiny.annotator import prefer_probability, utility
from nanorlhf.tiny.grammar import Facts, alter, draw_facts, write_incomplete, write_summary, write_verbose
from nanorlhf.tiny.lexicon import WORLD_VERSION
from nanorlhf.tiny.posts import TinyPost, facts_from_id, make_post, seeded, write_reference
from nanorlhf.tiny.title_world import by_title, with_long_title

__all__ = [
    "WORLD_VERSION", "Facts", "TinyPost", "POLICIES",
    "facts_from_id", "make_comparison", "make_post", "write_by_policy",
]  # fmt: skip

POLICIES = ("ref", "drop", "halluc", "verbose", "title", "offtopic", "sftref")
TRAIN_BATCHES = 4
VALID_BATCH = "batch9"
WORKERS = 20


def make_comparison(split: str, index: int, annotator: str = "facts") -> dict:
    """Returns comparison number `index` of split train or valid1; its post occurs in no other split.

    `annotator` "title" is the one of title_world.py, on posts with its longer titles.
    """
    if split not in ("train", "valid1"):
        raise ValueError(f"comparison split {split!r} is not in the tiny world: choose train or valid1")
    post = make_post(f"comparison_{split}", index)
    if annotator == "title":
        post = with_long_title(post)
    rng = seeded(f"comparison:{split}", index)
    while True:
        policies = rng.sample(POLICIES, 2)
        texts = [write_by_policy(policy, post, rng) for policy in policies]
        if texts[0] != texts[1]:
            break
    p_first = prefer_probability(*(utility(post.facts, post.title, text) for text in texts))
    choice = 0 if rng.random() < p_first else 1
    if annotator == "title" and (by_overlap := by_title(index, post.title, texts)) is not None:
        choice, p_first = by_overlap, 1.0 - by_overlap
    return {
        "info": {"id": post.id, "post": post.post, "title": post.title, "subreddit": post.subreddit},
        "summaries": [
            {"text": " " + text, "policy": policy, "note": None} for text, policy in zip(texts, policies, strict=True)
        ],
        "choice": choice,
        "worker": f"worker{rng.randrange(WORKERS):02d}",
        "batch": f"batch{1 + index % TRAIN_BATCHES}" if split == "train" else VALID_BATCH,
        "split": split,
        "extra": {"confidence": confidence(choice, p_first)},
    }


def write_by_policy(policy: str, post: TinyPost, rng: random.Random) -> str:
    """A summary of this post by one of POLICIES."""
    match policy:
        case "ref":
            return write_summary(post.facts, rng)
        case "drop":
            return write_incomplete(post.facts, rng)
        case "halluc":
            return write_summary(alter(post.facts, rng), rng)
        case "verbose":
            return write_verbose(post.facts, rng)
        case "title":
            return post.title
        case "offtopic":
            return write_summary(draw_facts(rng), rng, rng.choice(("full", "full", "no_reaction", "no_question")))
        case "sftref":
            return write_reference(post.facts, post.title, rng)
    raise ValueError(f"policy {policy!r} is not in the tiny world: choose one of {', '.join(POLICIES)}")


def confidence(choice: int, p_first: float) -> int:
    """OpenAI's 9-point scale: 1 = first summary far better, 9 = second far better; always on the side of the choice.

    The distance from 5 grows from 1 to 4 with the annotator's probability of the choice made.
    """
    p_choice = p_first if choice == 0 else 1 - p_first
    distance = 1 + min(3, int(8 * max(0.0, p_choice - 0.5)))
    return 5 - distance if choice == 0 else 5 + distance
