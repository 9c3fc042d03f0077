"""experiments/label.py: comparisons of any policies by any judge, as train_rm.py reads them; a judge that fails."""

import json
import math
from pathlib import Path

import pytest
from claude_server import ClaudeServer, message, prefer

from experiments import label
from nanorlhf.data.tldr import ComparisonStats, load_comparisons, load_posts
from nanorlhf.errors import UserError, one_sentence
from nanorlhf.evaluation.judge import LOSS, TIE, UNPARSED, WIN, Judgement, Pair
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.tiny.annotator import SHARPNESS
from nanorlhf.tiny.data import ensure_world
from nanorlhf.tiny.gold import gold_score
from nanorlhf.tiny.grammar import alter, write_incomplete, write_summary, write_verbose
from nanorlhf.tiny.posts import facts_from_id, make_post, seeded

SFT, PPO = EMBEDDED / "sft", EMBEDDED / "ppo"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    counts = {"train": 24, "valid": 12, "test": 4}
    return ensure_world(tmp_path_factory.mktemp("label") / "tiny", counts, {"train": 16, "valid1": 8})


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """run(flags...) -> exit status, stdout, stderr of the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> tuple[int, str, str]:
        sizes = "--num_posts", "24", "--valid_posts", "12", "--data", str(world)
        status = 0
        try:
            with one_sentence():
                label.main([*sizes, *flags])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def pairs(n: int, write) -> list[Pair]:
    """write(facts, rng) -> two texts, for n posts."""
    posts = [make_post("train", i) for i in range(n)]
    texts = [write(post.facts, seeded("label", i)) for i, post in enumerate(posts)]
    return [Pair(post, *two) for post, two in zip(posts, texts, strict=True)]


# --- what is written


def test_the_comparisons_are_what_the_reward_models_reader_reads(run, world):
    status, out, _ = run("--policy", f"sft={SFT}", f"ppo={PPO}", "--judge", "annotator", "--run_name", "mine")
    assert status == 0
    stats = ComparisonStats()
    train, valid = load_comparisons("runs/mine", "train", stats), load_comparisons("runs/mine", "valid")
    assert stats.equal_summaries == stats.cnndm == 0
    assert json.loads(out.splitlines()[-1])["rows"] == len(train) + len(valid)
    posts = {post.id: post for split in ("train", "valid") for post in load_posts(world, split)}
    rows = [json.loads(line) for line in Path("runs/mine/comparisons/mine.json").read_text("utf-8").splitlines()]
    for row, read in zip(rows, train + valid, strict=True):
        assert read.chosen == row["summaries"][row["choice"]]["text"] and read.chosen.startswith(" ")
        assert read.post.post == posts[read.post.id].post and read.post.title == posts[read.post.id].title
        assert {read.chosen_policy, read.rejected_policy} <= {"sft", "ppo"}
        assert (read.confidence < 5) == (row["choice"] == 0)
        assert (read.worker, read.batch) == ("annotator", "mine")
    assert {c.post.id for c in train} <= {f"tiny-train-{i:06}" for i in range(24)}
    assert {(c.chosen_policy, c.rejected_policy) for c in train} >= {("sft", "ppo"), ("ppo", "sft")}
    assert load_posts("runs/mine", "train") == load_posts(world, "train")  # train_rm.py's shift needs them


def test_with_the_old_comparisons_both_are_there_and_without_only_the_new(run, world):
    for name, flags in (("both", ["--with_old"]), ("new", [])):
        status, *_ = run("--policy", f"sft={SFT}", "--judge", "gold", "--run_name", name, *flags)
        assert status == 0
    new, both, old = (load_comparisons(folder, "train") for folder in ("runs/new", "runs/both", world))
    assert len(both) == len(new) + len(old) and {c.batch for c in new} == {"new"}


def test_labels_on_top_of_labels_never_overwrite_a_file_of_the_same_name(run):
    first = "--policy", f"sft={SFT}", "--judge", "gold"
    assert run(*first, "--run_name", "one")[0] == 0
    again = *first, "--with_old", "--data", "runs/one", "--run_name"
    status, _, err = run(*again, "one", "--overwrite")
    assert status == 2 and "has comparisons of this name" in err and len(load_comparisons("runs/one", "train")) > 0
    assert run(*again, "two")[0] == 0
    assert {c.batch for c in load_comparisons("runs/two", "train")} == {"one", "two"}


def test_the_same_command_writes_the_same_file_and_another_seed_another(run):
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("--policy", f"sft={SFT}", "--judge", "annotator", "--run_name", name, "--seed", seed)[0] == 0
        texts.append(Path(f"runs/{name}/comparisons/{name}.json").read_text("utf-8").replace(f'"{name}"', "name"))
    assert texts[0] == texts[1] != texts[2]


def test_a_pair_is_two_policies_drawn_at_random_and_never_two_equal_texts():
    posts = [make_post("train", i) for i in range(200)]
    texts = {name: [[f"{name} {k} {i}" for i in range(200)] for k in "xy"] for name in ("one", "two")}
    drawn = label.draw_pairs(posts, texts, seed=1)
    kinds = [(first, second) for _, first, second in drawn]
    assert len(drawn) == 200 and min(map(kinds.count, set(kinds))) > 30 and len(set(kinds)) == 4
    same = {"one": [["text"] * 200, ["text"] * 150 + ["other"] * 50]}
    assert len(label.draw_pairs(posts, same, seed=1)) == 50


# --- who chooses


def test_gold_errs_as_often_as_the_annotator_and_does_not_like_length():
    """Full summaries against ones with wrong facts: how often the better one is chosen is the mean of the sigmoid."""
    both = pairs(600, lambda facts, rng: (write_summary(facts, rng), write_summary(alter(facts, rng), rng)))
    gaps = [gold_score(facts_from_id(p.post.id), p.ours) - gold_score(facts_from_id(p.post.id), p.theirs) for p in both]
    expected = sum(1 / (1 + math.exp(-SHARPNESS * gap)) for gap in gaps) / len(gaps)
    chosen = label.gold(both, seed=1)
    assert sum(choice == 0 for choice, _ in chosen) / len(both) == pytest.approx(expected, abs=0.05)
    swapped = label.gold([Pair(p.post, p.theirs, p.ours) for p in both], seed=2)
    assert sum(choice == 1 for choice, _ in swapped) / len(both) == pytest.approx(expected, abs=0.05)


def test_the_annotator_prefers_longer_texts_more_often_than_gold_does():
    both = pairs(600, lambda facts, rng: (write_verbose(facts, rng), write_incomplete(facts, rng)))
    longer = [sum(choice == 0 for choice, _ in who(both, seed=1)) for who in (label.annotator, label.gold)]
    assert longer[0] > longer[1] + 30


class Stub:
    """A judge that says these verdicts in turn."""

    name = "stub"

    def __init__(self, *verdicts: str):
        self.verdicts = verdicts

    def compare(self, pairs):
        said = [self.verdicts[i % len(self.verdicts)] for i in range(len(pairs))]
        return [Judgement(verdict, verdict) for verdict in said]


def test_ties_and_unreadable_answers_make_no_comparison(capsys):
    both = pairs(8, lambda facts, rng: (write_summary(facts, rng), write_incomplete(facts, rng)))
    assert label.asked(Stub(WIN, TIE, LOSS, UNPARSED), both) == [(0, None), None, (1, None), None] * 2
    assert "2 ties, 2 unreadable of 8" in capsys.readouterr().out
    rows = label.label({"train": [(pair, "a", "b") for pair in both]}, "stub", "mine",
                       lambda pairs: label.asked(Stub(LOSS, TIE), pairs))  # fmt: skip
    assert [row["choice"] for row in rows] == [1] * 4 and all(row["extra"]["confidence"] is None for row in rows)


def test_a_judge_that_is_unreadable_most_of_the_time_is_refused():
    both = pairs(8, lambda facts, rng: (write_summary(facts, rng), write_incomplete(facts, rng)))
    with pytest.raises(UserError, match="judge stub with 6 unreadable answers of 8 is not readable in 50%"):
        label.asked(Stub(UNPARSED, UNPARSED, UNPARSED, WIN), both)
    with pytest.raises(UserError, match="without a preference in 8 pairs of train"):
        label.label({"train": [(pair, "a", "b") for pair in both]}, "stub", "m", lambda p: label.asked(Stub(TIE), p))


# --- Claude, and what goes wrong


@pytest.fixture
def server(monkeypatch):
    running = ClaudeServer(lambda prompt: prefer("A"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", running.url)
    yield running
    running.close()


CLAUDE = "--policy", f"sft={SFT}", "--judge", "claude", "--run_name", "ai"


def test_claude_is_asked_only_after_a_yes_and_once_for_both_splits(run, server):
    status, _, err = run(*CLAUDE)
    assert status == 2 and "agree with --yes" in err and len(err.splitlines()) == 1 and not server.asked
    assert not Path("runs/ai").exists()
    assert run(*CLAUDE, "--yes")[0] == 2  # the first seat always: a tie of every pair
    asked = len(server.asked)
    assert 40 < asked <= 2 * (24 + 12)  # both orders
    status, _, err = run(*CLAUDE, "--yes")
    assert status == 2 and "without a preference" in err and len(server.asked) == asked  # paid for once


def test_nonsense_from_claude_ends_in_one_sentence_and_loses_nothing(run, server, monkeypatch):
    server.answer = lambda prompt: message("As a language model, I like both.")
    status, out, err = run(*CLAUDE, "--yes")
    assert status == 2 and len(err.splitlines()) == 1
    assert "unreadable answers" in err and "answers are kept" in err
    assert not Path("runs/ai").exists() and not list(Path("runs").glob(".ai*"))
    (cache,) = Path("runs/judge").glob("*.jsonl")
    assert len(cache.read_text("utf-8").splitlines()) == 1 + len(server.asked)
    generated = {path: path.stat().st_mtime_ns for path in Path("runs/summaries").glob("*.jsonl")}
    monkeypatch.setattr(label, "chooser", lambda *_: lambda pairs: [(0, None)] * len(pairs))
    assert run(*CLAUDE)[0] == 0 and len(load_comparisons("runs/ai", "train")) > 10
    assert generated == {path: path.stat().st_mtime_ns for path in Path("runs/summaries").glob("*.jsonl")}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_posts", "0"], "num_posts 0 is not at least 1"),
        (["--temperature", "0"], "temperature 0.0 is not greater than 0"),
        (["--policy", "sft=nowhere"], "nowhere is not a folder"),
        (["--reward_model", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, flags, said):
    status, _, err = run("--policy", f"sft={SFT}", "--judge", "rm", *flags)
    assert status == 2 and said in err and len(err.splitlines()) == 1 and not Path("runs").exists()


def test_a_folder_that_exists_is_left_as_it_is(run):
    Path("runs/labels").mkdir(parents=True)
    Path("runs/labels/mine.txt").write_text("mine", encoding="utf-8")
    status, _, err = run("--policy", f"sft={SFT}", "--judge", "gold")
    assert status == 2 and "--overwrite" in err and Path("runs/labels/mine.txt").exists()
