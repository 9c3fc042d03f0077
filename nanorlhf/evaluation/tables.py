"""The tables of an evaluation, before anybody decides what they look like, and on a terminal.

Everything is a function of metrics.json (called `results`) and of rows of samples.jsonl; report.py makes pages of it.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

EXPLAINED = "What each number is, and what is healthy: docs/metrics.md."
NAMES = {"reference": "reference", "base": "base", "sft": "SFT", "ppo": "PPO", "rm": "reward model"}
MEASURES = {  # rows of the table of policies: name in metrics.json -> heading, format
    "rouge1": ("ROUGE-1", ".3f"),
    "rouge2": ("ROUGE-2", ".3f"),
    "rougeL": ("ROUGE-L", ".3f"),
    "loss": ("loss on references, nats a token", ".3f"),
    "length": ("words", ".1f"),
    "tokens": ("tokens", ".1f"),
    "eos_rate": ("stops (EOS)", ".1%"),
    "score": ("RM score", ".2f"),
    "gold": ("gold score", ".2f"),
}
HACKS = {
    "title_copy": ("title copied, mean share", ".2f"),
    "title_copy_50": ("... at least half of it", ".1%"),
    "title_copy_80": ("... at least 80%", ".1%"),
    "title_copy_100": ("... all of it", ".1%"),
    "copy4": ("4-grams copied from the post", ".2f"),
    "repetition": ("repeated bigrams in a text", ".1%"),
    "empty": ("without a word", ".1%"),
    "distinct2": ("distinct-2", ".3f"),
    "edit_distance": ("edit distance of samples of one post", ".2f"),
    "entropy": ("entropy, nats a token", ".3f"),
    "objective/kl_full": ("exact KL from SFT, nats a summary", ".2f"),
    "length_score_corr": ("correlation of length and RM score", ".2f"),
}


@dataclass
class Table:
    """Cells are plain text. `id` names the section of the report that it belongs to."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    id: str = ""


def display(name: str) -> str:
    """How a policy is called in a heading."""
    return NAMES.get(name, name)


