"""What a CPU's tensors give back is used again, and not asked from the system page by page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import ctypes, resource, sys
from nanorlhf.run.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def passes(n):  # 15 blocks of 8 MB, given back from the last to the first, as a backward pass does
    for _ in range(n):
        blocks = [libc.malloc(2**23) for _ in range(15)]
        for block in blocks:
            libc.memset(block, 1, 2**23)
        for block in reversed(blocks):
            libc.free(block)

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
passes(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes(4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 15 * 2**23 // 4096  # that four passes write to


def run(what: str, **environment: str) -> tuple[str, int]:
    """-> what keep_freed_memory said, and pages that the last four passes got from the system"""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, what]
    said = subprocess.check_output(command, cwd=ROOT, env=inherited | environment, encoding="utf-8").split()
    return said[0], int(said[1])


def glibc() -> bool:
    return sys.platform == "linux" and "glibc" in os.confstr("CS_GNU_LIBC_VERSION")


@pytest.mark.skipif(not glibc(), reason="the setting is glibc's")
def test_a_pass_uses_the_memory_of_the_one_before():
    said, pages = run("keep")
    assert said == "True" and pages < 0.02 * PAGES


@pytest.mark.skipif(not glibc(), reason="the setting is glibc's")
def test_the_environments_own_setting_wins():
    said, _ = run("keep", MALLOC_TRIM_THRESHOLD_="1000000")
    assert said == "False"


def test_on_another_system_nothing_happens(monkeypatch):
    from nanorlhf.run import memory

    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
