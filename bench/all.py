"""One visit to a machine: every benchmark with a time limit of its own, one file of results, the tables made from it.

    python -m bench.all --visit 1        a GPU, 8 minutes at most: the GPU tests, an update, a rollout, the kernels
    python -m bench.all --visit 2        the same again: twenty PPO updates at full depth, then side by side SmolLM2 on
                                         real posts, the tiny pipeline against a CPU's, the plan of memory
    python -m bench.all                  a GPU: both. A CPU: the same with tiny shapes, plans for four cards, and the
                                         comparisons, about 5 minutes when nothing else runs
    python -m bench.all --only update    some of it; the others stay in the file as they are
    python -m bench.all --dry            every command of a visit to a GPU, on this CPU and as small as it gets
    python -m bench.all --tables         only writes the tables of docs/speed.md and the README's line again

Writes bench/results/<device>.json (--results for another folder, where visit.log goes too) after each benchmark:
device, commit, driver, versions, and each benchmark's JSON line. What is there for this commit is not run again, so a
visit that was cut short goes on where it ended (--again runs it). One that fails or runs out of time keeps the figures
it had, with the end of what it said; the rest go on, and the exit status is 1. Benchmarks that measure no time run side
by side at the end, the others alone. The GPU tests are the kernels against float64, the step that waits for nothing,
the plan of memory, and a run with --deterministic that is resumed and ends with the same bits. A machine without a
network needs the packages of pyproject.toml brought along: the first thing said is which of them are missing, and how;
SmolLM2 and the posts too (bench/small_run.py), without which that part is left out.
"""

import argparse
import importlib.metadata
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
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from bench.rows import FILE
from bench.tables import quick, tables
from nanorlhf.run.run_folder import git
from nanorlhf.run.streams import as_command

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, README = ROOT / "bench" / "results", ROOT / "docs" / "speed.md", ROOT / "README.md"
BEGIN, END = "<!-- tables: python -m bench.all --tables -->\n", "<!-- end of tables -->\n"
QUICK = "| **Quick?** |"  # the README's line of measured speed, made from the results too
CARDS = (24, 48, 80, 141)  # GB, whose plans a CPU makes
DRY_LIMIT = 1200  # seconds
TAIL = 1500  # characters that are kept of a failed one's output


VISITS = {"1": ("tests", "update", "rollout", "kernels"), "2": ("ppo", "smollm2", "tiny", "plan")}
LATER = {"anthropic", "wandb", "gguf", "xllamacpp"}  # imported where they are used: of these only gguf, by small_run


class Bench(NamedTuple):
    name: str
    arguments: list[str]  # of python
    limit: int  # seconds
    alone: bool = True  # it measures time: nothing may run beside it


def benches(gpu_gb: float | None, trl_python: str | None = None) -> list[Bench]:
    """What a visit runs, in this order. gpu_gb: of the card; None on a CPU. trl_python: see bench.against."""
    if gpu_gb:
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        return [
            Bench("tests", ["-m", "pytest", "-m", "gpu", "-q", *workers], 180),
            Bench("update", ["-m", "bench.update"], 110),
            Bench("rollout", ["-m", "bench.rollout", "--rounds", "3"], 80),
            Bench("kernels", ["-m", "bench.kernels", "--rows", "6784"], 110),
            Bench("ppo", ["-m", "bench.ppo_run"], 230),
            Bench("smollm2", ["-m", "bench.small_run", "--minutes", "3.4"], 240, alone=False),
            Bench("tiny", ["-m", "bench.tiny_run"], 180, alone=False),
            Bench("plan", ["-m", "bench.plan", "--gpu_gb", f"{gpu_gb:.0f}"], 60, alone=False),
        ]
    small = ["--batch_size", "64", "--repeats", "5", *(["--trl_python", trl_python] if trl_python else [])]
    return [
        Bench("kernels", ["-m", "bench.kernels"], 60),
        Bench("rollout", ["-m", "bench.rollout"], 60),
        Bench("update", ["-m", "bench.update"], 180),
        *(Bench(f"plan_{gb}", ["-m", "bench.plan", "--gpu_gb", str(gb)], 120) for gb in CARDS),
        Bench("against", ["-m", "bench.against", "--threads", str(torch.get_num_threads()), *small], 360),
        Bench("scaling", ["-m", "bench.scaling", "--repeats", "2"], 240),
    ]


