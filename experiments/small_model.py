"""The real rung: SmolLM2-135M on real Reddit posts, SFT -> reward model -> PPO -> evaluation, in the minutes there are.

    python -m bench.stand_ins smollm2 models/smollm2                     where no hub can be reached
    python -m experiments.small_model --model models/smollm2 --data ../shared/data --minutes 4
    python -m experiments.small_model                                    hub, data/openai, one hour
    ... the same command again                                           goes on where it was stopped

The parts, each with its share of the time that is left; a part that is done is not done again:

    lr     SFT with each of --sft_lrs for a few steps: which loss on held-out posts?
    sft    the base model on the posts, the best of these learning rates
    rm     the reward model on the comparisons (split by post as published)
    ppo    PPO with each of --ppo_lrs
    eval   eval.py on held-out posts, the reward model as judge
    out_again    do transformers, and llama.cpp from a GGUF, write the same greedy text from the policy's folder?
    preflight    what PPO's checks measure in fp32 and in bf16

All of them are the real scripts with the preset smollm2, called in this process, so that CUDA starts and Triton
compiles once. How many steps a part may take is measured: its script runs for three steps, then the rest of its share
is filled; or --steps says it. On a CPU only short posts are used (short_posts.py). Writes runs/<name>_*, and into
--out: results.json, report.md, metrics of each stage, samples.jsonl.
"""

import argparse
import gc
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

import eval as evaluation
import train_ppo
import train_rm
import train_sft
from experiments.out_again import out_again
from experiments.short_posts import write_short_posts
from experiments.small_model_report import report
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError, check, one_sentence
from nanorlhf.evaluation.metrics import rouge
from nanorlhf.run.config import parse
from nanorlhf.run.device import device_name, peak_gib, pick_device, pick_dtype
from nanorlhf.run.inputs import find_data, find_model
from nanorlhf.run.run_folder import git
from nanorlhf.run.streams import as_command
from nanorlhf.storage.jsonl import read_jsonl, write_whole

SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo, "eval": evaluation}
SHARES = {"lr": 4, "sft": 3, "rm": 2, "ppo": 8, "eval": 3, "out_again": 1, "preflight": 1}  # of the time that is left
PROBE_STEPS = 3  # on a GPU the first compiles
LR_STEPS = 24  # of the comparison of learning rates, at most
MOST_EPISODES = 10**9  # of PPO's schedule, which ends with its last update
MOST_EPOCHS = 2  # of SFT and the reward model; PPO goes on for as long as there is time
GREEDY_POSTS, GREEDY_TOKENS = 6, 40
# What a step holds: as the preset has it on a GPU; on a CPU a sixteenth of it, of posts that are short.
LONGEST_ON_A_CPU = 224  # tokens of a query: a quarter of the posts, none of them cut; the comparisons are all taken
ON_A_GPU = {
    "sft": {"eval_posts": 386, "batch_size": 128},
    "rm": {"batch_size": 32, "shift_posts": 4096},
    "ppo": {"batch_size": 128},
    "eval": {"num_posts": 386, "diversity_posts": 64},
}
ON_A_CPU = {
    "sft": {"eval_posts": 128, "batch_size": 8, "microbatch_tokens": 2048, "save_every": 25},
    "rm": {"batch_size": 8, "shift_posts": 256, "microbatch_tokens": 2048, "save_every": 25},
    "ppo": {"batch_size": 8, "microbatch_tokens": 2048, "sample_every": 0, "save_every": 4},
    "eval": {"num_posts": 128, "diversity_samples": 0, "microbatch_tokens": 4096},
}
LR_POSTS = {"cuda": 128, "cpu": 32}  # held out, for the comparison of learning rates


class Clock:
    """What of the budget is left, and how much of it the next part may take."""

    def __init__(self, minutes: float):
        self.began, self.budget = time.monotonic(), 60 * minutes

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def share(self, part: str) -> float:
        """Seconds of a part: of what is left, by the shares of it and of those after it."""
        parts = list(SHARES)
        return max(0.0, self.left) * SHARES[part] / sum(SHARES[p] for p in parts[parts.index(part) :])


