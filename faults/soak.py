"""Does PPO leak? Train it for a while on the tiny world and fit lines through its memory and its time per update.

    python -m faults.soak                   20 minutes
    python -m faults.soak --minutes 5

Runs train_ppo.py as a user would, from the embedded checkpoints, with samples and a checkpoint every 8 updates, and
reads its resident memory from outside once a second. The first fifth is warm-up and is left out. Memory is flat when it
grows by less than 1% of itself an hour or by less than twice its standard error; time per update likewise. The standard
errors count the noise's correlation: they come from the means of 20 consecutive blocks. One JSON line last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command

ROOT = Path(__file__).parents[1]
FLAGS = "--preset tiny --device cpu --batch_size 32 --total_episodes 100000000 --lr_schedule constant --lr 1e-5"


def slope(seconds: np.ndarray, values: np.ndarray, blocks: int = 20) -> tuple[float, float]:
    """Growth an hour and its standard error: least squares through the means of consecutive blocks."""
    parts = np.array_split(np.arange(len(values)), min(blocks, len(values)))
    x = np.array([seconds[part].mean() for part in parts]) / 3600
    y = np.array([values[part].mean() for part in parts])
    x = x - x.mean()
    growth = float(x @ y / (x @ x))
    errors = y - y.mean() - growth * x
    return growth, float(np.sqrt(errors @ errors / max(len(parts) - 2, 1) / (x @ x)))


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train_ppo.py", *FLAGS.split()]
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        try:
            began, times, memory = time.monotonic(), [], []
            while (now := time.monotonic() - began) < 60 * args.minutes:
                assert run.poll() is None, f"train_ppo.py ended with status {run.returncode}"
                times.append(now)
                memory.append(resident_mib(run.pid))
                time.sleep(1)
            run.send_signal(signal.SIGTERM)
            status = run.wait(120)
        finally:
            run.kill()
        rows = read_metrics(Path(folder, "runs", "ppo"))
    times, memory = np.array(times), np.array(memory)
    late = times > times[-1] / 5
    rows = rows[len(rows) // 5 :]
    learn = np.array([row["time/rollout"] + row["time/score"] + row["time/learn"] for row in rows])
    clock = np.array([row["time"] for row in rows])
    growth, growth_error = slope(times[late], memory[late])
    slower, slower_error = slope(clock - clock[0], learn)
    found = {
        "minutes": args.minutes,
        "updates": rows[-1]["step"],
        "exit_status": status,
        "memory_mib": round(float(memory[late].mean()), 1),
        "memory_growth_mib_an_hour": round(growth, 2),
        "memory_growth_error": round(growth_error, 2),
        "seconds_an_update": round(float(np.median(learn)), 4),
        "seconds_growth_an_hour": round(slower, 4),
        "seconds_growth_error": round(slower_error, 4),
    }
    found["flat"] = growth < max(2 * growth_error, 0.01 * memory[late].mean())
    found["steady"] = slower < max(2 * slower_error, 0.01 * float(np.median(learn)))
    found = {name: bool(value) if isinstance(value, np.bool_) else value for name, value in found.items()}
    print(json.dumps(found))
    sys.exit(not (found["flat"] and found["steady"] and status == 143))


if __name__ == "__main__":
    as_command(main)
