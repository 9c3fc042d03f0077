"""What a command prints may go nowhere, and its terminal may go away: it goes on, or saves and ends; nothing is lost.

TERMINALS=all python -m pytest tests/test_terminals.py       the full run: every script in every situation
"""

import ast
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stages import SMALL

from nanorlhf.run.run import read_metrics

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_sft", "train_rm", "train_ppo", "eval")
SITUATIONS = {  # what stands behind the command on a shell's line
    "head": "| head -2",
    "a reader that has gone": "| true",
    "stdin closed": "<&-",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "stdout full": ">/dev/full",
    "both full": ">/dev/full 2>&1",
    "C locale": "",
    "nohup": "",
}
EVERY = [(situation, script) for situation in SITUATIONS for script in SCRIPTS]
SOME = [("head", "train_ppo"), ("all closed", "train_sft"), ("both full", "train_sft"), ("C locale", "eval")]
TRIED = EVERY if os.environ.get("TERMINALS") == "all" else SOME
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
FLAGS = SMALL | {"eval": "--num_posts 8 --num_comparisons 8 --diversity_posts 4 --judge rm"}


@pytest.fixture(scope="module")
def command(world, models):
    """command(script, more flags) -> the words that start it."""

    def make(script: str, more: str = "") -> list[str]:
        rm = models["train_ppo"].split("--reward_model ")[1]
        sft = models["train_rm"].split("--sft_model ")[1]
        theirs = models.get(script, f"--policy sft={sft} --reward_model {rm}")
        flags = f"--preset tiny --device cpu --data {world} {FLAGS[script]} {theirs} {more}"
        return [sys.executable, str(ROOT / f"{script}.py"), *shlex.split(flags)]

    return make


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """undisturbed(script) -> the run folder of a run that nothing happened to."""
    done = {}

    def run(script: str) -> Path:
        if script not in done:
            place = tmp_path_factory.mktemp("undisturbed")
            subprocess.run(command(script), cwd=place, env=environment(), check=True, stdout=subprocess.DEVNULL)
            done[script] = next((place / "runs").glob(script.removeprefix("train_")))
        return done[script]

    return run


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def assert_nothing_is_lost(place: Path, whole: Path) -> None:
    folder = place / "runs" / whole.name
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())
    ours, theirs = ([{k: v for k, v in row.items() if not k.startswith(("time", "perf"))} for row in read_metrics(f)]
                    for f in (folder, whole))  # fmt: skip
    assert ours == theirs
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    if (whole / "final").exists():
        one, two = (load_file(f / "final" / "model.safetensors") for f in (folder, whole))
        assert one.keys() == two.keys() and all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.parametrize("situation, script", TRIED)
def test_a_run_whose_output_goes_nowhere_loses_nothing(situation, script, command, undisturbed, tmp_path):
    line = f"{shlex.join(command(script))} {SITUATIONS[situation]}"
    line = f"nohup {line} >log 2>&1" if situation == "nohup" else line
    line = f"set -o pipefail; {line}" if situation == "head" else line
    more = C_LOCALE if situation == "C locale" else {}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment(**more), capture_output=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and b"Traceback" not in said and b"Exception ignored" not in said, said.decode()[-2000:]
    assert_nothing_is_lost(tmp_path, undisturbed(script))


COMMANDS = {  # what is started, and the exit status where its output is seen
    "nanorlhf status runs/none": 2,
    "nanorlhf.tiny.demo": 2,  # there is no run to judge
    "faults --help": 0,
    "experiments.seeds --help": 0,
    "bench.all --help": 0,
    "bench.plan --help": 0,
}


EVERY_COMMAND = [(words, behind) for words in COMMANDS for behind in ("| true", ">&-", ">/dev/full 2>&1", "2>&-")]
SOME_COMMANDS = [("nanorlhf status runs/none", "2>&-"), ("faults --help", "| true"), ("bench.all --help", ">&-")]


@pytest.mark.parametrize("words, behind", EVERY_COMMAND if os.environ.get("TERMINALS") == "all" else SOME_COMMANDS)
def test_a_command_whose_output_goes_nowhere_ends_as_if_it_were_seen(words, behind, tmp_path):
    line = f"set -o pipefail; {shlex.quote(sys.executable)} -m {words} {behind}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment(), capture_output=True, timeout=300)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == COMMANDS[words] and "Traceback" not in said and "Exception ignored" not in said, said


def started_by(path: Path) -> list[str]:
    """The calls below `if __name__ == "__main__"` of a file."""
    blocks = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
              if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"]  # fmt: skip
    return [ast.unparse(line.value.func) for block in blocks for line in block.body if isinstance(line, ast.Expr)]


