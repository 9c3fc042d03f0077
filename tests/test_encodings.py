"""Text is UTF-8 at every read and write, whatever the locale says: a lint over the repository's own Python files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for pattern in ("*.py", "*/**/*.py")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0][0] != "."
)
OPENERS = {
    "open": 1,
    "fdopen": 1,
    "NamedTemporaryFile": 0,
    "TemporaryFile": 0,
}  # where the mode stands; read_text below
RUNNERS = ("run", "Popen", "check_output", "check_call", "call")


def in_the_locales_encoding(source: str) -> Iterator[int]:
    """The lines of calls that read or write text without saying in which encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of_what = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        words = {word.arg: word.value for word in node.keywords}
        if name in ("read_text", "write_text"):
            if len(node.args) < (1 if name == "read_text" else 2):
                yield node.lineno
        elif name in OPENERS and of_what not in ("os", "Image", "tarfile", "zipfile", "webbrowser") or name == "fdopen":
            position = 0 if name == "open" and of_what not in ("", "io", "gzip", "lzma", "bz2") else OPENERS[name]
            mode = words.get("mode") or (node.args[position] if len(node.args) > position else None)
            usual = "w+b" if OPENERS[name] == 0 else ("rb" if of_what in ("gzip", "lzma", "bz2") else "r")
            mode = mode.value if isinstance(mode, ast.Constant) else (usual if mode is None else "b")
            if "b" not in mode:
                yield node.lineno
        elif name in RUNNERS and ("text" in words or "universal_newlines" in words):
            yield node.lineno


def test_every_text_file_and_every_pipe_is_read_and_written_as_utf8():
    found = [f"{path.relative_to(ROOT)}:{line}" for path in FILES
             for line in in_the_locales_encoding(path.read_text(encoding="utf-8"))]  # fmt: skip
    assert not found, f'say encoding="utf-8" in {found}'


@pytest.mark.parametrize(
    "source",
    ["path.read_text()", "path.write_text(x)", "open(p)", 'open(p, "w")', 'p.open("a")', "p.open()",
     'os.fdopen(n, "w")', 'gzip.open(p, "rt")', 'NamedTemporaryFile("w")', "subprocess.run(x, text=True)"],
)  # fmt: skip
def test_the_lint_sees(source):
    assert list(in_the_locales_encoding(source)) == [1]


@pytest.mark.parametrize(
    "source",
    ['path.read_text(encoding="utf-8")', 'path.read_text("utf-8")', 'open(p, "rb")', 'p.open("ab")', "gzip.open(p)",
     'open(p, encoding="utf-8")', "os.open(p, flags)", "NamedTemporaryFile()", "subprocess.run(x)", "open(p, mode)"],
)  # fmt: skip
def test_the_lint_lets_pass(source):
    assert not list(in_the_locales_encoding(source))
