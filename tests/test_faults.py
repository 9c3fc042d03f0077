"""Killed, stopped, damaged and out of disk: some of each. `python -m bench.faults` is the full harness."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the harness forks, and resizes a pipe as only Linux does")
def test_whatever_ends_a_run_it_resumes_to_the_same_bits():
    command = [sys.executable, "-m", "bench.faults", "--kills", "3", "--operations", "3", "--others", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == 0 and found["random_kills"] == 9 and found["operations_kills"] == 9
    kinds = ("random", "operations", "signals", "damage", "full", "read_only", "clock", "two", "download", "judge")
    for kind in kinds:
        assert found[f"{kind}_survived"] == found[f"{kind}_trials"] > 0, kind