def test_every_command_is_started_where_output_that_goes_away_ends_nothing():
    """cli for what has a Config, as_command for the rest: streams.py mends all of them, or none. What bench.against
    starts in TRL's environment finds nothing of ours there, and has a reader always."""
    files = [*ROOT.glob("*.py"), *(p for name in ("nanorlhf", "bench", "experiments", "faults")
                                   for p in (ROOT / name).rglob("*.py"))]  # fmt: skip
    calls = {path.relative_to(ROOT).as_posix(): started_by(path) for path in files}
    assert calls.pop("bench/trl_ppo.py") == ["main"]
    assert {name: found for name, found in calls.items() if found and found not in (["cli"], ["as_command"])} == {}
    assert calls["train_ppo.py"] == ["cli"] and calls["bench/plan.py"] == ["as_command"]


def start_on_a_terminal(words: list[str], place: Path, columns: int = 80):
    """A process of its own session on a pseudo-terminal -> (process, the terminal's other end)."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", str(columns)], stdin=theirs, check=False)
    process = subprocess.Popen(words, cwd=place, env=environment(COLUMNS=str(columns)), stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)  # fmt: skip
    os.close(theirs)
    return process, ours


def read_all(end: int, into: list[bytes]) -> None:
    while True:
        try:
            piece = os.read(end, 65536)
        except OSError:  # the process has ended, or we have closed the terminal
            return
        if not piece:
            return
        into.append(piece)


def wait_for_step(place: Path, stage: str, step: int, process) -> None:
    until = time.monotonic() + 300
    log = place / "runs" / stage / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) >= step):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def test_a_terminal_that_goes_away_is_as_sigterm(command, undisturbed, tmp_path):
    """The other end closes and the kernel hangs up, as when ssh breaks off; what is printed from then on fails."""
    process, end = start_on_a_terminal(command("train_ppo", "--save_every 100"), tmp_path)
    seen = []
    threading.Thread(target=read_all, args=(end, seen), daemon=True).start()
    wait_for_step(tmp_path, "ppo", 1, process)
    os.close(end)
    process.send_signal(signal.SIGHUP)  # what a login shell sends to its jobs
    assert process.wait(timeout=300) == 128 + signal.SIGHUP
    (saved,) = (tmp_path / "runs" / "ppo" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert step < 4 and [row["step"] for row in read_metrics(tmp_path / "runs" / "ppo")] == list(range(1, step + 1))
    again = command("train_ppo")[:2] + ["--resume", "--device", "cpu"]
    subprocess.run(again, cwd=tmp_path, env=environment(), check=True, stdout=subprocess.DEVNULL)
    ours, theirs = (read_metrics(f) for f in (tmp_path / "runs" / "ppo", undisturbed("train_ppo")))
    assert [row["objective/kl"] for row in ours] == [row["objective/kl"] for row in theirs]


def test_under_nohup_a_hang_up_stays_ignored(command, tmp_path):
    words = ["nohup", *command("train_sft")]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    wait_for_step(tmp_path, "sft", 1, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "runs" / "sft" / "final" / "model.safetensors").exists()


def test_on_a_terminal_of_20_columns_nothing_is_lost(command, undisturbed, tmp_path):
    process, end = start_on_a_terminal(command("train_sft"), tmp_path, columns=20)
    seen = []
    read_all(end, seen)
    assert process.wait(timeout=300) == 0 and b"Traceback" not in b"".join(seen)
    assert_nothing_is_lost(tmp_path, undisturbed("train_sft"))


def test_the_printed_command_can_be_typed(command, tmp_path):
    """A run is stopped by a signal; what its last line says is given to a shell as it stands."""
    name = 'my run ü: it\'s $HOME; `x` * "q" \\'
    words = [*command("train_sft", "--save_every 1"), "--run_name", name]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_step(tmp_path, name, 1, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    line = err.strip().split(b"\n")[-1]
    assert line.startswith(b"python ")
    shell = b"python() { " + shlex.quote(sys.executable).encode() + b' "$@"; }\n'
    done = subprocess.run(["bash", "-c", shell + line], cwd=tmp_path, env=environment(), capture_output=True)
    assert done.returncode == 0 and b"resumed from" in done.stdout, done.stderr.decode(errors="replace")
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / name)] == [1, 2, 3, 4, 4]
    record = json.loads((tmp_path / "runs" / name / "config.json").read_text(encoding="utf-8"))
    assert len(record["earlier"]) == 1


@pytest.mark.parametrize("name, more", [("my run ü", C_LOCALE), ("two\nlines", {})])
def test_a_name_that_could_not_be_typed_again_is_refused(name, more, command, tmp_path):
    words = [*command("train_sft"), "--run_name", name]
    done = subprocess.run(words, cwd=tmp_path, env=environment(**more), capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"error: run_name" in done.stderr
    assert not (tmp_path / "runs").exists()
