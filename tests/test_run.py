"""The run folder: what it refuses, what it writes, what it prints."""

import io
import json
import math
import os
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nanorlhf.run.console
import nanorlhf.run.run
import nanorlhf.run.run_folder
import nanorlhf.storage.jsonl
from nanorlhf.errors import UserError
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.storage.jsonl import append

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    preset: str = "tiny"
    run_name: str = "ppo"
    overwrite: bool = False
    resume: bool = False
    seed: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    track: bool = False
    lr: float = 1e-6


CONFIG = Config()
RESUME, OVERWRITE = replace(CONFIG, resume=True), replace(CONFIG, overwrite=True)


class Clock:
    """Stands in for the time module."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(nanorlhf.run.run, "time", clock)
    monkeypatch.setattr(nanorlhf.run.console, "time", clock)
    return clock


@pytest.fixture
def start(tmp_path):
    """Makes runs under tmp_path and closes them."""
    runs = []

    def make(cfg=CONFIG, stage="ppo", **options):
        runs.append(Run(stage, cfg, root=tmp_path, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.close(failed=True)


# -- the folder


def test_an_existing_run_is_refused_with_both_ways_out(start):
    earlier = start()
    earlier.log(1, {"loss": 2.0})
    earlier.close()
    with pytest.raises(UserError, match=r"ppo holds a run already: --resume continues it, --overwrite deletes it"):
        start()
    assert len(read_metrics(start(RESUME).folder)) == 1


def test_a_script_without_resume_does_not_offer_it(start):
    start().begin()
    without_resume = {name: value for name, value in vars(CONFIG).items() if name != "resume"}
    with pytest.raises(UserError, match="holds a run already: --overwrite deletes it, --run_name chooses"):
        start(types.SimpleNamespace(**without_resume))


def test_overwrite_deletes_the_earlier_run(start):
    earlier = start()
    earlier.log(1, {"loss": 2.0})
    earlier.close()
    run = start(OVERWRITE)
    run.begin()
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "lock"]
    run.log(1, {"loss": 3.0})
    assert [row["loss"] for row in read_metrics(run.folder)] == [3.0]  # only the first write deletes


@pytest.mark.parametrize("cfg", [CONFIG, OVERWRITE, RESUME])
def test_a_start_that_fails_before_the_first_write_loses_nothing(start, tmp_path, cfg):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    if cfg is not CONFIG:
        earlier = start()
        earlier.log(1, {"loss": 2.0})
        earlier.samples(1, [{"response": "a"}])
        earlier.close()
    before = files()
    with pytest.raises(UserError), start(cfg) as run:
        run.say("loading")
        list(run.progress(range(3)))
        raise UserError("the model is damaged")
    assert files() == before and bool(before) == (cfg is not CONFIG)
    assert (tmp_path / "ppo").exists() == bool(before)


@pytest.mark.parametrize("write", ["log", "samples", "truncate_metrics", "begin"])
def test_whatever_writes_first_makes_the_folder_this_runs_own(start, write):
    earlier = start(replace(CONFIG, lr=5.0))
    earlier.log(1, {"loss": 2.0})
    earlier.close()
    run = start(OVERWRITE)
    first = {"log": [1, {"loss": 1.0}], "samples": [1, [{"response": "a"}]], "truncate_metrics": [0], "begin": []}
    getattr(run, write)(*first[write])
    assert json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["config"]["lr"] == CONFIG.lr
    metrics = run.folder / "metrics.jsonl"
    assert ([row["loss"] for row in read_metrics(run.folder)] if metrics.exists() else []) == [1.0] * (write == "log")


def test_a_folder_that_another_run_has_taken_meanwhile_is_refused(start):
    slow, quick = start(), start()
    quick.log(1, {"loss": 2.0})
    with pytest.raises(UserError, match="holds a run already"):
        slow.log(1, {"loss": 7.0})
    assert [row["loss"] for row in read_metrics(quick.folder)] == [2.0]


def test_overwrite_deletes_neither_another_stage_nor_a_folder_that_is_no_run(start, tmp_path):
    start(stage="sft").begin()
    with pytest.raises(UserError, match="a run of sft, not of ppo: choose another --run_name"):
        start(OVERWRITE)
    (tmp_path / "ppo" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no run folder"):
        start(OVERWRITE)
    assert (tmp_path / "ppo" / "config.json").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp"])
def test_a_run_name_cannot_leave_the_runs_folder(start, name):
    with pytest.raises(UserError, match="run_name .* is not the name of one folder"):
        start(replace(OVERWRITE, run_name=name))


def test_an_empty_folder_may_be_used(start, tmp_path):
    (tmp_path / "ppo").mkdir()
    assert start().folder == tmp_path / "ppo"


def test_resume_needs_a_run_and_excludes_overwrite(start):
    with pytest.raises(UserError, match="holds no run to resume"):
        start(RESUME)
    with pytest.raises(UserError, match="exclude each other"):
        start(replace(RESUME, overwrite=True))


def test_config_json_tells_what_is_needed_to_repeat_the_run(start, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_ppo.py", "--lr", "1e-6"])
    run = start(kernels="torch")
    run.begin()
    record = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert record["stage"] == "ppo" and record["config"]["lr"] == 1e-6 and record["config"]["seed"] == 1
    assert record["argv"] == ["train_ppo.py", "--lr", "1e-6"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].startswith("cpu") and record["dtype"] == "float32" and record["kernels"] == "torch"
    assert "seed" not in record  # said once, in "config"
    assert record["git"] is None or set(record["git"]) == {"commit", "dirty"}


def test_git_gives_the_commit_and_whether_files_differ_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(nanorlhf.run.run_folder, "__file__", str(tmp_path / "nanorlhf.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert nanorlhf.run.run_folder.git() is None

    def git(*words):
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "a").write_text("1", encoding="utf-8")
    git("init")
    git("add", "a")
    git("commit", "-m", "a")
    clean = nanorlhf.run.run_folder.git()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "untracked").write_text("1", encoding="utf-8")
    assert nanorlhf.run.run_folder.git() == clean
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert nanorlhf.run.run_folder.git() == clean | {"dirty": True}
    monkeypatch.setenv("PATH", "")
    assert nanorlhf.run.run_folder.git() is None


def test_resume_keeps_the_earlier_record_and_says_what_changed(start, capsys):
    run = start()
    run.begin()
    run.close()
    path = run.folder / "config.json"
    first = json.loads(path.read_text(encoding="utf-8")) | {"id": "the first"}
    path.write_text(json.dumps(first), encoding="utf-8")
    with start(replace(RESUME, lr=2e-6)) as second:
        second.begin()
    assert "changed since the last start: lr 1e-06 -> 2e-06\n" in capsys.readouterr().out
    start(RESUME).begin()
    record = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert record["id"] == "the first"
    assert [earlier["config"]["lr"] for earlier in record["earlier"]] == [1e-6, 2e-6]
    assert record["earlier"][0] == first


def test_the_seed_decides_torch_and_numpy(start):
    def draws(seed):
        start(replace(OVERWRITE, seed=seed))
        return torch.rand(1).item(), np.random.rand()

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


# -- metrics.jsonl and samples.jsonl


def test_each_log_is_one_line_with_step_time_and_plain_numbers(start, clock):
    run = start()
    run.log(1, {"loss": torch.tensor(0.5), "objective/kl": np.float32(0.25), "episode": 128})
    run.log(2, {"loss": 0.1})
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 2 and text.endswith("\n")
    assert read_metrics(run.folder) == [
        {"step": 1, "time": 1000.0, "loss": 0.5, "objective/kl": 0.25, "episode": 128},
        {"step": 2, "time": 1000.0, "loss": 0.1},
    ]


def test_a_number_that_is_not_finite_is_null_and_named(start, capsys):
    run = start()
    run.log(1, {"loss": math.nan, "ratio": torch.tensor(math.inf), "lr": 1.0})

    def no_constants(word):
        raise AssertionError(f"{word} is not JSON")

    row = json.loads((run.folder / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=no_constants)
    assert row["loss"] is None and row["ratio"] is None and row["lr"] == 1.0
    assert row["not_finite"] == {"loss": "nan", "ratio": "inf"}
    assert "loss nan | ratio inf" in capsys.readouterr().out


def test_a_metric_that_is_no_number_is_our_own_error(start):
    with pytest.raises(AssertionError, match="metric name is str 'x'"):
        start().log(1, {"name": "x"})


def test_lines_are_appended_with_one_write_however_long(tmp_path, monkeypatch):
    sizes = []

    class File(io.FileIO):
        def write(self, data):
            sizes.append(len(data))
            return super().write(data)

    monkeypatch.setattr(
        nanorlhf.storage.jsonl, "open", lambda path, mode: io.BufferedWriter(File(path, mode)), raising=False
    )
    append(tmp_path / "x.jsonl", [{"step": i, "text": "x" * 30_000} for i in range(4)])
    assert sizes == [(tmp_path / "x.jsonl").stat().st_size]


def test_a_full_disk_is_an_error_and_not_a_silent_loss():
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full exists on Linux only")
    with pytest.raises(OSError, match="No space left"):
        append(Path("/dev/full"), [{"step": 1}])


def test_resume_drops_what_came_after_the_checkpoint_and_a_torn_last_line(start):
    run = start()
    for step in (1, 2, 3):
        run.log(step, {"loss": step / 3})
        run.samples(step, [{"response": "a\u2028b\nc"}])
    run.close()
    with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    run = start(RESUME)
    run.log(4, {"loss": 4.0})
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2, 3, 4]
    run.truncate_metrics(2)
    run.log(3, {"loss": 7.0})
    assert [row["loss"] for row in read_metrics(run.folder)] == [1 / 3, 2 / 3, 7.0]
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": 1, "response": "a\u2028b\nc"}, {"step": 2, "response": "a\u2028b\nc"}]
    assert not list(run.folder.glob("*.tmp"))


def test_read_metrics_accepts_a_last_line_without_newline_and_leaves_out_a_torn_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("after", ['{"step": 3}\n', ""])
@pytest.mark.parametrize("broken", ["{oops", "[1]", '{"loss": 1}', "", "\0\0"])
def test_read_metrics_names_file_and_line_of_a_corrupt_line(tmp_path, broken, after):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + "\n" + after, encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not what a run writes"):
        read_metrics(tmp_path)


def test_read_metrics_of_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl is not there"):
        read_metrics(tmp_path)


# -- what it prints, beside what console.py does


def test_the_first_lines_say_preset_device_dtype_kernels_and_folder(start, capsys):
    cfg = replace(CONFIG)
    cfg.preset_reason = "no CUDA device with 70 GB or more"
    run = start(cfg, kernels="torch")
    preset, device, folder, metrics = capsys.readouterr().out.splitlines()
    assert preset == "preset  tiny: no CUDA device with 70 GB or more"
    assert device == f"device  cpu ({torch.get_num_threads()} threads), float32, kernels torch, seed 1"
    assert folder == f"folder  {run.folder}"
    assert "docs/metrics.md" in metrics


def test_the_time_left_after_a_resume_counts_only_the_steps_of_this_process(start, clock, capsys):
    earlier = start()
    earlier.log(100, {"loss": 1.0})
    earlier.close()
    run = start(RESUME, total_steps=200)
    run.truncate_metrics(100)
    clock.now += 3
    run.log(110, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-1] == "step 110/200 | loss 1 | 0.3 s/step | ETA 0:27"


def test_samples_are_kept_whole_and_shown_short(start, capsys):
    run = start(unit="update")
    query = "[r/a] [/b] \x1b[31m\n" + "word " * 200
    rows = [{"query": query, "response": f"summary {i}", "score": i / 7} for i in range(5)]
    run.samples(3, rows)
    out = capsys.readouterr().out
    assert "samples at update 3" in out and "[r/a] [/b]" in out and "\x1b" not in out
    assert "summary 2" in out and "summary 3" not in out
    kept = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == [{"step": 3} | row for row in rows]


def test_leaving_with_an_error_does_not_say_done(tmp_path, capsys):
    with pytest.raises(RuntimeError), Run("ppo", CONFIG, root=tmp_path):
        raise RuntimeError
    assert "done" not in capsys.readouterr().out


def test_under_a_pipe_every_line_arrives_whole_and_at_once(tmp_path):
    script = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_run import Config
from nanorlhf.run.run import Run
with Run("ppo", Config(), total_steps=2, unit="update", root={str(tmp_path)!r}) as run:
    for update in run.progress([1, 2]):
        run.log(update, {{"loss": 0.5}})
    os._exit(3)  # a kill: what was not flushed is lost
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", "device", "folder", "metrics", "update", "update"]
    assert lines[-1].startswith("update 2/2 | loss 0.5 |") and "\r" not in done.stdout and done.stderr == ""
    assert len(read_metrics(tmp_path / "ppo")) == 2
