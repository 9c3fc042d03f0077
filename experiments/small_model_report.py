"""The tables of experiments/small_model.py: results.json and samples.jsonl -> markdown."""

import math
from pathlib import Path

from nanorlhf.data.tldr import Post
from nanorlhf.evaluation.hacks import TITLE_SHARES
from nanorlhf.evaluation.metrics import accuracy_interval, bootstrap_interval, title_copy
from nanorlhf.storage.jsonl import read_jsonl

TEXTS = 10  # posts shown with what each policy wrote
# Published ROUGE-L of SFT on OpenAI's TL;DR. For orientation: other posts, and models eight times as large.
PUBLISHED = ("ROUGE-L elsewhere, beside the unstemmed: 0.2471, the N+ paper's Pythia-1B (official validation posts, "
             "temperature 0.01); beside the stemmed: 0.2694, the report that this project grew from (Llama-3.2-1B, "
             "official test posts, greedy). Both learned from 116,722 posts that people had filtered")  # fmt: skip
PPO_COLUMNS = {  # column -> metric of train_ppo.py
    "score": "objective/scores",
    "KL": "objective/kl",
    "entropy": "objective/entropy",
    "EOS": "val/eos_rate",
    "words": "hack/length",
    "title": "hack/title_copy",
    "title >= 80%": "hack/title_copy_80",
    "clipfrac": "policy/clipfrac_avg",
    "s": "s",
}


def table(head: list[str], rows: list[list]) -> list[str]:
    """A markdown table; numbers with four digits."""

    def cell(value) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(map(cell, row))} |" for row in rows] + [""]


def report(state: dict, out: Path) -> str:
    """Everything that was reached, and by name what was not."""
    about = state["about"]
    commit = (about.get("git") or {}).get("commit", "unknown")
    lines = ["# SmolLM2-135M on real posts", ""]
    spent = sum(state.get("seconds", {}).values())
    lines += [f"{about['device']}, {about['dtype']}, torch {about['torch']}, commit {commit}, seed {about['seed']}: "
              f"{spent:.0f} s in all parts, begun with a budget of {60 * about['minutes']:.0f} s.", ""]  # fmt: skip
    failed = {part: row["failed"] for part, row in state.items() if isinstance(row, dict) and "failed" in row}
    lines += [f"- not reached: {part}: {why}" for part, why in failed.items()]
    lines += stages({part: state[part] for part in state if part not in failed}, state.get("seconds", {}))
    for part, section in SECTIONS.items():
        if part in state and part not in failed:
            lines += ["", *section(state[part], out)]
    return "\n".join(lines) + "\n"


def stages(state: dict, seconds: dict[str, float]) -> list[str]:
    """Seconds of each part with loading and measuring; tokens a second of its steps, median; peak memory."""
    rows = []
    for part in SECTIONS:
        runs = state[part].get("runs", {part: state[part]}) if part in state else {}
        for name, run in runs.items():
            speeds = sorted(row["perf/tokens_per_s"] for row in run.get("rows", ()) if "perf/tokens_per_s" in row)
            speed = f"{speeds[len(speeds) // 2]:,.0f}" if speeds else None
            spent = run["s"] if "rows" in run else seconds.get(part) if name == part else None
            if spent is not None:
                rows.append([name, len(speeds) or None, f"{spent:,.0f}", speed, run.get("peak_gib")])
    return ["", "## Stages", "", *table(["part", "steps", "seconds", "tokens/s", "peak GiB"], rows)] if rows else []


def lr(found: dict, _: Path) -> list[str]:
    if not found["runs"]:
        return [f"SFT's learning rate {found['chosen']:g} was given, not compared."]
    rows = [[name, row["loss"], row["rouge/rougeL"], row["eos_rate"]] for name, row in found["runs"].items()]
    return [f"## Learning rate of SFT, {found['steps']} steps each", "",
            *table(["lr", "held-out loss", "ROUGE-L", "EOS rate"], rows)]  # fmt: skip


