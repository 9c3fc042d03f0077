"""The evaluation end to end on untrained models, and what it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from claude_server import ClaudeServer
from test_claude import longer
from test_report import write_lines

import eval as evaluation
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.evaluation import summaries
from nanorlhf.evaluation.metrics import length_controlled_win_rate, win_rate, words
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.run.config import cli, parse, unread_fields
from nanorlhf.storage.checkpoint import load_policy, save_policy, save_scalar
from nanorlhf.storage.jsonl import read_jsonl
from nanorlhf.tiny.data import ensure_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small tiny world and untrained models; the current folder while a test runs in it."""
    folder = tmp_path_factory.mktemp("eval")
    ensure_world(folder / "world", posts={"valid": 24, "test": 8}, comparisons={"valid1": 30})
    tokenizer = load_tokenizer(ROOT / "nanorlhf" / "tiny")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    for seed, stage in enumerate(("base", "sft", "ppo")):
        policy = Policy(config)
        initialise(policy, seed)
        save_policy(policy, folder / stage, tokenizer)
    save_scalar(reward_model_from(policy, seed=0), folder / "rm", tokenizer)
    return folder


@pytest.fixture
def evaluate(place, monkeypatch):
    def run(*flags, models=("base", "sft", "ppo")):
        monkeypatch.chdir(place)
        shutil.rmtree("runs/summaries", ignore_errors=True)  # so that what a test sees was generated in it
        again(*flags, models=models)

    def again(*flags, models=("base", "sft", "ppo")):
        monkeypatch.chdir(place)
        typed = ["--preset", "tiny", "--device", "cpu", "--data", "world", "--response_length", "8", *flags]
        typed += ["--diversity_posts", "3", "--policy", *(f"{stage}={stage}" for stage in models)] if models else []
        typed += [] if "--reward_model" in flags else ["--reward_model", "rm"]
        evaluation.main(parse(evaluation.Config, evaluation.PRESETS, evaluation.__doc__, typed))

    run.again = again
    return run


def test_eval_writes_metrics_samples_and_the_report(evaluate, place, capsys):
    evaluate("--run_name", "whole")
    folder = place / "runs" / "whole"
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    samples = read_jsonl(folder / "samples.jsonl")
    assert list(found["policies"]) == ["reference", "base", "sft", "ppo"]
    assert found["about"]["posts"] == len(samples) == 24
    played = [f"{row['ours']} {row['theirs']}" for row in found["win_rates"]]
    assert played == ["ppo sft", "ppo reference", "sft reference"]
    for row in found["win_rates"]:  # the table is what the samples say
        gaps = [s[f"gold/{row['ours']}"] - s[f"gold/{row['theirs']}"] for s in samples]
        counts = sum(g > 1e-9 for g in gaps), sum(abs(g) <= 1e-9 for g in gaps), sum(g < -1e-9 for g in gaps)
        assert counts == (row["wins"], row["ties"], row["losses"])
        assert row["rate"] == pytest.approx(win_rate(*counts))
        assert row["interval"][0] <= row["rate"] <= row["interval"][1]
        outcomes = [1.0 if g > 1e-9 else 0.0 if g < -1e-9 else 0.5 for g in gaps]
        lengths = [[len(words(s[row[side]])) for s in samples] for side in ("ours", "theirs")]
        assert row["length_controlled"] == pytest.approx(length_controlled_win_rate(outcomes, *lengths))
    for stage, row in found["policies"].items():
        assert row["gold"] == pytest.approx(sum(s[f"gold/{stage}"] for s in samples) / 24)
    assert found["reward_model"]["comparisons"] == 30 and 0.6 < found["reward_model"]["ceiling"] < 1
    gold = {stage: row["gold"] for stage, row in found["policies"].items()}
    assert gold["reference"] > gold["sft"]  # these models never learned a word
    assert samples[0]["title"].split()[0] in (folder / "report.html").read_text(encoding="utf-8")
    assert samples[0]["title"].split()[0] in (folder / "report.md").read_text(encoding="utf-8")
    assert read_jsonl(folder / "metrics.jsonl")[-1]["time/total_s"] > 0
    printed = capsys.readouterr().out
    assert "Win rates by the gold judge" in printed and "report  runs/whole/report.html" in printed


