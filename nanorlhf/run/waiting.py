"""How long CPU threads wait awake for one another: set before torch is imported, since its OpenMP reads it once.

A layer is shared out to a thread on each core, and who is done waits for the others: awake for so many turns of a loop,
then asleep. To be woken costs 0.05 to 0.1 ms, as much as the work itself where operations are small: a rollout of the
tiny model takes 1.45 times as long. But when another process has taken a thread's core, those that wait awake keep
theirs from being used, and everything takes several times as long. So it depends on whether somebody else wants the
cores just now; GNU's OpenMP has 300,000 turns always. `python -m bench.busy` measures it, docs/speed.md has figures.
"""

import os
import time
from pathlib import Path

ALONE, BESIDE_OTHERS = 30_000, 1_000  # turns of the loop: 0.5 to 1.5 ms, and 0.02 to 0.05 ms
LOADAVG = Path("/proc/loadavg")  # of Linux: "0.08 0.03 0.01 2/119 6107", the fourth how many run or wait for a core


def others_running(looks: int = 5) -> int:
    """Processes beside this one that want a core: the fewest of a few looks, because what started us is soon done.
    0 where the system does not say."""
    found = []
    for _ in range(looks if LOADAVG.exists() else 0):
        found.append(int(LOADAVG.read_text(encoding="utf-8").split()[3].split("/")[0]) - 1)
        time.sleep(0.004)
    return max(0, min(found, default=0))


def turns() -> str:
    """What the scripts set GOMP_SPINCOUNT to, unless the environment has a value of its own."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
    return str(ALONE if others_running() + threads <= os.cpu_count() else BESIDE_OTHERS)
