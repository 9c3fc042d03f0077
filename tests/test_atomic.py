"""Files and folders are complete or absent, and a safetensors file is what everybody else reads."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanorlhf.storage import atomic
from nanorlhf.storage.atomic import atomic_folder, sha256, write_tensors

ROOT = Path(__file__).parents[1]


def test_a_folder_whose_writing_fails_does_not_appear(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "step_5") as partial:
        (partial / "state.json").write_text("half", encoding="utf-8")
        raise RuntimeError("killed")
    assert not (tmp_path / "a" / "step_5").exists()


def test_a_folder_whose_rewriting_fails_is_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "final") as partial:
        (partial / "text").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "final") as partial:
        (partial / "text").write_text("new", encoding="utf-8")
        raise RuntimeError("killed")
    assert (tmp_path / "final" / "text").read_text(encoding="utf-8") == "old"


def test_a_rewritten_folder_holds_only_what_is_new(tmp_path):
    for number in range(2):
        with atomic_folder(tmp_path / "final") as partial:
            (partial / f"{number}.txt").write_text("", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["1.txt"]


def test_a_kill_between_the_renames_leaves_the_old_folder_aside_and_the_next_save_puts_it_back(tmp_path, monkeypatch):
    def save(text):
        with atomic_folder(tmp_path / "final") as partial:
            (partial / "text").write_text(text, encoding="utf-8")

    def kill_at_the_second(source, target):
        if source.suffix == ".partial":
            raise KeyboardInterrupt
        rename(source, target)

    save("first")
    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill_at_the_second)
        save("second")
    assert (tmp_path / "final.old" / "text").read_text(encoding="utf-8") == "first"
    assert (tmp_path / "final.partial" / "text").read_text(encoding="utf-8") == "second"

    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "final"):
        raise RuntimeError("killed again")
    assert (tmp_path / "final" / "text").read_text(encoding="utf-8") == "first"
    save("third")
    assert (tmp_path / "final" / "text").read_text(encoding="utf-8") == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_disk_that_fills_up_gives_back_what_the_folder_took(tmp_path):
    with pytest.raises(OSError), atomic_folder(tmp_path / "final") as partial:
        (partial / "text").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("piece", [16, 10**6])
def test_what_is_written_is_read_by_safetensors_bit_for_bit(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(atomic, "PIECE_BYTES", piece)
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(7.0),
        "bf16": torch.arange(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "nan": torch.tensor([torch.nan, torch.inf, -0.0]),
        "bools": torch.tensor([True, False, True]),
        "ids": torch.arange(5),
        "double": torch.randn(2, dtype=torch.float64),
    }
    digest = write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert loaded[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        ), name
    content = (tmp_path / "x.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest() == sha256(tmp_path / "x.safetensors")
    assert int.from_bytes(content[:8], "little") % 8 == 0  # the tensors begin aligned
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o044  # whoever may read the folder may read the file


def test_a_limit_on_the_size_of_files_is_an_error_with_the_files_name_and_not_a_dead_process(tmp_path):
    """A mapped file would be a bus error here, and on a full disk."""
    program = (
        "import resource, sys, torch; from nanorlhf.storage.atomic import write_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_tensors(sys.argv[1], {'a': torch.zeros(10**6)})\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    path = tmp_path / "x.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.stdout == f"{errno.EFBIG} {path}\n", done.stderr
