"""The reward model's card: groups by hand, calibration by simulation, example sets that mean what they say."""

import numpy as np
import pytest

from nanorlhf.data.tldr import Comparison, Post
from nanorlhf.evaluation import rm_card
from nanorlhf.evaluation.metrics import words
from nanorlhf.evaluation.rm_card import calibration, card, confidence_name, examples


def comparison(chosen="a b c", rejected="d e", **changes) -> Comparison:
    fields = dict(
        post=Post("p", "r", "title", "The post. More.", ""), chosen=chosen, rejected=rejected, chosen_policy="x",
        rejected_policy="y", batch="batch3", split="valid1", confidence=7, worker="w",
    )  # fmt: skip
    return Comparison(**(fields | changes))


def test_a_confidence_that_is_not_on_the_scale_is_not_called_undecided():
    said = ["0 undecided", "4 far better", "4 far better", "not asked", "not on the scale"]
    assert [confidence_name(c) for c in (5, 1, 9, None, 12)] == said


def test_the_card_by_hand():
    comparisons = [
        comparison(),
        comparison(split="valid2", batch="batch4", confidence=1),
        comparison(chosen="d", rejected="a b", chosen_policy="y", rejected_policy="x", confidence=None),
        comparison(chosen="a b", rejected="c d", confidence=9),
    ]
    found = card(comparisons, chosen=[1.0, 2.0, 0.5, 0.0], rejected=[0.0, 2.0, 1.5, -3.0])
    assert (found["comparisons"], found["accuracy"]) == (4, 2 / 4)  # equal scores are an error
    assert found["length_baseline"] == (2 + 0.5) / 4
    by = {
        kind: {value: (row["n"], row["accuracy"]) for value, row in groups.items()}
        for kind, groups in found["by"].items()
    }
    assert by["split"] == {"valid1": (3, 2 / 3), "valid2": (1, 0.0)}
    assert by["batch"] == {"batch3": (3, 2 / 3), "batch4": (1, 0.0)}
    assert by["confidence"] == {"2 somewhat": (1, 1.0), "4 far better": (2, 0.5), "not asked": (1, 0.0)}
    assert by["policies"] == {"x vs y": (4, 0.5)}  # whichever of the two was chosen
    assert by["length gap, words"] == {
        "3. shorter by 1 to 5": (1, 0.0), "4. equal": (1, 1.0), "5. longer by 1 to 5": (2, 0.5)
    }  # fmt: skip
    assert [pair["chosen"] for pair in found["worst"]] == ["d", "a b c"]  # the most wrong first, and nothing right
    assert sum(found["histogram"]["chosen"]) == sum(found["histogram"]["rejected"]) == 4
    scores, lengths = [1.0, 0.0, 2.0, 2.0, 0.5, 1.5, 0.0, -3.0], [3, 2, 3, 2, 1, 2, 2, 2]
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1])


@pytest.mark.parametrize(
    "gap, name",
    [
        (-11, "1."),
        (-10, "2."),
        (-6, "2."),
        (-5, "3."),
        (-1, "3."),
        (0, "4."),
        (1, "5."),
        (5, "5."),
        (6, "6."),
        (11, "7."),
    ],
)
def test_length_gaps_have_bins_without_holes(gap, name):
    assert rm_card._gap_name(gap).startswith(name)


def test_the_calibration_error_of_a_perfect_model_is_0_within_noise():
    """Pairs drawn from the model's own probabilities."""
    rng = np.random.default_rng(0)
    gap = np.abs(rng.normal(0, 2, size=40_000))
    right = rng.random(len(gap)) < 1 / (1 + np.exp(-gap))
    rows, error = calibration(np.where(right, gap, -gap))
    assert error < 1.5 * 0.4 * (len(rows) / len(gap)) ** 0.5
    assert sum(row["n"] for row in rows) == len(gap)
    assert all(abs(row["accuracy"] - row["confidence"]) < 0.03 for row in rows)


def test_an_overconfident_model_is_found_out():
    """Right three times in four whatever it claims: at a claim of sigmoid(3) the error is the difference."""
    rows, error = calibration([3.0, 3.0, 3.0, -3.0])
    claim = 1 / (1 + np.exp(-3.0))
    assert error == pytest.approx(claim - 0.75)
    filled = [row for row in rows if row["n"]]
    assert len(filled) == 1 and filled[0]["low"] <= claim <= filled[0]["high"]
    assert filled[0]["interval"][0] < 0.75 < filled[0]["interval"][1]
    assert [row["accuracy"] for row in rows if not row["n"]] == [None] * 9


def test_certainty_falls_into_the_last_bin():
    rows, _ = calibration([1000.0, 0.0])
    assert (rows[-1]["n"], rows[0]["n"]) == (1, 1)


def test_example_sets_have_a_summary_of_every_post_and_say_what_they_are():
    posts = [
        Post("a", "r", "My boss", "He broke it. Then he left.", "My boss broke my car and left"),
        Post("b", "r", "My cat", "She is gone.", "Cat gone"),
    ]
    sets = examples(posts, seed=1)
    assert set(sets) == {"quality", "length at equal content", "nonsense"}
    assert all(len(made) == 2 for kinds in sets.values() for made in kinds.values())
    quality, length, nonsense = sets.values()
    assert quality["the reference"][0] == posts[0].summary and quality["of another post"][0] == posts[1].summary
    assert quality["its first half"] == ["My boss broke", "Cat"]
    grown = [len(words(kind[0])) for kind in length.values()]
    assert grown[:-1] == sorted(grown[:-1]) and grown[-1] == 2 * grown[0]
    assert all(kind[0].startswith(posts[0].summary) for kind in length.values())
    assert sorted(nonsense["its words shuffled"][0].split()) == sorted(posts[0].summary.split())
    assert nonsense["the title"][1] == "My cat" and nonsense["nothing"] == ["", ""]
    assert nonsense["the post's first sentence"][0] == "He broke it"
    assert examples(posts, seed=1) == sets