def test_the_same_seed_writes_the_same_summaries_and_numbers_and_another_seed_others(evaluate, place):
    def read(name):
        folder = place / "runs" / name
        return (folder / "metrics.json").read_text(encoding="utf-8"), [
            row["sft"] for row in read_jsonl(folder / "samples.jsonl")
        ]

    evaluate("--run_name", "a", "--num_posts", "6")
    evaluate("--run_name", "b", "--num_posts", "6")
    assert read("a") == read("b")
    evaluate("--run_name", "b", "--num_posts", "6", "--seed", "2", "--overwrite")
    assert read("a")[1] != read("b")[1]


def test_each_policy_samples_with_random_numbers_of_its_own(evaluate, place):
    """The same model twice: with shared numbers every pair would be a tie."""
    evaluate("--run_name", "twins", "--num_posts", "6", "--policy", "twin=sft", models=("sft",))
    for row in read_jsonl(place / "runs" / "twins" / "samples.jsonl"):
        assert row["sft"] != row["twin"]


def test_a_failure_on_the_way_keeps_an_earlier_evaluation_and_the_next_try_replaces_it(evaluate, place, monkeypatch):
    flags = ("--run_name", "earlier", "--num_comparisons", "6")
    evaluate(*flags, "--num_posts", "6")
    folder = place / "runs" / "earlier"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("sys.argv", ["eval.py"])
    with pytest.raises(UserError, match="lacks 5 of the 6 posts"):
        write_lines(place / "few.jsonl", [{"id": "tiny-valid-000000", "summary": "one"}])
        evaluate(*flags, "--num_posts", "6", "--samples", "x=few.jsonl", "--overwrite")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    evaluate(*flags, "--num_posts", "4", "--overwrite")
    assert len(read_jsonl(folder / "samples.jsonl")) == 4 and (folder / "report.html").is_file()


def test_policies_with_other_tokenizers_are_compared_as_text(evaluate, place, monkeypatch):
    """Each reads and writes with its own; nothing asks for the same one."""
    original = load_tokenizer
    asked = []
    monkeypatch.setattr(
        "nanorlhf.evaluation.summaries.load_tokenizer",
        lambda folder: asked.append(Path(folder).name) or original(folder),
    )
    evaluate("--run_name", "own", "--num_posts", "4")
    assert asked == ["base", "sft", "ppo"]


def test_a_policy_that_is_not_there_is_left_out_and_named(evaluate, place, monkeypatch, capsys):
    monkeypatch.setattr("nanorlhf.run.inputs.EMBEDDED", place / "no_checkpoints")
    (place / "no_checkpoints").mkdir(exist_ok=True)
    shutil.copytree(place / "sft", place / "no_checkpoints" / "sft")
    evaluate("--run_name", "part", "--split", "test", "--judge", "rm", models=())
    found = json.loads((place / "runs" / "part" / "metrics.json").read_text(encoding="utf-8"))
    assert list(found["policies"]) == ["reference", "sft"]
    assert len(found["win_rates"]) == 1 and found["about"]["posts"] == 8
    printed = capsys.readouterr().out
    for stage in ("base", "ppo"):
        assert f"{stage}: not found, left out ({place / 'no_checkpoints' / stage} is not there)" in printed
    assert "the judge is the reward model that PPO optimised" in " ".join(printed.split())


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--split", "train"], "split 'train' is not valid or test"),
        (["--judge", "gpt"], "judge 'gpt' is not one of gold, rm, claude"),
        (["--diversity_samples", "1"], "diversity_samples 1 is not 0 or at least 2"),
        (["--judge_model", "rm"], "--judge_model rm is not used by --judge gold"),
        (["--judge_cache", "x.jsonl"], "--judge_cache x.jsonl is not used by --judge gold"),
        (["--judge", "rm", "--batch"], "--batch True is not used by --judge rm"),
        (["--yes"], "--yes True is not used by --judge gold"),
        (["--policy", "disagreement=sft"], "--policy 'disagreement': expected a name"),
        (["--temperature", "-1"], "temperature -1.0 is not 0 or more"),
        (["--num_posts", "0"], "num_posts 0 is not at least 1"),
        (["--policy", "x=nowhere"], "policy x: nowhere is not a folder"),
        (["--policy", "x"], "policy x has no folder, expected x=DIR (bare names: base, sft, ppo)"),
        (["--policy", "reference=sft"], "--policy 'reference': expected a name"),
        (["--policy", "../a=sft"], "--policy '../a': expected a name"),
        (["--policy", "sft=sft"], "--policy sft: there are two of this name"),
        (["--samples", "sft=few.jsonl"], "--samples sft: there are two of this name"),
        (["--samples", "x=nowhere.jsonl"], "samples x: nowhere.jsonl is no file"),
        (["--judge", "claude", "--judge_cache", "other.jsonl"], "judge cache other.jsonl has model 'm'"),
    ],
)
def test_bad_flags_end_in_a_sentence_before_any_folder_is_made(evaluate, place, flags, said):
    write_lines(place / "other.jsonl", [{"kind": "judge", "model": "m", "prompt_sha256": "x"}])
    with pytest.raises(UserError, match=re.escape(said)):
        evaluate("--run_name", "bad", *flags)
    assert not (place / "runs" / "bad").exists()


