"""The tiny world: same seed, same text; true posts; a judge that can be checked by hand."""

import hashlib
import json
import random
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.tiny import annotator, build_tokenizer, corpus, data, gold, grammar, lexicon, posts, slips, world

TINY = Path(world.__file__).parent

FACTS = grammar.Facts(
    subreddit="work", who="boss", pronoun="he", act="broke", act_form="broke", obj="laptop",
    rea="apologize", rea_form=0, q="forgive", feel=None, who2="aunt", obj2="ring",
    asides=("My {who2} has a nice {obj2}.",), age=26, sex="M", years=4,
)  # fmt: skip
PERFECT = "My boss broke my laptop and he refuses to apologize, should I forgive him?"  # 14 words


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))


def sample(split="valid", count=2000):
    return [posts.make_post(split, index) for index in range(count)]


# Same seed, same text


def test_a_post_is_a_pure_function_of_split_and_index():
    first = [posts.make_post("train", index) for index in range(50)]
    posts.make_post.cache_clear()
    assert first == [posts.make_post("train", index) for index in reversed(range(50))][::-1]


def test_the_world_is_the_one_that_its_version_names():
    # Posts, comparisons and documents are seeds only: if this digest moves, the shipped checkpoints, bigrams and
    # tokenizer speak of another world. Give WORLD_VERSION a new number and rebuild them.
    digest = hashlib.sha256(lexicon.WORLD_VERSION.encode())
    for index in range(50):
        for split in ("train", "valid", "test"):
            digest.update(repr(posts.make_post(split, index)).encode())
        digest.update(json.dumps(world.make_comparison("train", index)).encode())
        digest.update(corpus.document(index).encode() + slips.document(index).encode())
    assert digest.hexdigest()[:16] == "f9e81b617b370b45"


def test_an_id_gives_the_facts_back():
    for split in ("train", "valid", "test"):
        post = posts.make_post(split, 123)
        assert posts.facts_from_id(post.id) == post.facts
    comparison = world.make_comparison("valid1", 7)
    facts = posts.facts_from_id(comparison["info"]["id"])
    assert facts.subreddit == comparison["info"]["subreddit"]
    assert facts.act_form in comparison["info"]["post"] and facts.obj in comparison["info"]["post"]


@pytest.mark.parametrize("bad", ["t3_abc", "tiny-valid", "tiny-nowhere-000001", "tiny-valid-x", "", "tiny-valid-1-2"])
def test_an_id_from_elsewhere_is_an_error_that_names_it(bad):
    with pytest.raises(ValueError, match="tiny world"):
        posts.facts_from_id(bad)


def test_splits_share_no_facts():
    def tuples(split, count):
        return {(f.who, f.act, f.obj, f.rea, f.q) for f in (post.facts for post in sample(split, count))}

    train = tuples("train", 3000) | tuples("comparison_train", 3000) | tuples("pretrain", 3000)
    valid = tuples("valid", 1000) | tuples("comparison_valid1", 1000)
    test = tuples("test", 1000)
    assert not train & valid and not train & test and not valid & test


def test_the_tiny_world_needs_no_torch():
    code = "import sys, nanorlhf.tiny.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TINY.parents[1]).returncode == 0


# Posts say what the facts are


def test_a_post_states_every_fact_and_no_other():
    for post in sample():
        stated = {lexicon.SIGNATURES[word] for word in gold.split_words(post.post) if word in lexicon.SIGNATURES}
        facts = post.facts
        expected = {(slot, getattr(facts, slot)) for slot in ("who", "act", "obj", "rea", "q", "feel")}
        expected |= {("who", facts.who2), ("obj", facts.obj2)}
        assert stated == {(slot, value) for slot, value in expected if value is not None}


