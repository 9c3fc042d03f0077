"""What an evaluation found, for people: tables, one HTML page, one Markdown page. (The curves are in figures.py.)

    python -m nanorlhf.report page runs/eval                       an evaluation's report.html and report.md, again
    python -m nanorlhf.report figure runs/ppo docs/ppo_tiny.png    score, gold score and KL over PPO updates

eval.py leaves metrics.json (called `results` here) and samples.jsonl; everything below is a function of those two and
of the training logs beside the models they name. report.html needs nothing but itself: style inside, figures as data:
addresses, no script. Posts are other people's text: every piece of it is escaped.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanorlhf.errors import UserError
from nanorlhf.figures import figures, png, ppo_figure
from nanorlhf.jsonl import read_jsonl, write_whole
from nanorlhf.run import read_metrics

SAMPLES_SHOWN, SAMPLES_IN_MARKDOWN = 60, 10  # on the two pages; samples.jsonl has all
NAMES = {"reference": "reference", "base": "base", "sft": "SFT", "ppo": "PPO", "rm": "reward model"}
MEASURES = {  # rows of the table of policies: name in metrics.json -> heading, format
    "rouge1": ("ROUGE-1", ".3f"),
    "rouge2": ("ROUGE-2", ".3f"),
    "rougeL": ("ROUGE-L", ".3f"),
    "words": ("words", ".1f"),
    "tokens": ("tokens", ".1f"),
    "eos_rate": ("stops (EOS)", ".1%"),
    "title_copy": ("title copied", ".2f"),
    "copy4": ("4-grams copied", ".2f"),
    "distinct2": ("distinct-2", ".3f"),
    "score": ("RM score", ".2f"),
    "gold": ("gold score", ".2f"),
}

# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table before anybody decides what it looks like: cells are plain text."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def number(value: float | None, form: str = ".3f") -> str:
    """The number, or "-" where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def interval(low_high: Sequence[float] | None, form: str = ".3f") -> str:
    return "-" if low_high is None else f"{number(low_high[0], form)} to {number(low_high[1], form)}"


def tables(results: dict) -> list[Table]:
    """The tables of an evaluation: policies, win rates, reward model."""
    about = results["about"]
    policies = results["policies"]
    rows = [
        [heading, *(number(row.get(key), form) for row in policies.values())]
        for key, (heading, form) in MEASURES.items()
        if any(row.get(key) is not None for row in policies.values())
    ]
    note = f"split {about['split']}, temperature {about['temperature']:g}, {about['response_length']} tokens at most"
    note += "; ROUGE without a stemmer; RM score: as if every summary had stopped"
    header = ["", *(NAMES[name] for name in policies)]
    found = [Table(f"Summaries of {about['posts']:,} held-out posts", header, rows, note)]
    if results["win_rates"]:
        rows = []
        for row in results["win_rates"]:
            who = f"{NAMES[row['ours']]} vs {NAMES[row['theirs']]}"
            counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
            controlled = f"{number(row['length_controlled'])} ({interval(row['length_controlled_interval'])})"
            rows.append([who, str(row["n"]), counts, number(row["rate"]), interval(row["interval"]), controlled])
        header = ["", "posts", "wins / ties / losses", "win rate", "95% interval", "at equal length"]
        note = "a tie counts half; intervals: paired bootstrap over posts"
        note += "; the judge is the reward model that PPO optimised" if about["judge"] == "rm" else ""
        found.append(Table(f"Win rates by the {about['judge']} judge", header, rows, note))
    if rm := results.get("reward_model"):
        rows = [
            ["accuracy", f"{number(rm['accuracy'])} ({interval(rm['interval'])})"],
            ["the longer summary wins", number(rm["length_baseline"])],
        ]
        if "ceiling" in rm:
            rows.append(["ceiling: knows the annotator", number(rm["ceiling"])])
            rows.append(["ceiling: goes by gold", number(rm["gold_ceiling"])])
        title = f"Reward model on {rm['comparisons']:,} held-out comparisons"
        found.append(Table(title, ["", "accuracy"], rows, "equal scores count as wrong, equal lengths as half"))
    return found


def sample_table(row: dict) -> Table:
    """One post's summaries side by side."""
    who = [name for name in NAMES if name in row]
    scores = [key for key in ("gold", "score") if any(f"{key}/{name}" in row for name in who)]
    rows = [[NAMES[name], row[name], *(number(row.get(f"{key}/{name}"), ".2f") for key in scores)] for name in who]
    return Table(
        row["title"], ["", "summary", *({"gold": "gold", "score": "RM"}[key] for key in scores)], rows, row["post"]
    )


def console(table: Table, width: int = 120) -> str:
    """The table in box-drawing characters, for a terminal."""
    from rich.console import Console
    from rich.table import Table as Box
    from rich.text import Text

    def plain(text: str) -> Text:  # no markup and no control characters out of a post
        return Text(" ".join("".join(c if c.isprintable() else " " for c in text).split()))

    box = Box(title=plain(table.title), caption=plain(table.note), title_justify="left", caption_justify="left")
    for heading in table.header:
        box.add_column(plain(heading))
    for row in table.rows:
        box.add_row(*map(plain, row))
    page = io.StringIO()
    Console(file=page, width=width).print(box)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


