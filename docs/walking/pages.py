"""A book as Markdown, as one self-contained HTML page and as a notebook."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from docs.walking.book import Block, Book, Code, Figure, Question, Say, Table
from docs.walking.figures import FIGURE_CSS, standalone

HERE = Path(__file__).parent
PROSE = MarkdownIt("commonmark", {"html": False}).enable("table")
FORMAT = HtmlFormatter(nowrap=True)


def slug(heading: str) -> str:
    """The anchor that a repository page gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ----------------------------------------------------------------------------------------------------------- Markdown


def markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return text + (f"\n\n*{table.note}*" if table.note else "")


def markdown_block(block: Block) -> str:
    match block:
        case Say(text):
            return text
        case Code():
            parts = [
                f"[{file}](../{file}): `{name}`\n\n```python\n{source}\n```" for file, name, source in block.parts()
            ]
            return "\n\n".join(parts)
        case Table():
            return markdown_table(block)
        case Figure(name, _, alt):
            return f"![{alt}]({name}.svg)"
        case Question(fault, ask, answer):
            inside = "\n\n".join(map(markdown_block, answer))
            return (
                f"**Predict, then see** (fault `{fault}`). {ask}\n\n<details>\n<summary>Answer, from a run with the fault "
                f"in</summary>\n\n{inside}\n\n</details>"
            )


def markdown(book: Book) -> str:
    """The page for a repository. Its figures are files beside it."""
    parts = []
    for index, cell in enumerate(book.cells):
        if cell.kind == "markdown":
            parts.append(cell.source)
        parts += map(markdown_block, book.of_cell(index))
    script = f"docs/{book.script.name}"
    made = f"<!-- Made by `python -m docs.walk` from {script}: change that. -->"
    return made + "\n\n" + "\n\n".join(parts) + "\n"


def figures(book: Book) -> dict[str, str]:
    """File name -> the drawing, with its own colours for a light and a dark page."""
    return {f"{block.name}.svg": standalone(block.svg) for _, block in book.blocks if isinstance(block, Figure)}


# --------------------------------------------------------------------------------------------------------------- HTML


def html_table(table: Table) -> str:
    def cell(text: str, tag: str = "td") -> str:
        kind = " class=text" if len(text) > 40 and "`" not in text else ""  # prose, which may wrap
        return f"<{tag}{kind}>{PROSE.renderInline(text)}</{tag}>"

    tokens = table.tokens or [None] * len(table.rows)
    head = "".join(cell(text, "th") for text in table.header)
    rows = "".join(
        f"<tr{'' if t is None else f' data-t={t}'}>{''.join(map(cell, row))}</tr>"
        for row, t in zip(table.rows, tokens, strict=True)
    )
    note = f"<p class=note>{PROSE.renderInline(table.note)}</p>" if table.note else ""
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"


def html_block(block: Block) -> str:
    match block:
        case Say(text):
            return PROSE.render(text)
        case Code():
            return "".join(
                f"<figure class=code><figcaption><a href='../{file}'>{file}</a> <b>{html.escape(name)}</b></figcaption>"
                f"<pre>{highlight(source, PythonLexer(), FORMAT)}</pre></figure>"
                for file, name, source in block.parts()
            )
        case Table():
            return html_table(block)
        case Figure(_, svg, alt):
            return f'<div class="wide drawing" role=img aria-label="{html.escape(alt)}">{svg}</div>'
        case Question(fault, ask, answer):
            inside = "".join(map(html_block, answer))
            return (
                f"<div class=question><p class=kicker>Predict, then see <code>{fault}</code></p>{PROSE.render(ask)}"
                f"<details><summary>Answer, from a run with the fault in</summary>{inside}</details></div>"
            )


def html_page(book: Book, ribbon: list[str]) -> str:
    """One page that needs nothing but itself, in ASCII. ribbon: the tokens that light up, one a response index."""
    style = (HERE / "walk.css").read_text(encoding="utf-8") + FIGURE_CSS
    script = (HERE / "walk.js").read_text(encoding="utf-8")
    sections: list[dict] = []
    for index, cell in enumerate(book.cells):
        if cell.kind == "markdown":
            title = re.match(r"#+ (.*)", cell.source)
            if title:
                sections.append({"title": title[1], "left": "", "right": "", "below": "", "cells": ""})
            sections[-1]["left"] += PROSE.render(cell.source)
        elif cell.kind == "code" and sections:
            sections[-1]["cells"] += highlight(cell.source + "\n\n", PythonLexer(), FORMAT)
        for block in book.of_cell(index):
            place = {Say: "left", Code: "right"}.get(type(block), "below")
            sections[-1][place] += html_block(block)
    body, links = [], []
    for section in sections:
        anchor = slug(section["title"])
        links.append(f"<a href='#{anchor}'>{html.escape(section['title'])}</a>")
        cells = section["cells"] and (
            f"<details class=cell><summary>the cell that made these numbers</summary><pre>{section['cells']}</pre></details>"
        )
        right = f"<div class=right>{section['right']}</div>" if section["right"] else ""
        body.append(
            f"<section id='{anchor}'{'' if right else ' class=alone'}><div class=left>{section['left']}</div>{right}"
            f"<div class=below>{section['below']}{cells}</div></section>"
        )
    tokens = "".join(f"<button data-t={t}>{html.escape(text)}</button>" for t, text in enumerate(ribbon))
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{policy}'">
<title>{html.escape(book.title)}</title>
<style>{style}</style>
</head>
<body>
<nav><details><summary>Stations</summary>{"".join(links)}</details><div class=ribbon>{tokens}</div></nav>
<main>{"".join(body)}</main>
<script>{script}</script>
</body>
</html>
"""
    return page.encode("ascii", "xmlcharrefreplace").decode()


# ----------------------------------------------------------------------------------------------------------- notebook


def bundle(block: Block) -> dict[str, str]:
    """What a notebook keeps of a block: type -> content."""
    if isinstance(block, Figure):
        return {"image/svg+xml": standalone(block.svg), "text/plain": block.alt}
    text = markdown_block(block)
    return {"text/markdown": text, "text/plain": text}


def notebook(book: Book) -> str:
    """The cells with what they showed, in Jupyter's format 4.5. Runs from any folder of a clone."""
    cells, count = [], 0
    for index, cell in enumerate(book.cells):
        if cell.kind == "hidden":
            continue
        made = {"cell_type": cell.kind, "id": f"cell-{index:03}", "metadata": {}}
        made["source"] = cell.source.splitlines(keepends=True)
        if cell.kind == "code":
            count += 1
            shown = [{"output_type": "display_data", "data": bundle(b), "metadata": {}} for b in book.of_cell(index)]
            made |= {"execution_count": count, "outputs": shown}
        cells.append(made)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
