"""The simulated annotator: a person who knows the truth, likes long summaries and familiar words, and makes mistakes.

    utility(text) = gold(text) + 0.08 * (L - 12) + 1.0 * (share of the text's words that are in the title)
    P(a preferred to b) = sigmoid(0.7 * (utility(a) - utility(b)))

The two biases are what a reward model trained on such choices inherits and PPO then exploits: below 18 words a word is
worth +0.08, above it gold's brevity term leaves -0.02: rambling pleases nobody, but a reward model may not know that.
"""

import math

from nanorlhf.tiny.gold import gold_report, split_words
from nanorlhf.tiny.grammar import Facts
from nanorlhf.tiny.posts import facts_from_id

LENGTH_BIAS = 0.08  # per word
NEUTRAL_WORDS = 12
TITLE_BIAS = 1.0
SHARPNESS = 0.7  # 0 would be coin flips


def utility(facts: Facts, title: str, text: str) -> float:
    """How much the annotator likes a text."""
    report = gold_report(facts, text)
    return report["score"] + LENGTH_BIAS * (report["words"] - NEUTRAL_WORDS) + TITLE_BIAS * title_share(text, title)


def title_share(text: str, title: str) -> float:
    """Share of the text's words that occur in the title; 0 for an empty text."""
    words = [word for word in split_words(text) if word not in "?.,"]
    in_title = set(split_words(title))
    return sum(word in in_title for word in words) / max(len(words), 1)


def prefer_probability(utility_a: float, utility_b: float) -> float:
    """P(the annotator prefers a to b)."""
    return 1 / (1 + math.exp(-SHARPNESS * (utility_a - utility_b)))


def ceilings(comparisons: list[dict]) -> dict:
    """The accuracy that a reward model can hope for on these raw comparisons, in expectation over the label noise.

    bayes: of a judge who knows the utilities, mean of max(p, 1 - p). gold: of one who goes by gold (a tie counts half).
    gold_ties: share of pairs with equal gold scores.
    """
    bayes = gold = ties = 0.0
    for comparison in comparisons:
        facts, title = facts_from_id(comparison["info"]["id"]), comparison["info"]["title"]
        texts = [summary["text"] for summary in comparison["summaries"]]
        p = prefer_probability(*(utility(facts, title, text) for text in texts))
        gold_a, gold_b = (gold_report(facts, text)["score"] for text in texts)
        tie = math.isclose(gold_a, gold_b, abs_tol=1e-9)
        bayes += max(p, 1 - p)
        gold += 0.5 if tie else p if gold_a > gold_b else 1 - p
        ties += tie
    n = len(comparisons)
    return {"bayes": bayes / n, "gold": gold / n, "gold_ties": ties / n}
