"""Writes the pages of the walk, and of the KL estimators, which are made in the same go."""

import runpy
from pathlib import Path

from docs.walking.book import ROOT, Book
from docs.walking.pages import figures, html_page, markdown, notebook


def pages(book: Book, ribbon: list[str]) -> dict[str, str]:
    """File name -> content: the walk in its three forms, and its figures."""
    made = {"walk.md": markdown(book), "walk.html": html_page(book, ribbon), "walk.ipynb": notebook(book)}
    return made | figures(book)


def kl_pages() -> dict[str, str]:
    """The same of docs/kl_estimators.py, which is one page of Markdown."""
    book = runpy.run_path(str(ROOT / "docs" / "kl_estimators.py"))["book"]
    return {"kl_estimators.md": markdown(book)} | figures(book)


def write(book: Book, ribbon: list[str], folder: Path = ROOT / "docs") -> None:
    """All pages, into docs/."""
    for name, content in (pages(book, ribbon) | kl_pages()).items():
        (folder / name).write_text(content, encoding="utf-8")
        print(f"wrote {folder.name}/{name}, {len(content):,} characters")
