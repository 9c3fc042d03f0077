"""Metrics against hand counts, brute force and simulations with a known answer."""

import math
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest

from nanorlhf.evaluation.metrics import (
    RIDGE,
    ROUGE_NAMES,
    _fit_logistic,
    accuracy_interval,
    bootstrap_interval,
    copied_ngrams,
    distinct_n,
    is_empty,
    length_controlled_interval,
    length_controlled_win_rate,
    length_fit,
    mean,
    mean_pairwise_edit_distance,
    repetition,
    rouge,
    seed_interval,
    title_copy,
    win_rate,
    win_rate_by_length,
    without_words,
    words,
)

# -- against a text


def test_rouge_has_no_stemmer():
    scores = rouge(["the cats sat"], ["the cat sat"])
    assert scores["rougeL"] == pytest.approx(2 / 3)  # 1 would mean that "cats" was stemmed
    assert scores["rouge1"] == pytest.approx(2 / 3)
    assert scores["rouge2"] == 0.0


def test_rouge_is_the_mean_of_the_rows_f_measures():
    scores = rouge(["a b", "x"], ["a b c d", "y"])
    first = 2 * 1.0 * 0.5 / 1.5  # precision 1, recall 1/2
    assert scores["rouge1"] == pytest.approx((first + 0) / 2)  # the second row has nothing in common


def test_rouge_of_an_empty_prediction_is_zero():
    assert rouge(["", "🙂"], ["the cat", "the cat"]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_rouge_of_two_thousand_summaries_takes_seconds():
    text = "my boss broke my laptop and he refuses to pay should i call a lawyer about it now"
    began = time.monotonic()
    rouge([text] * 2000, [text + " or not"] * 2000)
    assert time.monotonic() - began < 8


def test_rouge_equals_the_command_line_of_rouge_score(tmp_path):
    """On hard cases, one text a line: rouge_score.rouge reads files and writes mean scores as CSV."""
    pairs = [
        ("", "the cat sat"), ("My boss left", "My boss left"), ("MY BOSS, left!", "my boss left"), ("🙂", "a 🙂 b"),
        (" ".join(f"w{i}" for i in range(1000)), " ".join(f"w{i}" for i in range(0, 1000, 3))),
        ("running runs quickly", "run ran quick"), ("naïve café", "naive cafe"),
    ]  # fmt: skip
    files = {name: tmp_path / f"{name}.txt" for name in ("prediction", "target")}
    for name, texts in zip(files, zip(*pairs, strict=True), strict=True):
        files[name].write_text("\n".join(texts) + "\n", encoding="utf-8")
    for stemmer in (False, True):
        csv = tmp_path / f"{stemmer}.csv"
        command = ["-m", "rouge_score.rouge", f"--target_filepattern={files['target']}", f"--output_filename={csv}"]
        command += [f"--prediction_filepattern={files['prediction']}", f"--use_stemmer={stemmer}", "--aggregate=false"]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=60)
        rows = [line.split(",") for line in csv.read_text(encoding="utf-8").splitlines()]
        names = rows[0]
        theirs = {name: np.mean([float(row[names.index(f"{name}-F")]) for row in rows[1:]]) for name in ROUGE_NAMES}
        assert rouge(*map(list, zip(*pairs, strict=True)), stemmer=stemmer) == pytest.approx(theirs, abs=1e-6)


def test_a_stemmer_counts_inflections_as_equal():
    assert rouge(["the cats sat"], ["the cat sat"], stemmer=True)["rouge1"] == 1.0


@pytest.mark.parametrize("predictions, references", [([], []), (["a"], ["a", "b"])])
def test_rouge_refuses_no_texts_and_unequal_lists(predictions, references):
    with pytest.raises(ValueError, match="predictions, references: got"):
        rouge(predictions, references)


@pytest.mark.parametrize(
    "summary, title, share",
    [
        ("My boss, BROKE my laptop!", "my boss broke my laptop", 1.0),  # case and marks do not count
        ("my boss never broke a laptop", "my boss broke my laptop", 4 / 5),  # gaps in the summary are fine
        ("laptop boss", "boss laptop", 1 / 2),  # the order counts
        ("A B C B D A B", "b d c a b a", 4 / 6),  # the textbook's common subsequence
        ("", "boss laptop", 0.0),
        ("something else", "boss laptop", 0.0),
    ],
)
def test_title_copy_by_hand(summary, title, share):
    assert title_copy(summary, title) == pytest.approx(share)


def test_title_copy_without_a_title_is_nan():
    assert math.isnan(title_copy("a summary", " ?! "))


