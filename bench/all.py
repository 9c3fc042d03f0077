"""One visit to a machine: every benchmark with a time limit of its own, one file of results, the tables made from it.

    python -m bench.all                  on a GPU under 9 minutes: GPU tests, kernels, rollout, update, plan;
                                         on a CPU the same with tiny shapes, plans for four
                                         cards, and the comparisons: about 5 minutes when nothing else runs
    python -m bench.all --only update    some of it; the others stay in the file as they are
    python -m bench.all --tables         only writes the tables between the markers in docs/speed.md again

Writes bench/results/<device>.json: device, commit, driver, versions, and each benchmark's JSON line. One that fails or
runs out of time is recorded with the end of what it said, the rest go on, and the exit status is 1.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.tables import tables
from nanorlhf.run.run_folder import git

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- tables: python -m bench.all --tables -->\n", "<!-- end of tables -->\n"
CARDS = (24, 48, 80, 141)  # GB, whose plans a CPU makes
TAIL = 1500  # characters that are kept of a failed one's output


class Bench(NamedTuple):
    name: str
    arguments: list[str]  # of python
    limit: int  # seconds


def benches(gpu_gb: float | None, trl_python: str | None = None) -> list[Bench]:
    """What a visit runs, in this order. gpu_gb: of the card; None on a CPU. trl_python: see bench.against."""
    if gpu_gb:
        return [
            # Not the dozen training runs of test_determinism.py: three minutes, a command of their own.
            Bench("tests", ["-m", "pytest", "-m", "gpu", "-q", "--ignore", "tests/test_determinism.py"], 130),
            Bench("kernels", ["-m", "bench.kernels", "--rows", "6784"], 130),
            Bench("rollout", ["-m", "bench.rollout"], 90),
            Bench("update", ["-m", "bench.update"], 130),
            Bench("plan", ["-m", "bench.plan", "--gpu_gb", f"{gpu_gb:.0f}"], 40),
        ]
    small = ["--batch_size", "64", "--repeats", "2", *(["--trl_python", trl_python] if trl_python else [])]
    return [
        Bench("kernels", ["-m", "bench.kernels"], 60),
        Bench("rollout", ["-m", "bench.rollout"], 60),
        Bench("update", ["-m", "bench.update"], 180),
        *(Bench(f"plan_{gb}", ["-m", "bench.plan", "--gpu_gb", str(gb)], 120) for gb in CARDS),
        Bench("against", ["-m", "bench.against", "--threads", str(torch.get_num_threads()), *small], 360),
        Bench("scaling", ["-m", "bench.scaling", "--repeats", "2"], 240),
    ]


def run(bench: Bench) -> dict:
    """{"s", and "result" (its JSON line) or "skipped" or "error"}. Prints what it prints."""
    module = bench.arguments[1]
    if module.startswith("bench.") and not importlib.util.find_spec(module):
        return {"skipped": f"there is no {module}"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, *bench.arguments]
        try:
            child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            status = child.wait(timeout=bench.limit)
            error = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with all that it started
            child.wait()
            error = f"not done in {bench.limit} s"
        output.seek(0)
        text = output.read()
    found = {"s": round(time.monotonic() - began, 1)}
    lines = text.strip().splitlines()
    if error is None and module.startswith("bench."):
        try:
            return found | {"result": json.loads(lines[-1])}
        except (ValueError, IndexError):
            error = "its last line is no JSON"
    if error is None:
        return found | {"result": {"summary": lines[-1]}}  # of pytest
    return found | {"error": error, "tail": text[-TAIL:]}


def machine() -> dict:
    """What the figures belong to."""
    about = {"torch": torch.__version__, "python": platform.python_version(),
             "triton": getattr(sys.modules.get("triton"), "__version__", None)}  # fmt: skip
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda} | about
    linux = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", linux.read_text()) if linux.exists() else None
    processor = named.group(1) if named else platform.processor() or platform.machine()
    return {
        "device": "cpu",
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    } | about


def file_of(device: str) -> Path:
    return RESULTS / (re.sub("[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


def write(path: Path, text: str) -> None:
    """All of it or nothing: a visit may end at any moment."""
    beside = path.with_suffix(".writing")
    beside.write_text(text)
    os.replace(beside, path)


def write_tables() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE}: expected the markers {BEGIN!r} and {END!r}"
    write(PAGE, before + BEGIN + "\n" + tables(RESULTS) + "\n" + END + after)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.all", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the benchmarks")
    parser.add_argument("--trl_python", help="python of an environment with TRL, for bench.against on a CPU")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    args = parser.parse_args()
    if args.tables:
        write_tables()
        return
    gpu = torch.cuda.is_available()
    gpu_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None
    planned = benches(gpu_gb, args.trl_python)
    names = [bench.name for bench in planned]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"got --only {' '.join(sorted(unknown))}, expected of {', '.join(names)}")
    found, state = machine(), git() or {"commit": "unknown", "dirty": False}
    commit = state["commit"][:7] + (" with changes" if state["dirty"] else "")
    path = file_of(found["device"])
    before = json.loads(path.read_text())["benches"] if path.exists() and args.only else {}
    found["benches"] = {name: before[name] for name in names if name in before}
    for bench in planned:
        if args.only and bench.name not in args.only:
            continue
        print(f"{bench.name:8} at most {bench.limit} s: python {' '.join(bench.arguments)}", flush=True)
        found["benches"][bench.name] = one = run(bench) | {"commit": commit}
        print(f"{'':8} {one.get('error') or one.get('skipped') or 'done'}, {one.get('s', 0)} s", flush=True)
        RESULTS.mkdir(exist_ok=True)
        write(path, json.dumps(found, indent=1) + "\n")  # after each
    write_tables()
    failed = [name for name, bench in found["benches"].items() if "error" in bench]
    print(
        json.dumps({"bench": "all", "device": found["device"], "file": str(path.relative_to(ROOT)), "failed": failed})
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
