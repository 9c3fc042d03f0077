"""What a broken PPO run looks like: the tiny world trained with one fault at a time, drawn beside a healthy run.

    python -m experiments.bugs               all, 90 s a run on one core; then the figures of docs/bugs.md
    python -m experiments.bugs --only kl_sign   one of them
    python -m experiments.bugs --draw               only the figures, from the runs that are there
    python -m experiments.bugs --ratio            what a temperature missing in the update does to ratio and approxkl

The faults are lines of tests/mutations.py, planted while train_ppo.py runs, from the embedded SFT and reward model and
without the pre-flight, which would stop four of the eight before their first optimizer step. Writes runs/bug_<name> and
docs/bug_<name>.png; prints a Markdown table and one JSON line last.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

import train_ppo
from nanorlhf import ppo
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.packing import pack
from nanorlhf.rollout import generate
from nanorlhf.run.config import parse
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.run import read_metrics
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.tiny.data import ensure_world

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from mutations import MUTATIONS  # noqa: E402
from planting import planted  # noqa: E402

matplotlib.use("Agg")
FLAGS = "--preset tiny --batch_size 64 --total_episodes 1024 --save_every 0 --sample_every 0 --no_preflight --overwrite"
# As in the paper, but for the rate and the coefficient: three times the paper's, against a model that is easily fooled.
FLAGS += " --kl_coef 0.15 --lr 3e-4 --num_ppo_epochs 4 --num_minibatches 1"
FLAGS += " --critic_warmup 0 --lr_warmup 0 --critic_lr None"
NAMES = {
    "objective/gold": "true quality (gold)",
    "objective/scores": "reward-model score",
    "objective/kl": "KL to SFT, nats",
    "objective/entropy": "entropy, nats a response",
    "policy/approxkl_avg": "approxkl",
    "policy/clipfrac_avg": "share of clipped tokens",
    "val/eos_rate": "responses that stop",
    "hack/length": "words",
    "explained_variance": "explained variance",
    "returns_mean": "mean return",
}
SHOWN = {  # fault -> the four metrics that tell it
    "update_without_temperature": ["objective/gold", "objective/kl", "objective/entropy", "policy/approxkl_avg"],
    "state_off_by_one": ["objective/gold", "objective/scores", "objective/kl", "objective/entropy"],
    "kl_sign": ["objective/gold", "objective/scores", "objective/kl", "val/eos_rate"],
    "reference_is_policy": ["objective/gold", "objective/scores", "objective/kl", "hack/length"],
    "eos_is_no_action": ["objective/gold", "objective/scores", "val/eos_rate", "hack/length"],
    "score_on_every_token": ["objective/gold", "objective/scores", "hack/length", "returns_mean"],
    "fused_policy_min": ["objective/gold", "objective/kl", "policy/approxkl_avg", "policy/clipfrac_avg"],
    "returns_after_whitening": ["objective/gold", "hack/length", "returns_mean", "explained_variance"],
}
HEALTHY = "healthy"


def train(name: str) -> None:
    """One run of train_ppo.py with the fault `name` in, or with none."""
    fault = next((mutation for mutation in MUTATIONS if mutation.name == name), None)
    assert fault is not None or name == HEALTHY, f"{name} is no fault of tests/mutations.py"
    cfg = parse(train_ppo.Config, train_ppo.PRESETS, train_ppo.__doc__, [*FLAGS.split(), "--run_name", f"bug_{name}"])
    with planted(fault) if fault else contextlib.nullcontext():
        train_ppo.main(cfg)


def draw(name: str) -> None:
    """docs/bug_<name>.png: the telling metrics of a faulty run, over those of the healthy one."""
    healthy, faulty = (read_metrics(Path("runs") / f"bug_{run}") for run in (HEALTHY, name))
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.4), layout="constrained")
    for axis, metric in zip(axes, SHOWN[name], strict=True):
        for rows, color, label in ((healthy, "#888888", HEALTHY), (faulty, "#c0392b", name)):
            axis.plot([row["step"] for row in rows], [row.get(metric) for row in rows], color=color, label=label)
        axis.set_title(NAMES[metric], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks([1, 4, 8, 12, 16])
    axes[0].set_xlabel("update", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs" / f"bug_{name}.png", dpi=90)
    plt.close(figure)


def last(name: str) -> dict[str, float]:
    """Means over the last four updates of a run."""
    rows = read_metrics(Path("runs") / f"bug_{name}")[-4:]
    metrics = [
        "objective/gold",
        "objective/scores",
        "objective/kl",
        "val/eos_rate",
        "hack/length",
        "policy/approxkl_avg",
    ]
    metrics += ["policy/clipfrac_avg", "objective/entropy", "explained_variance"]
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in metrics}


@torch.no_grad()
def ratio(posts: int = 64, response_length: int = 32) -> dict[str, float]:
    """Mean ratio and approxkl before any step, the new log-probs at 0.7 and at 1, of samples at 0.7."""
    folder = EMBEDDED / "sft"
    policy, tokenizer = load_policy(folder), load_tokenizer(folder)
    queries, _ = encode_posts(load_posts(ensure_world(Path("data/tiny")), "train")[:posts], tokenizer, 104)
    responses, _ = generate(policy, queries, response_length, temperature=0.7, seed=1)
    packed = pack([query + response for query, response in zip(queries, responses.tolist(), strict=True)])
    mask = ppo.action_mask(responses, tokenizer.eos_id)
    old, same, other = (policy.response_logprobs(packed, responses, T)[0] for T in (0.7, 0.7, 1.0))
    found = {}
    for name, new in (("T 0.7", same), ("T 1", other)):
        _, stats = ppo.policy_loss(new, old, torch.zeros_like(old), mask, cliprange=0.2)
        found |= {f"{name}: ratio": stats["ratio"].item(), f"{name}: approxkl": stats["approxkl"].item()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bugs", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[HEALTHY, *SHOWN], choices=[HEALTHY, *SHOWN])
    parser.add_argument("--draw", action="store_true", help="only the figures")
    parser.add_argument("--ratio", action="store_true", help="only ratio and approxkl of a missing temperature")
    args = parser.parse_args()
    if args.ratio:
        print(json.dumps({"bench": "ratio", **ratio()}))
        return
    for name in [] if args.draw else args.only:
        train(name)
    rows = {name: last(name) for name in (HEALTHY, *SHOWN)}
    for name in SHOWN:
        draw(name)
    print("| run | " + " | ".join(rows[HEALTHY]) + " |\n|" + "---|" * (1 + len(rows[HEALTHY])))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    print(json.dumps({"bench": "bugs", "flags": FLAGS, "rows": rows}))


if __name__ == "__main__":
    as_command(main)
