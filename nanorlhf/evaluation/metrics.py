"""Numbers about summaries: overlap with a reference, copying, diversity, and win rates with their intervals.

Everything is a pure function of texts or numbers. Words are lower-cased runs of [a-z0-9]+, as ROUGE counts them. A
figure that is not defined for one text (title copying without a title) is nan, so that a mean over posts can leave it
out; a figure of no texts at all is a ValueError. What is a textbook's comes from rouge_score, rapidfuzz and scipy
(docs/libraries.md); scipy.stats is imported where it is used, because it takes half a second.
"""

import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from nanorlhf.data.cores import over_cores

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
RIDGE = 1e-3  # of the logistic regression; see `_fit_logistic`


def words(text: str) -> list[str]:
    """Lower-cased [a-z0-9]+ runs: the words of ROUGE without a stemmer."""
    return re.findall(r"[a-z0-9]+", text.lower())


def is_empty(text: str) -> bool:
    """Whether a text has no letter and no digit of any alphabet."""
    return not any(c.isalnum() for c in text)


def without_words(texts: Sequence[str]) -> str | None:
    """A warning with the number of texts that say something and have no `words`: in Chinese, Greek or Arabic."""
    count = sum(not words(text) and not is_empty(text) for text in texts)
    of = f"warning {count:,} of {len(texts):,} texts have no Latin letter and no digit"
    return f"{of}: ROUGE is 0 for them, and they count as 0 words" if count else None


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


# --- against a text ---------------------------------------------------------------------------------------------------


def rouge(
    predictions: Sequence[str], references: Sequence[str], stemmer: bool = False, progress=None
) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L (N+ section 5.5: without a stemmer; one adds 0.01 to 0.02).

    -> {"rouge1", "rouge2", "rougeL"}, 0 to 1. An empty prediction scores 0. Thousands of texts go over all cores.
    """
    _same_length(predictions=predictions, references=references)
    items = list(zip(predictions, references, strict=True))
    walk = {"progress": progress} if progress else {}
    rows = over_cores(rouge_rows_stemmed if stemmer else rouge_rows, items, what="ROUGE", **walk)
    return dict(zip(ROUGE_NAMES, np.mean(rows, axis=0).tolist(), strict=True))


def rouge_rows(pairs: Sequence[tuple[str, str]], stemmer: bool = False) -> list[tuple[float, float, float]]:
    """F-measures (ROUGE-1, ROUGE-2, ROUGE-L) of each (prediction, reference)."""
    from rouge_score.rouge_scorer import RougeScorer  # here: it imports nltk, which every script would wait for

    scorer = RougeScorer(ROUGE_NAMES, use_stemmer=stemmer)
    rows = (scorer.score(reference, prediction) for prediction, reference in pairs)
    return [tuple(row[name].fmeasure for name in ROUGE_NAMES) for row in rows]


def rouge_rows_stemmed(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, float, float]]:
    return rouge_rows(pairs, stemmer=True)


def title_copy(summary: str, title: str) -> float:
    """Longest common subsequence of words over the title's words: 1 when the whole title stands in the summary, in
    order, perhaps with gaps. nan for a title without words."""
    in_title = words(title)
    return LCSseq.similarity(words(summary), in_title) / len(in_title) if in_title else float("nan")


def copied_ngrams(summary: str, source: str, n: int = 4) -> float:
    """Share of the summary's n-grams that occur in the source; nan for a summary of fewer than n words."""
    mine, theirs = ngrams(words(summary), n), set(ngrams(words(source), n))
    return sum(gram in theirs for gram in mine) / len(mine) if mine else float("nan")