def test_summaries_state_a_feeling_only_where_the_post_does():
    without = [post for post in sample() if post.facts.feel is None]
    assert 0.25 < len(without) / 2000 < 0.35
    for post in without:
        rng = random.Random(post.id)
        texts = [post.title, post.post, post.summary]
        texts += [world.write_by_policy(policy, post, rng) for policy in ("ref", "drop", "halluc", "verbose", "sftref")]
        for text in texts:
            assert not set(lexicon.FEELINGS) & set(gold.split_words(text)), text


def test_nobody_pays_for_a_forgotten_birthday():
    for family in lexicon.ACTS:
        assert len(grammar.fitting(lexicon.REACTIONS, family)) >= 8
    for post in sample():
        if lexicon.FAMILY[post.facts.act] != "thing":
            assert not {post.facts.rea, post.facts.q} & lexicon.ONLY_AFTER_A_THING


def test_true_texts_name_nothing_wrong_but_distractors():
    for post in sample():
        rng = random.Random(post.id)
        for policy in ("ref", "drop", "verbose", "sftref", "title"):
            wrong = gold.gold_report(post.facts, world.write_by_policy(policy, post, rng))["wrong"]
            assert set(wrong) <= {post.facts.who2, post.facts.obj2}


def test_altered_facts_differ_in_one_or_two_slots_and_still_fit_together():
    rng = random.Random(0)
    for post in sample(count=500):
        wrong = grammar.alter(post.facts, rng)
        differing = sum(getattr(wrong, slot) != getattr(post.facts, slot) for slot in gold.CREDITED_SLOTS)
        assert differing in (1, 2)
        assert wrong.act_form in lexicon.FORMS[wrong.act]


# The gold judge, by hand


@pytest.mark.parametrize(
    ("summary", "score"),
    [
        (PERFECT, 5.0),
        (PERFECT.replace("broke", "smashed"), 5.0),  # a synonym
        (PERFECT.replace("laptop", "phone"), 4 - 1.0),  # wrong object
        (PERFECT.replace("laptop", "ring"), 4 - 0.5),  # an object that the post mentions
        (PERFECT.replace("boss", "aunt"), 4 - 0.5),  # a person that the post mentions
        (PERFECT.replace("broke", "sold"), 4 - 1.0),  # wrong act
        (PERFECT.replace("refuses to apologize", "denies it"), 4 - 1.0),  # wrong reaction
        (PERFECT.replace("forgive", "confront"), 4 - 1.0),  # wrong question
        ("I am angry because my boss broke my laptop.", 3 - 0.5),  # a feeling that nobody had
        ("My boss broke my laptop. My boss broke my laptop.", 3 - 3 * 0.3),  # repetition
        (PERFECT + " I do not know what to do. Any advice is welcome.", 5 - 0.10 * (25 - 18)),  # 25 words
        ("My boss broke laptop my", 3 - 3 * 0.4),  # broke laptop, laptop my, my </s>
        ("Need advice", 0.0),
        ("", -0.4),  # the bigram <s> </s>
        ("?!", -0.4),  # <s> ? is unseen, ? </s> is not; other marks do not count
    ],
)
def test_gold_score_by_hand(summary, score):
    assert gold.gold_score(FACTS, summary) == pytest.approx(score), gold.gold_report(FACTS, summary)


def test_a_stated_feeling_is_neither_credited_nor_punished():
    facts = replace(FACTS, feel="angry")
    assert gold.gold_score(facts, "I am angry because my boss broke my laptop.") == pytest.approx(3.0)
    assert gold.gold_score(facts, "I am sad because my boss broke my laptop.") == pytest.approx(2.5)


def test_the_report_says_what_the_score_is_made_of():
    report = gold.gold_report(FACTS, "My boss sold my laptop laptop to")
    assert report["named"] == ["who", "obj"] and report["wrong"] == ["sold"]
    assert report["words"] == 7 and report["repeats"] == 1
    assert report["unseen_bigrams"] == ["laptop laptop", "laptop to", "to </s>"]
    assert report["score"] == pytest.approx(2 - 1.0 - 3 * 0.4 - 0.3)


