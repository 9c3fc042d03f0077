"""The figures of a report: training curves from the runs' metrics.jsonl, win rates and calibration from metrics.json.

Thin: as logged. Thick: smoothed. With several seeds: a thin line each, their mean, and a band of one standard
deviation. Dotted: the published curves, beside a run of their size. Colours are legible on white and on black and the
background is transparent, so one PNG serves light and dark pages.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanorlhf.evaluation.metrics import seed_interval
from nanorlhf.evaluation.tables import display
from nanorlhf.run.run import read_metrics

GREY, PROXY, GOLD, KL = "#7f868f", "#2f7ed8", "#d99a1c", "#c2504f"
# Huang et al. 2024, the paper's 1B model: mean of its seeds, read by eye from the smoothed plots (2 % of an axis), over
# thousands of episodes. Pythia, not Llama: the shape is comparable, the levels only roughly.
PUBLISHED_EPISODES = [10e3, 25e3, 50e3, 100e3, 116.7e3, 200e3, 400e3, 600e3, 800e3, 998e3]
PUBLISHED_1B = {
    "objective/rlhf_reward": [0.11, 0.49, 0.69, 0.88, 0.95, 1.11, 1.34, 1.63, 1.80, 1.88],
    "objective/scores": [0.56, 1.24, 1.65, 2.16, 2.25, 2.62, 3.12, 4.00, 4.41, 4.52],
    "objective/kl": [9.3, 15.3, 19.3, 25.7, 26.0, 30.4, 35.7, 47.4, 52.3, 53.0],
}
CURVES = {  # stage -> (metric, title, colour)
    "sft": [("train/sft/loss", "SFT: loss (nats a token)", PROXY)],
    "rm": [
        ("train/rm/loss", "reward model: loss (nats a pair)", PROXY),
        ("train/rm/accuracy", "reward model: accuracy", GOLD),
    ],
    "ppo": [
        ("objective/scores", "PPO: reward model's score (proxy)", PROXY),
        ("objective/gold", "PPO: gold score (truth)", GOLD),
        ("objective/kl", "PPO: KL from SFT (nats a response)", KL),
        ("objective/rlhf_reward", "PPO: score minus KL penalty", PROXY),
        ("hack/length", "hacks: words a summary", GREY),
        ("hack/title_copy", "hacks: share of the title copied", GREY),
        ("hack/copy4", "hacks: 4-grams copied from the post", GREY),
        ("hack/repetition", "hacks: repeated bigrams in a text", GREY),
        ("hack/entropy", "hacks: entropy (nats a token)", GREY),
        ("hack/edit_distance", "hacks: edit distance of samples", GREY),
    ],
}


# --- drawing ----------------------------------------------------------------------------------------------------------


def new_axes(title: str, x_name: str, size: tuple[float, float] = (3.9, 2.9)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    dress(axes, title, x_name)
    return figure, axes


def dress(axes: Axes, title: str, x_name: str) -> None:
    axes.set_title(title, fontsize=10, color=GREY)
    axes.set_xlabel(x_name, fontsize=9, color=GREY)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.grid(alpha=0.25, color=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def points(rows: list[dict], metric: str, x: str = "step") -> tuple[list[float], list[float]]:
    pairs = [(row[x], row[metric]) for row in rows if row.get(metric) is not None and row.get(x) is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a tenth of the curve to either side: every step saw other data.

    Towards the ends the window shrinks on both sides alike, so a curve that falls steeply at first begins where the
    first value is, and not at the mean of what came after.
    """
    n, reach = len(values), len(values) // 10
    reaches = [min(reach, i, n - 1 - i) for i in range(n)]
    return [float(np.mean(values[i - r : i + r + 1])) for i, r in enumerate(reaches)]


def draw_curve(axes: Axes, logs: list[list[dict]], metric: str, colour: str, x: str = "step") -> None:
    """One metric of one run, or of several seeds, into the axes."""
    curves = [points(rows, metric, x) for rows in logs]
    curves = [(xs, ys) for xs, ys in curves if xs]
    marker = "." if curves and len(curves[0][0]) < 60 else None
    for xs, ys in curves:
        axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.4, marker=marker if len(curves) == 1 else None)
    if len(curves) == 1:
        axes.plot(curves[0][0], smooth(curves[0][1]), color=colour, linewidth=2.2)
    elif curves:
        length = min(len(xs) for xs, _ in curves)
        smoothed = np.array([smooth(ys)[:length] for _, ys in curves])
        centre, spread = smoothed.mean(axis=0), smoothed.std(axis=0, ddof=1)
        axes.plot(curves[0][0][:length], centre, color=colour, linewidth=2.2)
        axes.fill_between(curves[0][0][:length], centre - spread, centre + spread, color=colour, alpha=0.2, linewidth=0)


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=140, transparent=True)
    return file.getvalue()


# --- training curves --------------------------------------------------------------------------------------------------