def test_the_gold_judge_refuses_real_posts_before_anything_is_overwritten(evaluate, place):
    write_lines(
        place / "reddit" / "tldr" / "valid.jsonl",
        [{"id": "t3_a", "subreddit": "x", "title": "t", "post": "p", "summary": "s"}],
    )
    with pytest.raises(UserError, match="the gold judge knows only the tiny world's posts"):
        evaluate("--run_name", "real", "--data", "reddit")
    assert not (place / "runs" / "real").exists()


def test_an_evaluation_that_exists_is_not_overwritten(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "runs" / "kept").mkdir(parents=True)
    (place / "runs" / "kept" / "metrics.json").write_text("{}", encoding="utf-8")
    flags = "--preset tiny --data world --policy sft=sft --reward_model rm --run_name kept".split()
    with pytest.raises(SystemExit) as stop:
        cli(evaluation.main, evaluation.Config, evaluation.PRESETS, evaluation.__doc__, flags)
    assert stop.value.code == 2 and "runs/kept" in capsys.readouterr().err
    assert (place / "runs" / "kept" / "metrics.json").read_text(encoding="utf-8") == "{}"


def test_what_was_generated_once_is_found_again_and_not_for_another_model(evaluate, place, monkeypatch, capsys):
    evaluate("--run_name", "once", "--num_posts", "4")
    first = read_jsonl(place / "runs" / "once" / "samples.jsonl")
    assert "reused" not in capsys.readouterr().out

    def generate(*_, **__):
        raise AssertionError("generated again")

    with monkeypatch.context() as patch:
        patch.setattr("nanorlhf.evaluation.summaries.summarise", generate)
        evaluate.again("--run_name", "twice", "--num_posts", "4", "--judge", "rm")
        assert "reused  sft" in capsys.readouterr().out
        again = read_jsonl(place / "runs" / "twice" / "samples.jsonl")
        assert [row["ppo"] for row in again] == [row["ppo"] for row in first]
        one, two = (
            json.loads((place / "runs" / name / "metrics.json").read_text(encoding="utf-8"))
            for name in ("once", "twice")
        )
        assert one["policies"] == two["policies"]
        for flags in (["--seed", "2"], ["--temperature", "0.5"], ["--num_posts", "3"], ["--response_length", "9"]):
            with pytest.raises(AssertionError, match="generated again"):
                evaluate.again("--run_name", "other", "--num_posts", "4", *flags)
        weights = place / "sft" / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes((place / "ppo" / "model.safetensors").read_bytes())
        with pytest.raises(AssertionError, match="generated again"):
            evaluate.again("--run_name", "other", "--num_posts", "4")
        weights.write_bytes(before)
        patch.setattr("nanorlhf.evaluation.summaries.CODE", [place / "sft" / "config.json"])
        with pytest.raises(AssertionError, match="generated again"):
            evaluate.again("--run_name", "other", "--num_posts", "4")


@pytest.mark.parametrize("field", ["subreddit", "summary"])
def test_what_was_generated_is_not_found_for_other_queries_or_references(evaluate, place, monkeypatch, field):
    """The subreddit is part of the query; the reference decides the loss that is stored with the summaries."""
    evaluate("--run_name", "before", "--num_posts", "4", "--overwrite", "--judge", "rm", models=("sft",))
    found = json.loads((place / "runs" / "before" / "metrics.json").read_text(encoding="utf-8"))["policies"]["sft"]
    load = evaluation.load_posts
    monkeypatch.setattr(evaluation, "load_posts", lambda *_: [replace(p, **{field: " other"}) for p in load(*_)])
    evaluate.again("--run_name", "after", "--num_posts", "4", "--overwrite", "--judge", "rm", models=("sft",))
    again = json.loads((place / "runs" / "after" / "metrics.json").read_text(encoding="utf-8"))["policies"]["sft"]
    assert again["loss"] != found["loss"]


def test_another_reward_model_as_judge_is_named_and_not_called_the_one_that_was_optimised(evaluate, place, capsys):
    flags = ("--num_posts", "4", "--judge", "rm", "--judge_model", str(place / "rm"))
    evaluate("--run_name", "other_rm", *flags, models=("sft",))
    printed = " ".join(capsys.readouterr().out.split())
    assert "the judge is the reward model rm" in printed and "that PPO optimised" not in printed