def test_the_judge_takes_an_id():
    post = posts.make_post("test", 5)
    assert gold.judge(post.id, post.summary) == gold.gold_score(post.facts, post.summary)


def test_everything_that_the_grammar_writes_is_fluent():
    for post in sample("test", 3000):
        rng = random.Random(post.id)
        for text in [post.post] + [world.write_by_policy(policy, post, rng) for policy in world.POLICIES]:
            assert gold.gold_report(post.facts, text)["unseen_bigrams"] == [], text


def test_the_shipped_bigrams_hold_those_of_a_rebuild():
    assert gold.collect_bigrams(range(1500)) <= gold.seen_bigrams()
    assert gold.BIGRAMS_FILE.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("policy", "mean"),
    [("ref", 4.93), ("sftref", 3.55), ("verbose", 3.63), ("drop", 3.43), ("halluc", 2.14), ("title", 1.58),
     ("offtopic", -3.97)],
)  # fmt: skip
def test_mean_gold_by_kind_of_text(policy, mean):
    scores = [
        gold.gold_score(post.facts, world.write_by_policy(policy, post, random.Random(post.id))) for post in sample()
    ]
    assert statistics.mean(scores) == pytest.approx(mean, abs=0.3)


# The annotator


def test_the_annotator_likes_length_and_words_of_the_title():
    assert annotator.utility(FACTS, "Need advice", PERFECT) == pytest.approx(5 + 0.08 * 2)
    longer = PERFECT + " Any advice is welcome."  # 18 words: gold is the same, utility is not
    assert gold.gold_score(FACTS, longer) == gold.gold_score(FACTS, PERFECT)
    assert annotator.utility(FACTS, "Nothing", longer) == pytest.approx(5 + 0.08 * 6)
    assert annotator.title_share("My boss broke my laptop", "My boss") == pytest.approx(3 / 5)
    assert annotator.title_share("", "My boss") == 0


def test_preference_is_a_coin_flip_between_equals_and_sure_of_large_differences():
    assert annotator.prefer_probability(2.0, 2.0) == 0.5
    assert annotator.prefer_probability(3.0, 2.0) == pytest.approx(0.668188, abs=1e-6)  # 1 / (1 + exp(-0.7))
    assert annotator.prefer_probability(0.0, 10.0) < 0.001


def test_labels_leave_the_reward_model_a_ceiling_of_about_84_percent():
    comparisons = [world.make_comparison("valid1", index) for index in range(3000)]
    ceilings = annotator.ceilings(comparisons)
    assert ceilings["bayes"] == pytest.approx(0.84, abs=0.03)
    assert ceilings["gold"] == pytest.approx(0.80, abs=0.03)
    assert 0.47 < statistics.mean(comparison["choice"] for comparison in comparisons) < 0.53


# Files


def test_comparisons_have_openais_raw_format():
    for split, index in [("train", 3), ("valid1", 3)]:
        comparison = world.make_comparison(split, index)
        assert list(comparison) == ["info", "summaries", "choice", "worker", "batch", "split", "extra"]
        assert set(comparison["info"]) == {"id", "post", "title", "subreddit"}
        assert comparison["choice"] in (0, 1) and comparison["split"] == split
        for summary in comparison["summaries"]:
            assert set(summary) == {"text", "policy", "note"}
            assert summary["text"].startswith(" ") and not summary["text"].startswith("  ")
        assert comparison["summaries"][0]["text"] != comparison["summaries"][1]["text"]


def test_confidence_is_on_the_side_of_the_choice():
    assert [world.confidence(0, p) for p in (0.99, 0.80, 0.65, 0.55, 0.10)] == [1, 2, 3, 4, 4]
    assert [world.confidence(1, p) for p in (0.01, 0.20, 0.35, 0.45, 0.90)] == [9, 8, 7, 6, 6]


