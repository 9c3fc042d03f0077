"""What numbers are usual? Fills the column "tiny world" of docs/metrics.md from runs that are there.

    python -m experiments.seeds --seeds 1 2 3                             the runs, if there are none
    python -m experiments.metric_ranges runs/seed[123]_{sft,rm} runs/seed[123]_default_{ppo,eval}

For each row of the page: the lowest and the highest of the runs on the first line of metrics.jsonl, and after the arrow
as the mean of the last quarter of the lines. A number that a run writes once has no arrow; seconds and speeds are the
machine's and have no entry. An evaluation's numbers are PPO's (with SFT's before the arrow), those of PPO against SFT,
and those of the reward model. Reads the runs' config.json and metrics.jsonl, and metrics.json of evaluations; rewrites
the page and nothing else.
"""

import argparse
import json
import math
import re
from pathlib import Path

from nanorlhf.errors import check, one_sentence
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
STAGES = {"sft": "train_sft.py", "rm": "train_rm.py", "ppo": "train_ppo.py", "eval": "eval.py"}
SHOWN = "tiny world"  # what the heading of the column begins with
OF_THE_MACHINE = ("time/", "perf/")


def sections(text: str) -> dict[str, list[list[str]]]:
    """{heading: rows} of the page's tables, cells stripped; the tables under one heading follow each other."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines if line.startswith("| ")]
        found[heading.strip()] = rows
    return found


def names(row: list[str]) -> list[str]:
    """The names in a row's first cell."""
    return re.findall(r"`([^`]+)`", row[0])


def pattern(name: str) -> re.Pattern:
    """accuracy/split/<split>: any word may stand for the part in brackets."""
    return re.compile("[^/]+".join(map(re.escape, re.split(r"<\w+>", name))))


def figure(value: float) -> str:
    """Three digits, without an exponent where a person would write none."""
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}").replace("e-0", "e-")


def spread(values: list[float]) -> str:
    """ "0.12 to 0.34", or one number where they are as good as one."""
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{low} to {high}"


def of_lines(rows: list[dict], name: str) -> tuple[float, ...]:
    """(the first value, the mean of the last quarter) of a metric; one value where it was written once."""
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    if len(values) < 2:
        return tuple(values)
    last = values[-max(1, len(values) // 4) :]
    return values[0], sum(last) / len(last)


def of_evaluation(results: dict, name: str) -> tuple[float, ...]:
    """(SFT's, PPO's) of a number that describes policies, else PPO against SFT, else the reward model's card."""
    sft, ppo = (results["policies"].get(who, {}) for who in ("sft", "ppo"))
    if name in ppo:
        return tuple(row[name] for row in (sft, ppo) if isinstance(row.get(name), int | float))
    game = next((row for row in results["win_rates"] if (row["ours"], row["theirs"]) == ("ppo", "sft")), {})
    value = game.get(name, results["reward_model"].get(name))
    return (value,) if isinstance(value, int | float) and math.isfinite(value) else ()


def cell(row: list[str], found: dict[str, list[tuple[float, ...]]]) -> str:
    """What the column says of a row. found: {name: the numbers of each run}"""
    parts = []
    for name in (name for name in names(row) if not name.startswith(OF_THE_MACHINE)):
        values = [value for key, runs in found.items() if pattern(name).fullmatch(key) for value in runs if value]
        width = min(map(len, values), default=0)
        if width:
            parts.append(" → ".join(spread([value[i] for value in values]) for i in range(width)))
    return "; ".join(parts) or "-"


def fill(text: str, found: dict[str, dict[str, list[tuple[float, ...]]]], where: str) -> str:
    """The page with the column filled. found: {heading: {name: the numbers of each run}}; where: the sentence on top."""
    text = re.sub(r"(?s)<!-- where -->.*?<!-- /where -->", lambda _: f"<!-- where -->{where}<!-- /where -->", text)
    lines, heading, column = [], "", None
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        cells = [part.strip() for part in line.strip("|").split(" |")] if line.startswith("| ") else []
        if cells and cells[0] == "name":
            column = next(i for i, title in enumerate(cells) if title.startswith(SHOWN))
        elif cells and heading in found:
            cells[column] = cell(cells, found[heading])
            line = "| " + " | ".join(cells) + " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def read(folders: list[Path], page: str) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """{heading: {name: the numbers of each run}} of run folders, for the names on the page and those they stand for."""
    found = {heading: {} for heading in sections(page)}
    for folder in folders:
        stage = json.loads((folder / "config.json").read_text(encoding="utf-8"))["stage"]
        check(stage in STAGES, "run", folder, f"of {', '.join(STAGES)}")
        rows, heading = read_metrics(folder), STAGES[stage]
        numbers = {name: of_lines(rows, name) for name in dict.fromkeys(key for row in rows for key in row)}
        if stage == "eval":
            results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            known = {name for row in sections(page)[heading] for name in names(row)}
            numbers = {name: of_evaluation(results, name) or numbers.get(name, ()) for name in known}
        for name, values in numbers.items():
            found[heading].setdefault(name, []).append(values)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.metric_ranges", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of the three scripts and of evaluations")
    parser.add_argument("--machine", help="its name, for the page's first lines (default: the runs' device)")
    args = parser.parse_args(argv)
    with one_sentence():
        for run in args.runs:
            check((run / "config.json").is_file(), "run", run, "a run's folder")
        page, records = (
            PAGE.read_text(encoding="utf-8"),
            [json.loads((run / "config.json").read_text(encoding="utf-8")) for run in args.runs],
        )
        commits = sorted({record["git"]["commit"][:7] for record in records if record["git"]})
        seeds = sorted({record["config"]["seed"] for record in records})
        machine = args.machine or " and ".join(sorted({record["device"] for record in records}))
        where = f"seeds {', '.join(map(str, seeds))} at {', '.join(commits)} on {machine}"
        PAGE.write_text(fill(page, read(args.runs, page), where), encoding="utf-8")
        print(f"{PAGE}: filled from {len(args.runs)} runs")


if __name__ == "__main__":
    as_command(main)
