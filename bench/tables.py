"""The tables of docs/speed.md, from the files that bench.all writes. One function a benchmark."""

import json
from pathlib import Path


def heading(found: dict) -> str:
    if "driver" not in found:
        threads = found["threads"]
        where = f"{found['processor']}, {found['cores']} cores, {threads} thread{'s' * (threads != 1)}"
        return f"### CPU: {where}, torch {found['torch']}"
    return f"### {found['device']}, driver {found['driver']}, torch {found['torch']}"


def row_of(cells: list) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def update_table(result: dict) -> list[str]:
    """Phases of an update and of a step."""
    lines = [f"{result['shape']}, 128 queries of {result['mean_query']:.0f} tokens on average.", ""]
    names = {"of_matmul": "of a matmul", "of_copy": "of a copy", "mfu": "MFU", "peak_gib": "peak GiB"}
    there = [key for key in names if any(key in row for row in result["results"])]  # a CPU has none of them
    lines.append(row_of(["stage", "phase", "s", "tokens/s", *(names[key] for key in there)]))
    lines.append("|---" * (4 + len(there)) + "|")
    for row in result["results"]:
        speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
        more = [f"{row[key]:.1f}" if key == "peak_gib" and key in row else share(row.get(key)) for key in there]
        lines.append(row_of([row["stage"], row["phase"], f"{row['s']:.3f}", speed, *more]))
    if "planned_gib" in result:
        plans = ", ".join(f"{stage} {gib:.1f}" for stage, gib in result["planned_gib"].items())
        lines += ["", f"Peaks by counting (`bench.plan`), GiB: {plans}."]
    if "hours" in result:
        lines += ["", "By these step times: " + ", ".join(f"{k} {h:.2f} h" for k, h in result["hours"].items()) + "."]
    return lines


def against_table(result: dict) -> list[str]:
    """Ours beside transformers and TRL."""
    tokens = result["tokens"]
    lines = [f"{result['batch_size']} posts, {tokens['packed']:,} tokens packed, {tokens['padded']:,} padded.", ""]
    lines += [row_of(["threads", "", "nanorlhf, s", "theirs, s", "ratio", "of CPU time"]), "|---" * 6 + "|"]
    for row in result["results"]:
        for work in ("rollout", "sft", "update"):
            r = row[work]
            times = [f"{r[key]:.3f}" for key in ("nanorlhf", "transformers")]
            lines.append(
                row_of([row["threads"], f"{work}, transformers", *times, f"{r['ratio']:.2f}", f"{r['ratio_cpu']:.2f}"])
            )
        trl = row.get("trl", {})
        if "ratio" in trl:
            cells = [f"rollout + update, TRL {trl['trl']}", f"{trl['nanorlhf']:.3f}", f"{trl['seconds']:.3f}"]
            lines.append(row_of([row["threads"], *cells, f"{trl['ratio']:.2f}", f"{trl['ratio_cpu']:.2f}"]))
    return lines


def scaling_line(result: dict) -> list[str]:
    """Fitted exponents."""
    pairs = (f"{name} {result['exponents'][name]:.2f} ({result['by_flops'][name]:.2f})" for name in result["exponents"])
    return ["Exponents of seconds over tokens (by counting FLOPs): " + ", ".join(pairs) + "."]


def plan_table(result: dict) -> list[str]:
    """What fits on one card: a prediction."""
    per_token = result["saved_bytes_per_token"]
    kept, less = (f"{per_token[name] / 1e6:.2f}" for name in ("kept", "checkpointing"))
    card = f"**predicted** for {result['gpu_gb']:g} GB, {result['budget_gib']:.1f} GiB of them for torch"
    lines = [f"{card}; a trunk keeps {kept} MB a token, with checkpointing {less}.", ""]
    lines += [row_of(["stage", "states, GiB", "peak, GiB", "at", "flags"]), "|---" * 5 + "|"]
    for row in result["results"]:
        where = f"{row['microbatch_tokens']:,} tokens" + (", checkpointing" if row["checkpointing"] else "")
        flags = (f"`{row['flags']}`" if row["flags"] else "the preset's") if row["fits"] else "does not fit"
        states = sum(row["states_gib"].values())
        lines.append(row_of([row["stage"], f"{states:.1f}", f"{row['peak_gib']:.1f}", where, flags]))
    return lines


