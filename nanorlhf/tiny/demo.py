"""The demo's verdict: did every stage do what it should?

    python -m nanorlhf.tiny.demo                 the runs of `make demo`: runs/demo_sft, demo_rm, demo_ppo, demo_eval
    python -m nanorlhf.tiny.demo --prefix ""     runs of the default names: runs/sft, rm, ppo, eval

Prints three tables, of results, of the bars they have to pass and of speed by stage, and exits with status 1 and a list
when a bar is missed. A result that is absent or not a number misses its bar.
"""

import argparse
import json
import operator
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from nanorlhf.errors import UserError
from nanorlhf.evaluation.tables import NAMES, Table, console, interval, number
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command

STAGES = ("sft", "rm", "ppo", "eval")
RELATIONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
BARS = (  # (what `measure` calls it, relation, bound, in words)
    ("sft_rouge", ">=", 0.42, "SFT ROUGE-L"),
    ("gold_sft", ">=", 3.4, "gold score of SFT"),
    ("rm_accuracy", ">=", 0.68, "reward model's accuracy on held-out comparisons"),
    ("preflight_ratio_error", "<=", 1e-4, "|ratio - 1| before the first PPO update"),
    ("preflight_kl_error", "<=", 1e-3, "|KL| before the first PPO update"),
    ("max_kl", "<", 10.0, "largest objective/kl, nats a response"),
    ("gold_gain", ">=", 0.4, "gold score, PPO - SFT"),
    ("ppo_vs_sft", ">=", 0.60, "gold win rate, PPO vs SFT"),  # what seeds leave of it: docs/robustness.md
    ("ppo_vs_sft_low", ">", 0.55, "its 95% interval's lower end"),
    ("ppo_vs_reference", ">=", 0.58, "gold win rate, PPO vs reference"),
    ("eos_rate", ">=", 0.95, "share of PPO's summaries that stop"),
)


def read_runs(folders: dict[str, Path]) -> dict:
    """{stage: lines of its metrics.jsonl}, "results": the evaluation's metrics.json, "started": {stage: when}."""
    runs = {stage: read_metrics(folder) for stage, folder in folders.items()}
    for stage, rows in runs.items():
        if not rows:
            raise UserError(f"{folders[stage]} has no metrics, expected a finished run: `make demo` runs all stages")
    try:
        results = json.loads((folders["eval"] / "metrics.json").read_text(encoding="utf-8"))
        configs = {
            stage: json.loads((folder / "config.json").read_text(encoding="utf-8")) for stage, folder in folders.items()
        }
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"a run is not finished ({error}): `make demo` runs all stages") from None
    return runs | {"results": results, "started": {stage: config.get("started") for stage, config in configs.items()}}


