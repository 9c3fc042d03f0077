"""Where a script finds its data and its models, in this order:

    1. the flag                       --data, --model, --sft_model, --reward_model: a folder; a model also by hub id
    2. the run of the stage before    runs/sft/final, runs/rm/final            (where its model is that of this preset)
    3. the preset's own               tiny: nanorlhf/tiny/checkpoints, data/tiny
                                      llama-1b, paper: meta-llama/Llama-3.2-1B from the hub, data/openai as downloaded
                                      smollm2: HuggingFaceTB/SmolLM2-135M from the hub, data/openai as downloaded
    4. an error that says what to type

So every script runs alone on a fresh clone, and says which of the three it took.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from nanorlhf import parallel
from nanorlhf.data.download import DOWNLOADED
from nanorlhf.data.hub import LLAMA, SMOLLM2, fetch, is_hub_id
from nanorlhf.errors import UserError
from nanorlhf.tiny.data import ensure_world

EMBEDDED = Path(__file__).parents[1] / "tiny" / "checkpoints"
BASES = {"llama": LLAMA, "smollm2": SMOLLM2}  # model of a preset -> hub id of the base model
UPSTREAM = {"sft": "sft", "rm": "rm", "ppo": "ppo"}  # stage -> the run folder it writes by default


def find_data(flag: str | None, preset: str) -> tuple[Path, str]:
    """The data folder (tldr/*.jsonl, comparisons/batch*.json) and where it came from."""
    if flag is not None:
        if not Path(flag).is_dir():
            raise UserError(f"data: {flag} is not a folder, expected one with tldr/train.jsonl in OpenAI's format")
        return Path(flag), "--data"
    if preset == "tiny":
        folder = Path("data/tiny")
        with parallel.in_turn():
            return ensure_world(folder), "the embedded tiny world"
    if DOWNLOADED.is_dir():
        return DOWNLOADED, "as downloaded"
    raise UserError(
        f"data: none given and no {DOWNLOADED}, expected a folder with tldr/ and comparisons/ in OpenAI's format: run "
        "`python -m nanorlhf download`, or pass --data DIR, or --preset tiny"
    )


def find_model(
    stage: str, flag: str | None, flag_name: str, preset: str, runs: str | Path = "runs"
) -> tuple[Path, str]:
    """The Hugging Face folder of stage base, sft, rm or ppo, and where it came from. May download (data/hub.py)."""
    if flag is not None:
        if Path(flag).is_dir():
            return Path(flag), f"--{flag_name}"
        if is_hub_id(flag):
            with parallel.in_turn():
                return fetch(flag), f"{flag} on the hub"
        raise UserError(f"{flag_name}: {flag} is not a folder, expected a Hugging Face model folder or a hub id")
    if stage in UPSTREAM:
        run = Path(runs) / UPSTREAM[stage]
        if (run / "final").is_dir() and _model_of(_preset_of(run)) == _model_of(preset):
            return run / "final", f"the {stage} run"
    if preset == "tiny":
        return EMBEDDED / stage, "embedded"
    if stage not in UPSTREAM:
        base = BASES[_model_of(preset)]
        with parallel.in_turn():
            return fetch(base), f"{base} on the hub"
    raise UserError(
        f"{flag_name}: no {stage} model found, expected a Hugging Face folder: run `python train_{stage}.py` first, or "
        f"pass --{flag_name} DIR, or --preset tiny"
    )


def find_models(
    stage: str, flags: Sequence[str], flag_name: str, preset: str, runs: str | Path = "runs"
) -> tuple[tuple[str, ...], str]:
    """`find_model` for a flag that takes several, or none: the folders, and where the first came from."""
    found = [find_model(stage, flag, flag_name, preset, runs) for flag in flags or (None,)]
    return tuple(str(folder) for folder, _ in found), found[0][1]


def _model_of(preset: str | None) -> str:
    """Presets of one model read each other's runs: llama-1b and paper do, tiny and smollm2 stand alone."""
    return preset if preset in ("tiny", "smollm2") else "llama"


def _preset_of(run: Path) -> str | None:
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]["preset"]
    except (FileNotFoundError, ValueError, KeyError):  # a folder that no run of ours wrote
        return None
