"""A reward model's report card: how often it agrees with people, on what, how sure it is, and what it falls for.

    card(comparisons, chosen, rejected)     accuracy overall and by kind of pair, calibration, length, the worst pairs
    examples(posts)                         sets of summaries whose order is known: quality, length, nonsense

Everything is a pure function of texts and scores. Accuracies are strict (equal scores are an error, N+ detail 10) and
carry Wilson's 95% interval.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from nanorlhf.data.tldr import Comparison, Post
from nanorlhf.evaluation.hacks import correlation
from nanorlhf.evaluation.metrics import accuracy_interval, win_rate, words

LENGTH_GAPS = (  # (at most so many words, in words): chosen minus rejected
    (-11, "chosen shorter by over 10"), (-6, "shorter by 6 to 10"), (-1, "shorter by 1 to 5"), (0, "equal"),
    (5, "longer by 1 to 5"), (10, "longer by 6 to 10"), (math.inf, "longer by over 10"),
)  # fmt: skip
# distance from 5 on OpenAI's scale -> what it means
CONFIDENCE = {0: "0 undecided", 1: "1 slightly", 2: "2 somewhat", 3: "3 clearly", 4: "4 far better"}
WORST = 10
BINS = 10


def card(comparisons: Sequence[Comparison], chosen: Sequence[float], rejected: Sequence[float]) -> dict:
    """args: scores of the chosen and of the rejected summary of each comparison -> everything metrics.json keeps."""
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    correct = margins > 0
    gaps = np.array([len(words(c.chosen)) - len(words(c.rejected)) for c in comparisons])
    lengths = [len(words(text)) for c in comparisons for text in (c.chosen, c.rejected)]
    scores = [score for pair in zip(chosen, rejected, strict=True) for score in pair]
    n = len(comparisons)
    found = {"comparisons": n} | _accuracy(correct)
    found["length_baseline"] = win_rate(int((gaps > 0).sum()), int((gaps == 0).sum()), int((gaps < 0).sum()))
    found["length_correlation"] = correlation(lengths, scores)
    kinds = {
        "split": [c.split for c in comparisons],
        "batch": [c.batch for c in comparisons],
        "confidence": [confidence_name(c.confidence) for c in comparisons],
        "policies": [" vs ".join(sorted((c.chosen_policy, c.rejected_policy))) for c in comparisons],
        "length gap, words": [_gap_name(gap) for gap in gaps],
    }
    found["by"] = {kind: _by(values, correct) for kind, values in kinds.items()}
    found["calibration"], found["ece"] = calibration(margins)
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=30)
    found["histogram"] = {"edges": edges.tolist()} | {
        name: np.histogram(values, edges)[0].tolist() for name, values in (("chosen", chosen), ("rejected", rejected))
    }
    worst = np.argsort(margins)[:WORST]
    found["worst"] = [_pair(comparisons[i], chosen[i], rejected[i]) for i in worst if margins[i] <= 0]
    return found


def calibration(margins: Sequence[float], bins: int = BINS) -> tuple[list[dict], float]:
    """Does a margin mean what Bradley-Terry says, sigmoid(|margin|) = P(the higher score is the preferred one)?

    args: margins (n,), score of the preferred summary minus the other's
    -> the bins of confidence from 0.5 to 1 ({"low", "high", "n", "confidence", "accuracy", "interval"}, None where
    empty), and the expected calibration error: mean over pairs of |accuracy - confidence| of their bin (Guo et al.
    2017). With n pairs a perfect model still shows about 0.4 * sqrt(bins / n).
    """
    margins = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    which = np.minimum(((confidence - 0.5) / 0.5 * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for i in range(bins):
        mine = which == i
        row = {"low": 0.5 + 0.5 * i / bins, "high": 0.5 + 0.5 * (i + 1) / bins, "n": int(mine.sum())}
        row |= {"confidence": None, "accuracy": None, "interval": None}
        if row["n"]:
            row |= {"confidence": float(confidence[mine].mean())} | _accuracy(margins[mine] > 0)
            error += row["n"] / len(margins) * abs(row["accuracy"] - row["confidence"])
        rows.append(row)
    return rows, error


def confidence_name(confidence: int | None) -> str:
    """OpenAI's 9-point scale folded: how far from 5, the middle, whichever side was chosen."""
    return "not asked" if confidence is None else CONFIDENCE.get(abs(confidence - 5), "not on the scale")


def _accuracy(correct: np.ndarray) -> dict:
    right, n = int(correct.sum()), len(correct)
    return {"accuracy": right / n, "interval": accuracy_interval(right, n)}


def _by(values: Sequence[str], correct: np.ndarray) -> dict[str, dict]:
    groups = defaultdict(list)
    for value, right in zip(values, correct, strict=True):
        groups[value].append(right)
    return {value: {"n": len(rights)} | _accuracy(np.array(rights)) for value, rights in sorted(groups.items())}


def _gap_name(gap: int) -> str:
    """The bin of a length gap, chosen minus rejected; numbered, so that the bins sort."""
    for number, (most, name) in enumerate(LENGTH_GAPS):
        if gap <= most:
            return f"{number + 1}. {name}"
    raise AssertionError(gap)


def _pair(comparison: Comparison, chosen: float, rejected: float) -> dict:
    return {
        "id": comparison.post.id, "title": comparison.post.title, "post": comparison.post.post,
        "chosen": comparison.chosen.strip(), "rejected": comparison.rejected.strip(),
        "chosen_score": float(chosen), "rejected_score": float(rejected),
        "policies": f"{comparison.chosen_policy} over {comparison.rejected_policy}",
    }  # fmt: skip


# --- sets of example summaries ----------------------------------------------------------------------------------------

PADDING = ("Any advice is welcome.", "Thanks for reading.", "I know this is long.")


def examples(posts: Sequence[Post], seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """{set: {kind: a summary of each post}}: made from the reference, so what should score higher is known.

    quality: the reference, half of it, one of another post. length: the same content with one, two, three sentences
    that say nothing. nonsense: its words shuffled, one word repeated, the title, the post's first sentence, nothing.
    """
    rng = random.Random(seed)
    references = [post.summary.strip() for post in posts]
    others = references[1:] + references[:1]

    def shuffled(text: str) -> str:
        parts = text.split()
        rng.shuffle(parts)
        return " ".join(parts)

    return {
        "quality": {
            "the reference": references,
            "its first half": [" ".join(text.split()[: max(1, len(text.split()) // 2)]) for text in references],
            "of another post": others,
        },
        "length at equal content": {
            "the reference": references,
            **{
                f"and {n} empty sentence{'s' * (n > 1)}": [" ".join([text, *PADDING[:n]]) for text in references]
                for n in range(1, len(PADDING) + 1)
            },
            "the reference twice": [f"{text} {text}" for text in references],
        },
        "nonsense": {
            "its words shuffled": [shuffled(text) for text in references],
            "one word, twelve times": [" ".join(["advice"] * 12) for _ in references],
            "the title": [post.title.strip() for post in posts],
            "the post's first sentence": [post.post.split(". ")[0].strip() for post in posts],
            "nothing": ["" for _ in posts],
        },
    }
