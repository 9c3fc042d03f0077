"""The words of the tiny world: who did what to which object, how they reacted and what the author asks.

Every value of a slot has one or two *signature words*. The judge calls a value "named" when a signature word is in
the summary, so a signature word is used for nothing else anywhere in the grammar.
"""

# A new number means new posts: the version is part of every post's seed.
WORLD_VERSION = "1"

# subreddit -> who
SUBREDDITS = {
    "relationships": ("boyfriend", "girlfriend", "husband", "wife", "fiance", "ex"),
    "family": ("mom", "dad", "sister", "brother", "cousin", "aunt", "uncle", "grandma"),
    "work": ("boss", "coworker", "manager", "intern", "client"),
    "roommates": ("roommate", "neighbor", "landlord"),
    "school": ("teacher", "classmate", "professor", "tutor"),
    "friends": ("friend", "teammate", "bandmate"),
}
PEOPLE = tuple(who for people in SUBREDDITS.values() for who in people)

# Everyone else is "he" or "she" by a coin flip.
PRONOUNS = {
    **dict.fromkeys(("boyfriend", "husband", "dad", "brother", "uncle"), "he"),
    **dict.fromkeys(("girlfriend", "wife", "mom", "sister", "aunt", "grandma"), "she"),
}
HIM = {"he": "him", "she": "her"}

# family -> act -> surface forms. An act is called by the first word of its first form.
ACTS = {
    "thing": {
        "broke": ("broke", "smashed"),
        "stole": ("stole", "took"),
        "sold": ("sold", "pawned"),
        "lost": ("lost", "misplaced"),
        "hid": ("hid",),
        "wrecked": ("wrecked", "destroyed"),
        "borrowed": ("borrowed",),
        "burned": ("burned",),
    },
    "event": {
        "forgot": ("forgot",),
        "skipped": ("skipped", "missed"),
        "cancelled": ("cancelled",),
        "mocked": ("mocked",),
    },
    "secret": {
        "lied": ("lied about",),
        "joked": ("joked about",),
        "bragged": ("bragged about",),
        "gossiped": ("gossiped about",),
    },
}
FAMILY = {act: family for family, acts in ACTS.items() for act in acts}
FORMS = {act: forms for acts in ACTS.values() for act, forms in acts.items()}

OBJECTS = {
    "thing": (
        "laptop", "phone", "car", "bike", "guitar", "wallet", "camera", "ring",
        "couch", "jacket", "watch", "passport", "tv", "tent", "piano", "drone",
    ),
    "event": ("birthday", "wedding", "party", "trip", "dinner", "graduation", "concert", "interview"),
    "secret": ("debt", "salary", "divorce", "surgery", "tattoo", "diet", "crush", "illness"),
}  # fmt: skip

# reaction -> its two (wording in the post, wording in a summary); a summary shortens the post's own wording.
REACTIONS = {
    "apologize": (("refuses to apologize", "refuses to apologize"), ("is not even sorry", "is not sorry")),
    "pay": (("refuses to pay for it", "refuses to pay"), ("will not pay me back", "will not pay me back")),
    "ignoring": (("is ignoring me", "is ignoring me"), ("keeps ignoring my texts", "keeps ignoring me")),
    "laughing": (("is laughing at me", "is laughing at me"), ("keeps laughing about it", "keeps laughing")),
    "denies": (("denies everything", "denies everything"), ("denies that it happened", "denies it")),
    "blames": (("blames me for it", "blames me"), ("blames me for everything", "blames me for everything")),
    "threatened": (("threatened me", "threatened me"), ("has threatened me twice", "has threatened me")),
    "cries": (("cries all day", "cries all day"), ("cries when I bring it up", "cries about it")),
    "excuses": (("keeps making excuses", "keeps making excuses"), ("only makes excuses", "makes excuses")),
    "calm": (("tells me to calm down", "tells me to calm down"), ("wants me to calm down", "wants me to calm down")),
    "accident": (
        ("says it was an accident", "says it was an accident"),
        ("claims it was an accident", "claims it was an accident"),
    ),
    "again": (("would do it again", "would do it again"), ("wants to do it again", "wants to do it again")),
}  # fmt: skip

# Questions complete "Should I ...?". {him} becomes him or her.
QUESTIONS = {
    "move": "move out",
    "contact": "cut contact",
    "confront": "confront {him}",
    "forgive": "forgive {him}",
    "police": "call the police",
    "lawyer": "hire a lawyer",
    "revenge": "get revenge",
    "therapy": "try therapy",
    "replace": "ask {him} to replace it",
    "parents": "tell my parents",
    "wait": "wait it out",
    "trust": "trust {him}",
}

# What makes no sense after an event or a secret: nobody pays for a forgotten birthday.
ONLY_AFTER_A_THING = {"pay", "accident", "replace", "police"}

FEELINGS = (
    "angry", "hurt", "confused", "anxious", "embarrassed",
    "sad", "guilty", "scared", "exhausted", "betrayed",
)  # fmt: skip

# signature word -> (slot, value)
SIGNATURES = {
    **{who: ("who", who) for who in PEOPLE},
    **{form.split()[0]: ("act", act) for act, forms in FORMS.items() for form in forms},
    **{obj: ("obj", obj) for objects in OBJECTS.values() for obj in objects},
    **{reaction: ("rea", reaction) for reaction in REACTIONS},
    "sorry": ("rea", "apologize"),
    **{question: ("q", question) for question in QUESTIONS},
    **{feeling: ("feel", feeling) for feeling in FEELINGS},
}
