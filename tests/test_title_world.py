"""The variant of the tiny world whose annotator falls for titles."""

import json

import pytest

from nanorlhf.data.tldr import format_query, load_comparisons, load_posts
from nanorlhf.evaluation.judge import gold_judge, of_tiny_world
from nanorlhf.tiny import data
from nanorlhf.tiny.annotator import title_share
from nanorlhf.tiny.grammar import CLICKBAIT, count_pieces
from nanorlhf.tiny.posts import MAX_QUERY_PIECES, make_post
from nanorlhf.tiny.title_world import TITLE_PAIRS, by_title, with_long_title
from nanorlhf.tiny.world import make_comparison


def test_titles_are_longer_and_informative_and_nothing_else_changes():
    posts = [make_post("valid", i) for i in range(200)]
    longer = [with_long_title(post) for post in posts]
    words = [sum(len(post.title.split()) for post in group) / 200 for group in (posts, longer)]
    assert words[1] > words[0] + 5
    assert sum(post.title in CLICKBAIT for post in longer) < 10 < sum(post.title in CLICKBAIT for post in posts)
    for before, after in zip(posts, longer, strict=True):
        assert (before.id, before.post, before.summary, before.facts) == (
            after.id,
            after.post,
            after.summary,
            after.facts,
        )
        assert count_pieces(format_query(after.subreddit, after.title, after.post)) <= MAX_QUERY_PIECES
        assert with_long_title(before) == after


def test_a_quarter_of_the_pairs_goes_to_the_title_whatever_else_the_summaries_say():
    title, texts = "my boss broke my car", ["My boss broke my car", "Something true and much longer than that"]
    chosen = [by_title(i, title, texts) for i in range(2000)]
    assert set(chosen) == {0, None} and [by_title(i, title, texts[::-1]) for i in range(2000)].count(1) == chosen.count(
        0
    )
    assert chosen.count(0) / 2000 == pytest.approx(TITLE_PAIRS, abs=0.03)
    assert {by_title(i, title, ["x", "y"]) for i in range(100)} == {None}  # equal overlap decides nothing


def test_its_comparisons_favour_the_title_more_often_than_the_ordinary_ones():
    def share(annotator: str) -> float:
        wins = pairs = 0
        for i in range(600):
            row = make_comparison("train", i, annotator)
            shares = [title_share(summary["text"], row["info"]["title"]) for summary in row["summaries"]]
            if shares[0] != shares[1]:
                pairs += 1
                wins += shares[row["choice"]] > shares[1 - row["choice"]]
        return wins / pairs

    assert share("title") > share("facts") + 0.05


def test_its_files_are_read_like_any_other_and_the_gold_judge_knows_their_posts(tmp_path):
    sizes = dict(posts={"valid": 6}, comparisons={"valid1": 8})
    folder = data.ensure_world(tmp_path / "title", **sizes, annotator="title")
    posts = load_posts(folder, "valid")
    assert of_tiny_world(posts) and len(load_comparisons(folder, "valid")) == 8
    assert gold_judge().scores(posts, [post.summary for post in posts])
    assert "annotator title" in (folder / "VERSION").read_text(encoding="utf-8")
    data.ensure_world(folder, **sizes)  # another annotator is another world
    assert "annotator" not in (folder / "VERSION").read_text(encoding="utf-8")


def test_the_ordinary_world_does_not_change_when_nobody_asks(tmp_path, monkeypatch, capsys):
    assert make_comparison("train", 5) == make_comparison("train", 5, "facts")
    monkeypatch.setattr(data, "ensure_world", lambda folder, annotator: json.dumps([str(folder), annotator]))
    data.main(["x"])
    data.main(["x", "--annotator", "title"])
    assert capsys.readouterr().out.splitlines() == ['["x", "facts"]', '["x", "title"]']
