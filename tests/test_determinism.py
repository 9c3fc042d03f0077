"""--deterministic: the same bits from every run on a GPU, one that was resumed too; on a CPU it changes nothing.

    python -m pytest tests/test_determinism.py        on a machine with a GPU: two or three minutes

On a GPU every run is a process of its own: what makes a GPU deterministic has to be set before it is first used.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import ROOT, SCRIPTS, run

from nanorlhf.errors import UserError
from nanorlhf.run.device import CUBLAS, FIXED, make_deterministic
from nanorlhf.run.run import read_metrics
from nanorlhf.tiny.data import write_world

STEPS, SPLIT, LR = 6, 4, 1e-4  # the resumed run repeats the last two
SMALL = {  # from the embedded checkpoints
    "sft": "--batch_size 16 --eval_posts 8",
    "rm": "--batch_size 16 --eval_pairs 16 --shift_posts 16",
    "ppo": "--batch_size 16 --total_episodes 1000000 --kl_estimator k1",
}
CLOCKS = ("time", "perf/", "preflight/")  # a resumed run repeats the pre-flight checks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    splits = dict(posts={"train": 128, "valid": 16}, comparisons={"train": 128, "valid1": 16})
    return write_world(tmp_path_factory.mktemp("data") / "tiny", **splits)


def train(stage: str, folder: Path, data: Path, flags: str) -> str:
    """Run a script in a folder; returns what it printed."""
    folder.mkdir(exist_ok=True)
    common = f"--preset tiny --data {data} --max_updates {STEPS} --lr {LR} --save_every {SPLIT} {SMALL[stage]} {flags}"
    command = [sys.executable, ROOT / f"train_{stage}.py", *common.split()]
    env = {name: value for name, value in os.environ.items() if name != CUBLAS}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in final/ and final_critic/, by file and name."""
    files = sorted(folder.glob("runs/*/final*/model.safetensors"))
    return {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def metrics(folder: Path) -> list[dict]:
    (run,) = folder.glob("runs/*")
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_metrics(run)]


def straight_and_resumed(stage: str, tmp_path: Path, data: Path, flags: str) -> tuple[Path, Path]:
    """The folders of a run that went through, and of one that goes on from that one's checkpoint."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(stage, straight, data, flags)
    shutil.copytree(straight, resumed)
    for final in resumed.glob("runs/*/final*"):
        shutil.rmtree(final)
    assert f"step_{SPLIT}" in train(stage, resumed, data, f"{flags} --resume")
    return straight, resumed


@pytest.fixture
def as_before():
    """What --deterministic sets for a whole process is put back."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.mark.parametrize("name", SCRIPTS)
def test_on_a_cpu_deterministic_changes_no_bit(name, world, models, tmp_path, monkeypatch, capsys, as_before):
    for folder, flag in (("without", ""), ("with", "--deterministic")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        run(name, world, f"{models[name]} {flag}")
        assert ("seed 1, deterministic" in capsys.readouterr().out) == (folder == "with")
    ours, theirs = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that answers what it is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_workspaces_that_are_not_fixed_and_kernels_without_a_fixed_order_are_refused(monkeypatch, hopper):
    bf16 = torch.bfloat16
    monkeypatch.setenv(CUBLAS, ":4096:2")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG :4096:2 is not :4096:8 or :16:8.*unset it"):
        make_deterministic(hopper, "Triton 3.6", bf16)
    monkeypatch.setenv(CUBLAS, ":16:8")
    with pytest.raises(UserError, match="kernels PyTorch reference is not Triton's: unset NANORLHF_KERNELS"):
        make_deterministic(hopper, "PyTorch reference", bf16)
    with pytest.raises(UserError, match="dtype float32 is not bfloat16 on an H100 or H200"):
        make_deterministic(hopper, "Triton 3.6", torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="dtype bfloat16 is not bfloat16 on an H100 or H200"):
        make_deterministic(hopper, "Triton 3.6", bf16)
    assert not torch.are_deterministic_algorithms_enabled()


def test_torch_is_told_and_cublas_too(monkeypatch, as_before, hopper):
    monkeypatch.setenv(CUBLAS, "to be put back")
    monkeypatch.delenv(CUBLAS)
    make_deterministic(hopper, "Triton 3.6", torch.bfloat16)
    assert os.environ[CUBLAS] == FIXED[0]
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # or flash attention would keep its atomics
    assert not torch.utils.deterministic.fill_uninitialized_memory


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=on_a_gpu) for stage in ("sft", "rm", "ppo")])
def test_on_a_gpu_a_deterministic_run_that_was_resumed_ends_with_the_same_bits(stage, tmp_path, data):
    straight, resumed = straight_and_resumed(stage, tmp_path, data, "--device cuda --deterministic")
    ours, theirs = weights(straight), weights(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(straight) == metrics(resumed)


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=on_a_gpu) for stage in ("sft", "rm", "ppo")])
def test_on_a_gpu_a_run_that_was_resumed_without_it_ends_near_by(stage, tmp_path, data):
    """Adam moves a weight by about lr a step, whatever the gradient; two runs that share all but the order of their
    sums differ by a tenth of what the repeated steps could have moved, and by a rounding of the bf16 they are saved in.
    """
    straight, resumed = straight_and_resumed(stage, tmp_path, data, "--device cuda")
    ours, theirs = weights(straight), weights(resumed)
    optimizer_steps = (STEPS - SPLIT) * (4 if stage == "ppo" else 1)
    for name in ours:
        a, b = ours[name].float(), theirs[name].float()
        off = (a - b).norm() / a.numel() ** 0.5
        assert off <= 0.1 * LR * optimizer_steps + 2**-8 * a.norm() / a.numel() ** 0.5, f"{name}: {off:.1e}"
