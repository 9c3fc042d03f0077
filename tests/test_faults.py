"""Killed, stopped, damaged, refused and out of disk: some of each. `python -m faults` is the full harness."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the harness forks, and resizes a pipe as only Linux does"
)


def faults(flags: str) -> dict:
    """What the harness counted; it ends with status 1 when something did not survive."""
    command = [sys.executable, "-m", "faults", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_whatever_ends_ppo_it_resumes_to_the_same_bits_and_nothing_is_fetched_or_paid_for_twice(kills):
    found = faults(f"--kills {kills} --operations {kills} --others 1 --stages ppo download judge")
    assert found["failures"] == 0 and found["random_kills"] == found["operations_kills"] == kills
    kinds = ("random", "operations", "signals", "damage", "full", "read_only", "clock", "two", "download", "judge")
    for kind in kinds:
        assert found[f"{kind}_survived"] == found[f"{kind}_trials"] > 0, kind


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_sft_and_the_reward_model_survive_kills_too(kills):
    found = faults(f"--kills {kills} --operations 1 --others 0 --stages sft rm")
    assert found["failures"] == 0 and found["random_kills"] == 2 * kills and found["operations_kills"] == 2
    assert found["random_survived"] == found["random_trials"] > 0


@pytest.mark.nightly  # one kill and one signal are in test_parallel.py
def test_one_of_several_processes_may_be_killed_and_the_run_ends_in_the_same_bits():
    command = [sys.executable, "-m", "faults.ranks", *"--kills 2 --signals 1 --processes 2".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == 0 and found["kills"] == 2 and found["kills_survived"] == found["kills_runs"] > 0
