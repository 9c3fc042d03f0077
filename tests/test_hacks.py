"""The panel of hacks, by hand and on the hard cases; the alarms."""

import math

import numpy as np
import pytest
import torch

from nanorlhf.data.tldr import Post
from nanorlhf.evaluation import hacks
from nanorlhf.evaluation.hacks import Alarms, panel
from nanorlhf.monitoring import monitor


def post(title: str, text: str = "one two three four five six seven") -> Post:
    return Post("t3_x", "r", title, text, "s")


LONG = " ".join(f"w{i}" for i in range(1000))
# summary, title, post -> title_copy, copy4, repetition, words
HARD_CASES = {
    "empty": ("", "My boss left", "a b c d", (0.0, math.nan, math.nan, 0)),
    "blanks only": (" \n\t ", "My boss left", "a b c d", (0.0, math.nan, math.nan, 0)),
    "equal to the title": ("My boss left", "My boss left", "a b c d", (1.0, math.nan, 0.0, 3)),
    "the title in another case": ("MY BOSS, LEFT!!", "my Boss left", "a b c d", (1.0, math.nan, 0.0, 3)),
    "emoji only": ("🙂🙂 🙂", "🙂 left", "a b c d", (0.0, math.nan, math.nan, 0)),
    "emoji between words": ("my 🙂 boss 🙂 left me 🙂", "my boss left", "my boss left me", (1.0, 1.0, 0.0, 4)),
    "a title of emoji": ("my boss", "🙂", "a b c d", (math.nan, math.nan, 0.0, 2)),
    "a thousand words": (LONG, "w7 w999 w3", LONG, (2 / 3, 1.0, 0.0, 1000)),
    "a thousand times one word": (" ".join(["so"] * 1000), "so what", "so so so so", (0.5, 1.0, 998 / 999, 1000)),
    "a copied passage": ("he said one two three four", "x", "one two three four five", (0.0, 1 / 3, 0.0, 6)),
}


@pytest.mark.parametrize("case", HARD_CASES)
def test_hard_cases_by_hand(case):
    summary, title, text, (title_copy, copy4, repetition, length) = HARD_CASES[case]
    found = panel([summary], [post(title, text)])
    expected = {"title_copy": title_copy, "copy4": copy4, "repetition": repetition, "length": length}
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert found["empty"] == (length == 0)


def test_the_shares_count_posts_with_a_title_and_include_their_bound():
    texts = ["a b c d e", "a b c d x", "a b x x x", "x", "a"]
    titles = ["a b c d e"] * 4 + ["?!"]
    found = panel(texts, [post(title) for title in titles])
    assert [found[f"title_copy_{share}"] for share in hacks.TITLE_SHARES] == [2 / 4, 2 / 4, 1 / 4]
    assert found["title_copy"] == pytest.approx((1 + 0.8 + 0.4 + 0) / 4)
    assert math.isnan(panel(["a"], [post("?!")])["title_copy_50"])


def test_correlation_is_pearsons_and_0_where_nothing_varies():
    a, b = [1.0, 2.0, 4.0], [3.0, 1.0, 5.0]
    assert hacks.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert hacks.correlation(a, [2.0] * 3) == hacks.correlation([1.0] * 3, b) == 0.0
    assert panel(["a", "a b", "a b c"], [post("x")] * 3, [0.1, 0.2, 0.3])["length_score_corr"] == pytest.approx(1)


START = {
    "hack/length": 10.0,
    "hack/entropy": 0.4,
    "hack/distinct2": 0.4,
    "hack/title_copy_80": 0.1,
    "val/eos_rate": 1.0,
}


@pytest.mark.parametrize(
    "metric, silent, rings, said",
    [
        ("hack/length", 15.0, 15.1, "above 15: summaries have grown by half"),
        ("hack/entropy", 0.1, 0.09, "below 0.1: the policy hardly samples any more"),
        ("hack/distinct2", 0.2, 0.19, "below 0.2: summaries have become alike"),
        ("hack/title_copy_80", 0.5, 0.51, "above 0.5: most summaries repeat their title"),
        ("hack/repetition", 0.05, 0.06, "above 0.05: summaries repeat themselves"),
        ("hack/edit_distance", 0.15, 0.14, "below 0.15: samples of one post"),
        ("val/eos_rate", 0.8, 0.7, "below 0.8: many summaries do not stop"),
    ],
)
def test_an_alarm_rings_beyond_its_bound_and_says_the_number_and_the_meaning(metric, silent, rings, said):
    alarms = Alarms()
    assert alarms(START) == []
    assert alarms(START | {metric: silent}) == []
    (sentence,) = alarms(START | {metric: rings})
    assert sentence.startswith(f"warning {metric} is {rings:.3g}, ") and said in sentence


def test_an_alarm_is_said_once_and_again_after_it_has_been_off():
    alarms = Alarms()
    alarms(START)
    long = START | {"hack/length": 20.0}
    assert [len(alarms(metrics)) for metrics in (long, long, START, long)] == [1, 0, 0, 1]


def test_what_is_not_measured_neither_rings_nor_silences():
    alarms = Alarms()
    alarms(START)
    alike = START | {"hack/edit_distance": 0.1}
    assert [len(alarms(metrics)) for metrics in (alike, START, alike)] == [1, 0, 0]
    assert alarms(START | {"hack/repetition": math.nan}) == []


def test_after_a_resume_the_beginning_is_that_of_the_run():
    assert len(Alarms(began=START)(START | {"hack/length": 20.0})) == 1


def test_every_alarm_watches_a_number_that_ppo_logs():
    logged = {f"hack/{name}" for name in panel(["a b"], [post("t")], [0.0])}
    logged |= {"hack/entropy", "hack/edit_distance", "val/eos_rate"}  # monitor.texts and monitor.diversity
    logged |= monitor.objective(torch.zeros(2), *torch.zeros(2, 2, 2), torch.ones(2, 2, dtype=bool), kl_coef=0.1).keys()
    assert {name for name, *_ in hacks.ALARMS} <= logged
