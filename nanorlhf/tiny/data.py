"""The tiny world as files.

They are in exactly OpenAI's raw formats, so that the scripts read them as they read the real data:

    {folder}/VERSION                            which world, and how much of it
    {folder}/tldr/{train,valid,test}.jsonl      id, subreddit, title, post, summary
    {folder}/comparisons/batch{1..4,9}.json     JSON lines; batch9 is split valid1
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nanorlhf.tiny.lexicon import WORLD_VERSION
from nanorlhf.tiny.world import make_comparison, make_post

POSTS = {"train": 8192, "valid": 1024, "test": 1024}
COMPARISONS = {"train": 10240, "valid1": 1024}


def ensure_world(folder: str | Path, posts: dict[str, int] = POSTS, comparisons: dict[str, int] = COMPARISONS) -> Path:
    """Writes the world unless this very world is there already. Returns the folder."""
    if written_stamp(folder) != stamp(posts, comparisons):
        write_world(folder, posts, comparisons)
    return Path(folder)


def write_world(folder: str | Path, posts: dict[str, int] = POSTS, comparisons: dict[str, int] = COMPARISONS) -> Path:
    """Writes the world, all of it or nothing; the same bytes every time. Replaces an older world and nothing else."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and written_stamp(folder) is None:
        raise ValueError(f"{folder} is not empty and holds no tiny world: name another folder, or empty this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_files(temporary / "new", posts, comparisons)
        if written_stamp(folder) == stamp(posts, comparisons):
            return folder  # another process was faster; its files are the same
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(temporary / "new", folder)
    finally:
        shutil.rmtree(temporary)
    return folder


def write_files(folder: Path, posts: dict[str, int], comparisons: dict[str, int]) -> None:
    (folder / "tldr").mkdir(parents=True)
    for split, count in posts.items():
        rows = (make_post(split, index) for index in range(count))
        write_lines(folder / "tldr" / f"{split}.jsonl", (tldr_row(row) for row in rows))

    (folder / "comparisons").mkdir()
    batches: dict[str, list[dict]] = {}
    for split, count in comparisons.items():
        for index in range(count):
            comparison = make_comparison(split, index)
            batches.setdefault(comparison["batch"], []).append(comparison)
    for batch, rows in batches.items():
        write_lines(folder / "comparisons" / f"{batch}.json", rows)

    (folder / "VERSION").write_text(stamp(posts, comparisons), encoding="utf-8")


def tldr_row(post) -> dict:
    """A post as OpenAI's tldr_3_filtered has it."""
    return {name: getattr(post, name) for name in ("id", "subreddit", "title", "post", "summary")}


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def stamp(posts: dict[str, int], comparisons: dict[str, int]) -> str:
    return f"tiny world {WORLD_VERSION}, posts {posts}, comparisons {comparisons}\n"


def written_stamp(folder: str | Path) -> str | None:
    """What the VERSION file of a folder says; None where there is none."""
    path = Path(folder) / "VERSION"
    return path.read_text(encoding="utf-8") if path.exists() else None