def curve_figures(stage: str, logs: list[list[dict]], published: bool = False) -> dict[str, Figure]:
    """{name: figure} of one stage, of one run or of several seeds; a metric that no run logged is left out."""
    found = {}
    for metric, title, colour in CURVES[stage]:
        if not any(points(rows, metric)[0] for rows in logs):
            continue
        dotted = published and metric in PUBLISHED_1B
        x = "episode" if dotted else "step"
        figure, axes = new_axes(title, "episode" if dotted else "update" if stage == "ppo" else "step")
        draw_curve(axes, logs, metric, colour, x)
        if dotted:
            end = 1.3 * max(max(points(rows, metric, x)[0], default=0) for rows in logs)
            known = [(a, b) for a, b in zip(PUBLISHED_EPISODES, PUBLISHED_1B[metric], strict=True) if a <= end]
            label = "published 1B, read from plots"
            axes.plot(*zip(*known, strict=True), ":", color=GREY, linewidth=1.5, label=label) if known else None
            axes.legend(fontsize=7, labelcolor=GREY, frameon=False)
        found[f"{stage}_{metric.split('/')[-1]}"] = figure
    return found


def score_against_kl(logs: list[list[dict]]) -> Figure:
    """What was bought for how much KL: the proxy and, where it is known, the truth, over the updates of the runs."""
    figure, axes = new_axes("PPO: score against KL", "KL from SFT (nats a response)")
    for metric, colour, label in (("objective/scores", PROXY, "proxy"), ("objective/gold", GOLD, "gold")):
        for i, rows in enumerate(logs):
            kl, score = points(rows, metric, x="objective/kl")
            axes.plot(kl, score, ".", color=colour, markersize=4, alpha=0.7, label=label if i == 0 and kl else None)
    axes.legend(fontsize=7, labelcolor=GREY, frameon=False)
    return figure


def ppo_figure(rows: list[dict]) -> Figure:
    """What PPO maximised, what it was for, and what it cost, in a row: proxy, gold score (tiny world), KL."""
    wanted = [curve for curve in CURVES["ppo"][:3] if points(rows, curve[0])[0] or curve[0] != "objective/gold"]
    figure = Figure(figsize=(3.6 * len(wanted), 2.9), layout="constrained")
    for axes, (metric, title, colour) in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
        dress(axes, title.removeprefix("PPO: "), "update")
        draw_curve(axes, [rows], metric, colour)
    return figure


def run_folder(model_folder: str | Path) -> Path | None:
    """Where the metrics.jsonl of the run that made a model lies: beside its final/, or in an embedded checkpoint."""
    for folder in (Path(model_folder).parent, Path(model_folder)):
        if (folder / "metrics.jsonl").is_file():
            return folder
    return None


def seeds_of(folder: Path) -> list[Path]:
    """The run folders beside this one that differ from it in nothing but the seed and what follows from it."""
    free = ("seed", "run_name", "overwrite", "resume", "track", "sft_model", "reward_model", "model", "device")

    def settings(path: Path) -> tuple | None:
        try:
            record = json.loads((path / "config.json").read_text(encoding="utf-8"))
            config = {name: value for name, value in record["config"].items() if name not in free}
            return record["stage"], record["config"].get("seed"), config
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no run of ours
            return None

    mine = settings(folder)
    if mine is None:
        return [folder]
    found = {mine[1]: folder}
    for other in sorted(folder.parent.iterdir()):
        theirs = settings(other)
        if theirs and theirs[0] == mine[0] and theirs[2] == mine[2] and (other / "metrics.jsonl").is_file():
            found.setdefault(theirs[1], other)
    return list(found.values())


def training_figures(models: dict[str, dict], preset: str) -> dict[str, Figure]:
    """The curves of the runs that made these models, {stage: {"folder": ...}}, where their logs exist."""
    found = {}
    for stage in CURVES:
        folder = run_folder(models[stage]["folder"]) if stage in models else None
        if folder is None:
            continue
        logs = [read_metrics(path) for path in seeds_of(folder)]
        found |= curve_figures(stage, logs, published=preset in ("llama-1b", "paper"))
        if stage == "ppo" and points(logs[0], "objective/scores")[0]:
            found["ppo_score_against_kl"] = score_against_kl(logs)
    return found


# --- figures of the evaluation itself ---------------------------------------------------------------------------------


