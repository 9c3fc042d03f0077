"""What an evaluation found, as two pages: report.html for people with a browser, report.md for everywhere else.

    python -m nanorlhf.evaluation.report page runs/eval                     the pages of an evaluation, again
    python -m nanorlhf.evaluation.report figure runs/ppo docs/ppo_tiny.png  score, gold score and KL over PPO updates

eval.py leaves metrics.json (called `results` here) and samples.jsonl; a page is a function of those two and of the
logs of the runs that made the models (metrics.jsonl, trace.jsonl). Posts are other people's text: every piece of it is
escaped.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from nanorlhf.errors import UserError
from nanorlhf.evaluation.figures import figures, png, ppo_figure, run_folder
from nanorlhf.evaluation.html_page import html_page
from nanorlhf.evaluation.tables import EXPLAINED, Table, display, sample_table, tables, worst_tables
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import read_jsonl, write_whole

SAMPLES_IN_MARKDOWN = 10  # samples.jsonl has all


def about_line(results: dict) -> str:
    """Which models and data, where they came from, and the seed."""
    parts = [f"{display(name)}: {model['folder']} ({model['from']})" for name, model in results["models"].items()]
    parts += [f"{name} {results['about'][name]}" for name in ("data", "seed") if name in results["about"]]
    return "; ".join(parts)


def markdown_page(results: dict, samples: list[dict], images: dict[str, bytes]) -> str:
    """The tables and the first samples in Markdown (GitHub's), in ASCII; the figures are files beside it."""
    parts = ["# nanorlhf: evaluation", escape_markdown(about_line(results)), EXPLAINED]
    parts += [" ".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in images)]
    for table in tables(results):
        parts += [f"## {escape_markdown(table.title)}", _markdown_table(table), escape_markdown(table.note)]
    if worst := worst_tables(results.get("reward_model", {})):
        parts.append("## The pairs on which the reward model is most wrong")
        for table in worst:
            parts += [f"### {escape_markdown(table.title)}", _markdown_table(table)]
    if samples:
        shown = min(len(samples), SAMPLES_IN_MARKDOWN)
        parts += ["## Samples", f"the first {shown} posts; samples.jsonl has all"]
    for row in samples[:SAMPLES_IN_MARKDOWN]:
        table = sample_table(row)
        parts += [f"### {escape_markdown(table.title)}", escape_markdown(table.note), _markdown_table(table)]
    return ("\n\n".join(part for part in parts if part) + "\n").encode("ascii", "xmlcharrefreplace").decode()


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no tags, no emphasis, no links, no table cells out of a post."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", text)


def _markdown_table(table: Table) -> str:
    rows = [[escape_markdown(cell) for cell in row] for row in [table.header, *table.rows]]
    lines = [rows[0], ["---"] * len(table.header), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_traces(results: dict) -> list[dict]:
    """The episodes that the PPO run wrote down token by token: the first and the last of trace.jsonl; [] without."""
    folder = run_folder(results["models"]["ppo"]["folder"]) if "ppo" in results["models"] else None
    if folder is None or not (folder / "trace.jsonl").is_file():
        return []
    rows = read_jsonl(folder / "trace.jsonl")
    return rows[-1:] if len(rows) < 2 else [rows[-1], rows[0]]


def write_report(folder: str | Path) -> Path:
    """Write report.html, report.md and figures of an evaluation from what lies in its folder -> the page's path."""
    folder = Path(folder)
    try:
        results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no metrics.json, expected an evaluation: run `python eval.py` first") from None
    samples, images = read_jsonl(folder / "samples.jsonl"), figures(results)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    write_whole(folder / "report.md", markdown_page(results, samples, images))
    page = html_page(results, samples, images, read_traces(results), about_line(results))
    write_whole(folder / "report.html", page)
    return folder / "report.html"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.evaluation.report", description="Figures and pages.")
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
    as_command(main)
