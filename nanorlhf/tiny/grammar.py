"""The grammar of the tiny world: draw the facts of a story, then write a title, a post and summaries from them.

A story has five facts that a good summary names (who, act, obj, rea, q), perhaps a feeling, and details that are
beside the point. Everything is drawn from a `random.Random`, so the same seed writes the same text.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nanorlhf.tiny.lexicon import (
    ACTS, FAMILY, FEELINGS, FORMS, HIM, OBJECTS, ONLY_AFTER_A_THING, PEOPLE, PRONOUNS, QUESTIONS, REACTIONS, SUBREDDITS,
)  # fmt: skip

CLICKBAIT = (
    "Need advice", "You will not believe this", "I am so done", "What should I do?", "Is this normal?",
    "Please help me", "This just happened", "Am I wrong here?", "Not sure what to do", "I need to vent",
)  # fmt: skip

TITLES = (
    "My {who} {act} my {obj}",
    "{Who} {act} my {obj}, what now?",
    "My {who} {act} my {obj} and {he} {rea}",
    "Should I {ask} after my {who} {act} my {obj}?",
    "{age}{sex}, should I {ask}?",
    "Feeling {feel} about my {who}",
)

INTROS = (
    "My {who} and I ({age}{sex}) used to be close.",
    "I ({age}{sex}) have known my {who} for {years} years.",
    "I am {age}{sex} and I see my {who} every day.",
    "I am {age}{sex} and my {who} is a big part of my life.",
)
TIMES = ("Yesterday", "Last night", "Last week", "A month ago", "Two days ago", "On Monday")
EVENTS = (
    "{time} {he} {act} my {obj}.",
    "{time} {he} {act} my {obj} for no reason.",
    "{time} I found out that {he} {act} my {obj}.",
    "Then {he} {act} my {obj} while I was at school.",
)
REACTION_SENTENCES = (
    "{He} {post_rea}.",
    "Now {he} {post_rea}.",
    "I tried to talk about it but {he} {post_rea}.",
    "The worst part is that {he} {post_rea}.",
)
FEELING_SENTENCES = ("I feel so {feel}.", "I am really {feel} right now.", "It has left me feeling {feel}.")
# Beside the point. Half of them name another person or another object, to tempt a careless summary.
ASIDES = (
    "My {who2} has a nice {obj2}.",
    "My {who2} thinks I should let it go.",
    "My {who2} told me to post here.",
    "I just bought a new {obj2}.",
    "I work a lot and I only have two days off.",
    "I have not slept much lately.",
    "I know this is long.",
    "English is not my first language.",
)
QUESTION_SENTENCES = (
    "Should I {ask}?",
    "I do not know if I should {ask}.",
    "Would it be wrong to {ask}?",
    "Is it time to {ask}?",
)
CLOSINGS = ("Thanks for reading.", "Please be kind.", "Any help is welcome.")

# What a summary covers -> its templates. {My_who} is "My boss" or "Boss"; {question} is drawn from ASKING.
ASKING = ("should I {ask}?", "is it time to {ask}?", "not sure if I should {ask}.")
SUMMARIES = {
    "full": (
        "{My_who} {act} my {obj} and {he} {rea}, {question}",
        "{My_who} {act} my {obj}, now {he} {rea}. {Question}",
        "{My_who} {rea} after {he} {act} my {obj}, {question}",
        "I am {feel} because my {who} {act} my {obj} and {he} {rea}. {Question}",
        "Should I {ask} after my {who} {act} my {obj} and {he} {rea}?",
    ),
    "no_reaction": (
        "{My_who} {act} my {obj}, {question}",
        "{My_who} {act} my {obj}. {Question}",
        "I am {feel} because my {who} {act} my {obj}. {Question}",
        "Should I {ask} after my {who} {act} my {obj}?",
    ),
    "no_question": (
        "{My_who} {act} my {obj} and {he} {rea}.",
        "{My_who} {act} my {obj}, now {he} {rea}. Need advice.",
        "{My_who} {rea} after {he} {act} my {obj}. Need advice.",
        "I am {feel} because my {who} {act} my {obj}, now {he} {rea}. Need advice.",
    ),
    "vague": (
        "{My_who} {rea}, {question}",
        "{My_who} did something bad, {question}",
        "I am {feel} because of my {who}, {question}",
        "Should I {ask}? I have a problem with my {who}.",
    ),
}
FILLERS = (
    "Any advice is welcome.",
    "I do not know what to do.",
    "I really need some help here.",
    "This has been on my mind for days.",
    "I feel so {feel}.",
)


@dataclass(frozen=True)
class Facts:
    """What is true in one story. `feel`, `who2` and `obj2` are None where the post does not mention any."""

    subreddit: str
    who: str
    pronoun: str  # he or she
    act: str  # which act; the post words it as act_form
    act_form: str
    obj: str
    rea: str  # which reaction; the post uses its wording number rea_form
    rea_form: int
    q: str
    feel: str | None
    who2: str | None  # a distractor: another person
    obj2: str | None  # a distractor: another object
    asides: tuple[str, ...]  # sentences beside the point
    age: int
    sex: str
    years: int


def draw_facts(rng: random.Random) -> Facts:
    """Draws one story; every choice is uniform, a feeling is stated in 70 % of them."""
    subreddit = rng.choice(tuple(SUBREDDITS))
    who = rng.choice(SUBREDDITS[subreddit])
    act = rng.choice(tuple(FAMILY))
    family = FAMILY[act]
    obj = rng.choice(OBJECTS[family])
    asides = tuple(rng.sample(ASIDES, rng.randint(1, 3)))
    who2 = rng.choice([person for person in PEOPLE if person != who])
    obj2 = rng.choice([thing for thing in OBJECTS["thing"] if thing != obj])
    return Facts(
        subreddit=subreddit,
        who=who,
        pronoun=PRONOUNS.get(who) or rng.choice(("he", "she")),
        act=act,
        act_form=rng.choice(FORMS[act]),
        obj=obj,
        rea=rng.choice(fitting(REACTIONS, family)),
        rea_form=rng.randrange(2),
        q=rng.choice(fitting(QUESTIONS, family)),
        feel=rng.choice(FEELINGS) if rng.random() < 0.7 else None,
        who2=who2 if "{who2}" in " ".join(asides) else None,
        obj2=obj2 if "{obj2}" in " ".join(asides) else None,
        asides=asides,
        age=rng.randint(18, 35),
        sex=rng.choice("FM"),
        years=rng.randint(2, 9),
    )


def fitting(values, family: str) -> list[str]:
    """The reactions or questions that make sense after an act of this family."""
    return [value for value in values if family == "thing" or value not in ONLY_AFTER_A_THING]


def fill(template: str, facts: Facts, **told: str) -> str:
    """Writes the facts into a template's {slots}; `told` is written in place of what is true, or beside it."""
    post_rea, rea = REACTIONS[facts.rea][facts.rea_form]
    true = dict(
        who=facts.who,
        he=facts.pronoun,
        He=facts.pronoun.capitalize(),
        him=HIM[facts.pronoun],
        act=facts.act_form,
        obj=facts.obj,
        post_rea=post_rea,
        rea=rea,
        ask=QUESTIONS[facts.q].format(him=HIM[facts.pronoun]),
        feel=facts.feel,
        who2=facts.who2,
        obj2=facts.obj2,
        age=facts.age,
        sex=facts.sex,
        years=facts.years,
    )
    slots = true | told
    return template.format(**slots, Who=capital(slots["who"]))