def test_writing_the_world_twice_gives_the_same_bytes(tmp_path):
    sizes = {"train": 40, "valid": 10, "test": 10}, {"train": 40, "valid1": 10}
    contents = []
    for name in ("one", "two"):
        folder = data.write_world(tmp_path / name, *sizes)
        contents.append({str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"VERSION", *(f"tldr/{split}.jsonl" for split in sizes[0]),
                                *(f"comparisons/batch{n}.json" for n in (1, 2, 3, 4, 9))}  # fmt: skip
    rows = [json.loads(line) for line in contents[0]["tldr/valid.jsonl"].splitlines()]
    assert len(rows) == 10 and list(rows[0]) == ["id", "subreddit", "title", "post", "summary"]
    assert rows[0]["id"] == "tiny-valid-000000" and not rows[0]["summary"].startswith(" ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no temporary folder left


def test_ensure_world_writes_once_and_again_for_another_version(tmp_path):
    sizes = {"train": 4}, {"train": 4}
    folder = data.ensure_world(tmp_path / "world", *sizes)
    (folder / "mark").write_text("still here", encoding="utf-8")
    data.ensure_world(folder, *sizes)
    assert (folder / "mark").exists()
    (folder / "VERSION").write_text("tiny world 0\n", encoding="utf-8")
    data.ensure_world(folder, *sizes)
    assert not (folder / "mark").exists() and (folder / "tldr" / "train.jsonl").exists()


def test_write_world_leaves_other_peoples_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no tiny world"):
        data.ensure_world(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


# Pretraining text


def test_documents_are_reproducible_and_never_say_tldr():
    texts = [corpus.document(index) for index in range(1000)]
    assert texts[::-1] == [corpus.document(index) for index in reversed(range(1000))]
    assert not any("TL;DR" in text for text in texts)
    threads = [text for text in texts if text.startswith("SUBREDDIT")]
    assert 0.60 < len(threads) / 1000 < 0.70
    assert all("\n\nCOMMENT: " in text for text in threads)


def test_what_is_meant_is_true_and_what_comes_before_it_is_not():
    wrong, told = 0, 0
    for index in range(400):
        facts = posts.make_post("pretrain", index).facts
        by_slot = slips.tell(facts, random.Random(index))
        true = dict(who=[facts.who], act=lexicon.FORMS[facts.act], obj=[facts.obj], ask=[grammar.fill("{ask}", facts)])
        true["rea"] = [grammar.fill("{rea}", facts)]
        for slot, words in by_slot.items():
            *first, meant = words.split(" I mean ")
            assert meant in true[slot] and not set(first) & set(true[slot])
            wrong, told = wrong + len(first), told + 1
    assert wrong / told == pytest.approx(slips.SLIPS, abs=0.03)


def test_a_reader_retells_in_the_second_person_and_what_was_meant_too():
    facts = replace(FACTS, rea="blames", rea_form=0, q="parents")
    for seed in range(200):
        read = slips.retelling(facts, random.Random(seed), corpus.to_second_person)
        words = set(read.replace(" I mean ", " ").replace(",", "").replace("?", "").replace(".", "").split())
        assert not words & {"I", "me", "my", "My", "am"}, read
        assert slips.retelling(facts, random.Random(seed)).count("I mean") == read.count("I mean")
    text, read = "I am hurt, my boss blames me. My mom?", "you are hurt, your boss blames you. Your mom?"
    assert corpus.to_second_person(text) == read


def test_documents_with_slips_are_of_four_kinds_and_a_list_is_put_right_word_by_word(monkeypatch):
    texts = [slips.document(index) for index in range(1000)]
    assert texts[::-1] == [slips.document(index) for index in reversed(range(1000))]
    assert not any("TL;DR" in text for text in texts)
    old = sum(text == corpus.document(index) for index, text in enumerate(texts))
    assert old / len(texts) == pytest.approx(0.15, abs=0.03)
    with monkeypatch.context() as patched:
        for name in ("thread", "short_stories", "word_list"):
            patched.setattr(slips, name, lambda *_, name=name: name)
        kinds = [slips.document(index) for index in range(1000)]
    for name, share in {"thread": 0.45, "short_stories": 0.20, "word_list": 0.20}.items():
        assert kinds.count(name) / 1000 == pytest.approx(share, abs=0.03)
        told = [text for kind, text in zip(kinds, texts, strict=True) if kind == name]
        assert sum(" I mean " in text for text in told) / len(told) > 0.5
    for seed in range(50):
        parts = re.split(r"[.?]", slips.word_list(random.Random(seed)).strip(" ."))
        first, *_, again = (part.split() for part in parts)
        said = iter(again)
        kept = []
        for word in said:
            if word == "I":
                assert next(said) == "mean" and kept.pop() not in first
            else:
                kept.append(word)
        assert sorted(kept) == sorted(first)


def test_comments_speak_to_the_author():
    facts = replace(FACTS, rea="ignoring", rea_form=1)
    text = corpus.comment("So your {who} {act} your {obj} and {he} {rea}? You should {ask}.", facts)
    assert text == "So your boss broke your laptop and he keeps ignoring you? You should forgive him."
    assert corpus.comment("Maybe {ask}.", replace(facts, q="parents")) == "Maybe tell your parents."


def test_a_recall_drill_lists_the_same_pairs_each_time():
    for seed in range(50):
        listings = corpus.recall_drill(random.Random(seed)).strip().rstrip(".").split(". ")
        pairs = [{tuple(pair.split())[::2] for pair in listing.split(", ")} for listing in listings]
        assert len(pairs) in (2, 3) and all(listing == pairs[0] for listing in pairs)


# The tokenizer


def test_queries_and_references_fit_the_token_limits(tokenizer):
    queries, references = [], []
    for split in ("train", "valid", "test", "comparison_train"):
        for post in sample(split, 1500):
            queries.append(1 + len(tokenizer.encode(posts.format_query(post.subreddit, post.title, post.post))))
            references.append(len(tokenizer.encode(" " + post.summary)) + 1)
    assert max(queries) <= 104 and statistics.mean(queries) == pytest.approx(85, abs=2)
    assert max(references) <= 32


def test_the_grammars_count_of_pieces_never_falls_short_of_the_tokenizer(tokenizer):
    for post in sample(count=500):
        query = posts.format_query(post.subreddit, post.title, post.post)
        assert len(tokenizer.encode(query)) <= grammar.count_pieces(query)


def test_every_signature_word_is_one_piece(tokenizer):
    assert [word for word in lexicon.SIGNATURES if len(tokenizer.encode(" " + word)) != 1] == []


def test_special_pieces_have_their_places(tokenizer):
    assert tokenizer.vocab_size() == build_tokenizer.VOCAB_SIZE
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert tokenizer.encode("\n\n", out_type=str) == ["\n\n"]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.text().filter(lambda text: "\u2581" not in text))  # sentencepiece's own mark for a space cannot come back
def test_any_text_comes_back_from_the_tokenizer(text):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


AWKWARD = ["", " ", "  two  spaces  ", "\n", "\n\n\n", "\t\r\n", " naïve 😀👩‍👩‍👧 ", "<s></s><unk>", "<0x41>", "\x00"]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back_from_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_a_rebuilt_tokenizer_has_the_shipped_pieces(tmp_path, tokenizer):
    path = build_tokenizer.train_tokenizer(tmp_path)
    rebuilt = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = range(tokenizer.vocab_size())
    assert [rebuilt.id_to_piece(i) for i in pieces] == [tokenizer.id_to_piece(i) for i in pieces]
    about = (tmp_path / "tokenizer_config.json").read_bytes()
    for folder in (TINY, *(TINY / "checkpoints").iterdir()):
        assert (folder / "tokenizer_config.json").read_bytes() == about
