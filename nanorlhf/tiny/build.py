"""Rebuild the embedded checkpoints from nothing, with the project's own scripts.

    python -m nanorlhf.tiny.build                   pretrain the base in two halves, then SFT, reward model, PPO
    python -m nanorlhf.tiny.build --start base      only its second half and what comes after, from runs/build_half
    python -m nanorlhf.tiny.build --start sft       keep the embedded base

Reads nothing else; writes nanorlhf/tiny/checkpoints/{base,sft,rm,ppo}: Hugging Face folders in bf16, each with the
metrics.jsonl of the run that made it, PPO's with its trace.jsonl. Change the grammar and everything has to be rebuilt:
first the bigrams (`python -m nanorlhf.tiny.gold`) and the tokenizer (`python -m nanorlhf.tiny.build_tokenizer`), then
this.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import check
from nanorlhf.run.config import cli
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.storage.checkpoint import load_policy, load_scalar, save_policy, save_scalar

HALF = "half"  # the base after the first half of its pretraining, which is not embedded
# stage -> the command that trains it, and the flags for the models of the stages before
STAGES = {
    HALF: (["-m", "nanorlhf.tiny.pretrain"], {}),
    "base": (["-m", "nanorlhf.tiny.pretrain"], {"model": HALF}),
    "sft": (["train_sft.py"], {"model": "base"}),
    "rm": (["train_rm.py"], {"sft_model": "sft"}),
    "ppo": (["train_ppo.py"], {"sft_model": "sft", "reward_model": "rm"}),
}


@dataclass
class Config:
    preset: str = "tiny"  # tiny
    start: str = HALF  # first stage to train: half, base, sft, rm or ppo; the ones before it are kept


def main(cfg: Config) -> None:
    check(cfg.start in STAGES, "start", cfg.start, f"one of {', '.join(STAGES)}")
    names = list(STAGES)
    models = {stage: EMBEDDED / stage for stage in names} | {HALF: Path("runs/build_half/final")}
    for stage in names[names.index(cfg.start) :]:
        began = time.monotonic()
        run = Path("runs") / f"build_{stage}"
        command, inputs = STAGES[stage]
        flags = [word for flag, source in inputs.items() for word in (f"--{flag}", str(models[source]))]
        name = ["--preset", "tiny", "--run_name", run.name, "--overwrite"]
        subprocess.run([sys.executable, *command, *name, *flags], check=True)
        if stage not in (HALF, "base"):  # the base is embedded in bf16 and everyone starts there; the others in fp32
            models[stage] = run / "final"
        if stage != HALF:
            embed(stage, run)
        where = models[HALF] if stage == HALF else EMBEDDED / stage
        print(f"{stage} rebuilt in {time.monotonic() - began:.0f} s: {where}", flush=True)


def embed(stage: str, run: Path) -> None:
    """Copy a run's final model, in bf16, its metrics and its trace to the embedded checkpoints."""
    tokenizer = load_tokenizer(run / "final")
    if stage == "rm":
        save_scalar(load_scalar(run / "final"), EMBEDDED / stage, tokenizer, dtype=torch.bfloat16)
    else:
        save_policy(load_policy(run / "final"), EMBEDDED / stage, tokenizer, dtype=torch.bfloat16)
    for name in ("metrics.jsonl", "trace.jsonl"):
        if (run / name).is_file():
            shutil.copy(run / name, EMBEDDED / stage / name)


if __name__ == "__main__":
    cli(main, Config, {"tiny": {}}, __doc__)