def number(value: float | None, form: str = ".3f") -> str:
    """The number, or "-" where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, f"z{form}")  # z: no "-0.000"


def interval(low_high: Sequence[float] | None, form: str = ".3f") -> str:
    return "-" if low_high is None else f"{number(low_high[0], form)} to {number(low_high[1], form)}"


def tables(results: dict) -> list[Table]:
    """All tables, in the order of the report."""
    found = [policy_table(results), hack_table(results)]
    if results["win_rates"]:
        found += [win_table(results), judge_table(results)]
    if rm := results.get("reward_model"):
        found += [rm_table(rm), rm_kinds_table(rm)]
    if results.get("examples"):
        found.append(example_table(results["examples"]))
    return found


def _columns(results: dict, measures: dict[str, tuple[str, str]], header: str) -> tuple[list[str], list[list[str]]]:
    policies = results["policies"]
    rows = [
        [heading, *(number(row.get(key), form) for row in policies.values())]
        for key, (heading, form) in measures.items()
        if any(row.get(key) is not None for row in policies.values())
    ]
    return [header, *map(display, policies)], rows


def policy_table(results: dict) -> Table:
    about = results["about"]
    header, rows = _columns(results, MEASURES, "")
    stemmed = "with a stemmer: not the paper's figure" if about.get("rouge_stemmer") else "without a stemmer"
    note = f"split {about['split']}, temperature {about['temperature']:g}, {about['response_length']} tokens at most"
    note += f"; ROUGE {stemmed}; RM score: as if every summary had stopped; tokens: each policy's own tokenizer"
    return Table(f"Summaries of {about['posts']:,} held-out posts", header, rows, note, "summaries")


def hack_table(results: dict) -> Table:
    about = results["about"]
    header, rows = _columns(results, HACKS, "")
    note = "title copied: longest common subsequence of words over title length; 4-grams and bigrams of words"
    if about.get("diversity_samples"):
        note += "; edit distance (words over the longer text) and entropy:"
        number_of_posts = min(about["diversity_posts"], about["posts"])
        note += f" {about['diversity_samples']} samples of each of {number_of_posts} posts"
        note += f" at temperature {about['diversity_temperature']:g}; exact KL: one sample"
    return Table("What a policy may be up to", header, rows, note, "summaries")


def win_table(results: dict) -> Table:
    about, rows = results["about"], []
    for row in results["win_rates"]:
        who = f"{display(row['ours'])} vs {display(row['theirs'])}"
        counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
        controlled = f"{number(row['length_controlled'])} ({interval(row['length_controlled_interval'])})"
        rows.append([who, str(row["n"]), counts, number(row["rate"]), interval(row["interval"]), controlled])
    header = ["", "pairs", "wins / ties / losses", "win rate", "95% interval", "at equal length"]
    note = "a tie counts half; intervals: paired bootstrap over posts; at equal length: logistic regression on the log"
    note += " length ratio, read at ratio 1"
    if about["judge"] == "rm":
        note += f"; the judge is the reward model {about.get('judge_model') or 'that PPO optimised'}"
    return Table(f"Win rates by the {about['judge']} judge", header, rows, note, "wins")


def judge_table(results: dict) -> Table:
    """How far to trust the judge."""
    about, rows = results["about"], []
    for row in results["win_rates"]:
        who = f"{display(row['ours'])} vs {display(row['theirs'])}"
        agreement = f"{number(row.get('rm_agreement'))} ({interval(row.get('rm_agreement_interval'))})"
        sees_order = about["judge"] == "claude"
        orders = [number(row[name] if sees_order else None) for name in ("first_seat", "swap_agreement")]
        rows.append([who, agreement, *orders, str(row.get("unparsed", 0))])
    note = "agreement: of the pairs with a winner, the share on which the reward model's scores name the same one"
    if about["judge"] == "claude":
        told = about["judge_details"]
        unparsed = ", ".join(f"{count} {why}" for why, count in told["unparsed"].items()) or "none"
        note += "; each pair asked in both orders unless its texts are equal, a win counts when both agree"
        note += f"; model {told['model']}, prompt"
        note += f" {told['prompt_file']} {told['prompt_sha256'][:12]}, {told['answers']:,} answers,"
        note += f" {told['input_tokens']:,} tokens in and {told['output_tokens']:,} out; unparsed: {unparsed}"
    else:
        note += "; a judge that scores each summary by itself sees no order"
    header = ["", "agrees with reward model", "first seat wins", "same in both orders", "unparsed"]
    return Table("The judge", header, rows, note, "wins")


def rm_table(rm: dict) -> Table:
    rows = [
        ["accuracy", f"{number(rm['accuracy'])} ({interval(rm['interval'])})"],
        ["the longer summary wins", number(rm["length_baseline"])],
    ]
    if "ceiling" in rm:
        rows.append(["ceiling: knows the annotator", number(rm["ceiling"])])
        rows.append(["ceiling: goes by gold", number(rm["gold_ceiling"])])
    rows.append(["expected calibration error", number(rm.get("ece"))])
    rows.append(["correlation of score and length", number(rm.get("length_correlation"), ".2f")])
    title = f"Reward model on {rm['comparisons']:,} held-out comparisons"
    note = "equal scores count as wrong, equal lengths as half; in brackets: 95% intervals"
    return Table(title, ["", "measured"], rows, note, "rm")


def rm_kinds_table(rm: dict) -> Table:
    rows = []
    for kind, groups in rm.get("by", {}).items():
        rows.append([f"by {kind}", "", "", ""])
        rows += [
            [value, str(row["n"]), number(row["accuracy"]), interval(row["interval"])] for value, row in groups.items()
        ]
    note = "length gap: words of the chosen minus words of the rejected summary"
    return Table("Its accuracy by kind of pair", ["", "pairs", "accuracy", "95% interval"], rows, note, "rm")


def example_table(examples: list[dict]) -> Table:
    rows, before = [], None
    for row in examples:
        if row["set"] != before:
            rows.append([row["set"], *[""] * (3 if "gold" in row else 2)])
        before = row["set"]
        gold = [number(row["gold"], ".2f")] if "gold" in row else []
        rows.append([row["kind"], number(row["score"], ".2f"), interval(row["interval"], ".2f"), *gold])
    header = ["", "mean RM score", "95% interval", *(["gold"] if "gold" in examples[0] else [])]
    note = f"the same {examples[0]['n']} posts in every row; what tells nothing, or repeats itself, should be no higher"
    return Table("What it thinks of summaries whose order is known", header, rows, note, "rm")


def worst_tables(rm: dict) -> list[Table]:
    """The pairs on which the reward model is most wrong, side by side."""
    found = []
    for pair in rm.get("worst", []):
        rows = [[who, pair[who], number(pair[f"{who}_score"], ".2f")] for who in ("chosen", "rejected")]
        found.append(Table(pair["title"], [pair["policies"], "summary", "RM"], rows, pair["post"]))
    return found


def sample_table(row: dict) -> Table:
    """One post's summaries side by side."""
    who = [name for name in row if f"score/{name}" in row or f"gold/{name}" in row]
    who = who or [name for name in NAMES if name in row]
    scores = [key for key in ("gold", "score") if any(f"{key}/{name}" in row for name in who)]
    rows = [[display(name), row[name], *(number(row.get(f"{key}/{name}"), ".2f") for key in scores)] for name in who]
    header = ["", "summary", *({"gold": "gold", "score": "RM"}[key] for key in scores)]
    return Table(row["title"], header, rows, row["post"])


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