def dry(planned: list[Bench]) -> list[Bench]:
    """The commands of a visit to a GPU as a CPU can run them in a minute: so that a visit finds no typo in them."""
    instead = {
        "update": ["--repeats", "1", "--stages", "sft", "--device", "cpu"],
        "kernels": ["--rows", "8", "--tokens", "8"],
        "rollout": ["--rounds", "1", "--device", "cpu", "--threads", "1"],
        "ppo": ["--updates", "3", "--device", "cpu"],
        "smollm2": ["--tiny", "--device", "cpu", "--minutes", "0.1"],
        "tests": ["--collect-only"],
        "tiny": ["--updates", "1", "--device", "cpu", "--dtypes", "float32", "--stages", "sft", "ppo"],
    }
    # Limits are those of a card that is waited for; here other work, or an old processor, may take any time.
    return [one._replace(arguments=one.arguments + instead.get(one.name, []), limit=DRY_LIMIT) for one in planned]


def missing() -> list[str]:
    """Packages of pyproject.toml's groups that the benchmarks import and this environment has not."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    names = [re.match(r"[\w-]+", line)[0] for group in groups.values() for line in group if isinstance(line, str)]
    found = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found += [name] if name not in LATER else []
    return found


BRING = """missing here: {names} (pyproject.toml). With a network: python -m pip install --group run --group test. To
bring them to a machine without one, fetch wheels for its Python and processor where there is a network, for example
    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        -d wheels {names} tyro docstring-parser typeguard shtab
