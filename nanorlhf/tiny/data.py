"""The tiny world as files.

They are in exactly OpenAI's raw formats, so that the scripts read them as they read the real data:

    {folder}/VERSION                            which world, and how much of it
    {folder}/tldr/{train,valid,test}.jsonl      id, subreddit, title, post, summary
    {folder}/comparisons/batch{1..4,9}.json     JSON lines; batch9 is split valid1

    python -m nanorlhf.tiny.data data/tiny_title --annotator title      a variant: title_world.py
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nanorlhf.run.streams import as_command
from nanorlhf.tiny.lexicon import WORLD_VERSION
from nanorlhf.tiny.title_world import with_long_title
from nanorlhf.tiny.world import make_comparison, make_post

POSTS = {"train": 8192, "valid": 1024, "test": 1024}
COMPARISONS = {"train": 10240, "valid1": 1024}
ANNOTATORS = ("facts", "title")


def ensure_world(
    folder: str | Path,
    posts: dict[str, int] = POSTS,
    comparisons: dict[str, int] = COMPARISONS,
    annotator: str = "facts",
) -> Path:
    """Writes the world unless this very world is there already. Returns the folder."""
    if written_stamp(folder) != stamp(posts, comparisons, annotator):
        write_world(folder, posts, comparisons, annotator)
    return Path(folder)


def write_world(
    folder: str | Path,
    posts: dict[str, int] = POSTS,
    comparisons: dict[str, int] = COMPARISONS,
    annotator: str = "facts",
) -> Path:
    """Writes the world, all of it or nothing; the same bytes every time. Replaces an older world and nothing else."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and written_stamp(folder) is None:
        raise ValueError(f"{folder} is not empty and holds no tiny world: name another folder, or empty this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_files(temporary / "new", posts, comparisons, annotator)
        if written_stamp(folder) == stamp(posts, comparisons, annotator):
            return folder  # another process was faster; its files are the same
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(temporary / "new", folder)
    finally:
        shutil.rmtree(temporary)
    return folder


def write_files(folder: Path, posts: dict[str, int], comparisons: dict[str, int], annotator: str = "facts") -> None:
    (folder / "tldr").mkdir(parents=True)
    for split, count in posts.items():
        rows = (make_post(split, index) for index in range(count))
        rows = map(with_long_title, rows) if annotator == "title" else rows
        write_lines(folder / "tldr" / f"{split}.jsonl", (tldr_row(row) for row in rows))

    (folder / "comparisons").mkdir()
    batches: dict[str, list[dict]] = {}
    for split, count in comparisons.items():
        for index in range(count):
            comparison = make_comparison(split, index, annotator)
            batches.setdefault(comparison["batch"], []).append(comparison)
    for batch, rows in batches.items():
        write_lines(folder / "comparisons" / f"{batch}.json", rows)

    (folder / "VERSION").write_text(stamp(posts, comparisons, annotator), encoding="utf-8")


def tldr_row(post) -> dict:
    """A post as OpenAI's tldr_3_filtered has it."""
    return {name: getattr(post, name) for name in ("id", "subreddit", "title", "post", "summary")}


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def stamp(posts: dict[str, int], comparisons: dict[str, int], annotator: str = "facts") -> str:
    variant = "" if annotator == "facts" else f", annotator {annotator}"
    return f"tiny world {WORLD_VERSION}, posts {posts}, comparisons {comparisons}{variant}\n"


def written_stamp(folder: str | Path) -> str | None:
    """What the VERSION file of a folder says; None where there is none."""
    path = Path(folder) / "VERSION"
    return path.read_text(encoding="utf-8") if path.exists() else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.tiny.data", description="Writes the tiny world's files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--annotator", default="facts", choices=ANNOTATORS, help="who judges: title_world.py")
    args = parser.parse_args(argv)
    print(ensure_world(args.folder, annotator=args.annotator))


if __name__ == "__main__":
    as_command(main)
