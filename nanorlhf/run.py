"""A run folder and everything a script prints: device, console, progress, metrics, samples.

    with Run("ppo", cfg, total_steps=911, unit="update", show=["objective/scores", "objective/kl"]) as run:
        run.say("911 updates of 128 episodes")
        for update in ...:
            run.log(update, {"objective/scores": 0.12, "objective/kl": 3.4})

runs/<run_name>/
    config.json      resolved config, command, git commit, versions, device; "earlier" keeps those of before a --resume
    metrics.jsonl    one object a log(): step, time (Unix seconds), then the metrics. JSON has no NaN: a value that is
                     not finite is null and is named: {"loss": null, "not_finite": {"loss": "nan"}}
    samples.jsonl    what the policy wrote: step, then the row's own names
    trace.jsonl      PPO only: one episode of some updates, token by token
    tb/              TensorBoard

A file here only grows, a whole line at a time; truncate_metrics, on resume, is the one exception.
"""

import importlib.metadata
import io
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nanorlhf.config import check
from nanorlhf.device import device_name, pick_device, pick_dtype, seed_everything
from nanorlhf.errors import UserError
from nanorlhf.jsonl import append, finite, read_jsonl, write_whole

PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece", "tiktoken", "tyro")


class RunConfig(Protocol):
    """The fields of a script's Config that Run reads. `resume` and `track` may be absent and then count as False."""

    preset: str
    run_name: str
    overwrite: bool
    seed: int
    device: str
    dtype: str


