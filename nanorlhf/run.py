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
    checkpoints/     what --resume goes on from (resume.py)
    lock             held by the process that writes here (run_folder.py)

    python -m nanorlhf.run status runs/ppo      where a run is, whether it is alive, and how to go on with it

A file here only grows, a whole line at a time; truncate_metrics, on resume, is the one exception.
"""

import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from nanorlhf.config import check, one_sentence
from nanorlhf.device import device_name, pick_device, pick_dtype, seed_everything
from nanorlhf.errors import NotFinite, Stopped, UserError, signal_name
from nanorlhf.jsonl import append, finite, read_jsonl, write_whole
from nanorlhf.optim import AdamW, not_finite
from nanorlhf.resume import check_disk, clear_leftovers, gigabytes, latest_checkpoint, load_newest, save_checkpoint
from nanorlhf.run_folder import changes, clear, lock, may_use, record_of, resume_command
from nanorlhf.signals import Signals

# Metrics whose nan or infinity ends a run; others have no value now and then (a title copied where no post has one).
MUST_BE_FINITE = (
    "train/sft/loss",
    "train/rm/loss",
    "loss/policy_avg",
    "loss/value_avg",
    "objective/scores",
    "grad_norm",
)


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
        on_nan = getattr(cfg, "on_nan", "stop")
        check(on_nan in ("stop", "skip"), "on_nan", repr(on_nan), "stop or skip")
        self.folder = Path(root) / cfg.run_name
        self._stage, self._kernels = stage, kernels
        self._before = self._may_begin()
        self.resuming = bool(getattr(cfg, "resume", False) and self._before)
        self._lock = None  # the folder is not touched before there is something to write
        self._began, self._started = time.monotonic(), datetime.now().astimezone()
        self._signals = Signals(self._way_on)
        self._at, self._skipped = (0, []), 0  # (step, ids of its samples); steps skipped
        self._marks = [(0, self._began)]  # (step, when it was logged); the first one is the start
        self._purge_step = None
        seed_everything(cfg.seed)

        self.say(f"preset  {cfg.preset}: {getattr(cfg, 'preset_reason', 'set in code')}")
        dtype = str(self.dtype).removeprefix("torch.")
        with_kernels = f", kernels {kernels}" if kernels else ""
        self.say(f"device  {device_name(self.device)}, {dtype}{with_kernels}, seed {cfg.seed}")
        self.say(f"folder  {self.folder}" + (" (resumed)" if self.resuming else ""))

    def _may_begin(self, locked: bool = False) -> dict:
        cfg = self.cfg
        return may_use(self.folder, self._stage, cfg.overwrite, getattr(cfg, "resume", None), locked)

    def begin(self) -> None:
        """Make the folder this run's own: an overwritten run is deleted here, when all inputs have been found good.

        Called by log, samples and truncate_metrics; a script calls it where it writes files of its own before those.
        Raises UserError when another run has taken the folder meanwhile.
        """
        if self._lock is not None:
            return
        self._may_begin()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        found, self._before = self._before, self._may_begin(locked=True)
        if bool(found) != bool(self._before):
            raise UserError(f"{self.folder} has been begun by another process meanwhile: start again")
        if self.cfg.overwrite:
            clear(self.folder)
        if self.resuming:
            self.truncate_metrics(math.inf)  # drops a line that a kill cut short
        about = dict(stage=self._stage, device=device_name(self.device), kernels=self._kernels)
        about["dtype"] = str(self.dtype).removeprefix("torch.")
        self._record = record_of(self.cfg, self._before, self._started, **about)
        write_whole(self.folder / "config.json", json.dumps(self._record, indent=2) + "\n")
        if self._wandb_module:
            about = dict(
                project="nanorlhf", name=self.cfg.run_name, config=self._record["config"], dir=str(self.folder)
            )
            self._wandb = self._wandb_module.init(id=self._record["id"], resume="allow", **about)
        if changed := changes(self._before, self._record):
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
        self._signals.check()
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
        bad = [name for name, value in values.items() if name in MUST_BE_FINITE and not math.isfinite(value)]
        if bad and getattr(self.cfg, "on_nan", "skip") == "stop":
            raise NotFinite(f"metric {bad[0]} ({values[bad[0]]})")
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
        self._signals.check()
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
        for path in self._logs():
            rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        if last_step != math.inf:
            self._marks = [(last_step, time.monotonic())]
            self._purge_step = last_step + 1  # TensorBoard hides what it has from here on

    # --- what makes a run survive

    def resume(self, optimizer: AdamW) -> int:
        """The step to go on from: 0, or that of the newest checkpoint that is whole, which is loaded. Says what the
        saves to come will take. From here on a signal waits for the end of the step.
        """
        cfg, sizes = self.cfg, (optimizer.state_bytes, optimizer.model_bytes)
        self.say(check_disk(self.folder, *sizes, cfg.keep, cfg.save_every))
        step = 0
        if self.resuming:
            checkpoint, tensors, state = load_newest(self.folder, self.say)
            if checkpoint:
                optimizer.load_state(tensors)
                step, optimizer.skipped = state["step"], state.get("skipped", 0)
            self.truncate_metrics(step)
            for (
                path
            ) in self._logs():  # an evaluation logs under the last step again: the checkpoint knows how far it was
                os.truncate(path, min(path.stat().st_size, state.get("logs", {}).get(path.name, math.inf)))
            clear_leftovers(self.folder)
            self.say(f"resumed from {checkpoint or 'the beginning: no checkpoint yet'}")
        self._skipped = optimizer.skipped
        self._signals.patient = step < self.total_steps
        return step

    def at(self, step: int, ids: Sequence[str]) -> None:
        """Which step (counted from 1) is being worked on, with which samples: what an error then names."""
        self._at = step, list(ids)

    def check_finite(self, **tensors: torch.Tensor) -> None:
        """Tensors of one row a sample of this step. Raises NotFinite that names tensor and samples; with --on_nan skip
        says it: the gradients of such a batch are not finite either, and their steps are skipped and counted."""
        step, ids = self._at
        for name, tensor in tensors.items():
            rows = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
            if rows.any():
                self._at = step, [ids[i] for i in rows.nonzero()[:, 0].tolist()]
                if self.cfg.on_nan == "stop":
                    raise NotFinite(not_finite({name: tensor}))
                self.say(f"warning {self.unit} {step}: {not_finite({name: tensor})}; {self._samples()}")
                self._at = step, ids

    def end_step(self, step: int, optimizer: AdamW) -> None:
        """Call it last in every step: saves a checkpoint when one is due or when a signal asks the run to end.

        Raises NotFinite instead of saving weights that are not finite, and Stopped after a signal.
        """
        if optimizer.skipped > self._skipped:
            self._skipped = optimizer.skipped
            self.say(f"warning {self.unit} {step} was skipped, {self._skipped} steps so far: {optimizer.last_skip}")
        last, due = step >= self.total_steps, self.cfg.save_every and step % self.cfg.save_every == 0
        if last or due or self._signals.asked:
            optimizer.check_weights()
        if self._signals.asked or (due and not last):
            logs = {path.name: path.stat().st_size for path in self._logs()}
            state = {"skipped": optimizer.skipped, "logs": logs}
            size, seconds = save_checkpoint(self.folder, step, optimizer.state(), state, self.cfg.keep)
            self.say(f"saved   {self.folder / 'checkpoints' / f'step_{step}'}: {gigabytes(size)} in {seconds:.2f} s")
        if number := self._signals.asked:
            reason = f"stopped by {signal_name(number)}, saved after {self.unit} {step}"
            raise Stopped(number, reason + self._way_on())
        self._signals.patient = not last  # what follows the last step ends at once

    def _way_on(self) -> str:
        """The end of a last message: how to go on with this run."""
        return f"; go on with:\n{resume_command(self._record)}" if self._lock else ": nothing had been written yet"

    def _samples(self) -> str:
        ids = self._at[1]
        more = f" and {len(ids) - 8} more, all in {self.folder / 'not_finite.json'}" if len(ids) > 8 else ""
        return f"samples {', '.join(ids[:8])}{more}" if ids else "no samples"

    def _explain(self, error: NotFinite) -> UserError:
        """The error of a number that is not finite, with what only the run knows."""
        step, ids = self._at
        self.begin()
        write_whole(self.folder / "not_finite.json", json.dumps({"step": step, "what": error.what, "ids": ids}) + "\n")
        last = latest_checkpoint(self.folder)
        return UserError(
            f"{self.unit} {step}: {error}; {self._samples()}; nothing was saved over, the last good checkpoint is "
            f"{last or 'none yet'}: `{resume_command(self._record)} --on_nan skip` goes on without such steps, or "
            "begin again with a lower --lr or with --max_grad_norm"
        )

    def _logs(self) -> list[Path]:
        paths = (self.folder / f"{name}.jsonl" for name in ("metrics", "samples", "trace"))
        return [path for path in paths if path.exists()]

    def close(self, failed: bool = False) -> None:
        """Flushes, gives the folder back and prints the total time. Called by `with`."""
        self._signals.restore()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None
        if self._lock is not None:
            self._lock.close()
        if not failed:
            self.say(f"done in {_clock(time.monotonic() - self._began)}: {self.folder}")

    def __enter__(self) -> "Run":
        self._signals.install()
        return self

    def __exit__(self, kind, error, trace) -> None:
        explained = self._explain(error) if isinstance(error, NotFinite) else None
        self.close(failed=kind is not None)
        if explained:
            raise explained from None

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


def main() -> None:
    from nanorlhf.status import status

    with one_sentence():
        words = sys.argv[1:]
        usage = "status and a run's folder: python -m nanorlhf.run status runs/ppo"
        check(len(words) == 2 and words[0] == "status", "command", " ".join(words) or "(none)", usage)
        print(status(words[1]))


if __name__ == "__main__":
    main()
