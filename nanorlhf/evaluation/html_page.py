"""report.html: one page that needs nothing but itself. Style, script and figures are inside; no address leaves it.

The content security policy allows this very script, by its hash, and nothing else: were a piece of a post ever taken
for markup, it could not run. Without the script the page is complete; it only adds searching and sorting.
"""

import base64
import hashlib
import html
import math
from pathlib import Path

from nanorlhf.evaluation.metrics import title_copy
from nanorlhf.evaluation.tables import EXPLAINED, Table, display, number, sample_table, tables, worst_tables

HERE = Path(__file__).parent
SAMPLES_SHOWN = 300  # samples.jsonl has all
SECTIONS = {  # id -> heading, which figures (by the first part of their name)
    "summaries": ("Summaries", ()),
    "wins": ("Win rates", ("wins",)),
    "rm": ("Reward model", ("card",)),
    "training": ("Training", ("sft", "rm", "ppo")),
}
TRACE_COLUMNS = {  # tensor -> heading, format
    "logprobs": ("log-prob", ".3f"),
    "ref_logprobs": ("reference", ".3f"),
    "kl": ("KL", ".3f"),
    "values": ("value", ".3f"),
    "rewards": ("reward", ".3f"),
    "advantages": ("advantage", ".2f"),
}


def html_page(
    results: dict, samples: list[dict], images: dict[str, bytes], traces: list[dict] = (), about: str = ""
) -> str:
    """The whole report, in ASCII: other characters are written as &#...;, which no encoding can garble."""
    style, script = (HERE / "report.css").read_text(encoding="utf-8"), (HERE / "report.js").read_text(encoding="utf-8")
    every, body, links = tables(results), [], []
    for id, (heading, kinds) in SECTIONS.items():
        pictures = [_figure(name, image) for name, image in images.items() if name.split("_")[0] in kinds]
        parts = [_section(table) for table in every if table.id == id]
        if pictures:
            parts.append(f"<div class=figures>{''.join(pictures)}</div>")
        if id == "rm" and (worst := worst_tables(results.get("reward_model", {}))):
            inside = "".join(_article(table) for table in worst)
            which = f"the {len(worst)} pairs on which it is most wrong"
            parts.append(f"<details><summary>{which}</summary>{inside}</details>")
        if id == "training":
            parts += [_trace(row, opened=i == 0) for i, row in enumerate(traces)]
        if parts:
            links.append((id, heading))
            body.append(f"<h2 id={id}>{heading}</h2>{''.join(parts)}")
    if samples:
        links.append(("samples-heading", "Samples"))
        body.append(_samples(samples))
    nav = "".join(f'<a href="#{id}">{heading}</a>' for id, heading in links)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nanorlhf: evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{style}</style></head>
