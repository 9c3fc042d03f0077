"""A run: its folder, its metrics and samples, and what makes it survive the end of a step. console.py prints.

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

    python -m nanorlhf status runs/ppo      where a run is, whether it is alive, and how to go on with it

A file here only grows, a whole line at a time; truncate_metrics, on resume, is the one exception. Of several processes
(parallel.py) 0 alone writes; the others have a Run that says and touches nothing.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from nanorlhf import parallel
from nanorlhf.errors import NotFinite, Stopped, UserError, check, signal_name
from nanorlhf.optim import AdamW, not_finite
from nanorlhf.run.console import Console
from nanorlhf.run.device import device_name, make_deterministic, pick_device, pick_dtype, seed_everything
from nanorlhf.run.memory import keep_freed_memory
from nanorlhf.run.run_folder import changes, clear, lock, may_use, record_of, resume_command
from nanorlhf.run.signals import Signals
from nanorlhf.run.trackers import Trackers
from nanorlhf.storage.jsonl import append, finite, read_jsonl, write_whole
from nanorlhf.storage.resume import (
    check_disk,
    clear_leftovers,
    gigabytes,
    latest_checkpoint,
    load_newest,
    save_checkpoint,
)

# Metrics whose nan or infinity ends a run; others have no value now and then (a title copied where no post has one).
MUST_BE_FINITE = (
    "train/sft/loss",
    "train/rm/loss",
    "train/dpo/loss",
    "loss/policy_avg",
    "loss/value_avg",
    "objective/scores",
    "grad_norm",
)


class RunConfig(Protocol):
    """The fields of a script's Config that Run reads. `resume`, `track` and `deterministic` may be absent: False."""

    preset: str
    run_name: str
    overwrite: bool
    seed: int
    device: str
    dtype: str