def test_copied_ngrams_by_hand():
    post = "yesterday my boss broke my laptop at work"
    assert copied_ngrams("My boss broke my laptop and left", post) == pytest.approx(2 / 4)
    assert math.isnan(copied_ngrams("my boss broke", post))


def test_repetition_by_hand():
    assert repetition("a b a b a") == pytest.approx(2 / 4)  # ab ba ab ba
    assert repetition("all words differ here") == 0.0
    assert math.isnan(repetition("one"))


def test_title_copy_and_edit_distance_agree_with_the_definition():
    """The recursion of the textbook, without a table, on random words; several of one letter and of more."""

    @cache
    def lcs(a, b):
        if not a or not b:
            return 0
        return lcs(a[1:], b[1:]) + 1 if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))

    @cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(1)
    for _ in range(150):
        a, b = (tuple(rng.choice(["a", "b", "boss", "laptop"], size=rng.integers(0, 8)).tolist()) for _ in range(2))
        texts = " ".join(a), " ".join(b)
        assert title_copy(*texts) == pytest.approx(lcs(a, b) / len(b) if b else math.nan, abs=1e-12, nan_ok=True)
        assert mean_pairwise_edit_distance(texts) == pytest.approx(distance(a, b) / max(len(a), len(b), 1), abs=1e-12)


# -- of a set of texts


def test_distinct_2_by_hand():
    assert distinct_n(["a b c", "a b d"]) == pytest.approx(3 / 4)  # ab, bc, bd of ab, bc, ab, bd
    assert math.isnan(distinct_n(["a", ""]))
    with pytest.raises(ValueError):
        distinct_n([])


def test_mean_pairwise_edit_distance_by_hand():
    assert mean_pairwise_edit_distance(["a b", "a b", "a c d"]) == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)
    assert mean_pairwise_edit_distance(["k i t t e n", "s i t t i n g"]) == pytest.approx(3 / 7)  # the textbook's
    assert mean_pairwise_edit_distance(["", ""]) == 0.0 and mean_pairwise_edit_distance(["", "a b"]) == 1.0
    with pytest.raises(ValueError, match="at least two"):
        mean_pairwise_edit_distance(["a"])


def test_mean_leaves_nan_out():
    assert mean([1.0, float("nan"), 3.0]) == 2.0
    assert math.isnan(mean([float("nan")]))
    with pytest.raises(ValueError):
        mean([])


def test_words_are_lower_cased_letters_and_digits():
    assert words("I'm 24F – naïve!") == ["i", "m", "24f", "na", "ve"]


# -- win rates


def test_a_tie_is_half_a_win():
    assert win_rate(3, 2, 5) == 0.4
    assert win_rate(0, 7, 0) == 0.5


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 2, 3)])
def test_win_rate_refuses_counts_of_nothing(counts):
    with pytest.raises(ValueError, match="wins, ties, losses"):
        win_rate(*counts)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, trials = 0.6 + 0.1 / 2, 300
    hits = 0
    for trial in range(trials):
        low, high = bootstrap_interval(
            rng.choice([1.0, 0.5, 0.0], p=[0.6, 0.1, 0.3], size=150), seed=trial, level=0.9, resamples=400
        )
        hits += low <= truth <= high
    assert 0.85 <= hits / trials <= 0.95  # 0.9, standard error 0.017


def test_the_bootstrap_interval_is_that_of_the_normal_approximation():
    outcomes = [1.0] * 300 + [0.0] * 200
    low, high = bootstrap_interval(outcomes, seed=0)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 500)
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.006)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    outcomes = np.random.default_rng(1).random(100)
    assert (
        bootstrap_interval(outcomes, seed=1)
        == bootstrap_interval(outcomes, seed=1)
        != bootstrap_interval(outcomes, seed=2)
    )


def test_always_tie_is_one_half_with_an_interval_of_no_width():
    assert bootstrap_interval([0.5] * 40, seed=0) == (0.5, 0.5)


@pytest.mark.parametrize("values, said", [([], "got none"), ([0.5, float("nan")], "not finite")])
def test_the_bootstrap_refuses_nothing_and_nan(values, said):
    with pytest.raises(ValueError, match=said):
        bootstrap_interval(values, seed=0)


def test_an_interval_of_one_post_has_no_width():
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)
    low, high = length_controlled_interval([1.0], [5], [7], seed=0)
    assert low == high == pytest.approx(length_controlled_win_rate([1.0], [5], [7]), abs=1e-12)