# --- pages ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #626a73; --line: #d9dde2; --card: #f6f7f9; --page: #fff; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e3e6ea; --soft: #98a1ab; --line: #363c44; --card: #1d2126; --page: #14171a; } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0 0 .5rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.wide { overflow-x: auto; } .wide th, .wide td { white-space: nowrap; } .note { color: var(--soft); font-size: .85rem; }
article { background: var(--card); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
article td:first-child, article td:nth-child(n+3), article th { overflow-wrap: normal; white-space: nowrap; }
details { margin: .5rem 0; color: var(--soft); } pre { white-space: pre-wrap; font: inherit; }
img { max-width: 100%; height: auto; }
""".strip()


def html_page(results: dict, samples: list[dict], images: dict[str, bytes]) -> str:
    """The whole report as one page, in ASCII: other characters are written as &#...;, which no encoding can garble."""
    body = [f"<h1>nanorlhf: evaluation</h1><p class=note>{html.escape(about_line(results))}</p>"]
    for name, image in images.items():
        address = "data:image/png;base64," + base64.b64encode(image).decode()
        body.append(f'<p><img alt="{html.escape(name.removesuffix(".png"))}: training curves" src="{address}"></p>')
    for table in tables(results):
        body.append(f"<h2>{html.escape(table.title)}</h2><div class=wide>{_html_table(table)}</div>")
        body.append(f"<p class=note>{html.escape(table.note)}</p>")
    if samples:
        body.append(f"<h2>Samples</h2><p class=note>{html.escape(_which(samples, SAMPLES_SHOWN))}</p>")
    for row in samples[:SAMPLES_SHOWN]:
        table = sample_table(row)
        post = f"<details><summary>the post</summary><pre>{html.escape(table.note)}</pre></details>"
        body.append(f'<article dir="auto"><h3>{html.escape(table.title)}</h3>{post}{_html_table(table)}</article>')
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nanorlhf: evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head>
<body>{chr(10).join(body)}</body></html>
"""
    return page.encode("ascii", "xmlcharrefreplace").decode()


def markdown_page(results: dict, samples: list[dict], images: dict[str, bytes]) -> str:
    """The same tables and the first samples in Markdown (GitHub's), in ASCII; the figures are files beside it."""
    parts = ["# nanorlhf: evaluation", escape_markdown(about_line(results))]
    parts += [f"![{name.removesuffix('.png')}: training curves]({name})" for name in images]
    for table in tables(results):
        parts += [f"## {escape_markdown(table.title)}", _markdown_table(table), escape_markdown(table.note)]
    if samples:
        parts += ["## Samples", escape_markdown(_which(samples, SAMPLES_IN_MARKDOWN))]
    for row in samples[:SAMPLES_IN_MARKDOWN]:
        table = sample_table(row)
        parts += [f"### {escape_markdown(table.title)}", escape_markdown(table.note), _markdown_table(table)]
    return ("\n\n".join(part for part in parts if part) + "\n").encode("ascii", "xmlcharrefreplace").decode()


def about_line(results: dict) -> str:
    """Which models, and where they came from."""
    parts = (f"{NAMES[stage]}: {model['folder']} ({model['from']})" for stage, model in results["models"].items())
    return "; ".join(parts)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no tags, no emphasis, no links, no table cells out of a post."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _which(samples: list[dict], shown: int) -> str:
    return f"the first {min(len(samples), shown)} posts; samples.jsonl has all"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _markdown_table(table: Table) -> str:
    rows = [[escape_markdown(cell) for cell in row] for row in table.rows]
    lines = [table.header, ["---"] * len(table.header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: str | Path) -> Path:
    """Write report.html, report.md and figures of an evaluation from what lies in its folder -> the page's path."""
    folder = Path(folder)
    try:
        results = json.loads((folder / "metrics.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no metrics.json, expected an evaluation: run `python eval.py` first") from None
    samples, images = read_jsonl(folder / "samples.jsonl"), figures(results["models"])
    for name, image in images.items():
        (folder / name).write_bytes(image)
    write_whole(folder / "report.md", markdown_page(results, samples, images))
    write_whole(folder / "report.html", html_page(results, samples, images))
    return folder / "report.html"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.report", description="Figures and pages of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("figure", help="reward, gold score and KL over the updates of a PPO run")
    command.add_argument("run", type=Path, help="folder of a PPO run, such as runs/ppo")
    command.add_argument("png", type=Path, help="file to write")
    command = commands.add_parser("page", help="write an evaluation's report.html and report.md again")
    command.add_argument("run", type=Path, help="folder of an evaluation, such as runs/eval")
    args = parser.parse_args(argv)
    try:
        if args.command == "figure":
            image = png(ppo_figure(read_metrics(args.run)))
            args.png.parent.mkdir(parents=True, exist_ok=True)
            args.png.write_bytes(image)
            print(args.png)
        else:
            print(write_report(args.run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