def capital(text: str) -> str:
    """The text with its first letter capital and the rest as it is."""
    return text[0].upper() + text[1:]


def sayable(templates: tuple[str, ...], facts: Facts) -> list[str]:
    """The templates that do not speak of a feeling the post leaves out."""
    return [template for template in templates if facts.feel or "{feel}" not in template]


Pick = Callable[[Sequence[str], random.Random], str]  # chooses one of several wordings


def by_habit(wordings: Sequence[str], rng: random.Random) -> str:
    """The first wording in half of all cases, the others alike: people have habits."""
    return wordings[0] if rng.random() < 0.5 else rng.choice(wordings[1:])


def evenly(wordings: Sequence[str], rng: random.Random) -> str:
    """Every wording alike: what the tokenizer learns from, so that rare ones get their pieces too."""
    return rng.choice(wordings)


def write_title(facts: Facts, rng: random.Random) -> str:
    """A title: clickbait in 40 % of posts, else one that gives away one to four facts."""
    if rng.random() < 0.4:
        return rng.choice(CLICKBAIT)
    return fill(rng.choice(sayable(TITLES, facts)), facts)


def write_post(facts: Facts, rng: random.Random) -> str:
    """A post: introduction, event, reaction, perhaps a feeling, asides anywhere after the event, the question."""
    story = [rng.choice(INTROS), rng.choice(EVENTS), rng.choice(REACTION_SENTENCES)]
    if facts.feel:
        story.insert(rng.choice((2, 3)), rng.choice(FEELING_SENTENCES))
    for aside in facts.asides:
        story.insert(rng.randint(2, len(story)), aside)
    story.append(rng.choice(QUESTION_SENTENCES))
    if rng.random() < 0.3:
        story.append(rng.choice(CLOSINGS))
    return fill(" ".join(story), facts, time=rng.choice(TIMES))