def test_the_intervals_are_percentiles_over_resamples_of_posts():
    """Drawn again here, a post with its lengths as one, by the same random numbers."""
    rng = np.random.default_rng(4)
    outcomes, lengths, others = rng.choice([1.0, 0.5, 0.0], size=30), rng.integers(1, 40, 30), rng.integers(1, 40, 30)
    drawn = np.random.default_rng(7).integers(30, size=(200, 30))
    rates = [length_controlled_win_rate(outcomes[i], lengths[i], others[i]) for i in drawn]
    low_high = length_controlled_interval(outcomes, lengths, others, seed=7, level=0.9, resamples=200)
    assert low_high == pytest.approx(np.quantile(rates, [0.05, 0.95]), abs=1e-9)
    low_high = bootstrap_interval(outcomes, seed=7, level=0.9, resamples=200)
    assert low_high == pytest.approx(np.quantile(outcomes[drawn].mean(1), [0.05, 0.95]), abs=1e-12)


def test_a_level_in_percent_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval([1.0], seed=0, level=95)


def test_the_interval_over_seeds_covers_the_truth_19_times_in_20():
    generator = np.random.default_rng(0)
    draws = generator.normal(3.0, 2.0, (4000, 3))
    covered = np.mean([abs(row.mean() - 3.0) <= seed_interval(row) for row in draws])
    assert covered == pytest.approx(0.95, abs=0.015)
    assert np.isnan(seed_interval([1.0])) and seed_interval([1.0, 3.0]) == pytest.approx(
        12.706, abs=1e-3
    )  # t sd / sqrt 2
    eleven = np.arange(11.0)  # the printed table: t 2.228 at 10 degrees of freedom, where the normal has 1.960
    assert seed_interval(eleven) == pytest.approx(2.228 * np.std(eleven, ddof=1) / np.sqrt(11), rel=3e-4)
    assert seed_interval([0.0, 1.0] * 50) == pytest.approx(1.984 * np.std([0, 1] * 50, ddof=1) / 10, rel=1e-3)


def test_the_accuracy_interval_is_wilsons():
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3
    assert accuracy_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = accuracy_interval(20, 20)
    assert 0.8 < low < 0.9 and high == 1.0
    with pytest.raises(ValueError):
        accuracy_interval(3, 2)


# -- length control


