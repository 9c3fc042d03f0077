"""Where a script finds its data and its models, in this order:

    1. the flag                       --data, --model, --sft_model, --reward_model
    2. the run of the stage before    runs/sft/final, runs/rm/final            (of the tiny world, or not, as this one)
    3. the embedded tiny world        nanorlhf/tiny/checkpoints, data/tiny     (preset tiny only)
    4. an error that says what to type

So every script runs alone on a fresh clone, and says which of the three it took.
"""

import json
from pathlib import Path

from nanorlhf.errors import UserError
from nanorlhf.tiny.data import ensure_world

EMBEDDED = Path(__file__).parent / "tiny" / "checkpoints"
UPSTREAM = {"sft": "sft", "rm": "rm", "ppo": "ppo"}  # stage -> the run folder it writes by default


def find_data(flag: str | None, preset: str) -> tuple[Path, str]:
    """The data folder (tldr/*.jsonl, comparisons/batch*.json) and where it came from."""
    if flag is not None:
        if not Path(flag).is_dir():
            raise UserError(f"data: {flag} is not a folder, expected one with tldr/train.jsonl in OpenAI's format")
        return Path(flag), "--data"
    if preset == "tiny":
        folder = Path("data/tiny")
        return ensure_world(folder), "the embedded tiny world"
    raise UserError(
        "data: no folder given, expected one with tldr/ and comparisons/ in OpenAI's format: "
        "pass --data DIR, or --preset tiny"
    )


def find_model(
    stage: str, flag: str | None, flag_name: str, preset: str, runs: str | Path = "runs"
) -> tuple[Path, str]:
    """The Hugging Face folder of stage base, sft, rm or ppo, and where it came from."""
    if flag is not None:
        if not Path(flag).is_dir():
            raise UserError(f"{flag_name}: {flag} is not a folder, expected a Hugging Face model folder")
        return Path(flag), f"--{flag_name}"
    if stage in UPSTREAM:
        run = Path(runs) / UPSTREAM[stage]
        if (run / "final").is_dir() and (_preset_of(run) == "tiny") == (preset == "tiny"):
            return run / "final", f"the {stage} run"
    if preset == "tiny":
        return EMBEDDED / stage, "embedded"
    command = f"run `python train_{stage}.py` first, or " if stage in UPSTREAM else ""
    raise UserError(
        f"{flag_name}: no {stage} model found, expected a Hugging Face folder: "
        f"{command}pass --{flag_name} DIR, or --preset tiny"
    )


def _preset_of(run: Path) -> str | None:
    try:
        return json.loads((run / "config.json").read_text())["config"]["preset"]
    except (FileNotFoundError, ValueError, KeyError):  # a folder that no run of ours wrote
        return None
