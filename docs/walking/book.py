"""A book is a script in cells whose run is the page: its comments are the prose, its calls add what they computed.

    # %% [markdown]      a cell of prose, in comments: true for any weights, so it holds no computed number
    # %%                 a cell of code; `book.say`, `book.code`, `book.table` and so on add blocks in their order

A block knows which cell it came from, by the line that called. pages.py writes the book as Markdown, HTML and a
notebook; in a notebook the same calls show their block below the cell.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Say:
    """A paragraph with numbers in it, Markdown."""

    text: str


@dataclass
class Code:
    """The source of functions that run, as they stand in their files."""

    functions: list[Callable]

    def parts(self) -> list[tuple[str, str, str]]:
        """(file from the root, qualified name, source) of each."""
        found = []
        for function in map(inspect.unwrap, self.functions):
            file = str(Path(inspect.getsourcefile(function)).relative_to(ROOT))
            found.append((file, function.__qualname__, inspect.cleandoc("\n" + inspect.getsource(function))))
        return found


@dataclass
class Table:
    """Rows of text. `tokens`: for each row the index of the response token it is about, or None."""

    header: list[str]
    rows: list[list[str]]
    tokens: list[int | None] = field(default_factory=list)
    note: str = ""


@dataclass
class Figure:
    """A drawing (figures.py), which Markdown finds in a file of its own."""

    name: str
    svg: str
    alt: str


@dataclass
class Question:
    """Predict, then see: a question, and the answer folded below it."""

    fault: str
    ask: str
    answer: list  # of Say and Table


Block = Say | Code | Table | Figure | Question


@dataclass
class Cell:
    kind: str  # markdown, code, or hidden: code that the notebook leaves out
    source: str
    first_line: int


def cells_of(source: str) -> list[Cell]:
    """The cells of a script. What stands before the first `# %%` is the docstring, which is no cell."""
    cells: list[Cell] = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith("# %%"):
            kind = "markdown" if "[markdown]" in line else "hidden" if "[hidden]" in line else "code"
            cells.append(Cell(kind, "", number))
        elif cells:
            cells[-1].source += line + "\n"
    for cell in cells:
        if cell.kind == "markdown":
            cell.source = re.sub(r"^# ?", "", cell.source, flags=re.MULTILINE)
        cell.source = cell.source.strip("\n")
    return cells


class Book:
    """Collects the blocks of one script."""

    def __init__(self, script: str, title: str):
        """args: script: the file, for its cells; title: of the HTML page"""
        self.script, self.title = Path(script), title
        self.cells = cells_of(self.script.read_text(encoding="utf-8"))
        self.blocks: list[tuple[int, Block]] = []  # (index of the cell, block)

    def say(self, text: str) -> None:
        self._add(Say(inspect.cleandoc(text)))

    def code(self, *functions: Callable) -> None:
        self._add(Code(list(functions)))

    def table(self, header: list[str], rows: list[list[str]], tokens=(), note: str = "") -> None:
        self._add(Table(header, rows, list(tokens), note))

    def figure(self, name: str, svg: str, alt: str) -> None:
        self._add(Figure(name, svg, alt))

    def question(self, fault: str, ask: str, *answer: str | Table) -> None:
        parts = [Say(inspect.cleandoc(part)) if isinstance(part, str) else part for part in answer]
        self._add(Question(fault, inspect.cleandoc(ask), parts))

    def of_cell(self, index: int) -> list[Block]:
        return [block for i, block in self.blocks if i == index]

    def _add(self, block: Block) -> None:
        if "ipykernel" in sys.modules:  # in a notebook the block is shown and that is all
            from IPython.display import display

            from docs.walking.pages import bundle

            display(bundle(block), raw=True)
            return
        frame = sys._getframe(2)
        while frame.f_code.co_name != "<module>":
            frame = frame.f_back
        starts = [cell.first_line for cell in self.cells]
        self.blocks.append((sum(start <= frame.f_lineno for start in starts) - 1, block))
