"""Tables and figures of docs/frontier.md, from the lines of experiments/results/frontier.jsonl.

    python -m experiments.frontier_report             prints the tables
    python -m experiments.frontier_report --write     puts them into docs/frontier.md and draws its figures

A number is the mean over seeds; behind it, half of its 95% interval over the seeds (Student's t). With 3 seeds t is
4.3, so the interval is wide: it is what three runs can tell, not what the posts within a run can.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import early_warning
from experiments.details_worth import SWITCHES
from experiments.frontier import RESULTS, known
from experiments.frontier_plan import plan
from nanorlhf.evaluation.figures import GOLD, GREY, KL, PROXY, dress, png
from nanorlhf.evaluation.metrics import seed_interval
from nanorlhf.run.streams import as_command

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "frontier.md"
BASE = "ppo", "kl 0.15"  # what the details are compared with
COLOURS = {"ppo": PROXY, "best of n": GOLD, "dpo": KL, "rloo": "#3f9b5f", "grpo": "#8a63d2"}
MARKERS = {"ppo, second round": "s", "ppo, more labels": "^"}
COLUMNS = {
    "kl": "KL, nats", "gold_gain": "gold score over SFT", "proxy_gain": "proxy over SFT", "win_rate": "win rate",
    "lc_win_rate": "at equal length", "length": "words",
}  # fmt: skip
Groups = dict[tuple[str, str], list[dict]]


def over_sft(rows: Sequence[dict]) -> list[dict]:
    """The rows with gains over SFT's mean level in place of gains over one sample of it: best of n at n = 1 has 17
    samples a post, so this start of every method has a quarter of the noise. As they are where that row is missing, and
    the proxy of another reward model."""
    start = {row["seed"]: row for row in rows if row["strength"] == "n 1"}
    found = []
    for row in rows:
        names = ("gold", "proxy") if "first_proxy_gain" not in row else ("gold",)
        base = start.get(row["seed"])
        found.append(row | ({f"{name}_gain": row[name] - base[name] for name in names} if base else {}))
    return found


def groups(rows: Sequence[dict], part: str) -> Groups:
    """{(method, strength): a row a seed}, in the order in which they were found."""
    found: Groups = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault((row["method"], row["strength"]), []).append(row)
    return found


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Over seeds: mean, and half the width of its 95% interval (nan for one seed)."""
    return float(np.mean(values)), seed_interval(values)