def sft(found: dict, _: Path) -> list[str]:
    *steps, last = found["rows"]
    speed = sorted(row["perf/tokens_per_s"] for row in steps)[len(steps) // 2]
    loss = [row["train/sft/loss"] for row in steps]
    return ["## SFT", "",
            f"{len(steps)} steps in {found['s']:.0f} s with loading and evaluation, {speed:,.0f} tokens/s, peak "
            f"{found['peak_gib']:.1f} GiB. Loss {loss[0]:.3f} to {loss[-1]:.3f}; held out "
            f"{last['validation/sft/loss']:.3f}."]  # fmt: skip


def rm(found: dict, _: Path) -> list[str]:
    *steps, last = found["rows"]
    speed = sorted(row["perf/tokens_per_s"] for row in steps)[len(steps) // 2]
    return ["## Reward model", "",
            f"{len(steps)} steps in {found['s']:.0f} s, {speed:,.0f} tokens/s, peak {found['peak_gib']:.1f} GiB. Loss "
            f"{steps[0]['train/rm/loss']:.3f} to {steps[-1]['train/rm/loss']:.3f}; accuracy on held-out pairs "
            f"{last['eval/rm/validation/accuracy']:.3f}, where the longer text wins "
            f"{last['eval/rm/validation/accuracy_longer_wins']:.3f} of them."]  # fmt: skip


def ppo(found: dict, _: Path) -> list[str]:
    lines = []
    for name, run in found["runs"].items():
        rows = [row for row in run["rows"] if "objective/kl" in row]
        for row in rows:
            row["s"] = sum(row[f"time/{phase}"] for phase in ("rollout", "score", "learn"))
        every = max(1, len(rows) // 12)
        shown = sorted({0, *range(every - 1, len(rows), every), len(rows) - 1})
        speed = sorted(row["perf/tokens_per_s"] for row in rows)[len(rows) // 2]
        lines += [f"## PPO: {name}, lr {rows[0]['lr']:g} at the start", "",
                  f"{len(rows)} updates in {run['s']:.0f} s, {speed:,.0f} tokens/s, peak {run['peak_gib']:.1f} GiB.",
                  ""]  # fmt: skip
        columns = [[rows[i]["step"], *(rows[i].get(metric) for metric in PPO_COLUMNS.values())] for i in shown]
        lines += table(["update", *PPO_COLUMNS], columns)
    return [*lines, *(f"- went on without it: {why}" for why in found["refused"])]


def preflight(found: dict, _: Path) -> list[str]:
    lines = ["## Pre-flight of one PPO update", ""]
    lines += [f"- {dtype}: {row['refused']}" for dtype, row in found.items() if "refused" in row]
    good = {dtype: row for dtype, row in found.items() if "refused" not in row}
    names = list(next(iter(good.values()), {}))
    return lines + table(
        ["check", *good], [[n.removeprefix("preflight/"), *(row.get(n) for row in good.values())] for n in names]
    )


def evaluation(found: dict, out: Path) -> list[str]:
    policies, lines = found["policies"], ["## On held-out posts", ""]
    head = ["policy", "loss", "ROUGE-1", "ROUGE-2", "ROUGE-L", "stemmed 1", "2", "L", "EOS", "words", "score"]
    rows = []
    for name, row in policies.items():
        plain, stemmed = ([of.get(f"rouge{n}") for n in "12L"] for of in (row, row.get("stemmed", {})))
        last = [row.get(key) for key in ("eos_rate", "length", "score")]
        rows.append([name, row.get("loss"), *plain, *stemmed, *last])
    lines += [f"{found['about']['posts']} posts; loss in nats a token of the authors' summaries. {PUBLISHED}.", ""]
    lines += table(head, rows)
    card = found["reward_model"]
    n, hits = card["comparisons"], round(card["accuracy"] * card["comparisons"])
    low, high = accuracy_interval(hits, n)
    lines += [f"Reward model: {hits} of {n} held-out pairs, {hits / n:.3f} (95% {low:.3f} to {high:.3f}); the longer "
              f"text wins {card['length_baseline']:.3f}. With {n} pairs a difference below about 0.13 is noise.",
              ""]  # fmt: skip
    rows = [
        [f"{row['ours']} over {row['theirs']}", row["rate"], _interval(row["interval"])] for row in found["win_rates"]
    ]
    lines += ["Judged by the reward model that PPO was trained on: what it likes, not what people like.", ""]
    lines += table(["", "win rate", "95%"], rows)
    path = out / "samples.jsonl"
    if path.is_file():
        texts = read_jsonl(path)
        lines += titles(texts, list(policies)) + samples(texts[:TEXTS], list(policies))
    return lines


def _interval(pair) -> str:
    return f"{pair[0]:.3f} to {pair[1]:.3f}"


def titles(rows: list[dict], names: list[str]) -> list[str]:
    posts = [Post(r["id"], r["subreddit"], r["title"], r["post"], "") for r in rows]
    lines, _ = title_table({name: ([r[name] for r in rows], posts) for name in names})
    return ["## Title copying", "", *lines]


def copies_of(texts: list[str], posts: list[Post]) -> list[float]:
    """`title_copy` of each text whose post has a title."""
    copies = [title_copy(text, post.title) for text, post in zip(texts, posts, strict=True)]
    return [copy for copy in copies if not math.isnan(copy)]


def title_table(texts: dict[str, tuple[list[str], list[Post]]]) -> tuple[list[str], dict[str, dict]]:
    """{name: (texts, their posts)} -> how much of a title is copied, with bootstrap intervals over posts, as markdown
    and as numbers."""
    lines, numbers = [], {}
    for name, (written, posts) in texts.items():
        copies = copies_of(written, posts)
        least = {f"at least {share}%": [float(copy >= share / 100 - 1e-9) for copy in copies] for share in TITLE_SHARES}
        numbers[name] = {"n": len(copies)}
        for what, values in ({"mean": copies} | least).items():
            numbers[name][what] = (sum(values) / len(values), *bootstrap_interval(values, seed=1))
        shown = (f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in list(numbers[name].values())[1:])
        lines.append([name, len(copies), *shown])
    return table(["text", "n", "share of the title, mean", *list(least)], lines), numbers


def samples(rows: list[dict], names: list[str]) -> list[str]:
    lines = [f"## {len(rows)} posts and what was written", ""]
    for row in rows:
        post = " ".join(row["post"].split())
        lines += [f"**r/{row['subreddit']}: {row['title']}** {post[:160]}{'...' if len(post) > 160 else ''}", ""]
        lines += [f"- {name}: {' '.join(row[name].split()) or '(nothing)'}" for name in names] + [""]
    return lines


def out_again(found: dict, _: Path) -> list[str]:
    lines = [f"transformers writes the same greedy text as our decoder for {found['same_greedy_text']} of "
             f"{found['posts']} posts (PPO's folder, fp32)."]  # fmt: skip
    if "gguf_same_tensors" in found:
        same = "every tensor is the same" if found["gguf_same_tensors"] else "TENSORS DIFFER"
        lines.append(f"As a GGUF in f32 and back, {same}.")
    if "same_in_llama_cpp" in found:
        lines.append(f"llama.cpp writes the same text from it for {found['same_in_llama_cpp']} of {found['posts']}.")
    return lines


SECTIONS = {"lr": lr, "sft": sft, "rm": rm, "ppo": ppo, "eval": evaluation, "preflight": preflight,
            "out_again": out_again}  # fmt: skip
