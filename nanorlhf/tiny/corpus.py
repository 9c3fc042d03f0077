"""Pretraining text of the tiny world: posts with comments, and drills that make copying emerge.

    document(index) -> str, a pure function of the index

65 % are posts with comments. Most begin with a word of comfort; the others retell the facts in the
second person ("So your boss broke your laptop ..."), so that predicting a comment means looking
facts up in the post. Finding "my laptop" from "your ___" is hard for a small model; 35 % are
drills for it: lists repeated word by word, and pairs "w1 my w2" listed again in another order with
another middle word, so that w1 alone tells w2. "TL;DR" never appears: summarising is left to SFT.
"""

import random

from nanorlhf.data.tldr import format_query
from nanorlhf.tiny.grammar import Facts, fill
from nanorlhf.tiny.lexicon import SIGNATURES
from nanorlhf.tiny.posts import make_post, seeded

# What most people write first: a word of comfort that tells nothing of the facts.
OPENERS = (
    "I went through the same thing a few years ago.",
    "Wow, {he} is not worth your time.",
    "You deserve better than {him}.",
    "There is no easy answer here.",
    "Tell {him} how you feel.",
    "Stay strong, it will get better.",
    "What did {he} say when you asked?",
    "Sleep on it and then talk to {him}.",
    "Some people never change and {he} is one of them.",
    "Please keep us posted.",
)
COMMENTS = (
    "So your {who} {act} your {obj} and {he} {rea}? You should {ask}.",
    "So your {who} {act} your {obj}? You can {ask}, or you can talk to your {who} about the {obj}.",
    "If my {who} {act} my {obj} then I would {ask}.",
    "Your {who} {act} your {obj} and now {he} {rea}. Do not {ask} yet.",
    "Your {who} {rea}? That is so wrong. Maybe {ask}.",
    "It is normal to be {feel} after your {who} {act} your {obj}.",
    "Do not {ask} just because your {who} {act} your {obj}.",
)
EDITS = (
    "EDIT: I will {ask}.",
    "EDIT: My {who} still {rea}.",
    "EDIT: Thanks for all the comments about my {obj}.",
    "EDIT: To be clear, {he} {act} my {obj}.",
)
TO_SECOND_PERSON = {"I": "you", "me": "you", "my": "your", "My": "Your", "am": "are"}
DRILL_WORDS = tuple(SIGNATURES)


def document(index: int) -> str:
    """Returns pretraining document number `index`."""
    rng = seeded("document", index)
    if rng.random() < 0.65:
        return thread(index, rng)
    return repeat_drill(rng) if rng.random() < 0.5 else recall_drill(rng)


def thread(index: int, rng: random.Random) -> str:
    """A post with one to four comments, most often after an opener, and in 15 % of cases an edit by its author."""
    post = make_post("pretrain", index)
    text = format_query(post.subreddit, post.title, post.post).removesuffix("\n\nTL;DR:")
    if rng.random() < 0.8:
        text += f"\n\nCOMMENT: {fill(rng.choice(OPENERS), post.facts)}"
    usable = [pattern for pattern in COMMENTS if post.facts.feel or "{feel}" not in pattern]
    for pattern in rng.sample(usable, rng.randint(1, 4)):
        text += f"\n\nCOMMENT: {comment(pattern, post.facts)}"
    if rng.random() < 0.15:
        text += f"\n\n{fill(rng.choice(EDITS), post.facts)}"
    return text


def comment(pattern: str, facts: Facts) -> str:
    """A reader's comment. What the author tells of "me" and "my" is about "you" here, except in "If my ..."."""
    text = fill(pattern, facts)
    return text if pattern.startswith("If my") else to_second_person(text)


def to_second_person(text: str) -> str:
    """me -> you, my -> your, I am -> you are; the marks after a word stay."""
    words = [(word.rstrip("?.,"), word) for word in text.split(" ")]
    return " ".join(TO_SECOND_PERSON.get(bare, bare) + word[len(bare) :] for bare, word in words)


def repeat_drill(rng: random.Random) -> str:
    """Five to fourteen words, listed two or three times in the same order."""
    words = rng.sample(DRILL_WORDS, rng.randint(5, 14))
    return (" " + " ".join(words) + ".") * rng.randint(2, 3)


def recall_drill(rng: random.Random) -> str:
    """Three to eight pairs "w1 my w2", listed two or three times in shuffled order with my, your or the between."""
    words = rng.sample(DRILL_WORDS, 2 * rng.randint(3, 8))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    text = ""
    for _ in range(rng.randint(2, 3)):
        rng.shuffle(pairs)
        listed = [f"{first} {rng.choice(('my', 'your', 'the'))} {second}" for first, second in pairs]
        text += f" {', '.join(listed)}."
    return text
