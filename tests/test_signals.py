"""SIGINT, SIGTERM, SIGHUP: while a model trains they wait for the end of the step, which is saved; else they end it."""

import os
import signal
import sys
from dataclasses import dataclass

import pytest
import torch

from nanorlhf.errors import Stopped
from nanorlhf.optim import AdamW
from nanorlhf.run.config import cli
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.run.signals import Signals
from nanorlhf.storage.resume import checkpoints


@dataclass
class Config:
    preset: str = "tiny"
    run_name: str = "sft"
    overwrite: bool = False
    resume: bool = False
    seed: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    save_every: int = 3
    keep: int = 1
    on_nan: str = "stop"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_sft.py"])


def train(capsys, *, at: dict, more: str = "") -> tuple[int, str, list[int]]:
    """A run of 5 steps that sends itself the signals at[step] within that step (0 is before the first, 6 after the
    last). Returns its exit status, its last line on stderr, and the steps it logged."""

    def send(step):
        for number in at.get(step, ()):
            os.kill(os.getpid(), number)

    def main(cfg):
        layer = torch.nn.Linear(2, 2)
        with Run("sft", cfg, total_steps=5) as run:
            optimizer = AdamW([layer], lr=0.1)
            send(0)
            step = run.resume(optimizer)
            while step < 5:
                layer(torch.ones(1, 2)).sum().backward()
                send(step + 1)
                norm = optimizer.step(0.1)
                step += 1
                run.log(step, {"grad_norm": norm})
                run.end_step(step, optimizer)
            run.log(5, {"evaluation": 1.0})  # under the last step again, as train_sft.py and train_rm.py do
            send(6)

    status = 0
    try:
        cli(main, Config, {"tiny": {}}, "", ["--preset", "tiny", *more.split()])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err.splitlines()
    steps = [row["step"] for row in read_metrics("runs/sft")] if os.path.exists("runs/sft") else []
    return status, error[-1] if error else "", steps


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_the_step_is_finished_and_saved_and_the_last_line_says_how_to_go_on(capsys, number, status, step):
    found = train(capsys, at={step: [number]})
    assert found == (status, "python train_sft.py --resume --device cpu", list(range(1, step + 1)))
    assert [path.name for path in checkpoints("runs/sft")] == [f"step_{step}"]
    assert train(capsys, at={}, more="--resume") == (0, "", [1, 2, 3, 4, 5, 5])


def test_a_second_signal_ends_the_run_at_once_and_the_checkpoint_before_stays(capsys):
    found = train(capsys, at={5: [signal.SIGINT, signal.SIGINT]})
    assert found == (130, "python train_sft.py --resume --device cpu", [1, 2, 3, 4])
    assert [path.name for path in checkpoints("runs/sft")] == ["step_3"]
    assert train(capsys, at={}, more="--resume") == (0, "", [1, 2, 3, 4, 5, 5])


def test_after_the_last_step_a_signal_ends_the_run_at_once(capsys):
    assert train(capsys, at={6: [signal.SIGTERM]})[:2] == (143, "python train_sft.py --resume --device cpu")


def test_a_run_that_was_saved_after_its_last_step_logs_its_evaluation_once_however_often_it_is_stopped(capsys):
    train(capsys, at={5: [signal.SIGTERM]})
    assert train(capsys, at={6: [signal.SIGTERM]}, more="--resume")[0] == 143  # evaluated, then stopped
    assert train(capsys, at={}, more="--resume") == (0, "", [1, 2, 3, 4, 5, 5])


def test_before_anything_is_written_a_signal_ends_the_run_and_leaves_no_folder(capsys):
    status, line, steps = train(capsys, at={0: [signal.SIGTERM]})
    assert (status, line, steps) == (143, "stopped by SIGTERM at once: nothing had been written yet", [])


def test_the_handlers_of_before_are_back_after_a_run(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(capsys, at={2: [signal.SIGTERM]})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_ignored():
    """A shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers = Signals(lambda: "")
    try:
        handlers.install()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            os.getpid()
    finally:
        handlers.restore()
        signal.signal(signal.SIGINT, before)
