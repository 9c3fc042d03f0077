"""What a run prints: on a terminal, to a file, and when the clock is set."""

import os
import pty
import subprocess
import sys
import termios
import types
from pathlib import Path

import pytest

import nanorlhf.run.console
from nanorlhf.run.console import Console, clock, typical_pace

ROOT = Path(__file__).parent.parent


@pytest.fixture
def at(monkeypatch):
    """at.now: the seconds that the console believes it is."""
    moment = types.SimpleNamespace(now=1000.0)
    moment.monotonic = lambda: moment.now
    monkeypatch.setattr(nanorlhf.run.console, "time", moment)
    return moment


def test_a_steps_line_shows_the_chosen_metrics_and_the_time_left(at, capsys):
    console = Console("update", 24, ["objective/scores", "episode", "absent"])
    at.now += 100  # loading
    console.step(1, {"objective/scores": 0.123456, "episode": 116722, "loss": 1.0})
    at.now += 5.9
    console.step(2, {"objective/scores": 0.2, "episode": 2})
    at.now += 5.9
    console.step(3, {"objective/scores": 0.3, "episode": 3})
    assert capsys.readouterr().out.splitlines() == [
        "update 1/24 | objective/scores 0.1235 | episode 116722 | 100 s/update | ETA 38:20",
        "update 2/24 | objective/scores 0.2 | episode 2 | 5.9 s/update | ETA 2:10",
        "update 3/24 | objective/scores 0.3 | episode 3 | 5.9 s/update | ETA 2:04",
    ]


def test_a_line_before_the_first_step_or_without_a_total_has_no_time_left(at, capsys):
    console = Console()
    console.step(0, {"loss": 1.0})
    at.now += 3700
    console.step(1, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines() == ["step 0 | loss 1", "step 1 | loss 1 | 3.7e+03 s/step"]
    assert console.elapsed() == "1:01:40"


@pytest.mark.parametrize("jump", [-36_000.0, 36_000.0])
def test_a_clock_that_is_set_by_hours_is_seen_in_no_time_left(at, capsys, jump):
    console = Console("update", 1000)
    for step in range(1, 40):
        at.now += 2 + (jump if step in (11, 30) else 0)
        console.step(step, {"loss": 1.0})
        line = capsys.readouterr().out
        assert step == 1 or f"| 2 s/update | ETA {clock(2 * (1000 - step))}" in line, line
    at.now += jump
    list(console.progress(range(3)))
    assert clock(jump).count("-") == 0 and "-" not in capsys.readouterr().out


def test_slow_steps_that_belong_to_the_run_count_in_the_pace_and_a_pause_does_not():
    every_fourth_saves = [(step, 10.0 * step + 20.0 * (step // 4)) for step in range(9)]
    assert typical_pace(every_fourth_saves) == 15.0
    paused = [(step, moment + (5000 if step > 5 else 0)) for step, moment in every_fourth_saves]
    assert 14.0 < typical_pace(paused) < 17.0
    assert typical_pace([(0, 5.0), (1, 1.0)]) == 0.0  # the clock ran backwards, and nothing else is known


def test_progress_off_a_terminal_is_a_line_every_ten_seconds_and_silent_for_short_work(at, capsys):
    console = Console()

    def work(count):
        for i in console.progress(range(count), what="scoring"):
            at.now += 1
            assert i < count

    work(2)
    assert capsys.readouterr().out == ""
    work(20)
    assert capsys.readouterr().out.splitlines() == [
        "scoring 2/20 | ETA 0:18",
        "scoring 12/20 | ETA 0:08",
        "scoring 20 done in 0:20",
    ]
    assert list(console.progress(iter("abc"))) == ["a", "b", "c"]


def test_a_character_that_the_console_cannot_show_does_not_end_the_run(tmp_path, monkeypatch):
    console = Console()
    with open(tmp_path / "out", "w", encoding="latin-1") as out:
        monkeypatch.setattr(sys, "stdout", out)
        console.say("a smile \N{GRINNING FACE}")
    assert (tmp_path / "out").read_text(encoding="latin-1") == "a smile ?\n"


def test_a_table_is_cut_and_moves_no_cursor(capsys):
    query = "[r/a] [/b] \x1b[31m\n" + "word " * 200
    Console().table("samples at update 3", [{"query": query, "score": i / 7} for i in range(3)])
    out = capsys.readouterr().out
    assert "samples at update 3" in out and "[r/a] [/b]" in out and "0.286" in out
    assert "\x1b" not in out and out.count("word") < 3 * 90


PROGRAM = """
import sys, time
from nanorlhf.run.console import Console
console = Console("update", 3, ["loss"])
console.say("before")
for update in (1, 2, 3):
    console.step(update, {"loss": update / 4})
    console.table(f"samples at update {update}", [{"post": "a post", "score": 1.0}])
    list(console.progress(range(2)))
console.close()
console.say("after")
"""


def screen(written: str) -> list[str]:
    """The lines that stay on a terminal: what a carriage return goes back over is written over."""
    lines, column = [""], 0
    written = written.replace("\x1b[A", "\0")
    row = 0
    for c in written:
        if c == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif c == "\r":
            column = 0
        elif c == "\0":
            row -= 1
        else:
            lines[row] = lines[row][:column].ljust(column) + c + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_on_a_terminal_the_lines_stand_whole_above_one_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    done = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert done.wait(60) == 0
    lines = [line for line in screen(written.decode()) if line]
    assert lines[0] == "before" and lines[-1] == "after"
    assert sum("loss" in line for line in lines) == 3 and sum("samples at update" in line for line in lines) == 3
    bars = [line for line in lines if line.startswith("update 3/3 |") and "loss" not in line]
    assert len(bars) == 1 and lines.index(bars[0]) == len(lines) - 2  # left where it was, full


def test_to_a_file_there_is_one_line_a_step_with_the_time_left_and_no_bar(tmp_path):
    with open(tmp_path / "nohup.out", "wb") as out:
        subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=out, stderr=out, check=True, timeout=120)
    written = (tmp_path / "nohup.out").read_text(encoding="utf-8")
    steps = [line for line in written.splitlines() if line.startswith("update")]
    assert len(steps) == 3 and all(" s/update | ETA 0:0" in line for line in steps)
    assert "\r" not in written and "\x1b" not in written
