"""What a benchmark has measured so far: one JSON line a measurement, for bench.all, which may have to cut it off."""

import json
import os

FILE = "NANORLHF_BENCH_ROWS"  # environment variable: where the lines go; without it they go nowhere


def note(row: dict) -> None:
    """Append a measurement to the file, as it is made."""
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
