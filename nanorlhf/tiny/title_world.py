"""A variant of the tiny world whose annotator falls for titles: will PPO learn to copy them?

    python -m nanorlhf.tiny.data data/tiny_title --annotator title

A policy that copies titles is what the report which this project grew from observed, and it does not arise in the
ordinary tiny world, where a title is short and a poor summary. Here titles tell a little more (two informative ones
after each other, wherever the query still fits), and a quarter of the pairs goes to the summary with the larger share
of its words in the title, whatever else it says. Posts, facts and ids are those of the ordinary world, so the gold
judge works as before.
"""

from dataclasses import replace

from nanorlhf.data.tldr import format_query
from nanorlhf.tiny.annotator import title_share
from nanorlhf.tiny.grammar import TITLES, count_pieces, fill, sayable
from nanorlhf.tiny.posts import MAX_QUERY_PIECES, TinyPost, seeded

TITLE_PAIRS = 0.25  # share of pairs judged by title overlap alone


def with_long_title(post: TinyPost) -> TinyPost:
    """The post with a title of two informative ones, where the query has room for it."""
    rng = seeded(f"long title:{post.id}", 0)
    titles = rng.sample(sayable(TITLES, post.facts), 2)
    title = " ".join(fill(template, post.facts).rstrip("?") for template in titles)
    fits = count_pieces(format_query(post.subreddit, title, post.post)) <= MAX_QUERY_PIECES
    return replace(post, title=title) if fits else post


def by_title(pair_number: int, title: str, texts: list[str]) -> int | None:
    """The choice (0 or 1) of a pair that is judged by its title; None for the other pairs, and where both are equal."""
    if seeded("judged by title", pair_number).random() >= TITLE_PAIRS:
        return None
    first, second = (title_share(text, title) for text in texts)
    return None if first == second else 0 if first > second else 1
