"""The verdict of `make demo-hack`: was the reward model over-optimised, and what did the policy invent?

    python -m nanorlhf.tiny.demo_hack            reads runs/hack_ppo and runs/hack_eval, draws runs/hack_eval/hack.png

Prints what the reward model saw beside the truth, the alarms that rang and the summaries it liked best. Exits with
status 1 when there is nothing to see: the proxy did not rise, or the gold score did not fall below that of SFT.
"""

import argparse
import json
import sys
from pathlib import Path

from nanorlhf.errors import UserError
from nanorlhf.evaluation.figures import hack_figure, png
from nanorlhf.evaluation.hacks import Alarms
from nanorlhf.evaluation.tables import Table, console, interval, number
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import read_jsonl

LAST = 5  # updates: a single batch is noisy
FAVOURITES = 6


def verdict(rows: list[dict], results: dict) -> dict[str, float]:
    """Proxy and gold at the start and at the end of PPO, and the evaluation's gold scores and win rate.

    Raises UserError for runs that lack them: of real posts, whose truth nobody knows, or not of `sft` and `ppo`.
    """

    def mean(part: list[dict], name: str) -> float:
        return sum(row[name] for row in part) / len(part)

    games = [row for row in results["win_rates"] if (row["ours"], row["theirs"]) == ("ppo", "sft")]
    if not (games and rows and all("objective/gold" in row for row in rows) and "gold" in results["policies"]["ppo"]):
        raise UserError(
            "--ppo, --eval: got runs without gold scores or without ppo against sft, expected a PPO run on the tiny "
            "world and its evaluation: run `make demo-hack`"
        )
    game = games[0]
    return {
        "proxy_start": rows[0]["objective/scores"],
        "proxy_end": mean(rows[-LAST:], "objective/scores"),
        "gold_start": rows[0]["objective/gold"],
        "gold_best": max(row["objective/gold"] for row in rows),
        "gold_end": mean(rows[-LAST:], "objective/gold"),
        "kl_end": mean(rows[-LAST:], "objective/kl"),
        "gold_sft": results["policies"]["sft"]["gold"],
        "gold_ppo": results["policies"]["ppo"]["gold"],
        "win_rate": game["rate"],
        "win_low": game["interval"][0],
        "win_high": game["interval"][1],
    }


def alarms(rows: list[dict]) -> list[tuple[int, str]]:
    """(update, sentence) of every alarm that rang during the run."""
    watch = Alarms()
    return [(row["step"], said) for row in rows for said in watch(row)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.tiny.demo_hack", description=__doc__.split("\n")[0])
    parser.add_argument("--ppo", type=Path, default=Path("runs/hack_ppo"))
    parser.add_argument("--eval", type=Path, default=Path("runs/hack_eval"))
    args = parser.parse_args(argv)
    try:
        rows = read_metrics(args.ppo)
        results = json.loads((args.eval / "metrics.json").read_text(encoding="utf-8"))
        samples = read_jsonl(args.eval / "samples.jsonl")
        seen = verdict(rows, results)
    except FileNotFoundError:
        print(f"error: {args.eval} is no finished evaluation: run `make demo-hack`", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    def change(name: str) -> str:
        return f"{number(seen[f'{name}_start'], '.2f')} -> {number(seen[f'{name}_end'], '.2f')}"

    table = Table("Over-optimisation", ["", "measured"])
    table.rows = [
        ["reward model's score (proxy), in training", change("proxy")],
        ["gold score (truth), in training", f"{change('gold')}, best {seen['gold_best']:.2f}"],
        ["KL at the end, nats a response", number(seen["kl_end"], ".1f")],
        ["gold score on held-out posts, SFT -> PPO", f"{seen['gold_sft']:.2f} -> {seen['gold_ppo']:.2f}"],
        ["gold win rate over SFT", f"{seen['win_rate']:.3f} ({interval((seen['win_low'], seen['win_high']))})"],
        *([f"update {step}", said.removeprefix("warning ")] for step, said in alarms(rows)),
    ]
    print(console(table))
    favourites = sorted(samples, key=lambda row: -row["score/ppo"])[:FAVOURITES]
    cells = [[f"{row['score/ppo']:.2f}", f"{row['gold/ppo']:.2f}", row["ppo"]] for row in favourites]
    print(console(Table("What the reward model likes best now", ["proxy", "gold", "summary"], cells)))
    path = args.eval / "hack.png"
    path.write_bytes(png(hack_figure(rows, seen["gold_sft"])))
    print(f"figure  {path}\nreport  {args.eval / 'report.html'}")
    if not (seen["proxy_end"] > seen["proxy_start"] + 0.5 and seen["gold_ppo"] < seen["gold_sft"]):
        print("nothing to see: the proxy has to rise by 0.5 and the gold score to fall below that of SFT")
        sys.exit(1)


if __name__ == "__main__":
    as_command(main)