def write_summary(facts: Facts, rng: random.Random, coverage: str = "full", pick: Pick = by_habit) -> str:
    """A summary that names what `coverage` says (a key of SUMMARIES), in nearly the words of the post."""
    act = rng.choice(FORMS[facts.act]) if rng.random() < 0.3 else facts.act_form
    return fill(summary_template(facts, rng, coverage, pick), facts, act=act)


def summary_template(facts: Facts, rng: random.Random, coverage: str, pick: Pick = by_habit) -> str:
    """One of the ways to write such a summary, with {who}, {act}, {obj}, {rea}, {ask} still to be filled in."""
    question = pick(ASKING, rng)
    template = pick(sayable(SUMMARIES[coverage], facts), rng)
    template = template.replace("{question}", question).replace("{Question}", capital(question))
    return template.replace("{My_who}", rng.choice(("My {who}", "{Who}")))


def write_incomplete(facts: Facts, rng: random.Random) -> str:
    """A true summary that leaves one or more facts out."""
    return write_summary(facts, rng, rng.choice(("no_reaction", "no_question", "vague")))


def write_verbose(facts: Facts, rng: random.Random, pick: Pick = by_habit) -> str:
    """A true summary with one or two sentences that add nothing."""
    coverage = rng.choice(("full", "full", "no_reaction", "no_question"))
    fillers = rng.sample(sayable(FILLERS, facts) + list(facts.asides), 2 if rng.random() < 0.67 else 1)
    return " ".join([write_summary(facts, rng, coverage, pick), *(fill(filler, facts) for filler in fillers)])


def alter(facts: Facts, rng: random.Random) -> Facts:
    """Facts with one (two in a third of cases) of who, act or object, reaction and question made wrong."""
    for slot in rng.sample(("who", "act or obj", "rea", "q"), 1 if rng.random() < 0.67 else 2):
        if slot == "act or obj":
            slot = rng.choice(("act", "obj"))
        wrong = wrong_value(slot, facts, rng)
        facts = replace(facts, **{slot: wrong})
        if slot == "act":
            facts = replace(facts, act_form=rng.choice(FORMS[wrong]))
    return facts


def wrong_value(slot: str, facts: Facts, rng: random.Random) -> str:
    """A value of who, act, obj, rea or q that fits the story and is not true; for who often the post's other person."""
    if slot == "who" and facts.who2 and rng.random() < 0.5:
        return facts.who2
    family = FAMILY[facts.act]
    values = {
        "who": PEOPLE,
        "act": tuple(ACTS[family]),
        "obj": OBJECTS[family],
        "rea": fitting(REACTIONS, family),
        "q": fitting(QUESTIONS, family),
    }[slot]
    return rng.choice([value for value in values if value != getattr(facts, slot)])


def count_pieces(text: str) -> int:
    """Tokens that a tokenizer with one piece a word, number, mark or blank line would need.

    The grammar cannot ask the tokenizer, which is trained on it; tests hold the two together.
    """
    return len(re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]|\n\n", text))
