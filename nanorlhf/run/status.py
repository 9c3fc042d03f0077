"""Where a run is: `python -m nanorlhf status runs/ppo`."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from nanorlhf.errors import UserError, check, one_sentence
from nanorlhf.run.console import LOOKED_AT, clock, typical_pace
from nanorlhf.run.run_folder import resume_command, writer_of
from nanorlhf.storage.jsonl import read_jsonl
from nanorlhf.storage.resume import checkpoints, damage, gigabytes

SHOWN = 6  # metrics of the last line


def status(folder: str | Path) -> str:
    """The lines of `look`, as one text."""
    return "\n".join(look(folder))


def look(folder: str | Path) -> Iterator[str]:
    """What a run is, whether a process writes to it now, its last metrics and the time left, its checkpoints (verified,
    which takes a minute where they have 30 GB), and the command that goes on with it; line by line. Raises UserError
    for a folder that no run wrote."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stage, started = record["stage"], record["started"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is no run folder, expected one with a run's config.json, like runs/ppo") from None
    yield f"run     {stage}, started {started} on {record.get('device')}, preset {record['config']['preset']}"
    writer = writer_of(folder)
    yield f"alive   yes: {writer}" if writer else "alive   no process writes here"
    yield from _last(folder, record.get("total_steps"), alive=bool(writer))
    for checkpoint in checkpoints(folder):
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        wrong = damage(checkpoint)
        yield f"saved   {checkpoint}: {gigabytes(size)}, " + (f"damaged ({wrong})" if wrong else "whole")
    finals = [final for final in sorted(folder.glob("final*")) if (final / "config.json").exists()]
    if finals:
        yield f"final   {', '.join(final.name for final in finals)}"
    through = finals and all((final / "README.md").exists() for final in finals)  # a card is the last that is written
    if through and not writer:
        yield "done    it is through: nothing to resume"
    elif not writer and "resume" in record["config"]:
        yield f"resume  {resume_command(record)}"


def _last(folder: Path, total: int | None, alive: bool) -> Iterator[str]:
    rows = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    if not rows:
        yield "last    nothing logged yet"
        return
    last = rows[-1]
    ago, when = time.time() - last["time"], datetime.fromtimestamp(last["time"]).isoformat(" ", "seconds")
    yield f"last    step {last['step']}" + (f" of {total}" if total else "") + f", logged at {when} ({clock(ago)} ago)"
    pace = typical_pace([(row["step"], row["time"]) for row in rows[-LOOKED_AT:]])
    if alive and total and pace:
        yield f"left    about {clock(pace * (total - last['step']))}, at {pace:.3g} s a step"
    numbers = {name: value for name, value in last.items() if name not in ("step", "time") and value is not None}
    numbers = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
    yield from (f"        {name} {value:.4g}" for name, value in list(numbers.items())[:SHOWN])
    if bad := last.get("not_finite"):
        yield f"        not finite: {', '.join(bad)}"


def main(argv: list[str]) -> None:
    """The command line of `python -m nanorlhf status`."""
    with one_sentence():
        check(
            len(argv) == 1,
            "status",
            " ".join(argv) or "(none)",
            "one run's folder",
            "python -m nanorlhf status runs/ppo",
        )
        for line in look(argv[0]):
            print(line, flush=True)