def length_figure(row: dict, title: str) -> Figure:
    """Win rate over the log length ratio: a dot a bin, its area the number of pairs, none where none is; the fit."""
    figure, axes = new_axes(title, "ln(words / words of the other)")
    filled = [bin for bin in row["by_length"] if bin["n"]]
    centres, rates = [(b["low"] + b["high"]) / 2 for b in filled], [b["rate"] for b in filled]
    most = max(b["n"] for b in filled)
    axes.scatter(centres, rates, s=[8 + 90 * b["n"] / most for b in filled], color=PROXY, alpha=0.8, linewidths=0)
    a, b = row["length_fit"]
    x = np.linspace(row["by_length"][0]["low"], row["by_length"][-1]["high"], 60)
    axes.plot(x, 0.5 * (1 + np.tanh((a + b * x) / 2)), color=GOLD, linewidth=2)
    low, high = row["length_controlled_interval"]
    axes.errorbar([0], [row["length_controlled"]], [[max(0, row["length_controlled"] - low)],
                  [max(0, high - row["length_controlled"])]], color=KL, fmt="o", capsize=3)  # fmt: skip
    axes.axhline(0.5, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_ylim(-0.05, 1.05)
    return figure


def calibration_figure(rm: dict) -> Figure:
    figure, axes = new_axes("reward model: calibration", "what it claims: sigmoid(score gap)")
    filled = [row for row in rm["calibration"] if row["n"]]
    x, y = [row["confidence"] for row in filled], [row["accuracy"] for row in filled]
    errors = [[max(0, row["accuracy"] - row["interval"][0]) for row in filled],
              [max(0, row["interval"][1] - row["accuracy"]) for row in filled]]  # fmt: skip
    axes.errorbar(x, y, errors, color=PROXY, fmt="o", markersize=4, capsize=2, linewidth=1, label="accuracy, 95%")
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, label="perfect")
    axes.legend(fontsize=7, labelcolor=GREY, frameon=False)
    return figure


def histogram_figure(rm: dict) -> Figure:
    figure, axes = new_axes("reward model: scores", "score")
    edges = np.array(rm["histogram"]["edges"])
    for name, colour in (("chosen", PROXY), ("rejected", KL)):
        axes.stairs(rm["histogram"][name], edges, color=colour, fill=True, alpha=0.35, label=name)
    axes.legend(fontsize=7, labelcolor=GREY, frameon=False)
    return figure


def figures(results: dict) -> dict[str, bytes]:
    """{name: PNG} of an evaluation. The part of a name before the first "_" says where in the report it stands."""
    found = training_figures(results["models"], results["about"].get("preset", ""))
    for row in results["win_rates"]:
        if row.get("by_length"):
            who = f"{display(row['ours'])} vs {display(row['theirs'])}"
            found[f"wins_{row['ours']}_{row['theirs']}"] = length_figure(row, f"{who}: win rate by length")
    if (rm := results.get("reward_model")) and rm.get("calibration"):
        found |= {"card_calibration": calibration_figure(rm), "card_scores": histogram_figure(rm)}
    return {name: png(figure) for name, figure in found.items()}


# --- over-optimisation ------------------------------------------------------------------------------------------------


def hack_figure(rows: list[dict], gold_sft: float) -> Figure:
    """One run without a leash: proxy and truth over updates, and both over KL."""
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    for axes, x, x_name in zip(
        figure.subplots(1, 2), ("step", "objective/kl"), ("update", "KL from SFT (nats a response)"), strict=True
    ):
        dress(axes, "PPO without a KL penalty", x_name)
        for metric, colour, label in (
            ("objective/scores", PROXY, "reward model's score"), ("objective/gold", GOLD, "gold score (truth)")
        ):  # fmt: skip
            xs, ys = points(rows, metric, x)
            axes.plot(xs, ys, ".", color=colour, markersize=4, alpha=0.5)
            order = np.argsort(xs, kind="stable")
            axes.plot(np.array(xs)[order], smooth(np.array(ys)[order]), color=colour, linewidth=2.2, label=label)
        axes.axhline(gold_sft, color=GOLD, linewidth=0.9, linestyle="--", label="gold score of SFT, held-out posts")
        axes.legend(fontsize=7, labelcolor=GREY, frameon=False)
    return figure


def overoptimisation_figure(groups: dict[float, list[list[dict]]], last: int = 5) -> Figure:
    """{kl_coef: logs of its seeds} -> proxy and truth against KL. Thin: the paths of all runs. Points: the mean of the
    last updates over the seeds, with its 95% interval over the seeds (Student's t)."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    panels = (
        ("objective/scores", PROXY, "reward model's score (proxy)"),
        ("objective/gold", GOLD, "gold score (truth)"),
    )
    for axes, (metric, colour, title) in zip(figure.subplots(1, 2), panels, strict=True):
        dress(axes, title, "KL from SFT (nats a response)")
        for kl_coef, logs in sorted(groups.items()):
            ends = []
            for rows in logs:
                kl, values = points(rows, metric, x="objective/kl")
                axes.plot(smooth(kl), smooth(values), color=colour, linewidth=0.8, alpha=0.35)
                ends.append((np.mean(kl[-last:]), np.mean(values[-last:])))
            x, y = np.mean(ends, axis=0)
            x_bar, y_bar = (seed_interval(values) if len(ends) > 1 else 0 for values in zip(*ends, strict=True))
            axes.errorbar(x, y, y_bar, x_bar, color=colour, fmt="o", markersize=5, capsize=3)
            axes.annotate(f"{kl_coef:g}", (x, y), (4, 5), textcoords="offset points", fontsize=8, color=GREY)
    return figure
