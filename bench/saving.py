"""What does a checkpoint cost? An eighth of the state of PPO with Llama-3.2-1B is saved, verified and loaded.

    python -m bench.saving                  in the current folder: 3.7 GB, removed again; 4 GB of memory
    python -m bench.saving --folder DIR     on another disk
    python -m bench.saving --parts 1        the full size: 29.7 GB of memory and of disk

The state is what a run saves: fp32 masters and both of Adam's moments of policy and critic, 12 bytes a parameter, in
the shapes of the real model (its layers and its vocabulary by eight). In the same run, in turns, the same bytes
are written plainly (write, fsync) and hashed plainly (SHA-256, in memory): a save does both at a time. One JSON
line last; `share_of_a_run_predicted` is the save's time at full size over that of the updates between two saves, at
UPDATE_S a piece, which is a prediction.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import train_ppo
from bench.stand_ins import LLAMA_32_1B
from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy, ScalarModel, parameter_count
from nanorlhf.optim import AdamW
from nanorlhf.run.streams import as_command
from nanorlhf.storage.atomic import sync
from nanorlhf.storage.model_config import read_config
from nanorlhf.storage.resume import checkpoints, damage, load_state, save_checkpoint

UPDATE_S = 6.0  # of an update of the llama-1b preset on one H200: predicted from its arithmetic, not measured
PIECE = 16 * 2**20  # bytes a plain write


def config(folder: Path, parts: int) -> LlamaConfig:
    """Llama-3.2-1B's, with one part of its layers and of its vocabulary."""
    layers, vocabulary = LLAMA_32_1B["num_hidden_layers"] // parts, LLAMA_32_1B["vocab_size"] // parts
    ids = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    (folder / "config.json").write_text(json.dumps(LLAMA_32_1B | ids | {"num_hidden_layers": layers}), encoding="utf-8")
    return read_config(folder)


def trained(config: LlamaConfig) -> AdamW:
    """The optimizer of a policy and a critic, as after a step. No zeros: what a file system does not store is fast."""
    with torch.device("meta"):
        models = [Policy(config), ScalarModel(config, bias=True)]
    models = [model.to_empty(device="cpu") for model in models]
    optimizer, noise = AdamW(models, lr=1e-6), torch.randn(2**22)
    for master in optimizer.masters:
        adam = {"step": torch.tensor(1.0), "exp_avg": torch.empty_like(master), "exp_avg_sq": torch.empty_like(master)}
        optimizer.adam.state[master] = adam
        for tensor in (master.detach(), adam["exp_avg"], adam["exp_avg_sq"]):
            for part in tensor.view(-1).split(noise.numel()):
                part.copy_(noise[: part.numel()])
    return optimizer


def pieces(tensors: dict[str, torch.Tensor]) -> list[memoryview]:
    """All bytes of a state, without a copy."""
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    return [memoryview(part.numpy()) for tensor in flat for part in tensor.split(PIECE)]


def plain_write(path: Path, state: list[memoryview]) -> None:
    with open(path, "wb", buffering=0) as file:
        for piece in state:
            while piece:
                piece = piece[file.write(piece) :]
    sync(path)


def plain_hash(state: list[memoryview]) -> None:
    digest = hashlib.sha256()
    for piece in state:
        digest.update(piece)


def seconds(function, *args) -> float:
    began = time.monotonic()
    function(*args)
    return time.monotonic() - began


def peak_mib(reset: bool = False) -> float:
    """The most memory that this process held since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that is measured")
    parser.add_argument("--parts", type=int, default=8, help="1/parts of the model")
    parser.add_argument("--repeats", type=int, default=4, help="saves; the figures are medians")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        optimizer = trained(config(folder, args.parts))
        state, size = pieces(optimizer.state()), optimizer.state_bytes
        print(
            f"{size / 1e9:.2f} GB of state, {parameter_count(torch.nn.ParameterList(optimizer.masters)):,} parameters"
        )
        written, hashed, saved, growth = [], [], [], []

        def plain() -> None:
            written.append(seconds(plain_write, folder / "plain", state))
            (folder / "plain").unlink()

        def save() -> None:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            before = peak_mib(reset=True)
            saved.append(save_checkpoint(folder, len(saved) + 1, optimizer.state(), {}, keep=1)[1])
            growth.append(peak_mib() - before)

        for turn in range(args.repeats):
            for work in (plain, save) if turn % 2 else (save, plain):  # a rented disk is fast until its credit is spent
                work()
            hashed.append(seconds(plain_hash, state))
            print(f"write {written[-1]:.2f} s, SHA-256 {hashed[-1]:.2f} s, save {saved[-1]:.2f} s", flush=True)
        (checkpoint,) = checkpoints(folder)
        forget(checkpoint)
        state.clear()
        optimizer.adam.state.clear()  # a run that is resumed has no moments yet
        verify = seconds(lambda: damage(checkpoint) and 1 / 0)
        before = peak_mib(reset=True)
        load = seconds(lambda: optimizer.load_state(load_state(checkpoint)[0]))
        loading = peak_mib() - before
    write_s, save_s = statistics.median(written), statistics.median(saved)
    every = train_ppo.Config().save_every
    print(json.dumps({
        "gigabytes": round(size / 1e9, 2), "save_s": round(save_s, 2), "save_gb_s": round(size / save_s / 1e9, 2),
        "plain_write_s": round(write_s, 2), "plain_write_gb_s": round(size / write_s / 1e9, 2),
        "sha256_s": round(statistics.median(hashed), 2), "save_over_write": round(save_s / write_s, 2),
        "save_growth_mib": round(max(growth)), "verify_s": round(verify, 2), "verify_and_load_s": round(load, 2),
        "load_growth_mib": round(loading), "full_size_save_s": round(save_s * args.parts, 1), "save_every": every,
        "share_of_a_run_predicted": round(save_s * args.parts / (every * UPDATE_S), 4),
    }))  # fmt: skip


if __name__ == "__main__":
    as_command(main)
