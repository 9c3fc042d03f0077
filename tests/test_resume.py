"""Checkpoints: exact, complete or absent, and verified: what is cut or flipped is recognised and passed over."""

import errno
import random
import shutil
import subprocess

import pytest
import torch

from nanorlhf.errors import UserError
from nanorlhf.optim import AdamW
from nanorlhf.storage import resume
from nanorlhf.storage.resume import (
    check_disk,
    checkpoints,
    damage,
    latest_checkpoint,
    load_newest,
    load_state,
    save_checkpoint,
    save_state,
)


def test_state_comes_back_exactly(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7.0), "c": torch.arange(3, dtype=torch.bfloat16)}
    save_state(tmp_path / "step_3", tensors, {"step": 3, "lr": 1e-6})
    loaded, state = load_state(tmp_path / "step_3")
    assert state == {"step": 3, "lr": 1e-6} and loaded.keys() == tensors.keys()
    assert all(
        loaded[name].dtype == tensors[name].dtype and torch.equal(loaded[name], tensors[name]) for name in tensors
    )


def test_a_damaged_state_is_named(tmp_path):
    save_state(tmp_path / "step_3", {"a": torch.ones(100)}, {})
    path = tmp_path / "step_3" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="step_3: the checkpoint is damaged .state.safetensors is not as it was"):
        load_state(tmp_path / "step_3")


@pytest.mark.parametrize("name", ["0.weight.master", "0.weight.step", "0.weight.exp_avg_sq"])
def test_a_state_without_one_of_its_tensors_is_refused_by_name(tmp_path, name):
    layer = torch.nn.Linear(2, 2, bias=False)
    optimizer = AdamW([layer], lr=1e-3)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step(1e-3)
    save_state(tmp_path / "step_1", {key: tensor for key, tensor in optimizer.state().items() if key != name}, {})
    with pytest.raises(UserError, match=f"checkpoint: tensor {name} is missing"):
        AdamW([layer], lr=1e-3).load_state(load_state(tmp_path / "step_1")[0])


def test_the_latest_checkpoint_is_the_largest_complete_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("step_9", "step_100", "step_20", "step_300.partial", "step_200.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == "step_100"


@pytest.mark.parametrize("keep", [1, 2])
def test_of_a_runs_checkpoints_the_newest_are_kept_and_what_a_kill_left_is_removed(tmp_path, keep):
    for name in ("step_300.partial", "step_200.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (8, 9, 10, 100):  # 9 is newer than 10 as a word
        size, seconds = save_checkpoint(tmp_path, step, {"a": torch.tensor(float(step))}, {"skipped": 2}, keep)
        tensors, state = load_state(latest_checkpoint(tmp_path))
        assert state == {"step": step, "skipped": 2} and tensors["a"].item() == step
        assert size == 4 and seconds > 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_10", "step_100"][-keep:]


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_older_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 2, {"a": torch.tensor(2.0)})
    monkeypatch.setattr(resume, "write_tensors", fail)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, 3, {"a": torch.tensor(3.0)})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]
    assert load_newest(tmp_path, print)[2]["step"] == 2


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """A run with checkpoints 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": torch.full((50,), float(step)), "b": torch.zeros(3)}, keep=2)
    return tmp_path


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "SHA256SUMS"])
def test_any_flipped_bit_and_any_cut_is_recognised_and_the_checkpoint_before_is_used(two, file):
    path = two / "checkpoints" / "step_2" / file
    whole, draw = path.read_bytes(), random.Random(0)
    for trial in range(40):
        place = draw.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(flipped) if trial % 2 else whole[:place])
        said = []
        folder, tensors, state = load_newest(two, said.append)
        assert folder.name == "step_1" and state == {"step": 1} and tensors["a"][0] == 1
        assert len(said) == 1 and str(two / "checkpoints" / "step_2") in said[0] and said[0].startswith("warning")
    path.write_bytes(whole)
    assert load_newest(two, pytest.fail)[0].name == "step_2"


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "SHA256SUMS"])
def test_a_checkpoint_without_one_of_its_files_is_damaged(two, file):
    (two / "checkpoints" / "step_2" / file).unlink()
    assert damage(two / "checkpoints" / "step_2") == f"{file} is missing"
    assert load_newest(two, lambda line: None)[0].name == "step_1"


def test_when_no_checkpoint_is_whole_the_run_is_not_begun_again_in_silence(two):
    for folder in checkpoints(two):
        (folder / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="none of 2 checkpoints is whole"):
        load_newest(two, lambda line: None)


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path):
    assert load_newest(tmp_path, pytest.fail) == (None, {}, {})


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not installed")
def test_sha256sum_checks_a_checkpoint(two):
    folder = two / "checkpoints" / "step_2"
    check = ["sha256sum", "-c", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    (folder / "state.json").write_text("{}", encoding="utf-8")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode != 0


# --- the disk ---------------------------------------------------------------------------------------------------------


def disk(monkeypatch, free):
    usage = shutil.disk_usage(".")._replace(free=free)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda folder: usage)


def test_a_run_says_what_its_saves_take_and_does_not_start_where_they_do_not_fit(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "ppo"  # not there yet
    sizes = dict(state_bytes=10_000_000, model_bytes=3_000_000, keep=1, save_every=8)
    disk(monkeypatch, 24_000_000)
    assert check_disk(run, **sizes) == (
        "saves   checkpoints: 10.0 MB every 8 steps, 1 kept; at most 23.0 MB of the 24.0 MB free"
    )
    disk(monkeypatch, 22_000_000)
    with pytest.raises(UserError) as stopped:
        check_disk(run, **sizes)
    assert str(stopped.value).startswith("disk: 22.0 MB are there for the run in ")
    assert str(stopped.value).endswith(
        ", expected 23.0 MB: 2 checkpoints of 10.0 MB (1 kept, one being written) and the final models, 3.0 MB: free "
        "some space, or make runs/ a link to a larger disk, or pass --save_every 0, without checkpoints to resume from,"
        ": 3.0 MB"
    )
    with pytest.raises(UserError, match="expected 43.0 MB: 4 checkpoints.*, or pass --keep 1: 23.0 MB, or pass --save"):
        check_disk(run, **sizes | {"keep": 3})
    disk(monkeypatch, 2_000_000)
    with pytest.raises(
        UserError, match="expected 3.0 MB: the final models, 3.0 MB: free some space, or make runs/[^,]*$"
    ):
        check_disk(run, **sizes | {"save_every": 0})
    disk(monkeypatch, 22_000_000)
    assert "none" in check_disk(run, **sizes | {"save_every": 0})
    checkpoint = run / "checkpoints" / "step_1"  # what a resumed run has on the disk counts as its own
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").write_bytes(bytes(2_000_000))
    check_disk(run, **sizes)


def test_a_save_that_does_not_fit_is_not_begun(two, monkeypatch):
    disk(monkeypatch, 100)
    with pytest.raises(OSError, match="200 bytes needed and 100 free|No space left") as caught:
        save_checkpoint(two, 3, {"a": torch.zeros(50)})
    assert caught.value.errno == errno.ENOSPC and latest_checkpoint(two).name == "step_2"