def repetition(text: str, n: int = 2) -> float:
    """Share of the text's n-grams that stood in it before: 0 where nothing repeats; nan for fewer than n words."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


# --- of a set of texts ------------------------------------------------------------------------------------------------


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams over all n-grams of the texts together (Li et al. 2016). It falls with the number of texts, so
    compare equal numbers. nan when no text has n words."""
    _same_length(texts=texts)
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def mean_pairwise_edit_distance(texts: Sequence[str]) -> float:
    """Mean over all pairs of texts of Levenshtein's distance in words (the fewest insertions, deletions and
    replacements that turn one into the other) over the longer text's words. 0: all are equal, 1: no word is kept."""
    if len(texts) < 2:
        raise ValueError(f"texts: got {len(texts)}, expected at least two to compare")
    distances = [Levenshtein.normalized_distance(a, b) for a, b in combinations(map(words, texts), 2)]
    return sum(distances) / len(distances)


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not nan; nan when all are."""
    numbers = _numbers(values, nan_is_fine=True)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if len(numbers) else float("nan")


# --- win rates and their intervals ------------------------------------------------------------------------------------


def win_rate(wins: int, ties: int, losses: int) -> float:
    """(wins + ties / 2) / all."""
    n = wins + ties + losses
    if n <= 0 or min(wins, ties, losses) < 0:
        raise ValueError(
            f"wins, ties, losses: got {wins}, {ties}, {losses}, expected counts of at least one comparison"
        )
    return (wins + ties / 2) / n


def bootstrap_interval(
    outcomes: Sequence[float], seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, drawing posts with replacement (Efron 1979).

    An outcome is what one post contributes: 1, 0.5 or 0 of a win rate, or any number of a mean. As both summaries of a
    pair belong to the same post, the pair is drawn as one. The interval knows the noise of posts and of sampling, not
    that of training: for that, train several seeds. When all outcomes are equal it has no width, however few they are.
    """
    return _bootstrap([_numbers(outcomes)], np.mean, resamples, seed, level)


def seed_interval(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of a mean over seeds (Student 1908): t sd / sqrt(n); nan for one seed."""
    if len(values) < 2:
        return float("nan")
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values)))


def accuracy_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the proportion correct / n (Wilson 1927): within [0, 1], with some width even at 0."""
    from scipy.stats import binomtest

    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"correct, n: got {correct}, {n}, expected 0 <= correct <= n and n at least 1")
    low, high = binomtest(correct, n).proportion_ci(_level(level), method="wilson")
    return float(low), float(high)


def win_rate_by_length(
    outcomes: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float], bins: int = 10
) -> list[dict[str, float | int | None]]:
    """The win rate in `bins` equal steps of ln(length / other length), from the smallest to the largest there is.

    -> [{"low", "high", "n", "rate"}]; the rate of an empty bin is None, not 0 (which would pull a curve down, as in N+
    section 5.3).
    """
    y, x = _length_regression(outcomes, lengths, other_lengths)
    edges = np.linspace(x.min(), x.max() if x.max() > x.min() else x.min() + 1e-9, bins + 1)
    which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    sums = np.bincount(which, weights=y, minlength=bins)
    return [
        {"low": float(edges[i]), "high": float(edges[i + 1]), "n": int(counts[i]),
         "rate": float(sums[i] / counts[i]) if counts[i] else None}
        for i in range(bins)
    ]  # fmt: skip


def length_controlled_win_rate(
    outcomes: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float]
) -> float:
    """The win rate if both summaries were equally long (N+ section 5.3, on rows instead of on ten bins).

    P(win) = sigmoid(a + b * ln(length / other length)), fitted to all rows; returned: sigmoid(a), that at ratio 1.

    args: outcomes (n,) 1, 0.5 or 0, a tie being half a win and half a loss; lengths, other_lengths (n,) in words or in
    tokens; a text of length 0 counts as 1. Where all ratios lie on one side of 1, the answer is an extrapolation.
    """
    return float(_sigmoid(length_fit(outcomes, lengths, other_lengths)[0]))


def length_fit(
    outcomes: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float]
) -> tuple[float, float]:
    """(a, b) of `length_controlled_win_rate`: log-odds at equal length, and their change a unit of ln(length ratio)."""
    y, x = _length_regression(outcomes, lengths, other_lengths)
    a, b = _fit_logistic(x[None], y[None])[0]
    return float(a), float(b)


