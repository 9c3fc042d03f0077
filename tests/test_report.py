"""The evaluation end to end on untrained models, its report of hostile posts, the demo's verdict on made-up runs."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval as evaluation
from nanorlhf import demo, figures, report
from nanorlhf.checkpoint import save_policy, save_scalar
from nanorlhf.config import cli, parse, unread_fields
from nanorlhf.errors import UserError
from nanorlhf.jsonl import read_jsonl
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.metrics import length_controlled_win_rate, win_rate, words
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.tiny.data import ensure_world
from nanorlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
HOSTILE = '<script>alert(1)</script> | "><img src=http://evil.example/x.png onerror=alert(2)> [a](javascript:x) *b* '
HOSTILE += "\u202eabc \ud83d 🙂"


# -- report


def results(**changes) -> dict:
    rate = {"n": 10, "wins": 6, "ties": 1, "losses": 3, "rate": 0.65, "interval": [0.56, 0.74]}
    rate |= {"length_controlled": 0.6, "length_controlled_interval": [0.5, 0.7]}
    found = {
        "about": {"posts": 10, "split": "valid", "temperature": 0.7, "response_length": 32, "judge": "gold", "seed": 1},
        "models": {"sft": {"folder": "runs/sft/final", "from": "the sft run"}},
        "policies": {
            "reference": {"words": 12.0, "gold": 3.5},
            "base": {"rougeL": 0.2, "words": 14.0, "eos_rate": 0.1, "gold": -1.0},
            "sft": {"rougeL": 0.6, "words": 13.0, "eos_rate": 0.99, "gold": 3.5},
            "ppo": {"rougeL": 0.6, "words": 17.0, "eos_rate": 0.98, "gold": 4.2, "title_copy": None},
        },
        "reward_model": {
            "comparisons": 256,
            "accuracy": 0.72,
            "interval": [0.66, 0.77],
            "length_baseline": 0.6,
            "ceiling": 0.84,
            "gold_ceiling": 0.8,
        },
        "win_rates": [
            {"ours": "ppo", "theirs": "sft"} | rate,
            {"ours": "ppo", "theirs": "reference"} | rate,
            {"ours": "sft", "theirs": "reference"} | rate,
        ],
    }
    return found | changes


def sample(text: str) -> dict:
    row = {
        "step": 0,
        "id": "x",
        "subreddit": "r",
        "title": text,
        "post": text,
        "reference": text,
        "base": text,
        "sft": text,
        "ppo": text,
    }
    return row | {f"{key}/{name}": 1.0 for key in ("gold", "score") for name in ("reference", "base", "sft", "ppo")}


class Tags(HTMLParser):
    """The tags and attributes of a page, and whether what is opened is closed."""

    VOID = ("meta", "img")

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.attributes, self.open, self.text = set(), [], [], ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_hostile_post_stays_text_in_html():
    page = report.html_page(results(), [sample(HOSTILE)], {"ppo.png": b"\x89PNG"})
    tags = Tags(page)
    assert not tags.seen & {"script", "iframe", "object", "link", "a", "form"}
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    addresses = [value for name, value in tags.attributes if name in ("src", "href")]
    assert addresses == ["data:image/png;base64,iVBORw=="]
    assert "<script>alert(1)</script>" in tags.text  # what the reader sees
    assert page.isascii()  # also a lone surrogate, which no file could hold


def test_the_page_is_readable_on_a_phone_in_light_and_dark_and_loads_nothing():
    page = report.html_page(results(), [sample("a post")], {})
    assert "width=device-width" in page and "prefers-color-scheme: dark" in page and "default-src 'none'" in page
    assert not re.search(r"https?://|url\(|@import", page)


def test_a_hostile_post_stays_text_in_markdown():
    page = report.markdown_page(results(), [sample(HOSTILE + "\n\n# a heading\n| a | b |")], {})
    assert page.isascii() and "<" not in page
    assert not re.search(r"(?<!\\)\]\(javascript", page)
    assert "# a heading" not in page.replace("\\#", "")
    row = next(line for line in page.splitlines() if line.startswith("| PPO | ") and "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells, although the text has bars


def test_the_three_renderings_show_the_same_numbers():
    for page in (
        "\n".join(map(report.console, report.tables(results()))),
        report.html_page(results(), [], {}),
        report.markdown_page(results(), [], {}),
    ):
        for cell in ("0.650", "0.560 to 0.740", "0.720", "0.840", "4.20", "98.0%"):
            assert cell in page


def test_what_was_not_measured_is_a_dash_and_an_empty_row_is_left_out():
    table = report.tables(results())[0]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["ROUGE-L"] == ["-", "0.200", "0.600", "0.600"]
    assert "title copied" not in rows
    assert len(report.tables(results(reward_model={}, win_rates=[]))) == 1


def test_an_escape_sequence_in_a_post_does_not_reach_the_terminal():
    assert "\x1b" not in report.console(report.sample_table(sample("\x1b[2J [red]text[/red]")))
    assert "[red]text[/red]" in report.console(report.sample_table(sample("[red]text[/red]")))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_figure_command_draws_a_ppo_run(tmp_path, capsys):
    rows = [
        {"step": i, "objective/scores": 0.1 * i, "objective/gold": 3 + 0.05 * i, "objective/kl": 0.2 * i}
        for i in range(1, 9)
    ]
    write_lines(tmp_path / "ppo" / "metrics.jsonl", rows)
    report.main(["figure", str(tmp_path / "ppo"), str(tmp_path / "docs" / "ppo.png")])
    assert (tmp_path / "docs" / "ppo.png").read_bytes().startswith(b"\x89PNG")
    assert len(figures.ppo_figure(rows).axes) == 3
    without_gold = [{"step": 1, "objective/scores": 0.1, "objective/kl": None}]  # as on real data
    assert len(figures.ppo_figure(without_gold).axes) == 2
    with pytest.raises(SystemExit) as stop:
        report.main(["figure", str(tmp_path / "nothing"), str(tmp_path / "x.png")])
    assert stop.value.code == 2 and "nothing/metrics.jsonl" in capsys.readouterr().err


def test_curves_come_from_the_run_that_made_the_model_or_from_beside_an_embedded_one(tmp_path):
    write_lines(tmp_path / "runs" / "ppo" / "metrics.jsonl", [{"step": 1}])
    write_lines(tmp_path / "checkpoints" / "sft" / "metrics.jsonl", [{"step": 2}])
    assert figures.training_log(tmp_path / "runs" / "ppo" / "final") == [{"step": 1}]
    assert figures.training_log(tmp_path / "checkpoints" / "sft") == [{"step": 2}]
    assert figures.training_log(tmp_path / "elsewhere") == []


# -- demo


@pytest.fixture
def runs(tmp_path):
    """Run folders of a demo that passes every bar."""

    def write(found=None, ppo_changes=(), root=tmp_path / "runs"):
        ppo = [
            {
                "step": i,
                "time": 100.0 + i,
                "objective/scores": 0.1 * i,
                "objective/kl": 0.3 * i,
                "perf/tokens_per_s": 900 + i,
            }
            for i in range(1, 6)
        ]
        ppo[0] |= {"preflight/ratio": 1.00001, "preflight/kl": -1e-5}
        ppo[-1] |= {"time/total_s": 61.0}
        for index, name, value in ppo_changes:
            ppo[index][name] = value
        logs = {
            "sft": [
                {"step": 1, "time": 5.0, "train/sft/loss": 4.2},
                {"step": 2, "time": 6.0, "train/sft/loss": 0.5, "validation/sft/loss": 0.4},
            ],
            "rm": [{"step": 1, "train/rm/loss": 0.7, "time/total_s": 30.5}],
            "ppo": ppo,
            "eval": [{"step": 0, "time": 10.0, "time/total_s": 9.0}],
        }
        for stage, rows in logs.items():
            write_lines(root / f"demo_{stage}" / "metrics.jsonl", rows)
            (root / f"demo_{stage}" / "config.json").write_text(
                json.dumps({"stage": stage, "started": "1970-01-01T00:00:01+00:00"})
            )
        (root / "demo_eval" / "metrics.json").write_text(json.dumps(found or results()))
        return root

    return write


def verdict(root: Path, *flags: str) -> int:
    try:
        demo.main(["--runs", str(root), *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_demo_that_passes_every_bar_exits_0_and_says_what_it_reached(runs, capsys):
    assert verdict(runs()) == 0
    printed = capsys.readouterr().out
    expected = ["all 10 bars passed", "4.20 -> 0.50", "0.200 -> 0.600", "0.720 (0.660 to 0.770)", "0.600 -> 0.840"]
    expected += [
        "0.10 -> 0.50",
        "3.50 -> 4.20",
        "0.650 (0.560 to 0.740)",
        "1.50",
        "61.0",
        "30.5",
        "903",
        "eval/report.html",
    ]
    for text in expected:
        assert text in printed, text
    assert "MISSED" not in printed


def changed(path: str, value) -> dict:
    """The results with one number changed; path such as "policies.ppo.gold" or "win_rates.0.rate"."""
    found = json.loads(json.dumps(results()))
    *parents, name = path.split(".")
    place = found
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[name] = value
    return found


@pytest.mark.parametrize(
    "path, value, bar",
    [
        ("policies.base.rougeL", 0.301, "SFT ROUGE-L / base ROUGE-L"),
        ("reward_model.accuracy", 0.679, "reward model's accuracy"),
        ("policies.ppo.gold", 3.89, "gold score, PPO - SFT"),
        ("win_rates.0.rate", 0.649, "gold win rate, PPO vs SFT"),
        ("win_rates.0.interval", [0.55, 0.74], "its 95% interval's lower end"),
        ("win_rates.1.rate", 0.579, "gold win rate, PPO vs reference"),
        ("policies.ppo.eos_rate", 0.949, "share of PPO's summaries that stop"),
        ("policies.ppo.eos_rate", None, "share of PPO's summaries that stop: -"),
    ],
)
def test_each_bar_of_the_evaluation_can_be_missed(runs, capsys, path, value, bar):
    assert verdict(runs(changed(path, value))) == 1
    printed = capsys.readouterr().out.split("missed bars:\n")[1].splitlines()
    assert len(printed) == 1 and printed[0].strip().startswith(bar)


@pytest.mark.parametrize(
    "index, name, value, bar",
    [
        (0, "preflight/ratio", 1.0002, "|ratio - 1| before"),
        (0, "preflight/ratio", None, "|ratio - 1| before"),
        (0, "preflight/kl", -0.002, "|KL| before"),
        (2, "objective/kl", 10.0, "largest objective/kl"),
        (2, "objective/kl", None, "largest objective/kl"),  # it was not finite
    ],
)
def test_each_bar_of_the_ppo_run_can_be_missed(runs, capsys, index, name, value, bar):
    assert verdict(runs(ppo_changes=[(index, name, value)])) == 1
    printed = capsys.readouterr().out.split("missed bars:\n")[1].splitlines()
    assert len(printed) == 1 and printed[0].strip().startswith(bar)


def test_every_bar_is_measured():
    nothing = {"ppo": [{}], "results": {}}
    assert {name for name, *_ in demo.BARS} == set(demo.measure(nothing))
    assert len(demo.BARS) == 10


def test_wins_by_another_judge_pass_no_bar(runs, capsys):
    assert verdict(runs(changed("about.judge", "rm"))) == 1
    assert "gold win rate, PPO vs SFT: -" in capsys.readouterr().out


def test_runs_of_other_names_can_be_judged(runs):
    root = runs()
    for stage in demo.STAGES:
        (root / f"demo_{stage}").rename(root / stage)
    assert verdict(root) == 2
    assert verdict(root, "--prefix", "") == 0


def test_an_unfinished_demo_exits_2_with_a_sentence(runs, tmp_path, capsys):
    (runs() / "demo_eval" / "metrics.json").unlink()
    assert verdict(tmp_path / "runs") == 2
    assert verdict(tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.count("error: ") == 2


# -- eval.py


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
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
def evaluate(workplace, monkeypatch):
    def run(*flags, models=("base", "sft", "ppo")):
        monkeypatch.chdir(workplace)
        typed = ["--preset", "tiny", "--device", "cpu", "--data", "world", "--response_length", "8", *flags]
        typed += [word for stage in models for word in (f"--{stage}_model", stage)] + ["--reward_model", "rm"]
        evaluation.main(parse(evaluation.Config, evaluation.PRESETS, evaluation.__doc__, typed))

    return run


def test_eval_writes_metrics_samples_and_the_report(evaluate, workplace, capsys):
    evaluate("--run_name", "whole")
    folder = workplace / "runs" / "whole"
    found = json.loads((folder / "metrics.json").read_text())
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
    assert samples[0]["title"].split()[0] in (folder / "report.html").read_text()
    assert samples[0]["title"].split()[0] in (folder / "report.md").read_text()
    assert read_jsonl(folder / "metrics.jsonl")[-1]["time/total_s"] > 0
    printed = capsys.readouterr().out
    assert "Win rates by the gold judge" in printed and "report  runs/whole/report.html" in printed


def test_the_same_seed_writes_the_same_summaries_and_numbers_and_another_seed_others(evaluate, workplace):
    def read(name):
        folder = workplace / "runs" / name
        return (folder / "metrics.json").read_text(), [row["sft"] for row in read_jsonl(folder / "samples.jsonl")]

    evaluate("--run_name", "a", "--num_posts", "6")
    evaluate("--run_name", "b", "--num_posts", "6")
    assert read("a") == read("b")
    evaluate("--run_name", "b", "--num_posts", "6", "--seed", "2", "--overwrite")
    assert read("a")[1] != read("b")[1]


def test_each_policy_samples_with_random_numbers_of_its_own(evaluate, workplace, monkeypatch):
    """The same model twice: with shared numbers every pair would be a tie."""
    monkeypatch.setattr("nanorlhf.inputs.EMBEDDED", workplace / "no_checkpoints")
    shutil.copytree(workplace / "sft", workplace / "ppo_is_sft")
    evaluate("--run_name", "twins", "--num_posts", "6", "--ppo_model", "ppo_is_sft", models=("sft",))
    for row in read_jsonl(workplace / "runs" / "twins" / "samples.jsonl"):
        assert row["sft"] != row["ppo"]


@pytest.mark.parametrize("stage, named", [("rm", "the reward model"), ("ppo", "the ppo policy")])
def test_a_model_with_another_tokenizer_is_refused_and_an_earlier_evaluation_is_kept(
    evaluate, workplace, monkeypatch, stage, named
):
    evaluate("--run_name", f"earlier_{stage}", "--num_posts", "6", "--num_comparisons", "6")
    folder = workplace / "runs" / f"earlier_{stage}"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def load(folder):
        tokenizer = load_tokenizer(folder)
        if Path(folder).name == stage:
            tokenizer._tokens[-1] += b"x"
        return tokenizer

    monkeypatch.setattr(evaluation, "load_tokenizer", load)
    with pytest.raises(UserError, match=f"tokenizer: that of {named} has other tokens"):
        evaluate("--run_name", f"earlier_{stage}", "--num_posts", "6", "--num_comparisons", "6", "--overwrite")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["eval.py"])
    evaluate("--run_name", f"earlier_{stage}", "--num_posts", "4", "--num_comparisons", "6", "--overwrite")
    assert len(read_jsonl(folder / "samples.jsonl")) == 4 and (folder / "report.html").is_file()


def test_a_policy_that_is_not_there_is_left_out_and_named(evaluate, workplace, monkeypatch, capsys):
    monkeypatch.setattr("nanorlhf.inputs.EMBEDDED", workplace / "no_checkpoints")
    evaluate("--run_name", "part", "--split", "test", "--judge", "rm", models=("sft",))
    found = json.loads((workplace / "runs" / "part" / "metrics.json").read_text())
    assert list(found["policies"]) == ["reference", "sft"]
    assert len(found["win_rates"]) == 1 and found["about"]["posts"] == 8
    printed = capsys.readouterr().out
    assert "ppo: not found, left out" in printed and "base: not found, left out" in printed
    assert "the judge is the reward model that PPO optimised" in " ".join(printed.split())


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--split", "train"], "split 'train' is not valid or test"),
        (["--judge", "claude"], "judge 'claude' is not one of gold, rm"),
        (["--temperature", "-1"], "temperature -1.0 is not 0 or more"),
        (["--num_posts", "0"], "num_posts 0 is not at least 1"),
        (["--ppo_model", "nowhere"], "ppo_model: nowhere is not a folder"),
    ],
)
def test_bad_flags_end_in_a_sentence_before_any_folder_is_made(evaluate, workplace, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        models = ("base", "sft") if "--ppo_model" in flags else ("base", "sft", "ppo")
        evaluate("--run_name", "bad", *flags, models=models)
    assert not (workplace / "runs" / "bad").exists()


def test_the_gold_judge_refuses_real_posts_before_anything_is_overwritten(evaluate, workplace):
    write_lines(
        workplace / "reddit" / "tldr" / "valid.jsonl",
        [{"id": "t3_a", "subreddit": "x", "title": "t", "post": "p", "summary": "s"}],
    )
    with pytest.raises(UserError, match="the gold judge knows only the tiny world's posts"):
        evaluate("--run_name", "real", "--data", "reddit")
    assert not (workplace / "runs" / "real").exists()


def test_an_evaluation_that_exists_is_not_overwritten(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (workplace / "runs" / "kept").mkdir(parents=True)
    (workplace / "runs" / "kept" / "metrics.json").write_text("{}")
    flags = "--preset tiny --data world --sft_model sft --reward_model rm --run_name kept".split()
    with pytest.raises(SystemExit) as stop:
        cli(evaluation.main, evaluation.Config, evaluation.PRESETS, evaluation.__doc__, flags)
    assert stop.value.code == 2 and "runs/kept" in capsys.readouterr().err
    assert (workplace / "runs" / "kept" / "metrics.json").read_text() == "{}"


def test_every_flag_of_eval_is_read():
    assert unread_fields(evaluation.Config, ROOT / "eval.py", ROOT / "nanorlhf" / "run.py") == []


def test_nan_metrics_are_shown_as_a_dash():
    assert report.number(math.nan) == report.number(None) == "-"
    assert report.interval(None) == "-"