class Run:
    """One run of one stage ("sft", "rm", "ppo", "eval"): claims the folder, seeds, picks device and dtype, logs.

    The folder is checked at once and touched at the first write (`begin`), so a start that fails loses nothing.
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
        self.cfg, self.total_steps, self.unit = cfg, total_steps, unit
        self.console = Console(unit, total_steps, show)
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        deterministic = getattr(cfg, "deterministic", False)
        if deterministic:
            make_deterministic(self.device, kernels, self.dtype)
        self._trackers = Trackers(track=getattr(cfg, "track", False)) if parallel.first() else None

        one_name = cfg.run_name == Path(cfg.run_name).name and cfg.run_name not in ("", "..")
        check(one_name, "run_name", repr(cfg.run_name), "the name of one folder", "leave out slashes")
        fix = "choose another name" + (
            "" if sys.flags.utf8_mode else ", or set PYTHONUTF8=1"
        )  # it is to be typed again
        check(cfg.run_name.isprintable(), "run_name", ascii(cfg.run_name), "printable in this locale", fix)
        on_nan = getattr(cfg, "on_nan", "stop")
        check(on_nan in ("stop", "skip"), "on_nan", repr(on_nan), "stop or skip")
        self.folder = Path(root) / cfg.run_name
        self._stage, self._kernels = stage, kernels
        self._before = parallel.from_first(self._may_begin)
        self.resuming = bool(getattr(cfg, "resume", False) and self._before)
        self._lock = None  # the folder is not touched before there is something to write
        self._record: dict | None = None  # config.json, once the folder is this run's
        self._started = datetime.now().astimezone()
        self._signals, parallel.way_on = Signals(self._way_on), self._way_on
        self._at, self._skipped = (0, []), 0  # (step, ids of its samples); steps skipped
        seed_everything(cfg.seed)

        self.say(f"preset  {cfg.preset}: {getattr(cfg, 'preset_reason', 'set in code')}")
        dtype = str(self.dtype).removeprefix("torch.")
        with_kernels = f", kernels {kernels}" if kernels else ""
        repeats = ", deterministic" if deterministic else ""
        self.say(f"device  {device_name(self.device)}, {dtype}{with_kernels}, seed {cfg.seed}{repeats}")
        if parallel.on():
            self.say(f"        {parallel.size()} processes: models in parts, posts shared out (docs/parallel.md)")
        self.say(f"folder  {self.folder}" + (" (resumed)" if self.resuming else ""))
        self.say("metrics explained in docs/metrics.md")

    def _may_begin(self, locked: bool = False) -> dict:
        cfg = self.cfg
        return may_use(self.folder, self._stage, cfg.overwrite, getattr(cfg, "resume", None), locked)

    def begin(self) -> None:
        """Make the folder this run's own: an overwritten run is deleted here, when all inputs have been found good.

        Called by log, samples and truncate_metrics; a script calls it where it writes files of its own before those.
        Raises UserError when another run has taken the folder meanwhile.
        """
        if self._record is not None:
            return
        if parallel.first():
            self._claim()
        about = dict(stage=self._stage, device=device_name(self.device), kernels=self._kernels)
        about |= dict(dtype=str(self.dtype).removeprefix("torch."), total_steps=self.total_steps)
        about |= dict(processes=parallel.size()) if parallel.on() else {}
        self._record = record_of(self.cfg, self._before, self._started, **about)
        if not parallel.first():
            return
        if self.resuming:
            self._drop_lines(math.inf)  # one that a kill cut short
        write_whole(self.folder / "config.json", json.dumps(self._record, indent=2) + "\n")
        self._trackers.begin(self.folder, self._record)
        if changed := changes(self._before, self._record):
            self.say(f"changed since the last start: {', '.join(changed)}")

    def _claim(self) -> None:
        self._may_begin()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        found, self._before = self._before, self._may_begin(locked=True)
        if bool(found) != bool(self._before):
            raise UserError(f"{self.folder} has been begun by another process meanwhile: start again")
        if self.cfg.overwrite:
            clear(self.folder)

    def say(self, line: str) -> None:
        """Prints a line."""
        self.console.say(line)

    def say_all(self, lines: Iterable[str]) -> None:
        """Prints lines."""
        for line in lines:
            self.say(line)

    def progress(self, iterable: Iterable, total: int | None = None, what: str = "working") -> Iterator:
        """Yields the items and shows how far it is."""
        return self.console.progress(iterable, total, what)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of a step (numbers, or tensors with one element) everywhere, and prints one line."""
        self._signals.check()
        self.begin()
        values = {name: _number(name, value) for name, value in metrics.items()}
        if parallel.first():
            append(self.folder / "metrics.jsonl", [{"step": step, "time": round(time.time(), 3)} | finite(values)])
            self._trackers.log(step, values)
        self.console.step(step, values)
        bad = [name for name, value in values.items() if name in MUST_BE_FINITE and not math.isfinite(value)]
        if bad and getattr(self.cfg, "on_nan", "skip") == "stop":
            raise NotFinite(f"metric {bad[0]} ({values[bad[0]]})")

    def samples(self, step: int, rows: Iterable[dict[str, Any]], shown: int = 3) -> None:
        """Appends rows (any names; text and numbers) to samples.jsonl and prints the first few as a table."""
        rows = list(rows)
        if not rows:
            return
        self._signals.check()
        self.begin()
        if parallel.first():
            append(self.folder / "samples.jsonl", [{"step": step} | finite(row) for row in rows])
        self.console.table(f"samples at {self.unit} {step}", rows[:shown])

    def truncate_metrics(self, last_step: float) -> None:
        """On resume: drops the lines of metrics, samples and trace.jsonl after `last_step`, the checkpoint's step."""
        self.begin()
        self.console.resume_at(last_step)
        if parallel.first():
            self._drop_lines(last_step)
            self._trackers.first_step = last_step + 1

    def _drop_lines(self, last_step: float) -> None:
        for path in self._logs():
            rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    # --- what makes a run survive

    def resume(self, optimizer: AdamW) -> int:
        """The step to go on from: 0, or that of the newest checkpoint that is whole, which is loaded. Says what the
        saves to come will take. From here on a signal waits for the end of the step.
        """
        cfg, sizes = self.cfg, (optimizer.state_bytes, optimizer.model_bytes)
        self.say(parallel.from_first(lambda: check_disk(self.folder, *sizes, cfg.keep, cfg.save_every)))
        step = 0
        if self.resuming:
            checkpoint, tensors, state = load_newest(self.folder, self.say)
            if checkpoint:
                optimizer.load_state(tensors)
                step, optimizer.skipped = state["step"], state.get("skipped", 0)
            self.truncate_metrics(step)
            if parallel.first():
                for path in self._logs():  # what an evaluation logged has the last step's number too: by size
                    os.truncate(path, min(path.stat().st_size, state.get("logs", {}).get(path.name, math.inf)))
                clear_leftovers(self.folder)
            parallel.barrier()
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
                    raise NotFinite(not_finite({name: tensor}), every=bool(rows.all()))
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
        asked = parallel.most(self._signals.asked or 0)  # a signal may have come to some of the processes only
        if last or due or asked:
            optimizer.check_weights()
        if asked or (due and not last):
            logs = {path.name: path.stat().st_size for path in self._logs()}
            state = {"skipped": optimizer.skipped, "logs": logs}
            size, seconds = save_checkpoint(self.folder, step, optimizer.state(), state, self.cfg.keep)
            self.say(f"saved   {self.folder / 'checkpoints' / f'step_{step}'}: {gigabytes(size)} in {seconds:.2f} s")
        if asked:
            reason = f"stopped by {signal_name(asked)}, saved after {self.unit} {step}"
            raise Stopped(asked, reason + self._way_on())
        self._signals.patient = not last  # what follows the last step ends at once

    def _way_on(self) -> str:
        """The end of a last message: how to go on with this run."""
        return f"; go on with:\n{resume_command(self._record)}" if self._record else ": nothing had been written yet"

    def _samples(self) -> str:
        ids = self._at[1]
        more = f" and {len(ids) - 8} more, all in {self.folder / 'not_finite.json'}" if len(ids) > 8 else ""
        return f"samples {', '.join(ids[:8])}{more}" if ids else "no samples"

    def _explain(self, error: NotFinite) -> UserError:
        """The error of a number that is not finite, with what only the run knows."""
        step, ids = self._at
        self.begin()
        found = json.dumps({"step": step, "what": error.what, "ids": ids}) + "\n"
        if parallel.first():
            write_whole(self.folder / "not_finite.json", found)
        last = latest_checkpoint(self.folder)
        way_on = (
            f"`{resume_command(self._record)} --on_nan skip` goes on without such steps, or begin again with a lower "
            "--lr or with --max_grad_norm"
        )
        if error.every and step == 1:  # before anything was learned: it came with a model
            way_on = "that is every sample, so a model that was passed in is too large for this dtype: take another one"
        return UserError(
            f"{self.unit} {step}: {error}; {self._samples()}; nothing was saved over, the last good checkpoint is "
            f"{last or 'none yet'}: {way_on}"
        )

    def _logs(self) -> list[Path]:
        paths = (self.folder / f"{name}.jsonl" for name in ("metrics", "samples", "trace"))
        return [path for path in paths if path.exists()]

    def close(self, failed: bool = False) -> None:
        """Flushes, gives the folder back and prints the total time. Called by `with`."""
        self._signals.restore()
        self.console.close()
        if self._trackers is not None:
            self._trackers.close(failed)
        if self._lock is not None:
            self._lock.close()
        if not failed:
            self.say(f"done in {self.console.elapsed()}: {self.folder}")

    def __enter__(self) -> "Run":
        self._signals.install()
        return self

    def __exit__(self, kind, error, trace) -> None:
        explained = self._explain(error) if isinstance(error, NotFinite) else None
        self.close(failed=kind is not None)
        if explained:
            raise explained from None


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. A last line cut short by a kill is left out."""
    return read_jsonl(Path(folder) / "metrics.jsonl")


def _number(name: str, value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    assert isinstance(value, (int, float)), f"metric {name} is {type(value).__name__} {value!r}: log numbers only"
    return value
