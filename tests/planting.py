"""Planting a fault in a running program: a piece of source is replaced in the functions that everybody already holds.

    with planted(mutation):
        ...                     the fault is in
                                and out again

The faulty file is compiled, not imported: the code of each function that changed is put into the function object that
exists, so every module that imported it by name sees the fault, and no file on disk changes. experiments/bugs.py trains
with the same faults that tests/test_mutations.py catches.
"""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """A fault: `old`, which stands exactly once in `file`, becomes `new`; `test` (file::name) is to fail."""

    name: str
    source: str  # detail of the paper, trap of the field, or the peer that shipped it
    file: str  # from the root of the repository
    old: str
    new: str
    test: str  # from tests/


def functions(code: CodeType) -> dict[str, CodeType]:
    """Qualified name -> code, of the functions and methods of a compiled module (not those inside functions)."""
    found = {}
    for constant in code.co_consts:
        if not isinstance(constant, CodeType) or constant.co_name.startswith("<"):
            continue
        if constant.co_flags & inspect.CO_OPTIMIZED:  # a function; a class body is not
            found[constant.co_qualname] = constant
        else:
            found |= functions(constant)
    return found


def function_object(module, qualified_name: str) -> FunctionType:
    """The function behind a name, below its decorators."""
    found = module
    for part in qualified_name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "fget", None) or getattr(found, "__func__", None) or found  # property, staticmethod
    return inspect.unwrap(found)


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The fault is in while the block runs. Raises AssertionError when its old text is not in the file exactly once."""
    path = ROOT / mutation.file
    source = path.read_text(encoding="utf-8")
    count = source.count(mutation.old)
    assert count == 1, f"{mutation.name}: {mutation.file} has {mutation.old!r} {count} times, expected once: mend it"
    healthy = functions(compile(source, str(path), "exec"))
    faulty = functions(compile(source.replace(mutation.old, mutation.new), str(path), "exec"))
    module = importlib.import_module(mutation.file.removesuffix(".py").replace("/", "."))
    changed = {function_object(module, name): faulty[name] for name in healthy if healthy[name] != faulty.get(name)}
    assert changed, f"{mutation.name}: changes no function of {mutation.file}"
    before = {function: function.__code__ for function in changed}
    for function, code in changed.items():
        function.__code__ = code
    try:
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code
