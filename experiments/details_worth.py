"""What is each implementation detail worth? PPO with one of ten details switched at a time, all else equal.

    python -m experiments.frontier --only detail                        trains and measures, 3 seeds each
    python -m experiments.frontier_report                               the table of docs/frontier.md
    python -m experiments.details_worth --switch score_at_eos --run_name x    one run; flags of train_ppo.py

A detail with a flag is switched by it. One without is no option of the lesson, and shall not become one: its line is
replaced while train_ppo.py runs, as experiments/bugs.py plants faults, and the pre-flight, which would refuse some of
these, is off.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from nanorlhf.run.streams import as_command
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from planting import Mutation, planted  # noqa: E402

TRAIN, PPO = "train_ppo.py", "nanorlhf/ppo.py"


@dataclass(frozen=True)
class Switch:
    """A detail, what the run does in its place, and how: flags, or (file, old text, new text) for each line."""

    name: str
    detail: str  # number in docs/details.md
    kept: str  # what the recipe does
    instead: str  # what this run does
    flags: str = ""
    lines: tuple[tuple[str, str, str], ...] = ()


NEW_HEAD = '__import__("nanorlhf.models").models.reward_model_from(policy, cfg.seed)'
SWITCHES = (
    Switch("no_advantage_whitening", "25", "advantages are whitened", "raw advantages", lines=(
        (TRAIN, "advantages = ppo.masked_whiten(raw_advantages, action_mask)", "advantages = raw_advantages"),)),
    Switch("new_critic", "22", "the critic starts as the reward model", "SFT's trunk and a new head", lines=(
        (TRAIN, "critic = critic_from(reward_models[0])", f"critic = critic_from({NEW_HEAD})"),)),
    Switch("temperature_in_sampling_only", "20", "every log-prob is at 0.7", "sampled at 0.7, log-probs at 1", lines=(
        (TRAIN, "R, T = responses.shape[1], cfg.temperature", "R, T = responses.shape[1], 1.0"),
        (TRAIN, "mask / actions, cfg.temperature, cfg.cliprange", "mask / actions, 1.0, cfg.cliprange"))),
    Switch("one_step", "20", "4 steps on each batch", "one: `--num_minibatches 1`", flags="--num_minibatches 1"),
    Switch("constant_lr", "20", "the rates fall linearly to 0", "`--lr_schedule constant`",
           flags="--lr_schedule constant"),
    Switch("no_value_clipping", "20", "values are clipped at 0.2", "`--cliprange_value 1000`",
           flags="--cliprange_value 1000"),
    Switch("reward_whitening", "24", "rewards are not whitened", "`--whiten_rewards`", flags="--whiten_rewards"),
    Switch("score_at_eos", "23", "the score comes one step after EOS", "at EOS", lines=(
        (PPO, "slot = (last_token(responses, eos_id) + 1)", "slot = last_token(responses, eos_id)"),)),
    Switch("no_missing_eos_rule", "23.3", "no EOS: the score is -1", "the reward model's score", lines=(
        (TRAIN, "scores = ppo.apply_missing_eos(said.raw_scores, responses, eos_id, cfg.missing_eos_score)",
         "scores = said.raw_scores"),)),
    Switch("no_shift", "15", "references score 0 on average", "scores as they are", lines=(
        (TRAIN, "critic = critic_from(", "reward_models[0].score_shift = 0.0; critic = critic_from("),)),
)  # fmt: skip


def switch(name: str) -> Switch:
    return next(known for known in SWITCHES if known.name == name)


@contextlib.contextmanager
def switched(which: Switch):
    """The lines of a switch are replaced while the block runs. Two of one file have to stand in different functions."""
    with contextlib.ExitStack() as stack:
        for file, old, new in which.lines:
            stack.enter_context(planted(Mutation(which.name, f"detail {which.detail}", file, old, new, test="")))
        yield


def train(which: Switch, flags: list[str]) -> None:
    import train_ppo  # here: --help and the plan should not wait for torch
    from nanorlhf.run.config import cli

    flags = [*flags, *which.flags.split(), *(["--no_preflight"] if which.lines else [])]
    with switched(which):
        cli(train_ppo.main, train_ppo.Config, train_ppo.PRESETS, train_ppo.__doc__, flags)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.details_worth", description=__doc__.split("\n")[0])
    parser.add_argument("--switch", required=True, choices=[known.name for known in SWITCHES])
    args, flags = parser.parse_known_args()  # all others are those of train_ppo.py
    train(switch(args.switch), flags)


if __name__ == "__main__":
    as_command(main)
