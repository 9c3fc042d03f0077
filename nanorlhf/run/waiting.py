"""How long CPU threads wait awake for one another: set before torch is imported, since its OpenMP reads it once.

A layer is shared out to a thread on each core, and who is done waits for the others: awake for so many turns of a loop,
then asleep. To be woken takes as long as the work itself where operations are small: a rollout of the tiny model takes
1.5 times as long. But when another process has taken a thread's core, those that wait awake keep theirs from being
used, and it takes up to 4 times as long. So it depends on whether somebody else wants the cores; GNU's OpenMP has
300,000 turns always. Decided once, at the start: a run that gets company later keeps its setting, which is why ALONE is
no more than it takes. Figures and machine: docs/speed.md, by `python -m bench.busy`.
"""

import os
import time
from pathlib import Path

ALONE, BESIDE_OTHERS = 30_000, 1_000  # turns of the loop, a pause of the processor each
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
    """What GOMP_SPINCOUNT is to be: what the environment says, else by who runs beside us just now."""
    if own := os.environ.get("GOMP_SPINCOUNT"):
        return own
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int((os.environ.get("OMP_NUM_THREADS") or str(cores)).split(",")[0])  # OpenMP allows a list
    return str(ALONE if others_running() + threads <= cores else BESIDE_OTHERS)