def kernels_table(result: dict) -> list[str]:
    """Milliseconds of an operation, a column for each contender; of a GPU only."""
    ceiling, rows = result["ceilings"], result["results"]
    if "gb" not in rows[0]:  # a CPU has the references only
        return []
    lines = [f"a copy moves {ceiling['GB']:,.0f} GB/s here, a matmul makes {ceiling['TFLOP']:.0f} TFLOP/s.", ""]
    others = {"torch F.rms_norm": "torch's own", "torch F.linear_cross_entropy": "torch's own"}
    columns = ["PyTorch", "torch.compile", "torch's own", "Liger"]
    found: dict[str, dict] = {}
    for row in rows:
        who = others.get(row["who"], row["who"].split(" (")[0])
        found.setdefault(row["op"], {})[who] = row
    there = [who for who in columns if any(who in one for one in found.values())]
    graphed = ["ours", *there] if any("gpu_ms" in row for row in rows) else []  # the body's operations, without Python
    head = ["operation", "ours, ms", "of the ceiling", "ours, GB", *(f"{who}, ms" for who in there)]
    lines += [row_of([*head, *(f"{who}, GPU alone" for who in graphed)])]
    lines.append("|---" * (4 + len(there) + len(graphed)) + "|")
    for op, one in found.items():
        ours = one["ours"]
        cells = [f"{ours['ms']:.3f}", share(ours["of_ceiling"]), f"{ours['gb']:.2f}"]
        cells += [f"{one[who]['ms']:.3f}" if who in one else "" for who in there]
        cells += [f"{one[who]['gpu_ms']:.3f}" if "gpu_ms" in one.get(who, {}) else "" for who in graphed]
        lines.append(row_of([op, *cells]))
    return lines


def rollout_table(result: dict) -> list[str]:
    """Ours and transformers' generate, taking turns."""
    tokens = f"{result['packed_tokens']:,} tokens packed, {result['padded_tokens']:,} padded"
    lines = [f"{result['batch']} queries, {tokens}, {result['response_length']} new ones.", ""]
    lines += [row_of(["threads", "", "s", "prefill, s", "ms a step", "tokens/s", "x ours"]), "|---" * 7 + "|"]
    for threads, contenders in result["threads"].items():
        for who, r in contenders.items():
            cells = [f"{r['seconds']:.3f}", f"{r['prefill_s']:.3f}", f"{r['step_ms']:.2f}", f"{r['tokens_per_s']:,.0f}"]
            lines.append(row_of([threads, who, *cells, f"{r['over_ours']:.2f}"]))
    return lines


def ppo_table(result: dict) -> list[str]:
    """train_ppo.py from update to update."""
    seconds = result["seconds"]
    mfu = f", MFU {result['mfu']:.0%}" if "mfu" in result else ""
    lines = [
        f"{result['updates']} updates of train_ppo.py, {result['shape']}, queries of {result['mean_query']:.0f} tokens; "
        f"{seconds['median']:.2f} s each{mfu}; the peak, {result['peak_gib']:.1f} GiB, grew by "
        f"{result['peak_growth']:.1%} after the second update.",
        "",
        row_of(["phase", "median, s", "least", "most", "second half over first"]),
        "|---" * 5 + "|",
    ]
    for phase in ("rollout", "score", "learn", "seconds"):
        r = result[phase]
        cells = [f"{r[key]:.3f}" for key in ("median", "least", "most")]
        lines.append(row_of(["whole" if phase == "seconds" else phase, *cells, f"{r['drift']:+.1%}"]))
    return lines


def tiny_table(result: dict) -> list[str]:
    """The tiny pipeline against the committed run of a CPU."""
    lines = ["the committed run is a CPU's.", ""]
    lines += [row_of(["stage", "dtype", "metric", "at", "here", "committed", "apart", "bound"]), "|---" * 8 + "|"]
    for row in result["results"]:
        numbers = [f"{row[key]:.4g}" for key in ("here", "committed", "apart", "bound")]
        lines.append(row_of([row["stage"], row["dtype"], row["metric"], row["where"], *numbers]))
    return lines


