"""docs/libraries.md has a reason for every library that pyproject.toml asks for, and for no other."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_dependency_has_its_reason_and_every_reason_its_dependency():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    asked = {re.match(r"[\w-]+", item)[0] for group in groups.values() for item in group if isinstance(item, str)}
    table = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8").split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if re.match(r"\| \w", line)]
    assert {name.strip() for names, _ in rows for name in names.split(",")} == asked
    assert all(reason.strip() for _, reason in rows)