def last(rows: list[dict], name: str) -> float | None:
    """The metric's value in the last line that has it."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def measure(runs: dict) -> dict[str, float | None]:
    """Everything a bar or the table needs, by name; None where the runs do not say."""
    ppo, results = runs["ppo"], runs["results"]
    policies = results.get("policies", {})
    by_gold = results.get("about", {}).get("judge") == "gold"  # another judge's wins pass no bar
    rates = {(row["ours"], row["theirs"]): row for row in results.get("win_rates", []) if by_gold}

    def policy(stage: str, name: str) -> float | None:
        return policies.get(stage, {}).get(name)

    def combine(function, *values: float | None) -> float | None:
        return None if None in values else function(*values)

    kls = [row["objective/kl"] for row in ppo if "objective/kl" in row]  # None: it was not finite
    return {
        "sft_rouge": policy("sft", "rougeL"),
        "gold_sft": policy("sft", "gold"),
        "rm_accuracy": results.get("reward_model", {}).get("accuracy"),
        "preflight_ratio_error": combine(lambda value: abs(value - 1), ppo[0].get("preflight/ratio")),
        "preflight_kl_error": combine(abs, ppo[0].get("preflight/kl")),
        "max_kl": None if None in kls else max(kls, default=None),
        "gold_gain": combine(operator.sub, policy("ppo", "gold"), policy("sft", "gold")),
        "ppo_vs_sft": rates.get(("ppo", "sft"), {}).get("rate"),
        "ppo_vs_sft_low": rates.get(("ppo", "sft"), {}).get("interval", [None])[0],
        "ppo_vs_reference": rates.get(("ppo", "reference"), {}).get("rate"),
        "eos_rate": policy("ppo", "eos_rate"),
    }


def judge_bars(values: dict[str, float | None], bars: Sequence[tuple] = BARS) -> list[tuple[str, str, str, bool]]:
    """(in words, measured, bar, passed) for each bar."""
    rows = []
    for name, relation, bound, in_words in bars:
        value = values[name]
        passed = value is not None and RELATIONS[relation](value, bound)  # a nan passes nothing
        rows.append((in_words, number(value, ".3g"), f"{relation} {bound:g}", passed))
    return rows


def results_table(runs: dict) -> Table:
    """What the stages reached, in the order they ran."""
    sft, rm, ppo, results = runs["sft"], runs["rm"], runs["ppo"], runs["results"]
    policies, card = results.get("policies", {}), results.get("reward_model", {})

    def change(before: float | None, after: float | None, form: str = ".2f") -> str:
        return f"{number(before, form)} -> {number(after, form)}"

    def first_to_last(rows: list[dict], name: str) -> str:
        return change(next((row[name] for row in rows if row.get(name) is not None), None), last(rows, name))

    def of(stage: str, name: str) -> float | None:
        return policies.get(stage, {}).get(name)

    rows = [
        ["SFT: training loss", first_to_last(sft, "train/sft/loss")],
        ["SFT: loss on held-out posts", number(last(sft, "validation/sft/loss"))],
        ["SFT: ROUGE-L, base -> SFT", change(of("base", "rougeL"), of("sft", "rougeL"), ".3f")],
        ["reward model: training loss", first_to_last(rm, "train/rm/loss")],
        ["reward model: accuracy", f"{number(card.get('accuracy'))} ({interval(card.get('interval'))})"],
        [
            "  length alone -> ceiling of the label noise",
            change(card.get("length_baseline"), card.get("ceiling"), ".3f"),
        ],
        ["PPO: reward model's score", first_to_last(ppo, "objective/scores")],
        ["PPO: KL at the end, nats a response", number(last(ppo, "objective/kl"), ".2f")],
        ["gold score, SFT -> PPO", change(of("sft", "gold"), of("ppo", "gold"))],
    ]
    for row in results.get("win_rates", []):
        name = f"win rate, {NAMES[row['ours']]} vs {NAMES[row['theirs']]}"
        rows.append([name, f"{number(row['rate'])} ({interval(row['interval'])})"])
    rows.append(["words a summary, SFT -> PPO", change(of("sft", "length"), of("ppo", "length"), ".1f")])
    judge = results.get("about", {}).get("judge", "-")
    return Table("Results", ["", "measured"], rows, f"in brackets: 95% intervals; the judge of win rates: {judge}")


def seconds_of(rows: list[dict], started: str | None) -> float | None:
    """Seconds a stage took: what it logged, else from its start to its last line."""
    total = last(rows, "time/total_s")
    if total is None and started and "time" in rows[-1]:
        total = rows[-1]["time"] - datetime.fromisoformat(started).timestamp()
    return total


def speed_table(runs: dict) -> Table:
    """Seconds and tokens a second by stage, so that a change can be compared."""
    table, total = Table("Speed", ["stage", "seconds", "tokens/s (median step)"]), 0.0
    for stage in STAGES:
        seconds = seconds_of(runs[stage], runs["started"][stage])
        speeds = [row["perf/tokens_per_s"] for row in runs[stage] if row.get("perf/tokens_per_s") is not None]
        table.rows.append([stage, number(seconds, ".1f"), number(median(speeds), ",.0f") if speeds else "-"])
        total += seconds or 0.0
    table.rows.append(["all", number(total, ".1f"), ""])
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.tiny.demo", description="The demo's results and verdict.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument(
        "--prefix", default="demo_", help="before sft, rm, ppo and eval in the names of the run folders"
    )
    args = parser.parse_args(argv)
    folders = {stage: args.runs / f"{args.prefix}{stage}" for stage in STAGES}
    try:
        runs = read_runs(folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    bars = judge_bars(measure(runs))
    verdicts = [[*row, "ok" if passed else "MISSED"] for *row, passed in bars]
    for table in (results_table(runs), Table("Bars", ["", "measured", "bar", ""], verdicts), speed_table(runs)):
        print(console(table))
    print(f"report  {folders['eval'] / 'report.html'}")
    missed = [f"{name}: {measured}, the bar is {bar}" for name, measured, bar, passed in bars if not passed]
    if missed:
        print("missed bars:\n" + "\n".join(f"  {line}" for line in missed))
        sys.exit(1)
    print(f"all {len(bars)} bars passed")


if __name__ == "__main__":
    as_command(main)
