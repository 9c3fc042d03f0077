"""Text of the second half of pretraining: people who retell a story, slip, and put themselves right ("I mean").

    document(index) -> str, a pure function of the index

    Your sister I mean boss broke your laptop and he blames you I mean refuses to pay, should you move out?

Whether "I mean" comes next depends on whether what was just read is what the post says. So the base model learns to
compare a retelling with its post, word by word. A reward model has to do the same, and from preferences alone, one bit
a pair, many seeds never found out how: docs/robustness.md. Four kinds of documents, from hard to easy:

    45 %  a post and one to three retellings of it
    20 %  one to four stories of a sentence or two, retold
    20 %  a list of words, repeated
    15 %  what the first half has (corpus.py), so that nothing of it is forgotten

In the two kinds in the middle a part of another story may come between the first telling and the second.
"""

import random
import re
from collections.abc import Callable

from nanorlhf.data.tldr import format_query
from nanorlhf.tiny import corpus
from nanorlhf.tiny.corpus import DRILL_WORDS, to_second_person
from nanorlhf.tiny.grammar import Facts, capital, draw_facts, fill, summary_template, write_post, wrong_value
from nanorlhf.tiny.lexicon import FORMS, HIM, QUESTIONS, REACTIONS
from nanorlhf.tiny.posts import make_post, seeded

SLIPS = 0.3  # share of the facts, or words, that are first told wrong
# A story of a sentence or two, and how it is retold.
SHORT = (
    ("My {who} {act} my {obj}.", "{Who} {act} my {obj}."),
    ("{He} is my {who}. {He} {act} my {obj}.", "My {who} {act} my {obj}."),
    ("My {who} {act} my {obj}, now {he} {post_rea}.", "{Who} {act} my {obj} and {he} {rea}."),
    ("Yesterday my {who} {act} my {obj}. Should I {ask}?", "Should I {ask} after my {who} {act} my {obj}?"),
)


def document(index: int) -> str:
    """Returns document number `index` of the second half."""
    rng = seeded("slips", index)
    kind = rng.random()
    if kind < 0.45:
        return thread(index, rng)
    if kind < 0.65:
        return short_stories(rng)
    return word_list(rng) if kind < 0.85 else corpus.document(index)


def thread(index: int, rng: random.Random) -> str:
    """A post and one to three retellings, each by a reader (COMMENT) or by the author (EDIT)."""
    post = make_post("pretrain", index)
    text = format_query(post.subreddit, post.title, post.post).removesuffix("\n\nTL;DR:")
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            text += f"\n\nEDIT: {retelling(post.facts, rng)}"
        else:
            text += f"\n\nCOMMENT: {retelling(post.facts, rng, to_second_person)}"
    return text


def retelling(facts: Facts, rng: random.Random, person: Callable[[str], str] = str) -> str:
    """The story in the form of a summary, with slips. `person` turns "my" into "your" where a reader tells it;
    str leaves it."""
    template = summary_template(facts, rng, rng.choice(5 * ("full",) + ("no_reaction", "no_question")))
    return capital(fill(person(template), facts, **tell(facts, rng, person)))


def tell(facts: Facts, rng: random.Random, person: Callable[[str], str] = str) -> dict[str, str]:
    """{slot of a template: the true value, or a wrong one "I mean" the true one}."""
    told = {}
    for slot, right in true_wordings(facts, rng).items():
        wrong = wording(slot, wrong_value(slot, facts, rng), facts, rng)
        told["ask" if slot == "q" else slot] = slip(person(wrong), person(right), rng)
    return told


def true_wordings(facts: Facts, rng: random.Random) -> dict[str, str]:
    """The five facts in a summary's words: nearly those of the post."""
    act = rng.choice(FORMS[facts.act]) if rng.random() < 0.3 else facts.act_form
    reaction, question = REACTIONS[facts.rea][facts.rea_form][1], wording("q", facts.q, facts, rng)
    return {"who": facts.who, "act": act, "obj": facts.obj, "rea": reaction, "q": question}


def wording(slot: str, value: str, facts: Facts, rng: random.Random) -> str:
    """A value of a slot in words; one of its two, where it has two."""
    match slot:
        case "act":
            return rng.choice(FORMS[value])
        case "rea":
            return rng.choice(REACTIONS[value])[1]
        case "q":
            return QUESTIONS[value].format(him=HIM[facts.pronoun])
    return value


def slip(wrong: str, right: str, rng: random.Random) -> str:
    """What is right, sometimes only at the second go."""
    return f"{wrong} I mean {right}" if rng.random() < SLIPS else right


def short_stories(rng: random.Random) -> str:
    """Stories of a sentence or two about different people and things, then each of them again in another order."""
    stories: list[Facts] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        facts = draw_facts(rng)
        if not any({facts.who, facts.act, facts.obj} & {other.who, other.act, other.obj} for other in stories):
            stories.append(facts)
    forms = [(*rng.choice(SHORT), facts) for facts in stories]
    text = "".join(" " + fill(first, facts) for first, _, facts in forms) + beside_the_point(rng)
    rng.shuffle(forms)
    return text + "".join(" " + capital(fill(again, facts, **tell(facts, rng))) for _, again, facts in forms)


def word_list(rng: random.Random) -> str:
    """Five to fourteen words, then the same words again, most often in another order."""
    words = rng.sample(DRILL_WORDS, rng.randint(5, 14))
    others = [word for word in DRILL_WORDS if word not in words]
    text = " " + " ".join(words) + "."
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.7:
            rng.shuffle(words)
        text += beside_the_point(rng) + " " + " ".join(slip(rng.choice(others), word, rng) for word in words) + "."
    return text


def beside_the_point(rng: random.Random) -> str:
    """The first sentences of another story, or nothing."""
    sentences = re.findall(r"[^.?]+[.?]", write_post(draw_facts(rng), rng))
    return " " + "".join(sentences[: rng.choice((1, 2, 3, 5, 8))]) if rng.random() < 0.7 else ""
