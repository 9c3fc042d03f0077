"""What a run prints: a line a step with the time left, tables of samples, the progress of slow work.

On a terminal the lines stand above a progress bar. Anywhere else (a pipe, nohup, a job's log) there is neither a bar
nor a carriage return: every line is whole, and arrives at once.
"""

import io
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

LOOKED_AT = 20  # latest steps that the time left is reckoned from


class Console:
    """The console of one run. unit: what a step is called; total_steps: where it ends, if that is known; show: the
    metrics on a step's line, by name (none: the first six)."""

    def __init__(self, unit: str = "step", total_steps: int | None = None, show: Iterable[str] = ()):
        self.unit, self.total_steps, self.show = unit, total_steps, list(show)
        self.interactive = sys.stdout.isatty() and sys.stderr.isatty()  # a progress bar, or plain lines
        self._bar = None
        self._began = time.monotonic()
        self._marks = [(0, self._began)]  # (step, when it ended); the first one is the start

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, at once (also under nohup)."""
        if sys.stdout.errors == "strict":  # not yet as streams.py has it: an emoji must not end a run in an old locale
            line = line.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding)
        if self.interactive:
            tqdm.write(line)
        else:
            print(line, flush=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One line: "update 3/911 | objective/scores 0.3 | 5.9 s/update | ETA 1:29:17". Moves the bar, if there is
        one."""
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

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Columns are the names of the first row. Texts are cut; what would move the cursor is a blank."""
        from rich.console import Console as Page
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, show_lines=True)
        for name in rows[0]:
            table.add_column(name)
        for row in rows:
            table.add_row(*(Text(_cell(row.get(name, ""))) for name in rows[0]))
        page = io.StringIO()
        width = shutil.get_terminal_size((120, 24)).columns if self.interactive else 120
        Page(file=page, width=width).print(table)
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
                eta = f" | ETA {clock((now - start) / done * (total - done))}" if total else ""
                self.say(f"{what} {done}" + (f"/{total}" if total else "") + eta)
                next_line, spoke = now + 10, True
            yield item
            done += 1
        if spoke:
            self.say(f"{what} {done} done in {clock(time.monotonic() - start)}")

    def resume_at(self, step: int) -> None:
        """The steps of this process begin after `step`: what was done before says nothing about its pace."""
        self._marks = [(step, time.monotonic())]

    def elapsed(self) -> str:
        """Since the console was made: 4:05."""
        return clock(time.monotonic() - self._began)

    def close(self) -> None:
        """Leaves the bar where it is; a later line stands below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _pace(self, step: int) -> list[str]:
        """["5.9 s/update", "ETA 2:03"]. The time before the first step includes loading and compiling, so it counts
        only while there is nothing else."""
        if step > self._marks[-1][0]:
            self._marks.append((step, time.monotonic()))
        recent = self._marks[max(len(self._marks) - LOOKED_AT, 1 if len(self._marks) > 2 else 0) :]
        if len(recent) < 2:
            return []
        pace = typical_pace(recent)
        eta = [f"ETA {clock(pace * max(self.total_steps - step, 0))}"] if self.total_steps else []
        return [f"{pace:.3g} s/{self.unit}", *eta]


def typical_pace(marks: list[tuple[int, float]]) -> float:
    """Seconds a step, from (step, when) marks in order: the mean over the steps that took at most ten times as long as
    the middle one. So neither a pause (Ctrl-Z, a laptop asleep) nor a clock that was set counts."""
    pairs = list(zip(marks, marks[1:], strict=False))
    took = [((b - a) / (last - first), last - first) for (first, a), (last, b) in pairs if b >= a and last > first]
    if not took:
        return 0.0
    usual = 10 * statistics.median_low(pace for pace, _ in took)
    took = [(pace, steps) for pace, steps in took if pace <= usual] if usual else took
    return sum(pace * steps for pace, steps in took) / sum(steps for _, steps in took)


def clock(seconds: float) -> str:
    """4:05, or 1:02:03 from an hour on. Time that ran backwards is none."""
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _cell(value: Any, limit: int = 400) -> str:
    value = value.item() if hasattr(value, "item") else value
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + " ..."
