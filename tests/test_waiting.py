"""How long CPU threads wait awake: long where nothing else wants the cores, briefly where something does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.run import waiting

ROOT = Path(__file__).parents[1]


@pytest.fixture
def machine(monkeypatch):
    """Of 4 cores, on which `running` processes want one: a number for each look, this process included."""

    def pretend(running: list[int]) -> None:
        looks = iter(running)

        class Loadavg:
            exists = staticmethod(lambda: bool(running))

            @staticmethod
            def read_text(encoding: str) -> str:
                return f"9.75 3.21 1.00 {next(looks)}/613 4711\n"  # what was a minute ago does not count

        monkeypatch.setattr(waiting, "LOADAVG", Loadavg)
        monkeypatch.setattr(waiting.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
        for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(name, raising=False)

    return pretend


@pytest.mark.parametrize(
    ("running", "threads", "expected"),
    [
        ([1] * 5, None, "30000"),
        ([3, 2, 1, 2, 2], None, "30000"),  # the shell that started us has ended
        ([2] * 5, None, "1000"),  # somebody wants one of the four cores
        ([2] * 5, "3", "30000"),  # and may have it
        ([3] * 5, "3", "1000"),
        ([2] * 5, "3,1", "30000"),  # a list: threads of threads
        ([], None, "30000"),  # a system that does not say
    ],
)
def test_threads_wait_awake_where_nobody_else_wants_the_cores(machine, monkeypatch, running, threads, expected):
    machine(running)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert waiting.turns() == expected


def says() -> bool:
    """Whether the system counts this process, which runs just now."""
    return waiting.LOADAVG.exists() and not waiting.LOADAVG.read_text(encoding="utf-8").split()[3].startswith("0/")


@pytest.mark.skipif(not says(), reason="this system does not say how many processes run")
def test_a_busy_process_is_seen():
    program = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    busy = [subprocess.Popen(program, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in busy:
            process.stdout.readline()
        assert waiting.others_running(looks=20) >= 1  # of two, one has a core or waits for it at each look
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("script", ["train_sft.py", "train_rm.py", "train_ppo.py", "eval.py"])
def test_it_is_set_before_torch_is_there_and_the_environment_wins(script):
    program = f"""
import builtins, os, sys
real, seen = builtins.__import__, []
def look(name, *args, **kwargs):
    if name == "torch" and not seen:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
    return real(name, *args, **kwargs)
builtins.__import__ = look
import {script.removesuffix(".py")}
print(seen[0])
"""
    for own in (None, "77"):
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        environment |= {"GOMP_SPINCOUNT": own} if own else {}
        said = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, encoding="utf-8")
        assert said.strip() in ({own} if own else {"1000", "30000"})