def number(values: Sequence[float], digits: int = 2) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def frontier_table(rows: Sequence[dict]) -> str:
    """A row for each method and strength; the last column compares with PPO at BASE, seed by seed."""
    found = groups(rows, "frontier")
    head = ["method", "strength", "seeds", *COLUMNS.values(), f"gold score - PPO's at {BASE[1].split()[-1]}"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (method, strength), some in found.items():
        digits = {"win_rate": 3, "lc_win_rate": 3, "length": 1}
        cells = [number([row[name] for row in some], digits.get(name, 2)) for name in COLUMNS]
        differences = paired(some, found.get(BASE, []), "gold") if (method, strength) != BASE else []
        cells.append(number(differences) + (" *" if apart(differences) else "") if differences else "")
        lines.append(f"| {method} | {strength} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(ours: Sequence[dict], theirs: Sequence[dict], name: str) -> list[float]:
    """Differences of the seeds that both have."""
    other = {row["seed"]: row[name] for row in theirs}
    return [row[name] - other[row["seed"]] for row in ours if row["seed"] in other]


def apart(values: Sequence[float]) -> bool:
    """Whether 0 lies outside of the 95% interval over seeds."""
    mean, half = mean_and_half(values)
    return abs(mean) > half  # never for one seed: a nan compares as False


def details_table(rows: Sequence[dict]) -> str:
    """Each switched detail: levels, and differences to the recipe with the same models, paired by seed."""
    base, found = groups(rows, "frontier").get(BASE, []), groups(rows, "details")
    head = ["detail", "the recipe", "in its place", "seeds", "gold score", "- recipe's", "win rate", "- recipe's", "KL"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if base:
        cells = [
            number([row[name] for row in base], digits) for name, digits in (("gold", 2), ("win_rate", 3), ("kl", 2))
        ]
        lines.append(f"| | all ten | | {len(base)} | {cells[0]} | | {cells[1]} | | {cells[2]} |")
    for which in SWITCHES:
        some = found.get(("detail", which.name), [])
        if not some or not base:
            lines.append(f"| {which.detail} | {which.kept} | {which.instead} | 0 | not run | | | | |")
            continue
        cells = [str(len(some))]
        for name, digits in (("gold", 2), ("win_rate", 3)):
            differences = paired(some, base, name)
            star = " *" if apart(differences) else ""
            cells += [number([row[name] for row in some], digits), number(differences, digits) + star]
        cells.append(number([row["kl"] for row in some]))
        lines.append(f"| {which.detail} | {which.kept} | {which.instead} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs_table(rows: Sequence[dict]) -> str:
    """What an ensemble or a second round changes against plain PPO of the same seeds and coefficient."""
    found = groups(rows, "frontier")
    head = ["method", "strength", "seeds", "gold score", "win rate", "KL", "first reward model's score"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (method, strength), some in found.items():
        base = found.get(("ppo", strength))
        if not method.startswith("ppo,") or not base:
            continue
        # Proxies can be compared under one model only: after a second round that is the first round's.
        some = [row | {"proxy_gain": row.get("first_proxy_gain", row["proxy_gain"])} for row in some]
        cells = []
        for name, digits in (("gold", 2), ("win_rate", 3), ("kl", 2), ("proxy_gain", 2)):
            differences = paired(some, base, name)
            cells.append(number(differences, digits) + (" *" if apart(differences) else ""))
        lines.append(f"| {method} | {strength} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def second_table(rows: Sequence[dict]) -> str:
    """Of summaries on which truth and proxy both differ from SFT's: how often the proxy prefers the better one."""
    head = ["method", "strength", "seeds", "this run's reward model", "that of the first round", "gold score over SFT"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (method, strength), some in groups(rows, "frontier").items():
        if not method.startswith("ppo") or any(row.get("agreement") is None for row in some):
            continue
        agreed = [row["agreement"] for row in some], [row.get("first_agreement", row["agreement"]) for row in some]
        cells = [*(number(values, 3) for values in agreed), number([row["gold_gain"] for row in some])]
        lines.append(f"| {method} | {strength} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def turns_table(rows: Sequence[dict]) -> str:
    """Where the gold score turns, run by run of each group that was trained by updates."""
    lines = [
        "| method | strength | best gold at update, by seed | its value | at the end | runs that turn |",
        "|" + "---|" * 6,
    ]
    for (method, strength), some in groups(rows, "frontier").items():
        golds = [row["curve"]["objective/gold"] for row in some if row.get("curve", {}).get("objective/gold")]
        if not golds:
            continue
        smooth = [early_warning.smoothed(gold) for gold in golds]
        best = [int(np.argmax(values)) for values in smooth]
        where = ", ".join(f"{b + 1} of {len(values)}" for b, values in zip(best, smooth, strict=True))
        levels = number([max(values) for values in smooth]), number([values[-1] for values in smooth])
        turned = sum(early_warning.turn(gold) is not None for gold in golds)
        lines.append(f"| {method} | {strength} | {where} | {levels[0]} | {levels[1]} | {turned} of {len(golds)} |")
    return "\n".join(lines)


def not_run(rows: Sequence[dict]) -> str:
    there = {row["run"] for row in rows}
    left: dict[str, list[str]] = {}
    for run in plan():
        if run.name not in there:
            left.setdefault(f"{run.method}, {run.strength}", []).append(str(run.seed))
    return "\n".join(f"- {name}: seeds {', '.join(seeds)}" for name, seeds in left.items()) or "Nothing: all was run."


def made_by(rows: Sequence[dict]) -> str:
    """Commit and machine of the results."""
    machines = sorted({row["machine"].replace(" 1 cores", " 1 core") for row in rows})
    commits = sorted({row["commit"] for row in rows})
    minutes = sum(row["seconds"] + row["measure_seconds"] for row in rows) / 60
    runs = len({row["run"] for row in rows})
    return f"{runs} runs, {minutes:.0f} minutes; {'; '.join(machines)}; commits {', '.join(commits)}."


# --- figures ----------------------------------------------------------------------------------------------------------


def family(method: str) -> str:
    return method.split(",")[0]


def frontier_figure(rows: Sequence[dict]) -> Figure:
    """Truth and proxy against KL, on a scale of its square root (Gao et al. 2022): a point is a method at a strength,
    mean over seeds, bars its 95% interval over seeds (a wide one runs out of the picture); a line joins the strengths
    of a method. Second rounds of PPO: open points. Long runs are left out: without a penalty they end 17 to 92 nats
    away (turning_figure has them)."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = (("gold_gain", "truth: gold score over SFT"), ("proxy_gain", "proxy: reward model's score over SFT"))
    found = {key: some for key, some in groups(rows, "frontier").items() if not key[1].startswith("long")}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        dress(axes, title, "KL from SFT, nats a summary")
        axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axes.set_xticks(ticks := [0, 0.5, 1, 2, 4, 8, 16, 32], [f"{tick:g}" for tick in ticks])
        shown = []
        for method in dict.fromkeys(method for method, _ in found if method != "sft"):
            ends = []
            for (_, strength), some in ((key, value) for key, value in found.items() if key[0] == method):
                (x, dx), (y, dy) = (mean_and_half([row[part] for row in some]) for part in ("kl", name))
                ends.append((x, y, 0 if math.isnan(dx) else dx, 0 if math.isnan(dy) else dy, strength))
            ends.sort()
            x, y, dx, dy, strengths = zip(*ends, strict=True)
            colour, plain = COLOURS.get(family(method), GREY), method == family(method)
            face = colour if plain else "none"
            axes.plot(x, y, color=colour, linewidth=1.2, linestyle="-" if plain else ":")
            dx = np.array([np.minimum(dx, x), dx])  # a KL is not below 0
            marker = "o" if plain else MARKERS.get(method, "s")
            axes.errorbar(x, y, dy, dx, color=colour, fmt="none", elinewidth=0.8, alpha=0.35)
            axes.plot(x, y, color=colour, linestyle="none", marker=marker, mfc=face, markersize=6, label=method)
            shown += y
            for end in ends:
                axes.annotate(end[-1].split()[-1], end[:2], (4, 4), textcoords="offset points", fontsize=7, color=GREY)
        axes.axhline(0, color=GREY, linewidth=0.7)
        axes.set_xlim(left=0)
        axes.set_ylim(min(shown) - 0.4, max(shown) + 0.6)  # of the points: a wide bar runs out of the picture
        axes.legend(fontsize=7, labelcolor=GREY, frameon=False)
    return figure


def turning_figure(rows: Sequence[dict]) -> Figure:
    """Truth and proxy update by update, of what is trained by updates: mean over seeds of the smoothed curves. Full
    lines: groups in which most runs turn; dotted and dash-dotted: the others."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    found = {key: [row["curve"] for row in some if row.get("curve")] for key, some in groups(rows, "frontier").items()}
    found = {key: curves for key, curves in found.items() if curves}
    panels = (("objective/gold", "truth: gold score"), ("objective/scores", "proxy: reward model's score"))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        dress(axes, title, "update")
        for i, ((method, strength), curves) in enumerate(found.items()):
            centre = np.mean([early_warning.smoothed(curve[name]) for curve in curves], axis=0)
            turned = sum(early_warning.turn(curve["objective/gold"]) is not None for curve in curves)
            style = "-" if 2 * turned > len(curves) else ":" if i < 10 else "-."  # ten colours
            label = f"{method}, {strength}"
            axes.plot(
                range(1, len(centre) + 1), centre, color=f"C{i % 10}", linestyle=style, linewidth=1.8, label=label
            )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, labelcolor=GREY, frameon=False)
    return figure


# --- the page ---------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[dict]) -> dict[str, str]:
    """{name of a place in the page: Markdown}"""
    rows = over_sft(rows)
    return {
        "frontier": frontier_table(rows),
        "pairs": pairs_table(rows),
        "second": second_table(rows),
        "turns": turns_table(rows),
        "details": details_table(rows),
        "warning": early_warning.table(rows),
        "not_run": not_run(rows),
        "made_by": made_by(rows),
    }


def fill(page: str, filled: dict[str, str]) -> str:
    """The page with everything between <!-- name --> and <!-- /name --> replaced. Raises AssertionError for a place
    that the page does not have."""
    for name, text in filled.items():
        place = re.compile(rf"(?s)<!-- {name} -->.*?<!-- /{name} -->")
        assert place.search(page), f"docs/frontier.md has no place {name}"
        page = place.sub(lambda _, name=name, text=text: f"<!-- {name} -->\n{text}\n<!-- /{name} -->", page)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.frontier_report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into docs/frontier.md, with its figures")
    args = parser.parse_args(argv)
    rows = known(args.results)
    filled = tables(rows)
    for name, text in filled.items():
        print(f"{name}\n\n{text}\n")
    if args.write:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), filled), encoding="utf-8")
        (DOCS / "frontier.png").write_bytes(png(frontier_figure(over_sft(rows))))
        (DOCS / "frontier_turning.png").write_bytes(png(turning_figure(rows)))
    print(json.dumps({"experiment": "frontier_report", "runs": len({row["run"] for row in rows})}))


if __name__ == "__main__":
    as_command(main)
