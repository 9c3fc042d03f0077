"""The demo's pipeline on several seeds, judged on posts that nothing was tuned on.

    python -m experiments.seeds                       seeds 1, 2 and 3, split test
    python -m experiments.seeds --seeds 4 5 --split valid

For each seed: SFT, reward model and PPO from the embedded base, then the evaluation. Writes
runs/seed<N>_{sft,rm,ppo,eval}; prints a Markdown table (the README's) and one JSON line last.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from nanorlhf.run.run import read_metrics


def pipeline(seed: int, split: str) -> dict[str, float]:
    """Run the four scripts with one seed; returns what the README reports."""

    def script(name: str, stage: str, *flags: str) -> None:
        run = ["--run_name", f"seed{seed}_{stage}", "--seed", str(seed), "--preset", "tiny", "--overwrite"]
        subprocess.run([sys.executable, name, *run, *flags], check=True, stdout=subprocess.DEVNULL)

    began = time.monotonic()
    runs = {stage: Path("runs") / f"seed{seed}_{stage}" for stage in ("sft", "rm", "ppo", "eval")}
    final = {stage: str(folder / "final") for stage, folder in runs.items()}
    sft, rm = ["--sft_model", final["sft"]], ["--reward_model", final["rm"]]
    script("train_sft.py", "sft")
    script("train_rm.py", "rm", *sft)
    script("train_ppo.py", "ppo", *sft, *rm)
    script("eval.py", "eval", "--policy", "base", f"sft={final['sft']}", f"ppo={final['ppo']}", *rm, "--split", split)
    results = json.loads((runs["eval"] / "metrics.json").read_text())
    policies, wins = results["policies"], {(w["ours"], w["theirs"]): w for w in results["win_rates"]}
    against_sft = wins["ppo", "sft"]
    return {
        "seed": seed,
        "SFT ROUGE-L / base": policies["sft"]["rougeL"] / policies["base"]["rougeL"],
        "RM accuracy": results["reward_model"]["accuracy"],
        "gold SFT": policies["sft"]["gold"],
        "gold PPO": policies["ppo"]["gold"],
        "PPO vs SFT": against_sft["rate"],
        "low": against_sft["interval"][0],
        "high": against_sft["interval"][1],
        "PPO vs reference": wins["ppo", "reference"]["rate"],
        "EOS rate": policies["ppo"]["eos_rate"],
        "KL, largest": max(row["objective/kl"] for row in read_metrics(runs["ppo"])),
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--split", default="test", choices=["valid", "test"])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        rows.append(pipeline(seed, args.split))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]), flush=True)
        print("| " + " | ".join(f"{value:.3g}" for value in rows[-1].values()) + " |", flush=True)
    print(json.dumps({"bench": "seeds", "split": args.split, "rows": rows}))


if __name__ == "__main__":
    main()
