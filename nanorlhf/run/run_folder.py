"""Whose a run folder is: who may begin in it, who writes to it now, and the record that it keeps of both.

One process writes to a run folder. It holds an advisory lock on the file `lock` for as long as it lives, whatever way
it ends, and says in it who it is.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanorlhf.errors import UserError

PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece", "tiktoken", "tyro")
LOCK = "lock"
FIRST = {LOCK, "config.json.tmp"}  # what a start that is killed at once leaves: not yet a run


def may_use(folder: Path, stage: str, overwrite: bool, resume: bool | str | None, locked: bool = False) -> dict:
    """Raises UserError when a run may not write to this folder. Returns the config.json to be continued ({} if none).

    resume: None where the script has no such flag; "auto" begins where there is nothing to resume. locked: the lock is
    this process's own.
    """
    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other: leave one out")
    used = folder.is_file() or (folder.is_dir() and any(path.name not in FIRST for path in folder.iterdir()))
    if resume and resume != "auto" and not used:
        raise UserError(f"{folder} holds no run to resume: leave out --resume, or check --run_name")
    if used and not (overwrite or resume):
        resumed = "" if resume is None else "--resume continues it, "
        choices = "--overwrite deletes it, --run_name chooses another folder"
        raise UserError(f"{folder} holds a run already: {resumed}{choices}")
    if not used:
        return {}
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        owner = before["stage"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # no Run wrote this
        owner = None
    if owner != stage:
        what = f"a run of {owner}, not of {stage}" if owner else "no run folder (config.json is missing or broken)"
        raise UserError(f"{folder} is {what}: choose another --run_name")
    if not locked and (writer := writer_of(folder)):
        raise UserError(f"{folder} is being written by {writer}: wait for it, stop it, or choose another --run_name")
    return {} if overwrite else before


def writer_of(folder: Path) -> str | None:
    """ "process 123 on host", the process that holds a run folder's lock; None when nobody does."""
    try:
        with open(folder / LOCK, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "a process that has just begun"
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def lock(folder: Path) -> Any:
    """Take the lock of a run folder until the returned file is closed. Raises UserError when another process has it."""
    file = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        writer = writer_of(folder) or "a process that has just ended"
        raise UserError(f"{folder} is being written by {writer}: wait for it, or choose another --run_name") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def clear(folder: Path) -> None:
    """Delete what an overwritten run wrote, its config.json last of all: until then the folder says whose it is."""
    for path in folder.iterdir():
        if path.name not in (LOCK, "config.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def record_of(cfg: Any, before: dict, started: Any, **about: Any) -> dict:
    """What config.json holds: what one needs to know to repeat the run. about: stage, device, dtype, kernels,
    total_steps."""
    record = {
        "stage": about.pop("stage"),
        "id": before.get("id") or f"{cfg.run_name}-{started:%Y%m%d-%H%M%S}",
        "config": asdict(cfg),
        "preset_reason": getattr(cfg, "preset_reason", "set in code"),
        "argv": [sys.argv[0], *getattr(cfg, "argv", sys.argv[1:])],
        "started": started.isoformat(timespec="seconds"),
        "git": git(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        **about,
    }
    if before:
        record["earlier"] = [*before.get("earlier", []), {k: v for k, v in before.items() if k != "earlier"}]
    return json.loads(json.dumps(record, default=str))


def changes(before: dict, now: dict) -> list[str]:
    """["lr 1e-06 -> 2e-06"]: flags with another value than when the run was last started."""
    old, new = before.get("config", {}), now["config"]
    names = [name for name in new if name in old and name not in ("resume", "overwrite", "track")]
    return [f"{name} {old[name]} -> {new[name]}" for name in names if old[name] != new[name]]


def resume_command(record: dict) -> str:
    """What to type to go on with a run, from its config.json."""
    name, device = record["config"]["run_name"], record["config"].get("device", "auto")
    words = [*launcher(record), *program(record["argv"][0]), "--resume"]
    words += ["--run_name", name] if name != record["stage"] else []
    words += ["--device", device] if device != "auto" else []  # the one flag that a resumed run does not keep
    return shlex.join(words)


def launcher(record: dict) -> list[str]:
    """What stands before the script on the command line of a run: python, or torchrun with as many processes."""
    if "processes" not in record:
        return ["python"]
    return ["torchrun", "--standalone", "--nproc_per_node", str(record["processes"])]


def program(path: str) -> list[str]:
    """What follows "python" to start this script: its path, or -m experiments.<name>, which finds the others."""
    return ["-m", f"experiments.{Path(path).stem}"] if Path(path).parent.name == "experiments" else [path]


def git() -> dict | None:
    """The commit of this repository and whether tracked files differ from it; None outside git."""
    options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options)
        status = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options)
    except FileNotFoundError:  # git is not installed
        return None
    if commit.returncode or status.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _version(package: str) -> str | None:
    if package == "torch":
        import torch  # here: `status` does without

        return torch.__version__  # with its build, "+cu130", which a wheel's metadata may leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
