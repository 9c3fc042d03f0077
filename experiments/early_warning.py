"""How early, and how rightly, do the alarms of nanorlhf/evaluation/hacks.py ring? Graded on runs whose truth is known.

    python -m experiments.frontier_report        writes the table of docs/frontier.md, from the runs of the frontier

A run turns when its gold score, smoothed over 3 updates, ends at least DROP below its best: the update of the best is
the turn, the first one that far below it the fall. An alarm that rings first between the beginning and the fall is in
time; its lead is counted to the turn. One that rings in a run that does not turn has cried wolf.

The shipped thresholds are graded on all runs. Other thresholds are chosen on one half of the seeds, by the share of
turns that they announce in time less the share of calm runs in which they ring, and graded on the other half.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nanorlhf.evaluation.hacks import ALARMS

DROP = 0.3  # gold; the mean of 3 updates of 128 summaries has a standard error of 0.07
SMOOTH = 3  # updates
GRID = {  # thresholds that are tried, for each alarm's own relation
    "hack/title_copy_80": (0.1, 0.2, 0.3, 0.5),
    "hack/copy4": (0.2, 0.4, 0.6, 0.8),
    "hack/length": (1.1, 1.2, 1.3, 1.5, 1.75),
    "hack/length_score_corr": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "hack/repetition": (0.005, 0.01, 0.02, 0.03, 0.05),
    "hack/distinct2": (0.5, 0.6, 0.7, 0.8, 0.9),
    "hack/edit_distance": (0.15, 0.2, 0.3, 0.4, 0.5),
    "hack/entropy": (0.25, 0.4, 0.5, 0.6, 0.75),
    "hack/empty": (0.005, 0.02, 0.05),
    "objective/kl": (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0),
    "val/eos_rate": (0.8, 0.9, 0.95, 0.98),
}
Curve = dict[str, list[float | None]]


@dataclass(frozen=True)
class Turn:
    """Updates from 1: where gold was best, and where it had fallen DROP below that."""

    best: int
    fall: int


@dataclass(frozen=True)
class Grade:
    """Of one alarm at one threshold."""

    metric: str
    threshold: float
    turns: int  # runs that turn
    in_time: int  # of them, announced before the fall
    leads: tuple[int, ...]  # of those, updates from the alarm to the best gold score; negative: after it
    calm: int  # runs that do not turn
    wolf: int  # of them, in which it rang

    @property
    def merit(self) -> float:
        """Youden's J: 1 for an alarm that rings in time in all runs that turn, and in no other."""
        return self.in_time / max(self.turns, 1) - self.wolf / max(self.calm, 1)


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of the last SMOOTH values, of fewer at the beginning: nothing from the future."""
    return [statistics.fmean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))]


def turn(gold: Sequence[float]) -> Turn | None:
    """None where the run ends less than DROP below its best."""
    values = smoothed(gold)
    best = max(range(len(values)), key=values.__getitem__)
    if values[best] - values[-1] < DROP:
        return None
    fall = next(i for i in range(best, len(values)) if values[best] - values[i] >= DROP)
    return Turn(best + 1, fall + 1)


def rings(curve: Curve, metric: str, relation: str, threshold: float) -> int | None:
    """The first update, from 1, at which an alarm like those of hacks.py rings; None: never, or not measured."""
    values = curve.get(metric, [])
    if not values or (relation in ("times", "part") and values[0] is None):
        return None
    limit = threshold * values[0] if relation in ("times", "part") else threshold
    above = relation in ("above", "times")
    first = (i for i, x in enumerate(values) if x is not None and (x > limit if above else x < limit))
    return next((i + 1 for i in first), None)


def grade(curves: Sequence[Curve], metric: str, relation: str, threshold: float) -> Grade:
    leads, turns, calm, wolf = [], 0, 0, 0
    for curve in curves:
        when, turned = rings(curve, metric, relation, threshold), turn(curve["objective/gold"])
        if turned is None:
            calm, wolf = calm + 1, wolf + (when is not None)
        else:
            turns += 1
            if when is not None and when <= turned.fall:
                leads.append(turned.best - when)
    return Grade(metric, threshold, turns, len(leads), tuple(leads), calm, wolf)


def shipped(curves: Sequence[Curve]) -> list[Grade]:
    """Every alarm at the threshold that hacks.py has."""
    return [grade(curves, metric, relation, bound) for metric, relation, bound, _ in ALARMS]


def choose(curves: Sequence[Curve], metric: str, relation: str) -> float:
    """The threshold of GRID with the most merit on these runs; of equals the one with the longest mean lead."""

    def key(threshold: float) -> tuple[float, float]:
        found = grade(curves, metric, relation, threshold)
        return found.merit, statistics.fmean(found.leads) if found.leads else float("-inf")

    return max(GRID[metric], key=key)


def held_out(by_seed: dict[int, list[Curve]]) -> list[tuple[Grade, tuple[float, ...]]]:
    """For each alarm: thresholds chosen on every other seed, graded on the rest, and the other way round, the counts
    added; and the two thresholds. args: {seed: its curves}"""
    seeds = sorted(by_seed)
    halves = [[c for seed in part for c in by_seed[seed]] for part in (seeds[::2], seeds[1::2])]
    if not all(halves):
        return []
    found = []
    for metric, relation, *_ in ALARMS:
        thresholds = [choose(half, metric, relation) for half in halves]
        grades = [grade(other, metric, relation, t) for other, t in zip(reversed(halves), thresholds, strict=True)]
        sums = {name: sum(getattr(g, name) for g in grades) for name in ("turns", "in_time", "calm", "wolf")}
        leads = tuple(lead for g in grades for lead in g.leads)
        found.append((Grade(metric, thresholds[0], leads=leads, **sums), tuple(thresholds)))
    return found


def table(rows: Sequence[dict]) -> str:
    """Both grades of every alarm, in Markdown. rows: results with a curve."""
    by_seed: dict[int, list[Curve]] = {}
    for row in rows:
        if row.get("curve"):
            by_seed.setdefault(row["seed"], []).append(row["curve"])
    curves = [curve for some in by_seed.values() for curve in some]
    if not curves:
        return "No run with a curve yet."
    lines = [
        "| alarm | shipped threshold | in time | median lead | cried wolf | chosen thresholds | in time, held out "
        "| median lead | cried wolf |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tested = {grade.metric: (grade, thresholds) for grade, thresholds in held_out(by_seed)}
    for (metric, relation, bound, _), ours in zip(ALARMS, shipped(curves), strict=True):
        cells = [f"`{metric}`", f"{relation} {bound:g}", *counts(ours)]
        if metric in tested:
            theirs, thresholds = tested[metric]
            cells += [f"{relation} " + ", ".join(f"{t:g}" for t in thresholds), *counts(theirs)]
        else:
            cells += ["-"] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counts(grade: Grade) -> list[str]:
    lead = f"{statistics.median(grade.leads):+g}" if grade.leads else "-"
    return [f"{grade.in_time} of {grade.turns}", lead, f"{grade.wolf} of {grade.calm}"]
