"""The curves of the three training stages, drawn from their metrics.jsonl.

Thin: as logged. Thick: smoothed. Colours are legible on white and on black and the background is transparent, so one
PNG serves light and dark pages.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nanorlhf.run import read_metrics

GREY, PROXY, GOLD, KL = "#7f868f", "#2f7ed8", "#d99a1c", "#c2504f"


def panels(specifications: list[tuple[str, str, str, list[dict], str]]) -> Figure:
    """Panels in a row, one curve each: (title, name of the x axis, metric, rows of a metrics.jsonl, colour)."""
    figure = Figure(figsize=(3.6 * len(specifications), 2.9), layout="constrained")
    all_axes = figure.subplots(1, len(specifications), squeeze=False)[0]
    for axes, (title, x_name, metric, rows, colour) in zip(all_axes, specifications, strict=True):
        points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4, marker="." if len(points) < 60 else None)
            axes.plot(steps, smooth(values), color=colour, linewidth=2.2)
        axes.set_title(title, fontsize=10, color=GREY)
        axes.set_xlabel(x_name, fontsize=9, color=GREY)
        axes.tick_params(colors=GREY, labelsize=8)
        axes.grid(alpha=0.25, color=GREY)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a tenth of the curve to either side: every step saw other posts."""
    reach = len(values) // 10
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def ppo_figure(rows: list[dict]) -> Figure:
    """What PPO maximised, what it was for, and what it cost: proxy score, gold score (tiny world), KL, over updates."""
    score = ("reward model's score (proxy)", "update", "objective/scores", rows, PROXY)
    gold = ("gold score (truth)", "update", "objective/gold", rows, GOLD)
    kl = ("KL from the SFT policy (nats a response)", "update", "objective/kl", rows, KL)
    has_gold = any(row.get("objective/gold") is not None for row in rows)
    return panels([score, gold, kl] if has_gold else [score, kl])


def training_figure(sft: list[dict], rm: list[dict]) -> Figure:
    """Loss of SFT, loss and accuracy of the reward model, over optimizer steps; a stage without rows is left out."""
    specifications = [
        ("SFT: loss (nats a token)", "step", "train/sft/loss", sft, PROXY),
        ("reward model: loss (nats a pair)", "step", "train/rm/loss", rm, PROXY),
        ("reward model: accuracy", "step", "train/rm/accuracy", rm, GOLD),
    ]
    return panels([specification for specification in specifications if specification[3]])


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, transparent=True)
    return file.getvalue()


def training_log(model_folder: str | Path) -> list[dict]:
    """The metrics.jsonl of the run that made a model: beside its final/, or in an embedded checkpoint; [] without."""
    for folder in (Path(model_folder).parent, Path(model_folder)):
        if (folder / "metrics.jsonl").is_file():
            return read_metrics(folder)
    return []


def figures(models: dict[str, dict]) -> dict[str, bytes]:
    """{file name: PNG} of the runs that made these models, {stage: {"folder": ...}}, where their logs exist."""
    logs = {stage: training_log(model["folder"]) for stage, model in models.items()}
    found = {}
    if logs.get("ppo"):
        found["ppo.png"] = png(ppo_figure(logs["ppo"]))
    if logs.get("sft") or logs.get("rm"):
        found["training.png"] = png(training_figure(logs.get("sft", []), logs.get("rm", [])))
    return found