and there
    python -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site"""


def run(bench: Bench, log: Path | None = None) -> dict:
    """{"s", and "result" (its JSON line) or "skipped" or "error"}. What it prints is added to the log at the end.

    "skipped" is what a benchmark says in its line that lacks something here: no result, and no failure.
    """
    module = bench.arguments[1]
    if module.startswith("bench.") and not importlib.util.find_spec(module):
        return {"skipped": f"there is no {module}"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+", encoding="utf-8") as output:
        rows = Path(folder) / "rows.jsonl"
        command, environment = [sys.executable, *bench.arguments], os.environ | {FILE: str(rows)}
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = child.wait(timeout=bench.limit)
            error = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with all that it started
            child.wait()
            error = f"not done in {bench.limit} s"
        output.seek(0)
        text = output.read()
        partial = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    found = {"s": round(time.monotonic() - began, 1)}
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(
                f"\n===== {bench.name}: python {' '.join(bench.arguments)}: {error or 'done'}, {found['s']} s\n{text}"
            )
    lines = text.strip().splitlines()
    result = _json(lines[-1]) if lines and module.startswith("bench.") else None
    if error is None and module.startswith("bench."):
        error = None if result else "its last line is no JSON"
    elif error is None:
        result = {"summary": lines[-1] if lines else ""}  # of pytest
    if error is None:
        return found | ({"skipped": result["skipped"]} if "skipped" in result else {"result": result})
    # What it had measured: its line all the same, where a process ends badly after its work, or the rows so far.
    kept = {"partial": result or {"results": partial}} if result or partial else {}
    return found | {"error": error, "tail": text[-TAIL:]} | kept


def _json(line: str) -> dict | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def updated(before: dict | None, now: dict) -> dict:
    """The entry of a benchmark: one that failed keeps the figures of an earlier one, and says that it failed since; one
    that could not be made here keeps them too."""
    if "result" in now or "result" not in (before or {}):
        return now
    if "skipped" in now:
        return before
    return before | {"failed_since": {key: now[key] for key in ("error", "commit", "tail")}}


def machine() -> dict:
    """What the figures belong to."""
    about = {"torch": torch.__version__, "python": platform.python_version(),
             "triton": getattr(sys.modules.get("triton"), "__version__", None)}  # fmt: skip
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, encoding="utf-8").stdout.split("\n")[0]
        return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda} | about
    linux = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", linux.read_text(encoding="utf-8")) if linux.exists() else None
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
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_tables() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE}: expected the markers {BEGIN!r} and {END!r}"
    write(PAGE, before + BEGIN + "\n" + tables(RESULTS) + "\n" + END + after)
    lines = README.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if line.startswith(QUICK)]
    assert len(places) == 1, f"{README}: expected one line that begins with {QUICK!r}"
    lines[places[0]] = f"{QUICK} {quick(RESULTS)} |\n"
    write(README, "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.all", description=__doc__.split("\n")[0])
    parser.add_argument("--visit", choices=VISITS, help="the first or the second half, on a GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the benchmarks")
    parser.add_argument("--again", action="store_true", help="also what there is of this commit")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing whose limit passes this")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the files are")
    parser.add_argument("--commit", help="its name, where there is no git")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="SmolLM2's wheel or its parts (bench.small_run)")
    parser.add_argument("--posts", metavar="DIR", help="tldr/ and comparisons/ as OpenAI's, for bench.small_run")
    parser.add_argument("--trl_python", help="python of an environment with TRL, for bench.against on a CPU")
    parser.add_argument("--dry", action="store_true", help="a visit to a GPU on this CPU, as small as it gets")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    args = parser.parse_args()
    if args.tables:
        write_tables()
        return
    if names := missing():
        parser.error(BRING.format(names=" ".join(names)))
    gpu = torch.cuda.is_available()
    gpu_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None
    planned = dry(benches(gpu_gb=80)) if args.dry else benches(gpu_gb, args.trl_python)
    names = [bench.name for bench in planned]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"got --only {' '.join(sorted(unknown))}, expected of {', '.join(names)}")
    chosen = args.only or (VISITS[args.visit] if args.visit else names)
    state = git() or {"commit": "unknown", "dirty": False}
    commit = args.commit or state["commit"][:7] + (" with changes" if state["dirty"] else "")
    own = ["--name", "visit_" + re.sub(r"\W+", "_", commit)]  # another commit does not go on with these runs
    own += ["--weights", *args.weights] if args.weights else []
    own += ["--posts", args.posts] if args.posts else []
    planned = [one._replace(arguments=one.arguments + own) if one.name == "smollm2" else one for one in planned]
    found = machine() | ({"device": "dry"} if args.dry else {})
    args.results.mkdir(parents=True, exist_ok=True)
    path, log = args.results / file_of(found["device"]).name, args.results / "visit.log"
    log = None if args.results == RESULTS else log
    before = json.loads(path.read_text(encoding="utf-8"))["benches"] if path.exists() else {}
    found["benches"] = {name: before[name] for name in names if name in before}
    began = time.monotonic()

    def left_out(bench: Bench) -> str | None:
        there = found["benches"].get(bench.name, {})
        if there.get("commit") == commit and "result" in there and "failed_since" not in there and not args.again:
            return "is there, of this commit"
        if args.budget and time.monotonic() - began + bench.limit > args.budget:
            return f"left out: {args.budget:.0f} s would not be enough"

    def note(bench: Bench, one: dict) -> None:
        found["benches"][bench.name] = updated(before.get(bench.name), one | {"commit": commit})
        print(f"{bench.name:8} {one.get('error') or one.get('skipped') or 'done'}, {one.get('s', 0)} s", flush=True)
        write(path, json.dumps(found, indent=1) + "\n")  # after each

    beside = []
    for bench in sorted((bench for bench in planned if bench.name in chosen), key=lambda bench: not bench.alone):
        reason = left_out(bench)
        print(f"{bench.name:8} {reason or f'at most {bench.limit} s: python ' + ' '.join(bench.arguments)}", flush=True)
        if bench.alone and not reason:
            note(bench, run(bench, log))
        elif not reason:
            beside.append(bench)
    with ThreadPoolExecutor(len(beside) or 1) as pool:  # they measure no time
        for bench, one in zip(beside, pool.map(lambda bench: run(bench, log), beside), strict=True):
            note(bench, one)
    if args.results == RESULTS and not args.dry:
        write_tables()
    failed = [name for name, one in found["benches"].items() if "error" in one or "failed_since" in one]
    print(json.dumps({"bench": "all", "device": found["device"], "file": path.name, "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    as_command(main)