class Run:
    """One run of one stage ("sft", "rm", "ppo", "eval"): claims the folder, seeds, picks device and dtype, logs.

    The folder is checked at once and touched at the first write (`begin`), so a start that fails loses nothing.
    `total_steps` may be set later (run.total_steps = n), before the first log.
    Raises UserError for a folder that must not be touched, an unusable device, or a missing tracker.
    """

    def __init__(
        self,
        stage: str,
        cfg: RunConfig,
        *,
        total_steps: int | None = None,
        unit: str = "step",
        show: Iterable[str] = (),
        kernels: str | None = None,
        root: str | Path = "runs",
    ):
        self.cfg, self.total_steps, self.unit, self.show = cfg, total_steps, unit, list(show)
        self.resuming = getattr(cfg, "resume", False)
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.interactive = sys.stdout.isatty() and sys.stderr.isatty()  # a progress bar, or plain lines
        self._bar = None
        self._board = None
        self._board_class = _import_tensorboard()
        self._wandb = None
        self._wandb_module = _import_wandb() if getattr(cfg, "track", False) else None

        one_name = cfg.run_name == Path(cfg.run_name).name and cfg.run_name not in ("", "..")
        check(one_name, "run_name", repr(cfg.run_name), "the name of one folder", "leave out slashes")
        self.folder = Path(root) / cfg.run_name
        self._stage, self._kernels = stage, kernels
        self._before = self._may_begin()
        self._ours = False  # the folder is not touched before there is something to write
        self._began, self._started = time.monotonic(), datetime.now().astimezone()
        self._marks = [(0, self._began)]  # (step, when it was logged); the first one is the start
        self._purge_step = None
        seed_everything(cfg.seed)

        self.say(f"preset  {cfg.preset}: {getattr(cfg, 'preset_reason', 'set in code')}")
        dtype = str(self.dtype).removeprefix("torch.")
        with_kernels = f", kernels {kernels}" if kernels else ""
        self.say(f"device  {device_name(self.device)}, {dtype}{with_kernels}, seed {cfg.seed}")
        self.say(f"folder  {self.folder}" + (" (resumed)" if self.resuming else ""))

    def _may_begin(self) -> dict:
        cfg = self.cfg
        return _may_use(self.folder, self._stage, cfg.overwrite, getattr(cfg, "resume", None))

    def begin(self) -> None:
        """Make the folder this run's own: an overwritten run is deleted here, when all inputs have been found good.

        Called by log, samples and truncate_metrics; a script calls it where it writes files of its own before those.
        Raises UserError when another run has taken the folder meanwhile.
        """
        if self._ours:
            return
        self._before = self._may_begin()
        self._ours = True
        if self.cfg.overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resuming:
            self.truncate_metrics(math.inf)  # drops a line that a kill cut short
        record = self._record(self._stage, self._kernels, self._before)
        write_whole(self.folder / "config.json", json.dumps(record, indent=2) + "\n")
        if self._wandb_module:
            about = dict(project="nanorlhf", name=self.cfg.run_name, config=record["config"], dir=str(self.folder))
            self._wandb = self._wandb_module.init(id=record["id"], resume="allow", **about)
        if changed := _changes(self._before, record):
            self.say(f"changed since the last start: {', '.join(changed)}")

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, at once (also under nohup)."""
        encoding = sys.stdout.encoding or "utf-8"
        line = line.encode(encoding, "replace").decode(encoding)  # an emoji must not end a run in an old locale
        if self.interactive:
            tqdm.write(line)
        else:
            print(line, flush=True)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of a step (numbers, or tensors with one element) everywhere, and prints one line."""
        self.begin()
        values = {name: _number(name, value) for name, value in metrics.items()}
        append(self.folder / "metrics.jsonl", [{"step": step, "time": round(time.time(), 3)} | finite(values)])
        if self._board is None:
            self._board = self._board_class(str(self.folder / "tb"), purge_step=self._purge_step)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

        shown = [name for name in self.show if name in values] or list(values)[:6]
        pace = self._pace(step)
        of_total = f"/{self.total_steps}" if self.total_steps else ""
        numbers = [f"{name} {values[name]:{'d' if isinstance(values[name], int) else '.4g'}}" for name in shown]
        self.say(" | ".join([f"{self.unit} {step}{of_total}", *numbers, *pace]))
        if self.interactive and self.total_steps:
            if self._bar is None:
                form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
                self._bar = tqdm(total=self.total_steps, desc=self.unit, bar_format=form, dynamic_ncols=True)
            self._bar.n = step
            self._bar.set_postfix_str(" ".join(pace))

    def samples(self, step: int, rows: Iterable[dict[str, Any]], shown: int = 3) -> None:
        """Appends rows (any names; text and numbers) to samples.jsonl and prints the first few as a table."""
        rows = list(rows)
        if not rows:
            return
        self.begin()
        append(self.folder / "samples.jsonl", [{"step": step} | finite(row) for row in rows])
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"samples at {self.unit} {step}", show_lines=True)
        for name in rows[0]:
            table.add_column(name)
        for row in rows[:shown]:
            table.add_row(*(Text(_cell(row.get(name, ""))) for name in rows[0]))
        page = io.StringIO()
        width = shutil.get_terminal_size((120, 24)).columns if self.interactive else 120
        Console(file=page, width=width).print(table)
        self.say(page.getvalue().rstrip())

    def progress(self, iterable: Iterable, total: int | None = None, what: str = "working") -> Iterator:
        """Yields the items. A bar on a terminal; elsewhere a line about every 10 s, and nothing for work under 2 s."""
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        if self.interactive:
            yield from tqdm(iterable, total=total, desc=what, delay=1, dynamic_ncols=True, leave=False)
            return
        start = time.monotonic()
        next_line, done, spoke = start + 2, 0, False
        for item in iterable:
            now = time.monotonic()
            if done and now >= next_line:
                eta = f" | ETA {_clock((now - start) / done * (total - done))}" if total else ""
                self.say(f"{what} {done}" + (f"/{total}" if total else "") + eta)
                next_line, spoke = now + 10, True
            yield item
            done += 1
        if spoke:
            self.say(f"{what} {done} done in {_clock(time.monotonic() - start)}")

    def truncate_metrics(self, last_step: float) -> None:
        """On resume: drops the lines of metrics, samples and trace.jsonl after `last_step`, the checkpoint's step."""
        self.begin()
        for path in (self.folder / f"{name}.jsonl" for name in ("metrics", "samples", "trace")):
            if path.exists():
                rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
                write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        if last_step != math.inf:
            self._marks = [(last_step, time.monotonic())]
            self._purge_step = last_step + 1  # TensorBoard hides what it has from here on

    def close(self, failed: bool = False) -> None:
        """Flushes and prints the total time. Called by `with`."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None
        if not failed:
            self.say(f"done in {_clock(time.monotonic() - self._began)}: {self.folder}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(failed=kind is not None)

    def _record(self, stage: str, kernels: str | None, before: dict) -> dict:
        """What config.json holds: what one needs to know to repeat the run."""
        record = {
            "stage": stage,
            "id": before.get("id") or f"{self.cfg.run_name}-{self._started:%Y%m%d-%H%M%S}",
            "config": asdict(self.cfg),
            "preset_reason": getattr(self.cfg, "preset_reason", "set in code"),
            "argv": [sys.argv[0], *getattr(self.cfg, "argv", sys.argv[1:])],
            "started": self._started.isoformat(timespec="seconds"),
            "git": _git(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES},
            "device": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernels": kernels,
        }
        if before:
            record["earlier"] = [*before.get("earlier", []), {k: v for k, v in before.items() if k != "earlier"}]
        return json.loads(json.dumps(record, default=str))

    def _pace(self, step: int) -> list[str]:
        """["5.9 s/update", "ETA 2:03"], from the last 20 logs of this process. The time before the first log includes
        loading and compiling, so it counts only while there is nothing else."""
        if step > self._marks[-1][0]:
            self._marks.append((step, time.monotonic()))
        recent = self._marks[max(len(self._marks) - 20, 1 if len(self._marks) > 2 else 0) :]
        (first, began), (last, ended) = recent[0], recent[-1]
        if last == first:
            return []
        pace = (ended - began) / (last - first)
        eta = [f"ETA {_clock(pace * max(self.total_steps - step, 0))}"] if self.total_steps else []
        return [f"{pace:.3g} s/{self.unit}", *eta]


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. A last line cut short by a kill is left out."""
    return read_jsonl(Path(folder) / "metrics.jsonl")


