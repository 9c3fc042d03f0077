"""One process writes to a run folder, and --resume auto may stand in a restart loop."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_run import CONFIG, OVERWRITE, RESUME

import nanorlhf.run.run
from nanorlhf.errors import UserError
from nanorlhf.run.config import parse
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.run.run_folder import clear, lock, writer_of
from nanorlhf.storage.jsonl import append, read_jsonl

ROOT = Path(__file__).parents[1]
AUTO = replace(CONFIG, resume="auto")
HOLD = """
import sys
from pathlib import Path
from nanorlhf.run.run_folder import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def log(cfg, tmp_path, step: int) -> Run:
    with Run("ppo", cfg, root=tmp_path) as run:
        run.log(step, {"loss": 1.0})
    return run


@pytest.mark.parametrize("cfg", [RESUME, OVERWRITE, AUTO])
def test_a_folder_that_another_process_writes_to_is_refused_with_its_number_until_it_is_dead(tmp_path, cfg):
    log(CONFIG, tmp_path, 1)
    before = (tmp_path / "ppo" / "metrics.jsonl").read_bytes()
    command = [sys.executable, "-c", HOLD, tmp_path / "ppo"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert writer_of(tmp_path / "ppo").startswith(f"process {other.pid} on ")
        with pytest.raises(UserError, match=f"is being written by process {other.pid} on"):
            Run("ppo", cfg, root=tmp_path)
        with pytest.raises(UserError, match=f"is being written by process {other.pid} on"):
            lock(tmp_path / "ppo")
        other.kill()
    assert (tmp_path / "ppo" / "metrics.jsonl").read_bytes() == before
    assert writer_of(tmp_path / "ppo") is None
    log(cfg, tmp_path, 2)


def test_a_run_that_was_begun_by_another_process_meanwhile_is_not_written_over(tmp_path):
    slow = Run("ppo", AUTO, root=tmp_path)  # nothing there: it would begin
    log(CONFIG, tmp_path, 1)
    with pytest.raises(UserError, match="has been begun by another process meanwhile: start again"):
        slow.log(7, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path / "ppo")] == [1]


def test_resume_auto_begins_where_there_is_nothing_and_goes_on_where_there_is_a_run(tmp_path):
    assert not Run("ppo", AUTO, root=tmp_path).resuming
    log(AUTO, tmp_path, 1)
    assert log(AUTO, tmp_path, 2).resuming
    assert [row["step"] for row in read_metrics(tmp_path / "ppo")] == [1, 2]
    with pytest.raises(UserError, match="exclude each other"):
        Run("ppo", replace(AUTO, overwrite=True), root=tmp_path)


@pytest.mark.parametrize("left", [["lock"], ["lock", "config.json.tmp"], []])
def test_what_a_start_that_was_killed_at_once_leaves_is_no_run(tmp_path, left):
    (tmp_path / "ppo").mkdir()
    for name in left:
        (tmp_path / "ppo" / name).write_text("{", encoding="utf-8")
    assert not log(AUTO, tmp_path, 1).resuming


def test_an_overwritten_run_says_whose_it_is_until_all_else_is_gone(tmp_path, monkeypatch):
    log(CONFIG, tmp_path, 1)
    (tmp_path / "ppo" / "final").mkdir()
    clear(tmp_path / "ppo")
    assert sorted(path.name for path in (tmp_path / "ppo").iterdir()) == ["config.json", "lock"]
    assert json.loads((tmp_path / "ppo" / "config.json").read_text(encoding="utf-8"))["stage"] == "ppo"


def test_auto_is_the_one_word_that_resume_takes(monkeypatch, tmp_path):
    import train_ppo

    monkeypatch.chdir(tmp_path)

    def resume(*flags):
        return parse(train_ppo.Config, train_ppo.PRESETS, "", ["--preset", "tiny", *flags]).resume

    assert resume() is False and resume("--resume") is True
    assert resume("--resume", "auto") == resume("--resume=auto") == "auto"
    assert resume("--resume", "--seed", "3") is True
    for flags in (["--resume", "always"], ["--resume=always"]):
        with pytest.raises(UserError, match="always"):
            resume(*flags)


def test_a_clock_that_jumps_back_changes_the_time_in_the_log_and_nothing_else(tmp_path, monkeypatch, capsys):
    wall = iter([2e9, 1e9, 0.0, -5.0])

    class Clock:
        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def time():
            return next(wall)

    monkeypatch.setattr(nanorlhf.run.run, "time", Clock)
    with Run("ppo", CONFIG, root=tmp_path, total_steps=4) as run:
        for step in (1, 2, 3, 4):
            run.log(step, {"loss": 1.0})
    assert [row["time"] for row in read_metrics(run.folder)] == [2e9, 1e9, 0.0, -5.0]
    assert "ETA -" not in capsys.readouterr().out


def test_whoever_tails_a_log_sees_whole_lines_only(tmp_path):
    """A process writes, this one reads all the while: each line that has its end is whole, and none is lost."""
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from pathlib import Path; from nanorlhf.storage.jsonl import append\n"
        "for step in range(3000): append(Path(sys.argv[1]), [{'step': step, 'text': 'x' * (step % 9000)}])"
    )
    seen, reads = 0, 0
    with subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT) as writer:
        while writer.poll() is None:
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(seen)
                    *whole, rest = file.read().split(b"\n")
                for line in whole:
                    json.loads(line)
                    seen += len(line) + 1
                reads += bool(whole)
    assert writer.returncode == 0 and reads > 10
    assert [row["step"] for row in read_jsonl(path)] == list(range(3000))
    append(path, [{"step": 3000}])
