"""What a run resumes from: checkpoints that are complete or absent, and verified before they are used.

    checkpoints/step_8/
        state.safetensors    fp32 masters and Adam's moments: 12 bytes a parameter that is trained
        state.json           the step, and how many steps were skipped
        SHA256SUMS           of these two; `sha256sum -c SHA256SUMS` checks it by hand

There is no more to a run: the order of the data is a function of (seed, step), the noise of the sampling of (seed,
episode, t), the learning rate of the step. No generator has a state to lose. Nothing is unpickled.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanorlhf import parallel
from nanorlhf.errors import UserError
from nanorlhf.storage.atomic import atomic_folder, sha256, sync, write_tensors

FILES = ("state.safetensors", "state.json")
SUMS = "SHA256SUMS"


def save_state(folder: str | Path, tensors: dict[str, Tensor], state: dict) -> None:
    """A checkpoint of a run: named tensors and a small JSON object; complete or absent. Of tensors in parts every
    process gives its own."""
    if not parallel.first():
        write_tensors(Path(folder), tensors)
        return
    with atomic_folder(folder) as partial:
        digest = write_tensors(partial / "state.safetensors", tensors)
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        sums = _line(digest, "state.safetensors") + _line(sha256(partial / "state.json"), "state.json")
        (partial / SUMS).write_bytes(sums)


def _line(digest: str, name: str) -> bytes:
    return f"{digest}  {name}\n".encode()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was written."""
    try:
        sums = (folder / SUMS).read_bytes()
        for name in FILES:
            line = _line(sha256(folder / name), name)
            if not sums.startswith(line):
                return f"{name} is not as it was written"
            sums = sums.removeprefix(line)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    return f"{SUMS} is not as it was written" if sums else None


def load_state(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The inverse of `save_state`: tensors on the CPU, and the JSON object. Raises UserError when it is damaged."""
    folder = Path(folder)
    if found := damage(folder):
        raise UserError(
            f"{folder}: the checkpoint is damaged ({found}): remove the folder to resume from an earlier one"
        )
    return _read(folder)


class Stored(Mapping):
    """The tensors of a checkpoint by name, each read from the file when it is asked for: as much of it as is used."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names = self._open(lambda file: list(file.keys()))

    def _open(self, read):
        try:
            with safe_open(self._folder / "state.safetensors", framework="pt") as file:
                return read(file)
        except SafetensorError as error:
            raise UserError(f"{self._folder}: the checkpoint cannot be read ({error}): remove the folder") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._open(lambda file: file.get_tensor(name))

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    return dict(Stored(folder)), _state(folder)


def _state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The complete checkpoints under a run folder's checkpoints/, oldest first. Not one that is .partial or .old."""
    names = (path.name.removeprefix("step_") for path in Path(run_folder, "checkpoints").glob("step_*"))
    return [Path(run_folder, "checkpoints", f"step_{step}") for step in sorted(int(n) for n in names if n.isdecimal())]


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(checkpoints(run_folder)), None)


def load_newest(
    run_folder: Path, say: Callable[[str], None]
) -> tuple[Path | None, Mapping[str, Tensor], dict]:
    """The newest checkpoint that is as it was written: its folder, tensors and JSON object; (None, {}, {}) when the run
    has none yet. A damaged one is named in a warning and passed over. Raises UserError when all are damaged."""
    name, state = parallel.from_first(lambda: _newest(run_folder, say))  # verified once, not by every process
    return (Path(name), Stored(Path(name)), state) if name else (None, {}, {})


def _newest(run_folder: Path, say: Callable[[str], None]) -> tuple[str | None, dict]:
    found = checkpoints(run_folder)
    for folder in reversed(found):
        if wrong := damage(folder):
            say(
                f"warning {folder} is damaged ({wrong})" + (": the one before it is used" if folder != found[0] else "")
            )
            continue
        return str(folder), _state(folder)
    if found:
        raise UserError(
            f"{run_folder}: none of {len(found)} checkpoints is whole, expected one to resume from: remove "
            f"{run_folder / 'checkpoints'} to begin the run again"
        )
    return None, {}


def save_checkpoint(run_folder: Path, step: int, tensors: dict[str, Tensor], state: dict | None = None, keep: int = 1):
    """Save checkpoints/step_<step> of a run, then delete all but the newest `keep`. Returns (bytes, seconds).

    Raises OSError (ENOSPC) before it writes when the disk has too little room: the checkpoint before it stays.
    """
    began = time.monotonic()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if not parallel.first():
        save_state(run_folder, tensors, {})
        return size, time.monotonic() - began
    clear_leftovers(run_folder)
    free = shutil.disk_usage(run_folder).free
    if free < size:
        needed = f"No space left on device, {size:,} bytes needed and {free:,} free"
        raise OSError(errno.ENOSPC, needed, str(run_folder))
    for path in run_folder.glob("*.jsonl"):  # what was logged up to here is to be there when this checkpoint is
        sync(path)
    save_state(run_folder / "checkpoints" / f"step_{step}", tensors, {"step": step} | (state or {}))
    for old in checkpoints(run_folder)[:-keep]:
        aside = old.with_name(old.name + ".old")
        os.replace(old, aside)  # half a checkpoint must not look like one
        shutil.rmtree(aside)
    return size, time.monotonic() - began


def clear_leftovers(run_folder: Path) -> None:
    """Delete what a killed save left of a checkpoint; of a full-depth 1B run it is up to 30 GB."""
    for suffix in ("partial", "old"):
        for path in Path(run_folder, "checkpoints").glob(f"step_*.{suffix}"):
            shutil.rmtree(path)


def check_disk(run_folder: Path, state_bytes: int, model_bytes: int, keep: int, save_every: int) -> str:
    """The line a run prints before it starts: what its saves take. Raises UserError when the disk has no room for them.

    Needed are `keep` checkpoints, the one being written, and the final models; what the run has already counts. One
    that is kept goes only when the next is whole: with less, a kill during a save would lose the run.
    """
    folder = next(path for path in (run_folder, *run_folder.resolve().parents) if path.exists())
    there = sum(path.stat().st_size for old in checkpoints(run_folder) for path in old.iterdir())
    needed = model_bytes + ((keep + 1) * state_bytes if save_every else 0)
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        ways = {"--keep 1": model_bytes + 2 * state_bytes} if save_every and keep > 1 else {}
        ways |= {"--save_every 0, without checkpoints to resume from,": model_bytes} if save_every else {}
        raise UserError(
            f"disk: {gigabytes(free + there)} are there for the run in {folder}, expected {gigabytes(needed)}: "
            + (
                f"{keep + 1} checkpoints of {gigabytes(state_bytes)} ({keep} kept, one being written) and "
                * bool(save_every)
            )
            + f"the final models, {gigabytes(model_bytes)}: free some space, or make runs/ a link to a larger disk"
            + "".join(f", or pass {way}: {gigabytes(size)}" for way, size in ways.items())
        )
    every = f"{gigabytes(state_bytes)} every {save_every} steps, {keep} kept" if save_every else "none (--save_every 0)"
    return f"saves   checkpoints: {every}; at most {gigabytes(needed)} of the {gigabytes(free)} free"


def gigabytes(size: int) -> str:
    """29.7 GB; 10.7 MB below a gigabyte."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