<body><h1>nanorlhf: evaluation</h1><p class=note>{html.escape(about)}</p><p class=note>{EXPLAINED}</p><nav>{nav}</nav>
{chr(10).join(body)}
<script>{script}</script></body></html>
"""
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _figure(name: str, image: bytes) -> str:
    address = "data:image/png;base64," + base64.b64encode(image).decode()
    return f'<img alt="{html.escape(name.replace("_", " "))}" src="{address}">'


def _section(table: Table) -> str:
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h3>{html.escape(table.title)}</h3><div class=wide>{_table(table)}</div>{note}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _article(table: Table, data: dict[str, float] | None = None, more: str = "") -> str:
    """A post with summaries below each other: name, text, numbers; on a phone under each other."""
    values = "".join(f' data-{name}="{value:.6g}"' for name, value in (data or {}).items())
    post = f"<details><summary>the post</summary><pre>{html.escape(table.note)}</pre></details>"
    rows = []
    for name, text, *numbers in table.rows:
        told = ", ".join(f"{what} {value}" for what, value in zip(table.header[2:], numbers, strict=True))
        name, text, told = map(html.escape, (name, text, told))
        rows.append(f"<dt>{name}</dt><dd dir=auto>{text}</dd><dd class=numbers>{told}</dd>")
    title = f"<h3 dir=auto>{html.escape(table.title)}</h3>"
    return f"<article{values}>{title}{post}<dl>{''.join(rows)}</dl>{more}</article>"


def _samples(samples: list[dict]) -> str:
    """The first posts with all summaries, and what the script needs to search and sort them."""
    shown = samples[:SAMPLES_SHOWN]
    names = [key.split("/")[1] for key in shown[0] if key.startswith("score/")]
    names = names or [key.split("/")[1] for key in shown[0] if key.startswith("gold/")]
    last = names[-1] if names else ""
    orders = {"": "in the order of the data"}
    articles = []
    for row in shown:
        data = {}
        for key, what in (("score", "RM score"), ("gold", "gold score")):
            value = row.get(f"{key}/{last}")
            if value is not None:
                data[key] = value
                orders[f"{key} down"] = f"highest {what} of {display(last)} first"
                orders[f"{key} up"] = f"lowest {what} of {display(last)} first"
        copied = title_copy(str(row.get(last, "")), row["title"])
        if last and not math.isnan(copied):
            data["copy"] = copied
            orders["copy down"] = f"most of the title copied by {display(last)} first"
        if row.get("disagreement") is not None:
            data["disagreement"] = row["disagreement"]
            orders["disagreement down"] = "judge against reward model first"
        verdicts = [f"{key.split('/')[1].replace('_', ' ')}: {row[key]}" for key in row if key.startswith("verdict/")]
        more = f"<p class=note>{html.escape('; '.join(verdicts))}</p>" if verdicts else ""
        articles.append(_article(sample_table(row), data, more))
    options = "".join(f'<option value="{key}">{html.escape(said)}</option>' for key, said in orders.items())
    controls = (
        '<div class=controls id=controls hidden><input id=search type=search placeholder="search" '
        f'aria-label="search the samples"><select id=order aria-label="order of the samples">{options}</select>'
        "<span class=note id=count></span></div>"
    )
    note = f"the first {len(shown)} of {len(samples)} posts; samples.jsonl has all"
    body = f"<p class=note>{note}</p>{controls}<div id=samples>{''.join(articles)}</div>"
    return f"<h2 id=samples-heading>Samples</h2>{body}"


def _trace(row: dict, opened: bool) -> str:
    """One episode token by token, as PPO had it before it learned from it."""
    columns = {name: said for name, said in TRACE_COLUMNS.items() if name in row}
    headings = ("token", *(heading for heading, _ in columns.values()), "action mask", "value mask")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    lines, strongest = [], max((abs(x) for x in row["advantages"]), default=0) or 1
    for t, token in enumerate(row["tokens"]):
        acts = row["action_mask"][t]
        colour, weight = ("47,126,216", "194,80,79")[row["advantages"][t] < 0], abs(row["advantages"][t]) / strongest
        shade = f' style="background:rgba({colour},{0.5 * weight:.2f})"' if acts else ""
        cells = "".join(f"<td>{number(row[name][t], form)}</td>" for name, (_, form) in columns.items())
        masks = "".join(f"<td>{'yes' if on else '-'}</td>" for on in (acts, row["value_mask"][t]))
        kind = "" if acts else " class=off"
        lines.append(f"<tr{kind}><td{shade}>{html.escape(token)}</td>{cells}{masks}</tr>")
    note = "as it was before the policy learned from it; shade: advantage, whitened over the batch; a faint row is the"
    note += " state after EOS, where the score is paid: its token was sampled and does not count."
    note += f" Score {row['score']:.3f}. Title: {row['title']}"
    return (
        f"<details class=trace{' open' if opened else ''}><summary>update {row['step']}: one response, token by token"
        f"</summary><div class='wide steps'><table><tr>{head}</tr>{''.join(lines)}</table></div>"
        f"<p class=note>{html.escape(note)}</p></details>"
    )
