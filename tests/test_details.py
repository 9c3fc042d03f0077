"""docs/details.md cannot rot: what it names exists, every detail is there, and its list of faults is that of the tests.

python tests/test_details.py        writes the list of faults into docs/details.md again
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
PAGE, TRAPS = ROOT / "docs" / "details.md", ROOT / "docs" / "traps.md"
MARK = "<!-- faults -->\n"
STATUS = ("followed", "adapted", "different", "left out")
PAPER = ["1", "2.1", "2.2", "2.3", *map(str, range(3, 23)), "23.1", "23.2", "23.3", "24", "25"]
pytestmark = pytest.mark.details


def rows() -> list[list[str]]:
    """The cells of each row of the four hand-written tables."""
    written = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    lines = [line for line in written.splitlines() if re.match(r"\| (U|P|M)?\d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(row: list[str]) -> str:
    return row[0].split()[0]


def faults() -> str:
    """The generated list: one row a fault."""
    cell = lambda text: "`` " + text.strip().replace("\n", " ").replace("|", "\\|") + " ``" if text.strip() else "(end)"  # noqa: E731
    lines = ["| fault | source | file | line | becomes | caught by |", "|---|---|---|---|---|---|"]
    for m in MUTATIONS:
        file = f"[{m.file}](../{m.file})"
        test = m.test.split("::")[1].split("[")[0]
        lines.append(
            f"| `{m.name}` | {m.source} | {file} | {cell(m.old)} | {cell(m.new)} | "
            f"[{test}](../tests/{m.test.split('::')[0]}) |"
        )
    return "\n".join(lines) + "\n"


@cache
def defined(path: Path) -> set[str]:
    """Functions, classes, Class.method and module constants of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def links(cell: str) -> list[tuple[str, Path]]:
    return [(text, (PAGE.parent / target).resolve()) for text, target in re.findall(r"\[([\w.]+)\]\(([^)]+)\)", cell)]


def test_every_detail_of_the_paper_has_one_row_in_its_order():
    assert [number(row) for row in rows() if number(row)[0] not in "UPM"] == PAPER


@pytest.mark.parametrize("row", rows(), ids=number)
def test_what_a_row_names_exists(row):
    assert len(row) == 6, "a row has six cells"
    _, _, status, code, tests, guarded = row
    assert status.startswith(STATUS)
    if status.startswith("left out"):
        assert not (code or tests or guarded)
        return
    assert links(code) and links(tests), "a row that is not left out names a function and a test"
    for text, path in links(code):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = path.stem if module.startswith("nanorlhf.") else module  # no two files there have one name
        assert text.startswith(module + "."), f"{text} is not in {path}"
        assert text.removeprefix(module + ".") in defined(path), f"{text} is not defined in {path}"
    for text, path in links(tests):
        assert path.parent == ROOT / "tests" and text in defined(path), f"{text} is no test of {path}"
    names = {mutation.name for mutation in MUTATIONS}
    assert set(re.findall(r"`(\w+)`", guarded)) <= names, "a fault that is not in mutations.py"


def test_every_trap_has_a_row_that_names_what_catches_it():
    lines = [line for line in TRAPS.read_text(encoding="utf-8").splitlines() if re.match(r"\| T\d", line)]
    assert [line.split()[1] for line in lines] == [f"T{n}" for n in range(1, 61)]
    known = {mutation.name: mutation for mutation in MUTATIONS}
    for line in lines:
        trap, caught = line.split("|")[1].strip(), line.split("|")[4]
        named, tests = re.findall(r"`(\w+)`", caught), links(caught)
        assert named or tests or "not here" in caught, trap
        assert set(named) <= known.keys(), trap
        for text, path in tests:
            assert text in defined(path), f"{trap}: {text} is no test of {path}"
        cited = {name for name, m in known.items() if re.search(rf"\b{trap}\b", m.source)}
        assert cited <= set(named), f"{trap}: {cited - set(named)} cite it"


def test_every_fault_stands_in_a_row():
    named = {name for row in rows() for name in re.findall(r"`(\w+)`", row[5])}
    assert {mutation.name for mutation in MUTATIONS} - named == set()


def test_the_list_of_faults_is_that_of_the_tests():
    assert PAGE.read_text(encoding="utf-8").split(MARK)[1] == faults(), "run: python tests/test_details.py"


def test_every_link_of_the_docs_leads_somewhere():
    for page in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_stands_in_the_list_of_pages():
    listed = set(re.findall(r"\]\(([\w.]+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_counts_as_this_page_does():
    statuses = [row[2] for row in rows() if number(row)[0] not in "UPM"]
    count = {status: sum(s.startswith(status) for s in statuses) for status in STATUS}
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(PAPER)} details of the paper: {count['followed']} followed, {count['adapted']} adapted" in said
    assert f"{count['different']} different on purpose, {count['left out']} left out" in said
    assert f"{len(MUTATIONS)} planted faults" in said


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + faults(), encoding="utf-8")