class Done(NamedTuple):
    folder: Path
    seconds: float
    peak_gib: float

    @property
    def rows(self) -> list[dict]:
        return read_jsonl(self.folder / "metrics.jsonl")


def run(stage: str, on: torch.device, **flags) -> Done:
    """One run of a script with the preset smollm2. The command is printed as one would type it."""
    words = ["--preset", "smollm2"]
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    script, began = SCRIPTS[stage], time.monotonic()
    print(f"\n$ python {Path(script.__file__).name} {' '.join(words)}", flush=True)
    script.main(parse(script.Config, script.PRESETS, script.__doc__, words))
    done = Done(Path("runs") / flags["run_name"], time.monotonic() - began, peak_gib(on))
    gc.collect()
    if on.type == "cuda":  # give the memory back, and count the peak anew
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(on)
    return done


class Experiment:
    """The parts. Each is a method that returns what results.json keeps of it; `state` holds those that are done."""

    def __init__(self, args: argparse.Namespace, out: Path):
        self.args, self.out, self.clock = args, out, Clock(args.minutes)
        self.data = str(find_data(args.data, "smollm2")[0].resolve())
        self.model = str(find_model("base", args.model, "model", "smollm2")[0].resolve())
        self.device = pick_device(args.device)
        self.sizes = ON_A_GPU if self.device.type == "cuda" else ON_A_CPU
        longest = args.longest or (None if self.device.type == "cuda" else LONGEST_ON_A_CPU)
        self.probe_steps = PROBE_STEPS if self.device.type == "cuda" else 2
        self.measured: dict[str, dict] = {}  # stage -> seconds a step, and around all of them
        self.path = out / "results.json"
        self.state: dict = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"seconds": {}}
        dtype = str(pick_dtype(args.dtype, self.device)).removeprefix("torch.")
        about = {"device": device_name(self.device), "dtype": dtype, "torch": torch.__version__, "git": git()}
        about |= {"minutes": args.minutes, "seed": args.seed, "sizes": self.sizes, "data": Path(self.data).name}
        if longest is not None:
            short = out / "data"
            counts = write_short_posts(Path(self.data), short, load_tokenizer(self.model), longest)
            self.data, about = str(short.resolve()), about | {"longest": longest, "posts": counts}
            print(f"posts   of at most {longest} tokens, kept of all: {counts}", flush=True)
        self.state.setdefault("about", about | {"started": time.strftime("%Y-%m-%d %H:%M:%S")})

    def flags(self, stage: str) -> dict:
        own = {"data": self.data, "seed": self.args.seed, "device": self.args.device, "dtype": self.args.dtype}
        return own | self.sizes[stage]

    def name(self, stage: str) -> str:
        return f"{self.args.name}_{stage}"

    def do(self, part: str) -> None:
        """A part, unless it is done. One that fails says why in results.json and the others go on."""
        if part in self.state and "failed" not in self.state[part]:
            print(f"found   {part}: done before", flush=True)
            return
        began, seconds = time.monotonic(), self.clock.share(part)
        print(f"\n==== {part}: {seconds:.0f} s of the {self.clock.left:.0f} s left ====", flush=True)
        try:
            self.state[part] = getattr(self, part)(seconds)
        except UserError as error:
            self.state[part] = {"failed": str(error)}
            print(f"failed  {part}: {error}", flush=True)
        self.state["seconds"][part] = round(time.monotonic() - began, 1)
        self.state.setdefault("commits", {})[part] = (git() or {}).get("commit")
        self.state["about"]["total_s"] = round(time.monotonic() - self.clock.began, 1)
        write_whole(self.path, json.dumps(self.state, indent=1) + "\n")

    # --- parts

    def lr(self, seconds: float) -> dict:
        lrs, losses = self.args.sft_lrs, {}
        flags = self.flags("sft") | {"model": self.model, "run_name": self.name("lr"), "save_every": 0}
        flags |= {"eval_posts": LR_POSTS[self.device.type], "overwrite": True}
        if len(lrs) < 2:
            return {"chosen": lrs[0], "steps": 0, "runs": {}}
        steps = self.args.steps.get("lr") or min(LR_STEPS, self.steps_for(seconds / len(lrs), "sft", flags)[0])
        for lr in lrs:
            last = run("sft", self.device, **flags, lr=lr, max_updates=steps).rows[-1]
            losses[f"{lr:g}"] = {name: last[f"validation/sft/{name}"] for name in ("loss", "rouge/rougeL", "eos_rate")}
        return {"chosen": float(min(losses, key=lambda lr: losses[lr]["loss"])), "steps": steps, "runs": losses}

    def sft(self, seconds: float) -> dict:
        flags = self.flags("sft") | {"model": self.model, "lr": self.state["lr"]["chosen"]}
        return self.train("sft", seconds, flags | {"num_epochs": MOST_EPOCHS})

    def rm(self, seconds: float) -> dict:
        flags = self.flags("rm") | {"sft_model": self.final("sft"), "lr": self.args.rm_lr}
        return self.train("rm", seconds, flags | {"num_epochs": MOST_EPOCHS})

    def ppo(self, seconds: float) -> dict:
        ends, found, lrs = time.monotonic() + seconds, {"runs": {}, "refused": []}, self.args.ppo_lrs
        flags = self.flags("ppo") | {"sft_model": self.final("sft"), "reward_model": self.final("rm")}
        flags |= {"total_episodes": MOST_EPISODES}
        for i, lr in enumerate(lrs):
            name = "ppo" if i == 0 else f"ppo_{lr:g}"
            share, refused = (ends - time.monotonic()) / (len(lrs) - i), None
            try:
                found["runs"][name] = self.train(name, share, flags | {"lr": lr})
            except UserError as error:  # which of its figures and why is part of the result; then on without it
                if not str(error).startswith("pre-flight") or not flags.get("preflight", True):
                    raise
                refused = str(error)
            if refused:  # here the error, and the models that its traceback holds, are gone
                gc.collect()
                found["refused"].append(refused)
                flags["preflight"] = False
                found["runs"][name] = self.train(name, share, flags | {"lr": lr}, afresh=True)
        return found

    def eval(self, _: float) -> dict:
        policies = [f"base={self.model}", f"sft={self.final('sft')}"]
        names = list(self.state["ppo"].get("runs", ()))  # "ppo" last: eval.py compares the last with all others
        policies += [f"{name}={self.final(name)}" for name in reversed(names)]
        flags = self.flags("eval") | {"policy": policies, "reward_model": self.final("rm"), "judge": "rm"}
        done = run("eval", self.device, **flags, run_name=self.name("eval"), overwrite=True)
        shutil.copy(done.folder / "samples.jsonl", self.out / "samples.jsonl")
        found, rows = (
            json.loads((done.folder / "metrics.json").read_text(encoding="utf-8")),
            read_jsonl(done.folder / "samples.jsonl"),
        )
        for name, row in found["policies"].items():
            if name != "reference":
                row["stemmed"] = rouge([r[name] for r in rows], [r["reference"] for r in rows], stemmer=True)
        return {key: found[key] for key in ("about", "policies", "reward_model", "win_rates")} | {"s": done.seconds}

    def preflight(self, _: float) -> dict:
        """What the checks before and in an update measure, by dtype: this is where a bound may be wrong."""
        found = {}
        flags = self.flags("ppo") | {"sft_model": self.final("sft"), "reward_model": self.final("rm")}
        flags |= {"batch_size": min(32, flags["batch_size"]), "max_updates": 1, "overwrite": True}
        for dtype in ("float32", "bfloat16"):
            try:
                name = self.name(f"preflight_{dtype}")
                (row,) = run("ppo", self.device, **flags | {"dtype": dtype, "run_name": name}).rows
                found[dtype] = {k.removeprefix("preflight/"): v for k, v in row.items() if k.startswith("preflight/")}
            except UserError as error:
                found[dtype] = {"refused": str(error)}
        return found

    def out_again(self, _: float) -> dict:
        queries, _ = encode_posts(load_posts(self.data, "valid")[:GREEDY_POSTS], load_tokenizer(self.final("ppo")), 256)
        return out_again(self.final("ppo"), list(queries), GREEDY_TOKENS, self.device)

    # --- what they share

    def final(self, name: str) -> str:
        return str(Path("runs") / self.name(name) / "final")

    def steps_for(self, seconds: float, stage: str, flags: dict) -> tuple[int, dict]:
        """How many steps of a stage fit into so many seconds, at least 1, by a run of three, made once a stage."""
        began = time.monotonic()
        if stage not in self.measured:
            own = {"run_name": self.name(f"{stage}_probe"), "max_updates": self.probe_steps, "overwrite": True}
            probe = run(stage, self.device, **flags | own)
            times = [row["time"] for row in probe.rows][: self.probe_steps]
            step = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
            around = max(0.0, probe.seconds - (times[-1] - times[0]) - step)  # loading, encoding, the evaluation
            self.measured[stage] = {"s_per_step": step, "s_around": around}
        step, around = self.measured[stage].values()
        steps = max(1, int((seconds - (time.monotonic() - began) - around) / step))
        print(f"plan    {stage}: {step:.2f} s a step and {around:.1f} s around them: {steps} steps in {seconds:.0f} s")
        return steps, self.measured[stage]

    def train(self, name: str, seconds: float, flags: dict, afresh: bool = False) -> dict:
        """A stage trained to its end, or on from where it was stopped unless `afresh`; its metrics go to --out."""
        stage, folder = name.partition("_")[0], Path("runs") / self.name(name)
        if (folder / "config.json").is_file() and not afresh:
            measured, done = {}, run(stage, self.device, run_name=folder.name, device=self.args.device, resume=True)
        else:
            steps, measured = self.args.steps.get(name, self.args.steps.get(stage)), {}
            if steps is None:
                steps, measured = self.steps_for(seconds, stage, flags)
            done = run(stage, self.device, **flags, max_updates=steps, run_name=folder.name, overwrite=afresh)
        shutil.copy(folder / "metrics.jsonl", self.out / f"{name}_metrics.jsonl")
        return measured | {"s": round(done.seconds, 1), "peak_gib": done.peak_gib, "rows": done.rows}