def length_controlled_interval(
    outcomes: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float], seed: int, level: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float]:  # fmt: skip
    """Percentile bootstrap interval of `length_controlled_win_rate`, fitted again on each resample of posts."""
    y, x = _length_regression(outcomes, lengths, other_lengths)

    def at_equal_length(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        """(..., n) each -> (...)"""
        n = x.shape[-1]
        return _sigmoid(_fit_logistic(x.reshape(-1, n), y.reshape(-1, n))[:, 0]).reshape(x.shape[:-1])

    return _bootstrap([x, y], at_equal_length, resamples, seed, level)


def _length_regression(outcomes, lengths, other_lengths) -> tuple[np.ndarray, np.ndarray]:
    _same_length(outcomes=outcomes, lengths=lengths, other_lengths=other_lengths)
    y, mine, other = _numbers(outcomes), _numbers(lengths), _numbers(other_lengths)
    if min(mine.min(), other.min()) < 0:
        raise ValueError(f"lengths: got {min(mine.min(), other.min())}, expected 0 or more")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"outcomes: got values from {y.min()} to {y.max()}, expected 0 (loss) to 1 (win)")
    return y, np.log(np.maximum(mine, 1) / np.maximum(other, 1))


def _fit_logistic(x: np.ndarray, y: np.ndarray, steps: int = 200) -> np.ndarray:
    """(intercept, slope) of a logistic regression of each of S data sets, by Newton's method. x, y (S, n) -> (S, 2).

    Minimises sum(-y log p - (1-y) log(1-p)) + RIDGE/2 * (a^2 + b^2), p = sigmoid(a + b x). Without the ridge only wins,
    or wins that a length separates perfectly from losses, would have no finite answer; elsewhere it is too weak to see.
    A step is shortened until no log-odds moves by more than 1: within that the curvature changes by less than a factor
    of e, so every step goes down and Newton cannot overshoot.
    """
    a, b = np.zeros(len(x)), np.zeros(len(x))
    for _ in range(steps):
        p = _sigmoid(a[:, None] + b[:, None] * x)
        error, weight = y - p, p * (1 - p)
        g_a, g_b = error.sum(1) - RIDGE * a, (error * x).sum(1) - RIDGE * b
        h_aa, h_ab, h_bb = weight.sum(1) + RIDGE, (weight * x).sum(1), (weight * x * x).sum(1) + RIDGE
        determinant = h_aa * h_bb - h_ab**2
        step_a, step_b = (h_bb * g_a - h_ab * g_b) / determinant, (h_aa * g_b - h_ab * g_a) / determinant
        largest = np.abs(step_a[:, None] + step_b[:, None] * x).max(1)
        a, b = a + step_a / np.maximum(largest, 1), b + step_b / np.maximum(largest, 1)
        if largest.max() < 1e-9:
            break
    return np.stack([a, b], axis=1)


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))  # no overflow


def _bootstrap(
    columns: list[np.ndarray], statistic: Callable, resamples: int, seed: int, level: float
) -> tuple[float, float]:
    """Percentile interval of `statistic` over resamples of rows. columns: (n,) each; one row of them is drawn as one."""
    from scipy.stats import bootstrap

    n, level = len(columns[0]), _level(level)
    if n == 1:  # scipy wants two; every resample of one row is that row
        return (float(statistic(*columns, axis=-1)),) * 2
    found = bootstrap(
        columns, statistic, paired=len(columns) > 1, vectorized=True, method="percentile", n_resamples=resamples,
        confidence_level=level, batch=max(1, 1_000_000 // n), rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = found.confidence_interval
    return float(low), float(high)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number between 0 and 1, such as 0.95")
    return level


def _numbers(values: Sequence[float], nan_is_fine: bool = False) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("values: got none, expected at least one")
    if not nan_is_fine and not np.isfinite(numbers).all():
        raise ValueError(f"values: got {int((~np.isfinite(numbers)).sum())} that are not finite, expected numbers")
    return numbers


def _same_length(**lists: Sequence) -> None:
    sizes = {name: len(items) for name, items in lists.items()}
    if 0 in sizes.values() or len(set(sizes.values())) > 1:
        got = ", ".join(map(str, sizes.values()))
        raise ValueError(f"{', '.join(sizes)}: got {got} of them, expected at least one and equally many")
