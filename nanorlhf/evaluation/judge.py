"""Judges: which of two summaries of a post is better?

    judge.compare(pairs) -> judgements      a list of Pair in; a Judgement of `ours`, one a pair, out

    gold     looks the facts up: the truth, in the tiny world only
    rm       a reward model scores both; PPO was trained to please it, so a win shows that it optimised, not improved
    claude   a language model reads both, in both orders (claude.py)

A judge that scores each summary by itself (gold, rm) is a ScoreJudge; one that has to see the two side by side needs
`name` and `compare` and nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nanorlhf.data.tldr import MAX_RESPONSE, Post, encode_query, end_response, response_text
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.errors import UserError
from nanorlhf.tiny.gold import judge as gold_of_id
from nanorlhf.tiny.posts import facts_from_id, make_post

if TYPE_CHECKING:  # torch takes seconds to import, and only one of the judges needs it
    from nanorlhf.models import ScalarModel

WIN, TIE, LOSS = "win", "tie", "loss"  # of `ours`
UNPARSED = "unparsed"  # the judge answered, but not the question: counted and shown, never guessed
OUTCOMES = {WIN: 1.0, TIE: 0.5, LOSS: 0.0}  # what a verdict adds to a win rate
EQUAL = 1e-9  # scores that differ by less are a tie: gold scores are sums of tenths

JUDGES = ("gold", "rm", "claude")


@dataclass(frozen=True)
class Pair:
    """Two summaries of one post."""

    post: Post
    ours: str
    theirs: str


@dataclass(frozen=True)
class Judgement:
    """What a judge said of `ours`, once shown before `theirs` and once after: WIN, TIE, LOSS or UNPARSED each."""

    ours_first: str
    theirs_first: str
    asked: bool = True  # False: two equal texts, a tie without a question

    @property
    def verdict(self) -> str:
        """What it said both times; TIE where the order decided; UNPARSED where either answer is."""
        if UNPARSED in (self.ours_first, self.theirs_first):
            return UNPARSED
        return self.ours_first if self.ours_first == self.theirs_first else TIE


class Judge(Protocol):
    name: str

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]: ...


def order_effects(judgements: Sequence[Judgement]) -> dict[str, float | int]:
    """How much the order of the two summaries decided.

    -> first_seat: of the answers that name a winner, the share that names the first shown (0.5: no bias; nan: none);
    swap_agreement: share of pairs, both answers readable, judged the same in both orders (two equal texts, about which
    nobody was asked, do not count: they would flatter it); unparsed: pairs left out
    """
    readable = [j for j in judgements if j.verdict != UNPARSED and j.asked]
    decided = [first for j in readable for first in (_first_won(j.ours_first), _first_won(_swap(j.theirs_first)))]
    decided = [won for won in decided if won is not None]
    same = sum(j.ours_first == j.theirs_first for j in readable)
    return {
        "first_seat": sum(decided) / len(decided) if decided else float("nan"),
        "swap_agreement": same / len(readable) if readable else float("nan"),
        "unparsed": sum(j.verdict == UNPARSED for j in judgements),
    }


def _swap(verdict: str) -> str:
    return {WIN: LOSS, LOSS: WIN}.get(verdict, verdict)


def _first_won(verdict: str) -> bool | None:
    return {WIN: True, LOSS: False}.get(verdict)


@dataclass(frozen=True)
class ScoreJudge:
    """Scores each summary by itself; the higher score wins. `scores(posts, summaries)` returns one number a summary."""

    name: str
    scores: Callable[[Sequence[Post], Sequence[str]], list[float]]

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        posts = [pair.post for pair in pairs]
        ours = self.scores(posts, [pair.ours for pair in pairs])
        theirs = self.scores(posts, [pair.theirs for pair in pairs])
        verdicts = [verdict(a, b) for a, b in zip(ours, theirs, strict=True)]
        return [Judgement(v, v) for v in verdicts]  # it never sees an order


def verdict(our_score: float, their_score: float) -> str:
    """WIN, TIE or LOSS of the first of two scores. An assertion fails for a nan, which would compare as anything."""
    assert not math.isnan(our_score + their_score), f"scores {our_score} and {their_score}: a judge returned nan"
    if abs(our_score - their_score) <= EQUAL:
        return TIE
    return WIN if our_score > their_score else LOSS


# --- gold -------------------------------------------------------------------------------------------------------------


def gold_judge() -> ScoreJudge:
    """The tiny world's own judge (tiny/gold.py). Raises UserError for a post that the world did not write."""
    return ScoreJudge("gold", gold_scores)


def gold_scores(posts: Sequence[Post], summaries: Sequence[str]) -> list[float]:
    """The gold score of each summary. Raises UserError for a post that the tiny world did not write."""
    check_gold(posts)
    return [gold_of_id(post.id, summary) for post, summary in zip(posts, summaries, strict=True)]


def check_gold(posts: Sequence[Post]) -> None:
    """Raises UserError unless the tiny world wrote every one of these posts, in its present version."""
    for post in posts:
        try:
            facts_from_id(post.id)
        except ValueError as error:
            raise UserError(
                f"the gold judge knows only the tiny world's posts, and {error}: choose --judge rm"
            ) from None
        _, split, index = post.id.split("-")
        if make_post(split, int(index)).post != post.post:
            raise UserError(f"post {post.id} is not what the tiny world writes under this id: make its files again")


def of_tiny_world(posts: Sequence[Post]) -> bool:
    """Whether these posts call themselves the tiny world's."""
    return all(post.id.startswith("tiny-") for post in posts)


# --- reward model -----------------------------------------------------------------------------------------------------


def reward_model_judge(
    model: "ScalarModel", tokenizer: Tokenizer, max_query_length: int, microbatch_tokens: int, progress=None, say=None
) -> ScoreJudge:
    """A reward model as a judge. A summary is scored as a finished one, EOS included, whether or not its policy stopped
    by itself; a long one by its first MAX_RESPONSE tokens, which `say` tells. What it has scored it remembers.

    Raises UserError for a score that is nan or infinite.
    """
    from nanorlhf.packing import in_microbatches

    walk = progress or (lambda items, what: items)
    known: dict[tuple[Post, str], float] = {}

    def scores(posts: Sequence[Post], summaries: Sequence[str]) -> list[float]:
        asked = list(zip(posts, summaries, strict=True))
        new = [key for key in dict.fromkeys(asked) if key not in known]
        queries = [encode_query(tokenizer, p.subreddit, p.title, p.post, max_query_length) for p, _ in new]
        fitted = [end_response(tokenizer, tokenizer.encode(response_text(text))) for _, text in new]
        if say and (cut := sum(was_cut for _, was_cut in fitted)):
            say(f"note    {cut:,} of {len(new):,} summaries are scored by their first {MAX_RESPONSE} tokens")
        sequences = [query + response for query, (response, _) in zip(queries, fitted, strict=True)]
        if sequences:
            (values,) = in_microbatches(
                lambda packed, _: [model.last_scores(packed)], sequences, microbatch_tokens,
                model.score.weight.device, lambda turns: walk(turns, what="scoring"),
            )  # fmt: skip
            bad = [new[i][0].id for i, value in enumerate(values.tolist()) if not math.isfinite(value)]
            if bad:
                raise UserError(
                    f"reward model: its score of a summary of post {bad[0]} is not finite, expected a number: its "
                    "weights are finite, so they are too large for this dtype or damaged; take another checkpoint"
                )
            known.update(zip(new, values.tolist(), strict=True))
        return [known[key] for key in asked]

    return ScoreJudge("rm", scores)