def _steps(word: str) -> tuple[str, int]:
    """PART=N, as argparse reads it: a ValueError becomes its message."""
    part, _, number = word.partition("=")
    known = part in ("lr", "sft", "rm", "ppo") or part.startswith("ppo_")
    if not known or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not lr, sft, rm or ppo, then = and a number of steps: rm=112")
    return part, int(number)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.small_model", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub id of the base model [HuggingFaceTB/SmolLM2-135M]")
    parser.add_argument("--data", help="folder with tldr/ and comparisons/ in OpenAI's formats [data/openai]")
    parser.add_argument("--minutes", type=float, default=60, help="of wall time for all parts together [60]")
    parser.add_argument("--name", default="small", help="runs are called <name>_sft, <name>_rm ... [small]")
    parser.add_argument("--out", type=Path, help="where results go [runs/<name>_results]")
    parser.add_argument("--sft_lrs", type=float, nargs="+", default=[train_sft.PRESETS["smollm2"]["lr"]])
    parser.add_argument("--rm_lr", type=float, default=train_rm.PRESETS["smollm2"]["lr"])
    parser.add_argument("--ppo_lrs", type=float, nargs="+", default=[train_ppo.PRESETS["smollm2"]["lr"]])
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES), help="only these")
    parser.add_argument("--longest", type=int, help="leave out posts of more tokens [a CPU: 224, a GPU: none]")
    steps = "steps of lr, sft, rm, ppo, or a run as ppo_1e-05, in place of what is measured"
    parser.add_argument("--steps", nargs="+", type=_steps, default=[], metavar="PART=N", help=steps)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    args.steps = dict(args.steps)
    with one_sentence("type the same command again"):
        check(args.minutes > 0, "minutes", args.minutes, "greater than 0")
        out = args.out or Path("runs") / f"{args.name}_results"
        out.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(args, out)
        for part in args.parts:
            experiment.do(part)
        write_whole(out / "report.md", report(experiment.state, out))
        print(f"\nreport  {out / 'report.md'}: {experiment.state['about']['total_s']:.0f} s in all", flush=True)


if __name__ == "__main__":
    as_command(main)