def small_table(result: dict) -> list[str]:
    """SmolLM2 on real posts, stage by stage."""
    about, rows = result["about"], {row["part"]: row for row in result["results"] if "failed" not in row}
    lines = [f"{about['dtype']}, seed {about['seed']}, {about['total_s']:.0f} s for all parts, beside others.", ""]
    lines += [row_of(["stage", "steps", "tokens/s", "peak GiB", "first", "last", "held out"]), "|---" * 7 + "|"]
    for part in ("sft", "rm", "ppo"):
        if part in rows:
            row = rows[part]
            kind, held_out = "loss", row.get("held_out")
            if part == "ppo":
                kind, held_out = "score", f"KL {row['kl'][-1]:.2f}, EOS {row['eos_rate'][-1]:.2f}"
            cells = [row["steps"], f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.1f}"]
            cells += [f"{kind} {x:.3f}" for x in row[kind]]
            lines.append(row_of([part, *cells, held_out if part == "ppo" else f"{held_out:.3f}"]))
    for who, row in rows.get("eval", {}).get("policies", {}).items():
        if "rougeL" in row:
            lines += ["", f"{who}: ROUGE-L {row['rougeL']:.4f}, EOS {row['eos_rate']:.2f}, {row['length']:.1f} words."]
    for row in rows.get("eval", {}).get("win_rates", []):
        low, high = row["interval"]
        who = f"{row['ours']} over {row['theirs']} by the reward model"
        lines += ["", f"{who}: {row['rate']:.3f} ({low:.3f} to {high:.3f})."]
    if same := rows.get("out_again"):
        text = f"transformers writes the same greedy text for {same['same_greedy_text']} of {same['posts']} posts."
        lines += ["", text]
    return lines


def tests_line(result: dict) -> list[str]:
    """What pytest said last."""
    return [result["summary"].strip("= ") + "."]


TABLES = {"plan": plan_table, "update": update_table, "against": against_table, "scaling": scaling_line,
          "kernels": kernels_table, "rollout": rollout_table, "ppo": ppo_table, "tiny": tiny_table,
          "smollm2": small_table, "tests": tests_line}  # fmt: skip
COMMANDS = {"ppo": "python -m bench.ppo_run", "tiny": "python -m bench.tiny_run", "tests": "python -m pytest -m gpu",
            "smollm2": "python -m bench.small_run"}  # fmt: skip


def quick(folder: Path) -> str:
    """The README's line: an update and a rollout on each GPU that was measured, then the ratios of a CPU."""
    parts = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name == "cpu.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        results = {name: bench["result"] for name, bench in found["benches"].items() if "result" in bench}
        if "driver" in found and {"update", "rollout"} <= results.keys():
            commit = found["benches"]["update"]["commit"]
            parts.append(f"{results['update']['shape']}'s shape on one {found['device']}, measured at {commit}: "
                         + _quick_gpu(results["update"], results["rollout"]))  # fmt: skip
        elif "driver" not in found and {"against", "rollout"} <= results.keys():
            beside = results["against"]["results"][-1]
            threads = str(beside["threads"])
            rollout = results["rollout"]["threads"][threads]["transformers"]["over_ours"]
            commit = found["benches"]["against"]["commit"]
            parts.append(f"On {threads} cores of an {found['processor']} the tiny rollout "
                         f"is {rollout:.1f} times as quick as transformers, an update {beside['update']['ratio']:.2f} "
                         f"times ({commit}); other processors")  # fmt: skip
    return ". ".join(parts) + ": [speed.md](docs/speed.md)"


def _quick_gpu(update: dict, rollout: dict) -> str:
    rows = {row["phase"]: row for row in update["results"] if row["stage"] == "ppo"}
    ours, theirs = (rollout["threads"]["1"][who]["seconds"] for who in ("ours", "transformers"))
    return (
        f"an update of 128 episodes takes {rows['whole']['s']:.1f} s (learning at {rows['learn']['mfu']:.0%} MFU), a "
        f"rollout {ours:.2f} s where transformers' `generate` takes {theirs:.2f} s, "
        f"{rows['whole']['peak_gib']:.0f} GiB at its peak"
    )


def tables(folder: Path) -> str:
    """The tables of all files of results in a folder, in Markdown."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(heading(found))
        for name, bench in found["benches"].items():
            if failed := bench.get("failed_since"):
                parts.append(
                    f"`{name}`: {failed['error']} at commit {failed['commit']}; what it measured before stays."
                )
            if "result" not in bench:
                parts.append(f"`{name}`: {bench.get('error') or bench['skipped']}.")
            elif (kind := name.split("_")[0]) in TABLES:  # plan_80
                head = f"`{COMMANDS.get(kind, f'python -m bench.{kind}')}`, commit {bench['commit']}: "
                lines = TABLES[kind](bench["result"])
                lines += ["", f"{bench['note'][0].upper()}{bench['note'][1:]}."] if bench.get("note") and lines else []
                parts += [head + "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"
