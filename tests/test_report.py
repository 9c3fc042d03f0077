"""The report: hostile posts stay text, the same numbers in every rendering, curves of the right runs."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import train_ppo
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.evaluation import figures, report, tables
from nanorlhf.evaluation.html_page import html_page
from nanorlhf.run.inputs import EMBEDDED

HOSTILE = '<script>alert(1)</script> | "><img src=http://evil.example/x.png onerror=alert(2)> [a](javascript:x) *b* '
HOSTILE += "\u202eabc \ud83d 🙂"


# -- report


def results(**changes) -> dict:
    rate = {"n": 10, "wins": 6, "ties": 1, "losses": 3, "rate": 0.65, "interval": [0.56, 0.74]}
    rate |= {"length_controlled": 0.6, "length_controlled_interval": [0.5, 0.7]}
    found = {
        "about": {
            "posts": 10,
            "split": "valid",
            "temperature": 0.7,
            "response_length": 32,
            "judge": "gold",
            "seed": 1,
            "diversity_samples": 4,
            "diversity_posts": 8,
            "diversity_temperature": 0.7,
        },
        "models": {"sft": {"folder": "runs/sft/final", "from": "the sft run"}},
        "policies": {
            "reference": {"length": 12.0, "gold": 3.5},
            "base": {"rougeL": 0.2, "length": 14.0, "eos_rate": 0.1, "gold": -2.0},
            "sft": {"rougeL": 0.6, "length": 13.0, "eos_rate": 0.99, "gold": 3.5},
            "ppo": {"rougeL": 0.6, "length": 17.0, "eos_rate": 0.98, "gold": 4.2, "title_copy": None},
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


def trace(text: str, **changes) -> dict:
    """A row of trace.jsonl: three tokens, the last the state after EOS."""
    numbers = {
        name: [0.5, -0.25, 0.125] for name in ("logprobs", "ref_logprobs", "kl", "values", "rewards", "advantages")
    }
    masks = {"action_mask": [True, True, False], "value_mask": [True, True, True]}
    row = {"step": 3, "score": 1.5, "id": "x", "title": text, "post": text, "ids": [5, 2, 7]}
    return row | {"tokens": [text, "<EOS>", " x"]} | numbers | masks | changes


class Tags(HTMLParser):
    """The tags and attributes of a page, and whether what is opened is closed."""

    VOID = ("meta", "img", "input")

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.attributes, self.open, self.text, self.scripts = set(), [], [], "", 0
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.scripts += tag == "script"
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_hostile_post_stays_text_in_html():
    found = results()
    found["reward_model"]["worst"] = [
        {"id": "x", "title": HOSTILE, "post": HOSTILE, "chosen": HOSTILE, "rejected": HOSTILE, "policies": HOSTILE,
         "chosen_score": -1.0, "rejected_score": 1.0}
    ]  # fmt: skip
    page = html_page(found, [sample(HOSTILE)], {"ppo_kl": b"\x89PNG"}, [trace(HOSTILE)], about=HOSTILE)
    tags = Tags(page)
    assert not tags.seen & {"iframe", "object", "link", "form"} and tags.scripts == 1  # that of the page
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    addresses = [value for name, value in tags.attributes if name in ("src", "href") and not value.startswith("#")]
    assert addresses == ["data:image/png;base64,iVBORw=="]
    assert "<script>alert(1)</script>" in tags.text  # what the reader sees
    assert page.isascii()  # also a lone surrogate, which no file could hold


def test_the_page_is_readable_on_a_phone_in_light_and_dark_and_loads_nothing():
    page = html_page(results(), [sample("a post")], {})
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
        "\n".join(map(tables.console, tables.tables(results()))),
        html_page(results(), [], {}),
        report.markdown_page(results(), [], {}),
    ):
        for cell in ("0.650", "0.560 to 0.740", "0.720", "0.840", "4.20", "98.0%"):
            assert cell in page


def test_what_was_not_measured_is_a_dash_and_an_empty_row_is_left_out():
    table = tables.tables(results())[0]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["ROUGE-L"] == ["-", "0.200", "0.600", "0.600"]
    assert "tokens" not in rows
    assert len(tables.tables(results(reward_model={}, win_rates=[]))) == 2


def test_the_first_line_names_models_data_and_seed():
    found = results()
    found["about"]["data"] = "data/tiny"
    assert report.about_line(found) == "SFT: runs/sft/final (the sft run); data data/tiny; seed 1"


def test_the_script_of_the_page_is_the_only_one_that_may_run():
    page = html_page(results(), [sample("a post")], {})
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "unsafe-inline'; script" in page


def test_a_sample_carries_what_it_is_sorted_by():
    row = sample("My boss broke it") | {"disagreement": -0.5, "verdict/ppo_vs_sft": "win", "ppo": "my boss left"}
    page = html_page(results(), [row], {})
    assert 'data-score="1" data-gold="1" data-copy="0.5" data-disagreement="-0.5"' in page
    assert "judge against reward model first" in page and "ppo vs sft: win" in page


def test_the_trace_shows_every_token_with_its_masks():
    page = html_page(results(), [], {}, [trace("a token")])
    assert "update 3: one response, token by token" in page and "-0.250" in page and "&lt;EOS&gt;" in page
    assert page.count("<td>yes</td>") == 5 and page.count("<tr class=off>") == 1


def test_a_steep_start_is_not_smoothed_away():
    """A mean that reaches forward only would begin at the level of what came after."""
    values = [4.0, 2.0, 1.0, *[0.5] * 37]
    smoothed = figures.smooth(values)
    assert smoothed[0] == 4.0 and smoothed[-1] == 0.5 and smoothed[1] == pytest.approx(7 / 3)
    assert figures.smooth([1.0, 2.0, 3.0, 4.0]) == [1.0, 2.0, 3.0, 4.0]


def write_run(folder: Path, seed: int, lr: float = 1e-3, stage: str = "ppo", scores=(0.0, 1.0)) -> None:
    rows = ((9_000 * (i + 1), x) for i, x in enumerate(scores))
    rows = [{"step": n // 9_000, "episode": n, "objective/scores": x, "objective/kl": x} for n, x in rows]
    write_lines(folder / "metrics.jsonl", rows)
    config = {"seed": seed, "lr": lr, "run_name": folder.name, "sft_model": f"runs/sft{seed}"}
    (folder / "config.json").write_text(json.dumps({"stage": stage, "config": config}), encoding="utf-8")


def test_runs_that_differ_in_their_seed_only_are_drawn_together(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, scores=(0.0, 3.0))
    write_run(tmp_path / "again", seed=1)
    write_run(tmp_path / "other_lr", seed=3, lr=2e-3)
    write_run(tmp_path / "other_stage", seed=3, stage="rm")
    (tmp_path / "no_run").mkdir()
    folders = figures.seeds_of(tmp_path / "a")
    assert [folder.name for folder in folders] == ["a", "b"]
    axes = figures.curve_figures("ppo", [report.read_metrics(folder) for folder in folders])["ppo_scores"].axes[0]
    assert list(axes.lines[-1].get_ydata()) == [0.0, 2.0]  # the mean of the two
    assert len(axes.collections) == 1  # the band


def test_the_published_curves_are_dotted_behind_a_run_of_their_size_and_say_what_they_are(tmp_path):
    write_run(tmp_path / "ppo", seed=1, scores=(0.1, 0.5, 0.7))
    models = {"ppo": {"folder": tmp_path / "ppo" / "final"}}
    axes = figures.training_figures(models, "llama-1b")["ppo_scores"].axes[0]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(dotted[0].get_xdata()) == [10e3, 25e3] and list(dotted[0].get_ydata()) == [0.56, 1.24]
    assert "read from plots" in dotted[0].get_label()
    assert not [line for line in figures.training_figures(models, "tiny")["ppo_scores"].axes[0].lines
                if line.get_linestyle() == ":"]  # fmt: skip


def test_an_empty_bin_of_lengths_has_no_dot():
    bins = [(-1.0, 0.0, 4, 0.5), (0.0, 1.0, 0, None), (1.0, 2.0, 2, 1.0)]
    row = {"by_length": [dict(zip(("low", "high", "n", "rate"), bin, strict=True)) for bin in bins]}
    row |= {"length_fit": [0.1, 0.5], "length_controlled": 0.52, "length_controlled_interval": [0.4, 0.6]}
    dots = figures.length_figure(row, "a vs b").axes[0].collections[0].get_offsets()
    assert dots.tolist() == [[-0.5, 0.5], [1.5, 1.0]]


def test_an_escape_sequence_in_a_post_does_not_reach_the_terminal():
    assert "\x1b" not in tables.console(tables.sample_table(sample("\x1b[2J [red]text[/red]")))
    assert "[red]text[/red]" in tables.console(tables.sample_table(sample("[red]text[/red]")))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
    assert figures.run_folder(tmp_path / "runs" / "ppo" / "final") == tmp_path / "runs" / "ppo"
    assert figures.run_folder(tmp_path / "checkpoints" / "sft") == tmp_path / "checkpoints" / "sft"
    assert figures.run_folder(tmp_path / "elsewhere") is None


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert [tables.number(x) for x in (-1e-6, -0.0, -0.5)] == ["0.000", "0.000", "-0.500"]
    assert tables.number(-1e-6, ".1%") == "0.0%"


def test_nan_metrics_are_shown_as_a_dash():
    assert tables.number(math.nan) == tables.number(None) == "-"
    assert tables.interval(None) == "-"


def test_the_embedded_checkpoint_brings_the_trace_of_its_own_run():
    """Rewards add up to the score minus the KL penalty of the tiny preset, and the tokens are its tokenizer's."""
    folder = EMBEDDED / "ppo"
    tokenizer, steps = load_tokenizer(folder), {row["step"] for row in report.read_metrics(folder)}
    traces = report.read_traces({"models": {"ppo": {"folder": str(folder)}}})
    every = train_ppo.PRESETS["tiny"]["sample_every"]
    assert [row["step"] for row in traces] == [max(step for step in steps if step % every == 0), 1]
    for row in traces:
        assert sum(row["rewards"]) == pytest.approx(row["score"] - 0.05 * sum(row["kl"]), abs=1e-5)
        assert tokenizer.decode(row["ids"][:3]) == "".join(row["tokens"][:3])
    assert set(map(abs, traces[1]["kl"])) == {0.0}  # before the first update
