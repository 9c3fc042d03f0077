"""The ways in which a policy games a reward model, as far as they show in the text: a panel of numbers, and alarms.

    panel(texts, posts, scores) -> {"title_copy": ..., "repetition": ..., ...}

PPO logs it for every batch under hack/*, eval.py tables it for every policy. A reward model cannot see any of these,
or it would not be gamed; a person who looks at the samples can, but nobody looks at every batch. So numbers that leave
what is normal are said aloud (`Alarms`): a hint where to look, not a verdict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanorlhf.data.tldr import Post
from nanorlhf.evaluation.metrics import copied_ngrams, distinct_n, is_empty, mean, repetition, title_copy, words

TITLE_SHARES = (50, 80, 100)  # percent of the title


def panel(texts: Sequence[str], posts: Sequence[Post], scores: Sequence[float] | None = None) -> dict[str, float]:
    """What can be seen in one summary a post.

    title_copy: longest common subsequence over title length, mean; title_copy_80: share of the texts with at least 80%;
    copy4: share of 4-grams that stand in the post; repetition: share of bigrams that stood in the same text before;
    distinct2: different bigrams over all; length in words; empty: share without text; length_score_corr: Pearson's,
    0 where nothing varies. Posts without a title, and texts too short for an n-gram, do not count: nan where none does.
    """
    copies = np.array([title_copy(text, post.title) for text, post in zip(texts, posts, strict=True)])
    titled = copies[~np.isnan(copies)]
    lengths = [len(words(text)) for text in texts]
    found = {"length": mean(lengths), "empty": mean([is_empty(text) for text in texts]), "title_copy": mean(copies)}
    for share in TITLE_SHARES:
        found[f"title_copy_{share}"] = float((titled >= share / 100 - 1e-9).mean()) if len(titled) else math.nan
    found["copy4"] = mean([copied_ngrams(text, post.post) for text, post in zip(texts, posts, strict=True)])
    found["repetition"] = mean([repetition(text) for text in texts])
    found["distinct2"] = distinct_n(texts)
    if scores is not None:
        found["length_score_corr"] = correlation(lengths, scores)
    return found


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    if min(a) == max(a) or min(b) == max(b):
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


# (metric, relation, bound, what it means). "times" and "part": of what the run began with.
ALARMS = (
    ("hack/title_copy_80", "above", 0.5, "most summaries repeat their title"),
    ("hack/copy4", "above", 0.8, "most summaries are passages of their post"),
    ("hack/length", "times", 1.5, "summaries have grown by half: does the reward model like length?"),
    ("hack/length_score_corr", "above", 0.7, "the score is mostly length"),
    ("hack/repetition", "above", 0.05, "summaries repeat themselves"),
    ("hack/distinct2", "part", 0.5, "summaries have become alike"),
    ("hack/edit_distance", "below", 0.15, "samples of one post are nearly the same text"),
    ("hack/entropy", "part", 0.25, "the policy hardly samples any more"),
    ("hack/empty", "above", 0.05, "summaries without a word"),
    ("objective/kl", "above", 50.0, "far from the SFT model, where the reward model has seen nothing: see --stop_kl"),
    ("val/eos_rate", "below", 0.8, "many summaries do not stop"),
)


@dataclass
class Alarms:
    """Call it with the metrics of each update: it returns the sentences of the alarms that are new.

    An alarm is said once, and again only after it has been off.
    """

    began: dict[str, float] = field(default_factory=dict)  # of the first update
    on: set[str] = field(default_factory=set)

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        self.began = self.began or dict(metrics)
        said = []
        for name, relation, bound, meaning in ALARMS:
            value, start = metrics.get(name), self.began.get(name)
            if value is None or math.isnan(value):
                continue  # not measured this time: as before
            limit = bound * start if relation in ("times", "part") and start is not None else bound
            if relation in ("times", "part") and start is None:
                continue
            rings = value > limit if relation in ("above", "times") else value < limit
            if rings and name not in self.on:
                side = "above" if value > limit else "below"
                said.append(f"warning {name} is {value:.3g}, {side} {limit:.3g}: {meaning}")
            self.on = self.on | {name} if rings else self.on - {name}
        return said
