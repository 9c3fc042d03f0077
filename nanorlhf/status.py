"""Where a run is: `python -m nanorlhf.run status runs/ppo`."""

import json
import time
from datetime import datetime
from pathlib import Path

from nanorlhf.errors import UserError
from nanorlhf.jsonl import read_jsonl
from nanorlhf.resume import checkpoints, damage, gigabytes
from nanorlhf.run_folder import resume_command, writer_of

SHOWN = 6  # metrics of the last line


def status(folder: str | Path) -> str:
    """What a run is, whether a process writes to it now, its last metrics, its checkpoints (verified), and the command
    that goes on with it. Raises UserError for a folder that no run wrote."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "config.json").read_text())
        stage, started = record["stage"], record["started"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is no run folder, expected one with a run's config.json, like runs/ppo") from None
    lines = [f"run     {stage}, started {started} on {record.get('device')}, preset {record['config']['preset']}"]
    writer = writer_of(folder)
    lines.append(f"alive   yes: {writer}" if writer else "alive   no process writes here")
    rows = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    if rows:
        last = rows[-1]
        ago = max(0, round(time.time() - last["time"]))
        when = datetime.fromtimestamp(last["time"]).isoformat(" ", "seconds")
        lines.append(f"last    step {last['step']}, logged at {when} ({ago} s ago)")
        numbers = {name: value for name, value in last.items() if name not in ("step", "time") and value is not None}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
        lines += [f"        {name} {value:.4g}" for name, value in list(numbers.items())[:SHOWN]]
        if bad := last.get("not_finite"):
            lines.append(f"        not finite: {', '.join(bad)}")
    else:
        lines.append("last    nothing logged yet")
    for checkpoint in checkpoints(folder):
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        wrong = damage(checkpoint)
        lines.append(f"saved   {checkpoint}: {gigabytes(size)}, " + (f"damaged ({wrong})" if wrong else "whole"))
    finals = [path.name for path in sorted(folder.glob("final*")) if (path / "config.json").exists()]
    if finals:
        lines.append(f"final   {', '.join(finals)}")
    if not writer and stage != "eval":
        lines.append(f"resume  {resume_command(record)}")
    return "\n".join(lines)