def test_text_of_another_model_is_judged_beside_ours(evaluate, place):
    posts = [
        json.loads(line) for line in (place / "world" / "tldr" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    write_lines(place / "theirs.jsonl", [{"id": p["id"], "summary": " " + p["summary"]} for p in posts[::-1]])
    evaluate("--run_name", "beside", "--samples", "theirs=theirs.jsonl", models=("sft",))
    found = json.loads((place / "runs" / "beside" / "metrics.json").read_text(encoding="utf-8"))
    assert (
        found["policies"]["theirs"]["rougeL"] == 1.0
        and found["policies"]["theirs"]["gold"] > found["policies"]["sft"]["gold"]
    )
    assert "eos_rate" not in found["policies"]["theirs"] and "loss" not in found["policies"]["theirs"]
    played = {f"{row['ours']} {row['theirs']}": row["rate"] for row in found["win_rates"]}
    assert list(played) == ["sft theirs", "sft reference", "theirs reference"] and played["theirs reference"] == 0.5
    row = read_jsonl(place / "runs" / "beside" / "samples.jsonl")[0]
    assert row["verdict/theirs_vs_reference"] == "tie" and row["theirs"] == row["reference"]


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"id": "t3_a", "summary": "s"}], "lacks 24 of the 24 posts (the first: tiny-valid-000000)"),
        ([{"id": "t3_a"}], "has no summary (or x) of post t3_a"),
        ([{"id": "t3_a", "summary": "a"}, {"id": "t3_a", "summary": "b"}], "has two summaries of post t3_a"),
        ([{"summary": "s"}, {}], "is not what a run writes (no object with a id)"),
        ([{"id": f"tiny-valid-{i:06d}", "summary": " "} for i in range(24)], "all 24 summaries in x.jsonl are blank"),
    ],
)
def test_a_file_of_samples_that_does_not_fit_is_refused(evaluate, place, rows, said):
    write_lines(place / "x.jsonl", rows)
    with pytest.raises(UserError, match=re.escape(said)):
        evaluate("--run_name", "unfit", "--samples", "x=x.jsonl", models=("sft",))
    assert not (place / "runs" / "unfit").exists()


def test_the_loss_on_the_references_is_that_of_their_tokens_alone(place):
    posts = load_posts(place / "world", "valid")[:5]
    tokenizer, policy = load_tokenizer(place / "sft"), load_policy(place / "sft")
    queries, references = encode_posts(posts, tokenizer, 104)
    total = 0.0
    for query, reference in zip(queries, references, strict=True):
        logprobs = policy.logits([query + reference])[0].log_softmax(-1)
        total -= sum(logprobs[len(query) - 1 + i, token].item() for i, token in enumerate(reference))
    loss = summaries.reference_loss(policy, queries, references, 200, progress=lambda items, what: items)
    assert loss == pytest.approx(total / sum(map(len, references)), rel=1e-5)


def test_claude_judges_end_to_end(evaluate, place, monkeypatch):
    server = ClaudeServer(longer)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    flags = ("--judge", "claude", "--yes", "--num_posts", "6", "--judge_cache", "cache.jsonl")
    evaluate("--run_name", "claude", *flags, models=("sft", "ppo"))
    server.close()
    evaluate.again("--run_name", "claude_again", *flags, models=("sft", "ppo"))  # the server is gone: from the cache
    one, two = (
        json.loads((place / "runs" / n / "metrics.json").read_text(encoding="utf-8"))
        for n in ("claude", "claude_again")
    )
    assert one["win_rates"] == two["win_rates"] and one["about"]["judge_details"] == two["about"]["judge_details"]
    row = one["win_rates"][0]
    samples = read_jsonl(place / "runs" / "claude" / "samples.jsonl")
    longer_ones = sum((len(s["ppo"]) > len(s["sft"])) + 0.5 * (len(s["ppo"]) == len(s["sft"])) for s in samples)
    assert row["rate"] == pytest.approx(longer_ones / 6) and row["swap_agreement"] == 1.0
    page = (place / "runs" / "claude" / "report.md").read_text(encoding="utf-8")
    assert one["about"]["judge_details"]["prompt_sha256"][:12] in page and "unparsed: none" in page


def test_every_flag_of_eval_is_read():
    assert unread_fields(evaluation.Config, ROOT / "eval.py", ROOT / "nanorlhf" / "run" / "run.py") == []
