"""Judges: pairs in, verdicts out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanorlhf.data.tldr import MAX_RESPONSE, Post, encode_query, encode_response
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.evaluation.judge import (
    LOSS,
    OUTCOMES,
    TIE,
    UNPARSED,
    WIN,
    Judgement,
    Pair,
    ScoreJudge,
    gold_judge,
    of_tiny_world,
    order_effects,
    reward_model_judge,
    verdict,
)
from nanorlhf.evaluation.metrics import win_rate
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.tiny.gold import judge as gold
from nanorlhf.tiny.world import make_post


def tiny_post(index: int, split: str = "valid") -> Post:
    post = make_post(split, index)
    return Post(post.id, post.subreddit, post.title, post.post, post.summary)


TOKENIZER = load_tokenizer(Path(__file__).parent.parent / "nanorlhf" / "tiny")
REDDIT = Post("t3_abc", "AskReddit", "A title", "A post.", "A summary.")


def said(judge, pairs: list[Pair]) -> list[str]:
    return [judgement.verdict for judgement in judge.compare(pairs)]


def test_the_higher_gold_score_wins_and_equal_ones_tie():
    posts = [tiny_post(i) for i in range(20)]
    pairs = [Pair(post, post.summary, "nothing to see") for post in posts]
    verdicts = said(gold_judge(), pairs)
    for pair, got in zip(pairs, verdicts, strict=True):
        assert got == (WIN if gold(pair.post.id, pair.ours) > gold(pair.post.id, pair.theirs) else LOSS)
    assert verdicts.count(WIN) > 15
    assert said(gold_judge(), [Pair(post, post.summary, post.summary) for post in posts]) == [TIE] * 20


def test_swapping_the_two_summaries_swaps_the_verdict():
    pairs = [Pair(tiny_post(i), tiny_post(i).summary, tiny_post(i + 1).summary) for i in range(30)]
    swapped = [Pair(pair.post, pair.theirs, pair.ours) for pair in pairs]
    there, back = said(gold_judge(), pairs), said(gold_judge(), swapped)
    assert [OUTCOMES[a] + OUTCOMES[b] for a, b in zip(there, back, strict=True)] == [1.0] * 30


def test_scores_that_differ_by_rounding_are_a_tie():
    assert verdict(0.1 + 0.2, 0.3) == TIE
    assert verdict(0.3001, 0.3) == WIN
    with pytest.raises(AssertionError, match="nan"):
        verdict(float("nan"), 0.0)


def test_a_judge_that_always_ties_gives_one_half():
    judge = ScoreJudge("constant", lambda posts, summaries: [0.0] * len(posts))
    verdicts = said(judge, [Pair(REDDIT, "a", "b")] * 8)
    assert win_rate(*(verdicts.count(v) for v in OUTCOMES)) == 0.5


def test_a_pair_is_won_only_when_it_is_won_in_both_orders():
    expected = {(WIN, WIN): WIN, (LOSS, LOSS): LOSS, (TIE, TIE): TIE, (WIN, LOSS): TIE, (WIN, TIE): TIE,
                (UNPARSED, WIN): UNPARSED, (LOSS, UNPARSED): UNPARSED}  # fmt: skip
    assert {orders: Judgement(*orders).verdict for orders in expected} == expected


def test_order_effects_by_hand():
    """Shown first and won, shown second and lost: the first seat won both times. Then a pair without such a liking."""
    judged = [(WIN, LOSS), (WIN, LOSS), (WIN, WIN), (TIE, TIE), (UNPARSED, WIN)]  # ours first, ours second
    effects = order_effects([Judgement(*orders) for orders in judged])
    assert effects == {"first_seat": 5 / 6, "swap_agreement": 2 / 4, "unparsed": 1}


@pytest.mark.parametrize("id", ["t3_abc", "tiny-nowhere-000001", "tiny-valid-9999999", "tiny-valid-x"])
def test_the_gold_judge_refuses_a_post_of_another_world(id):
    with pytest.raises(UserError, match="the gold judge knows only the tiny world's posts.*--judge rm"):
        gold_judge().compare([Pair(replace(REDDIT, id=id), "a", "b")])


def test_the_gold_judge_refuses_another_text_under_a_tiny_id():
    with pytest.raises(UserError, match="tiny-valid-000003 is not what the tiny world writes"):
        gold_judge().compare([Pair(replace(tiny_post(3), post="Something else."), "a", "b")])


def test_the_gold_judge_takes_the_posts_of_comparisons():
    post = tiny_post(5, split="comparison_valid1")
    assert said(gold_judge(), [Pair(post, post.summary, "")]) == [WIN]


def test_the_tiny_world_is_recognised():
    assert of_tiny_world([tiny_post(0), tiny_post(1)])
    assert not of_tiny_world([tiny_post(0), REDDIT])


@pytest.fixture(scope="module")
def reward_model():
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    policy = Policy(config)
    initialise(policy, seed=0)
    return reward_model_from(policy, seed=0)


def test_the_reward_model_judge_prefers_what_the_reward_model_scores_higher(reward_model):
    judge = reward_model_judge(reward_model, TOKENIZER, max_query_length=104, microbatch_tokens=300)
    posts = [tiny_post(i) for i in range(6)]
    ours, theirs = [post.summary for post in posts], [post.title for post in posts]

    def score(post, text):
        query = encode_query(TOKENIZER, post.subreddit, post.title, post.post, 104)
        return reward_model.scores([query + encode_response(TOKENIZER, text)]).item()

    alone = [score(post, text) for post, text in zip(posts, ours, strict=True)]
    assert judge.scores(posts, ours) == pytest.approx(alone, abs=1e-5)  # several a batch, in any order
    assert judge.scores(posts[::-1], ours[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    expected = [verdict(score(p, a), score(p, b)) for p, a, b in zip(posts, ours, theirs, strict=True)]
    assert said(judge, [Pair(p, a, b) for p, a, b in zip(posts, ours, theirs, strict=True)]) == expected


def test_the_reward_model_judge_scores_a_summary_once(reward_model, monkeypatch):
    judge = reward_model_judge(reward_model, TOKENIZER, max_query_length=104, microbatch_tokens=10_000)
    scored = []
    monkeypatch.setattr(
        reward_model,
        "last_scores",
        lambda packed: scored.extend(packed.lengths) or torch.arange(len(packed.lengths), dtype=torch.float32),
    )
    assert judge.scores([tiny_post(0), tiny_post(0), tiny_post(1)], ["a", "a", "a"]) == [0.0, 0.0, 1.0]
    judge.scores([tiny_post(1)], ["a"])
    assert len(scored) == 2


def test_a_long_summary_is_scored_by_its_first_tokens_and_counted(reward_model):
    said_lines = []
    judge = reward_model_judge(reward_model, TOKENIZER, 104, 4096, say=said_lines.append)
    seen, score = [], reward_model.last_scores
    reward_model.last_scores = lambda packed: seen.extend(packed.lengths) or score(packed)
    try:
        judge.scores([tiny_post(0), tiny_post(1)], ["a plan " * 8600, "short"])  # 60,000 characters
    finally:
        del reward_model.last_scores
    assert max(seen) <= 104 + MAX_RESPONSE
    assert said_lines == [f"note    1 of 2 summaries are scored by their first {MAX_RESPONSE} tokens"]


def test_a_score_that_is_not_finite_is_named_with_its_post(reward_model, monkeypatch):
    monkeypatch.setattr(reward_model, "last_scores", lambda packed: torch.full((len(packed.lengths),), torch.inf))
    judge = reward_model_judge(reward_model, TOKENIZER, 104, 4096)
    with pytest.raises(
        UserError, match=r"reward model: its score of a summary of post tiny-valid-000000 is not finite"
    ):
        judge.scores([tiny_post(0)], ["a"])
