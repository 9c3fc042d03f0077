"""Files of one JSON object a line, as runs write them: whole lines only, and nothing that JSON does not have."""

import json
import math
import os
from pathlib import Path
from typing import Any

from nanorlhf.errors import UserError, check


def read_jsonl(path: Path, having: str = "step") -> list[dict]:
    """The objects of a file, each with the key `having`; raises UserError with file and line for anything else but an
    unfinished last line."""
    check(path.is_file(), "file", path, "there", "start the run first, or check the folder's name")
    *whole, rest = path.read_bytes().split(b"\n")  # rest is empty, or a line without its end
    rows = []
    for number, line in enumerate([*whole, rest], start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and having in row):
                raise ValueError(f"no object with a {having}")
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a thousand brackets
            if number > len(whole):
                break
            raise UserError(f"{path}:{number} is not what a run writes ({error}): delete the line") from error
        rows.append(row)
    return rows


def append(path: Path, rows: list[dict]) -> None:
    """Appends lines with a single write, so that whoever reads meanwhile sees whole lines."""
    data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    with open(path, "ab") as file:
        file.write(data)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file: a reader, or a kill, finds the old one or the new one."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON can say it: null for NaN and infinities, which "not_finite" then names."""
    row = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
    bad = {name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return row | dict.fromkeys(bad) | ({"not_finite": bad} if bad else {})
