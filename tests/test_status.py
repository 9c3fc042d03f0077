"""`python -m nanorlhf status`: where a run is, whether it lives, and how to go on with it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import CONFIG

import nanorlhf.__main__
import nanorlhf.run.run
from nanorlhf.errors import UserError
from nanorlhf.run.run import Run
from nanorlhf.run.status import status
from nanorlhf.storage.resume import save_checkpoint

ROOT = Path(__file__).parents[1]


def test_a_living_run_shows_its_process_its_last_metrics_and_whether_its_checkpoints_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_ppo.py"])
    run = Run("ppo", CONFIG, root=tmp_path)
    with run:
        run.begin()
        assert "nothing logged yet" in status(run.folder)
        run.log(7, {"objective/scores": 0.25, "objective/kl": float("nan")})
        for step in (6, 7):
            save_checkpoint(run.folder, step, {"a": torch.zeros(3)}, keep=2)
        (run.folder / "checkpoints" / "step_7" / "state.json").write_text("{}", encoding="utf-8")
        said = status(run.folder)
        assert "alive   yes: process" in said and "resume" not in said
        assert "last    step 7, logged at" in said and "objective/scores 0.25" in said
        assert "not finite: objective/kl" in said
        assert "step_6: 0.0 MB, whole" in said and "step_7: 0.0 MB, damaged (state.json is not" in said
    said = status(run.folder).splitlines()
    assert "alive   no process writes here" in said and said[-1] == "resume  python train_ppo.py --resume --device cpu"


def test_a_living_run_says_how_much_is_left_at_its_usual_pace_and_a_finished_one_that_it_is_through(
    tmp_path, monkeypatch
):
    now = [1000.0]
    monkeypatch.setattr(nanorlhf.run.run.time, "time", lambda: now[0])
    with Run("sft", CONFIG, total_steps=300, root=tmp_path) as run:
        for step in range(1, 11):
            now[0] += 4000 if step == 6 else 2  # dead for an hour
            run.log(step, {"loss": 1.0})
        now[0] += 65
        said = status(run.folder)
        assert "last    step 10 of 300, " in said and "(1:05 ago)" in said
        assert "left    about 9:40, at 2 s a step" in said
        (run.folder / "final").mkdir()
        (run.folder / "final" / "config.json").write_text("{}", encoding="utf-8")
    assert "resume  " in status(run.folder)  # saved, and not evaluated yet
    (run.folder / "final" / "README.md").write_text("a card", encoding="utf-8")
    assert status(run.folder).splitlines()[-1] == "done    it is through: nothing to resume"


def test_a_folder_that_is_no_run_is_one_sentence_and_exit_status_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="is no run folder"):
        status(tmp_path)
    command = [sys.executable, "-m", "nanorlhf", "status", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for words in (["status", str(tmp_path)], ["status"], [], ["frobnicate", "x"]):  # the same without a process each
        monkeypatch.setattr(sys, "argv", ["nanorlhf", *words])
        with pytest.raises(SystemExit) as ended:
            nanorlhf.__main__.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
