"""What experiments/frontier.py runs, in this order: a list of runs, each a list of steps, a step one script.

The most valuable come first, and every method has its seeds at one strength before the next strength begins. Each seed
has an SFT and a reward model of its own, trained once (a step that several runs begin with) and shared by all methods;
those of seed 1 are the embedded ones, which are what the two scripts make of seed 1, in bf16 (nanorlhf/tiny/build.py).
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from experiments.details_worth import SWITCHES, Switch

SEEDS = (1, 2, 3)
EMBEDDED_SEED, EMBEDDED = 1, Path("nanorlhf/tiny/checkpoints")
# As preset tiny had PPO at 17af441: 18 updates of one epoch of 4 minibatches, the rate falling linearly; 4.7 TFLOP.
CHEAP = "--num_ppo_epochs 1 --num_minibatches 4 --critic_warmup 1 --critic_lr 1.5e-3 --lr 4e-4 --lr_warmup 1"
CHEAP += " --lr_schedule linear --total_episodes 2304 --save_every 0 --sample_every 3"
# Twice as long at a constant rate: where over-optimisation shows, and what an ensemble does about it.
LONG = CHEAP.replace("2304", "4608").replace("linear", "constant")
KL = "--kl_coef 0.15"  # at which the details are compared


@dataclass(frozen=True)
class Step:
    """One script with its flags; what it leaves is in runs/<name>."""

    name: str
    words: tuple[str, ...]  # program and flags, without run name, seed and preset
    seconds: int  # of one thread of an AMD EPYC (Zen 5), for the budget


@dataclass(frozen=True)
class Run:
    """A line of the results: a method at a strength with a seed. `policy` and `reward_model`: folders to measure."""

    part: str  # frontier, or details: which page's table it belongs to
    method: str
    strength: str
    seed: int
    steps: tuple[Step, ...]
    policy: Path | None  # None: best-of-n, which measures itself
    reward_model: Path

    @property
    def name(self) -> str:
        return f"{self.method} {self.strength} {self.seed}"


def final(name: str) -> Path:
    return Path("runs") / name / "final"


def step(name: str, seconds: int, *words: object) -> Step:
    """Words may hold several flags in one string; a Path is one word."""
    split = [part for word in words for part in (str(word).split() if isinstance(word, str) else [str(word)])]
    return Step(name, tuple(split), seconds)


def sft(seed: int) -> Path:
    return EMBEDDED / "sft" if seed == EMBEDDED_SEED else final(f"fr_sft{seed}")


def rm(seed: int) -> Path:
    return EMBEDDED / "rm" if seed == EMBEDDED_SEED else final(f"fr_rm{seed}")


def models(seed: int) -> tuple[Step, ...]:
    """What trains both models of a seed."""
    if seed == EMBEDDED_SEED:
        return ()
    flags = "train_rm.py --save_every 0 --sft_model", sft(seed)
    return step(f"fr_sft{seed}", 60, "train_sft.py --save_every 0"), step(f"fr_rm{seed}", 120, *flags)


def inputs(seed: int) -> tuple:
    """Flags of a stage that reads both models of its seed."""
    return "--sft_model", sft(seed), "--reward_model", rm(seed)


def trained(method: str, strength: str, seed: int, seconds: int, *words, before: tuple[Step, ...] = ()) -> Run:
    """A run whose last step trains the policy that is measured."""
    name = "fr_" + re.sub(r"[^a-z0-9._]+", "-", f"{method}_{strength}_{seed}")
    steps = (*models(seed), *before, step(name, seconds, *words))
    return Run("frontier", method, strength, seed, steps, final(name), rm(seed))


def nothing(seed: int) -> Run:
    """SFT itself: where every method starts, at 0 nats."""
    return Run("frontier", "sft", "-", seed, models(seed), sft(seed), rm(seed))


def ppo(kl_coef: float, seed: int) -> Run:
    return trained("ppo", f"kl {kl_coef:g}", seed, 60, "train_ppo.py", CHEAP, f"--kl_coef {kl_coef:g}", *inputs(seed))


def long(kl_coef: float, seed: int) -> Run:
    flags = "train_ppo.py", LONG, f"--kl_coef {kl_coef:g}", *inputs(seed)
    return trained("ppo", f"long, kl {kl_coef:g}", seed, 130, *flags)


def best_of_n(seed: int) -> Run:
    """All n at once: the first n of the same 16 samples."""
    flags = "-m experiments.best_of_n --n 1 2 4 8 16 --posts 512 --split test --policy", sft(seed)
    last = step(f"fr_bon_{seed}", 60, *flags, "--reward_model", rm(seed))
    return Run("frontier", "best of n", "n 1 to 16", seed, (*models(seed), last), None, rm(seed))


def dpo(beta: float, seed: int) -> Run:
    flags = "-m experiments.train_dpo", f"--beta {beta:g} --save_every 0 --sft_model", sft(seed)
    return trained("dpo", f"beta {beta:g}", seed, 130, *flags)


def group(algorithm: str, kl_coef: float, seed: int) -> Run:
    """RLOO or GRPO: the same loop without a critic, 4 samples a query, as many episodes as PPO."""
    where = "reward" if algorithm == "rloo" else "loss"  # each as its authors have it
    flags = "-m experiments.train_rloo --algorithm", algorithm, "--samples_per_query 4 --kl", where
    more = f"--kl_coef {kl_coef:g} --total_episodes 2304 --save_every 0 --sample_every 3", *inputs(seed)
    return trained(algorithm, f"kl {kl_coef:g}", seed, 45, *flags, *more)


def ensemble(rule: str, kl_coef: float, seed: int) -> Run:
    """A long PPO against the reward models of three seeds, its own first (the critic starts as that one)."""
    others = [other for other in SEEDS if other != seed]
    before = tuple(part for other in others for part in models(other))
    rms = [rm(which) for which in (seed, *others)]
    flags = "--sft_model", sft(seed), "--reward_model", *rms, "--ensemble", rule
    flags = "train_ppo.py", LONG, f"--kl_coef {kl_coef:g}", *flags
    return trained(f"ppo, {rule} of 3", f"long, kl {kl_coef:g}", seed, 150, *flags, before=before)


def second_round(kl_coef: float, seed: int, own: bool = True) -> Run:
    """The annotator judges pairs of samples; a reward model learns from these and the old pairs; PPO starts again.

    own: half of the samples are those of PPO's first round; else all are SFT's, as many: is it the data, or whose?
    """
    first, tag = ppo(kl_coef, seed), f"{'own' if own else 'sft'}{seed}"
    policies = [f"sft={sft(seed)}"] + [f"ppo={first.policy}"] * own
    flags = "-m experiments.label --judge annotator --with_old --num_posts 4096 --policy"
    labels = step(f"fr_labels_{tag}", 40, flags, *policies)
    folder = Path("runs") / labels.name
    again = step(f"fr_rm_{tag}", 150, "train_rm.py --save_every 0 --data", folder, "--sft_model", sft(seed))
    before = (*(first.steps[-1:] if own else ()), labels, again)
    flags = "--sft_model", sft(seed), "--reward_model", final(again.name)
    method = "ppo, second round" if own else "ppo, more labels"
    flags = "train_ppo.py", CHEAP, f"--kl_coef {kl_coef:g}", *flags
    return replace(trained(method, f"kl {kl_coef:g}", seed, 60, *flags, before=before), reward_model=final(again.name))


def detail(which: Switch, seed: int) -> Run:
    """PPO at kl_coef 0.15 with one detail switched."""
    flags = "-m experiments.details_worth --switch", which.name, CHEAP, KL, *inputs(seed)
    return replace(trained("detail", which.name, seed, 60, *flags), part="details")


def plan() -> list[Run]:
    """Every run, most valuable first."""
    first = [
        nothing,
        partial(ppo, 0.15),
        best_of_n,
        partial(group, "rloo", 0.15),
        partial(group, "grpo", 0.15),
        partial(dpo, 0.5),
        partial(long, 0.0),
        partial(ensemble, "min", 0.0),
        partial(ppo, 0.0),
        partial(ppo, 0.05),
        partial(second_round, 0.05),
    ]
    second = [partial(dpo, 0.25), partial(group, "rloo", 0.05), partial(group, "grpo", 1.0)]
    details = [partial(detail, which) for which in SWITCHES]
    third = [
        partial(ppo, 0.5),
        partial(ppo, 0.02),
        partial(dpo, 1.0),
        partial(second_round, 0.05, own=False),
        partial(ensemble, "mean", 0.0),
        partial(ensemble, "mean_minus_std", 0.0),
        partial(long, 0.05),
        partial(ensemble, "min", 0.05),
    ]
    return [make(seed=seed) for make in (*first, *second, *details, *third) for seed in SEEDS]