def planted(n: int, intercept: float, slope: float, seed: int):
    """Outcomes that follow sigmoid(intercept + slope * log ratio) exactly, of summaries that are mostly longer."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(10, 60, size=n), rng.integers(8, 30, size=n)
    p = 1 / (1 + np.exp(-(intercept + slope * np.log(lengths / others))))
    return (rng.random(n) < p).astype(float), lengths, others


def test_length_control_recovers_a_planted_effect():
    outcomes, lengths, others = planted(40_000, intercept=0.3, slope=1.5, seed=0)
    assert outcomes.mean() > 0.7  # the raw win rate is mostly length
    assert length_controlled_win_rate(outcomes, lengths, others) == pytest.approx(1 / (1 + math.exp(-0.3)), abs=0.01)


def test_win_rates_by_length_by_hand_with_an_empty_bin():
    """Log ratios 0, 0, ln 2, ln 8 in three bins of ln 2: two rows, one, and one in the last."""
    rows = win_rate_by_length([1, 0, 0.5, 1], [5, 5, 10, 40], [5, 5, 5, 5], bins=3)
    assert [(row["n"], row["rate"]) for row in rows] == [(2, 0.5), (1, 0.5), (1, 1.0)]
    rows = win_rate_by_length([1, 0], [5, 40], [5, 5], bins=4)
    assert [row["rate"] for row in rows] == [1.0, None, None, 0.0]  # empty is not 0
    assert rows[0]["low"] == 0.0 and rows[-1]["high"] == pytest.approx(math.log(8))
    assert sum(row["n"] for row in win_rate_by_length([1, 0, 1], [5] * 3, [5] * 3)) == 3  # all equally long


def test_the_fit_is_the_curve_whose_value_at_0_is_the_length_controlled_rate():
    outcomes, lengths, others = planted(20_000, intercept=0.3, slope=1.5, seed=5)
    a, b = length_fit(outcomes, lengths, others)
    assert (a, b) == pytest.approx((0.3, 1.5), abs=0.08)
    assert length_controlled_win_rate(outcomes, lengths, others) == pytest.approx(1 / (1 + math.exp(-a)))


def test_length_control_solves_the_likelihood_equations():
    """The best fit, found by a search that knows no derivative."""
    outcomes, lengths, others = planted(60, intercept=-0.4, slope=0.8, seed=3)
    outcomes[:5] = 0.5
    x = np.log(lengths / others)

    def loss(a, b):
        z = a + b * x
        return np.sum(np.logaddexp(0, z) - outcomes * z)

    grid = np.linspace(-2, 2, 401)
    a = grid[np.argmin([min(loss(a, b) for b in np.linspace(-1, 3, 201)) for a in grid])]
    assert length_controlled_win_rate(outcomes, lengths, others) == pytest.approx(1 / (1 + math.exp(-a)), abs=0.006)


def test_length_control_of_always_tie_is_one_half():
    assert length_controlled_win_rate([0.5] * 30, range(30), [7] * 30) == pytest.approx(0.5, abs=1e-12)


def test_a_tie_weighs_half_to_both_sides():
    """One row of 0.5, twice, is one win and one loss."""
    ties = length_controlled_win_rate([0.5, 0.5, 1, 0, 1], [9, 9, 20, 8, 5], [12, 12, 10, 16, 5])
    split = length_controlled_win_rate([1, 0, 1, 0, 1], [9, 9, 20, 8, 5], [12, 12, 10, 16, 5])
    assert ties == pytest.approx(split, abs=1e-12)


@pytest.mark.parametrize("slope_sign", [1, -1])
def test_lengths_that_separate_wins_from_losses_have_a_finite_answer(slope_sign):
    lengths = np.array([4, 5, 6, 20, 30, 40])
    outcomes = (slope_sign * np.log(lengths / 10) > 0).astype(float)
    assert 0.05 < length_controlled_win_rate(outcomes, lengths, [10] * 6) < 0.95


def test_newtons_method_does_not_overshoot():
    """81 wins and a tie: full steps leap from side to side here and never arrive."""
    rows = [(1.0, 12, 10)] * 3 + [(1.0, 10, 12)] * 42 + [(1.0, 330, 10)] * 36 + [(0.5, 58, 100)]
    outcomes, lengths, others = map(np.array, zip(*rows, strict=True))
    x = np.log(lengths / others)
    a, b = _fit_logistic(x[None], outcomes[None])[0]
    residuals = outcomes - 1 / (1 + np.exp(-(a + b * x)))
    assert residuals.sum() == pytest.approx(RIDGE * a, abs=1e-9)
    assert (residuals * x).sum() == pytest.approx(RIDGE * b, abs=1e-9)


def test_only_wins_is_nearly_one_and_only_losses_nearly_zero():
    assert 0.999 < length_controlled_win_rate([1.0] * 100, [10, 20] * 50, [15] * 100) < 1
    assert 0 < length_controlled_win_rate([0.0] * 100, [10, 20] * 50, [15] * 100) < 0.001


def test_at_equal_lengths_length_control_changes_nothing():
    assert length_controlled_win_rate([1, 1, 1, 0], [5] * 4, [5] * 4) == pytest.approx(0.75, abs=1e-3)


def test_an_empty_summary_counts_as_one_word():
    a = length_controlled_win_rate([1, 0, 1, 0], [0, 5, 9, 7], [5, 5, 5, 5])
    assert a == length_controlled_win_rate([1, 0, 1, 0], [1, 5, 9, 7], [5, 5, 5, 5])


def test_the_length_controlled_interval_covers_the_planted_value():
    truth = 1 / (1 + math.exp(-0.3))
    hits = 0
    for trial in range(60):
        outcomes, lengths, others = planted(200, intercept=0.3, slope=1.5, seed=100 + trial)
        low, high = length_controlled_interval(outcomes, lengths, others, seed=trial, resamples=200)
        hits += low <= truth <= high
    assert hits >= 52  # 95 % of 60 is 57, standard error 1.7


@pytest.mark.parametrize("outcomes, lengths", [([1.0], [1, 2]), ([], []), ([2.0, 0.0], [1, 2]), ([1.0, 0.0], [-1, 2])])
def test_length_control_refuses_what_makes_no_sense(outcomes, lengths):
    with pytest.raises(ValueError):
        length_controlled_win_rate(outcomes, lengths, lengths)


def test_texts_of_other_alphabets_are_counted_and_are_not_empty():
    assert without_words(["a", "", "...", "5"]) is None
    assert without_words(["你好", "привет", "hi", ""]).startswith(
        "warning 2 of 4 texts have no Latin letter and no digit"
    )
    assert [is_empty(text) for text in ("你好", "a", "?!", " ")] == [False, False, True, True]