def _may_use(folder: Path, stage: str, overwrite: bool, resume: bool | None) -> dict:
    """Raises UserError when a run may not write to this folder. Returns the config.json to be continued ({} if none).

    resume is None where the script has no such flag.
    """
    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other: leave one out")
    used = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if resume and not used:
        raise UserError(f"{folder} holds no run to resume: leave out --resume, or check --run_name")
    if used and not (overwrite or resume):
        resumed = "" if resume is None else "--resume continues it, "
        choices = "--overwrite deletes it, --run_name chooses another folder"
        raise UserError(f"{folder} holds a run already: {resumed}{choices}")
    if not used:
        return {}
    try:
        before = json.loads((folder / "config.json").read_text())
        owner = before["stage"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # no Run wrote this
        owner = None
    if owner != stage:
        what = f"a run of {owner}, not of {stage}" if owner else "no run folder (config.json is missing or broken)"
        raise UserError(f"{folder} is {what}: choose another --run_name")
    return {} if overwrite else before


def _changes(before: dict, now: dict) -> list[str]:
    """["lr 1e-06 -> 2e-06"]: flags with another value than when the run was last started."""
    old, new = before.get("config", {}), now["config"]
    names = [name for name in new if name in old and name not in ("resume", "overwrite", "track")]
    return [f"{name} {old[name]} -> {new[name]}" for name in names if old[name] != new[name]]


def _number(name: str, value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    assert isinstance(value, (int, float)), f"metric {name} is {type(value).__name__} {value!r}: log numbers only"
    return value


def _cell(value: Any, limit: int = 400) -> str:
    value = value.item() if hasattr(value, "item") else value
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _clock(seconds: float) -> str:
    """4:05, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _git() -> dict | None:
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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard is not installed: pip install tensorboard") from error
    return SummaryWriter


def _import_wandb():
    try:
        import wandb
    except ImportError as error:
        raise UserError("--track needs wandb, which is not installed: pip install wandb, or leave it out") from error
    return wandb
