"""Flags, presets, --help and what a wrong flag gets."""

import errno
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

import eval as eval_script
import train_ppo
import train_rm
import train_sft
from nanorlhf.errors import UserError, check
from nanorlhf.run.config import OTHER_SPELLINGS, RULES, cli, describe, parse, unread_fields
from nanorlhf.tiny import pretrain

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    """What a script declares."""

    # -- run
    preset: str = "auto"  # auto | tiny | llama-1b | paper
    run_name: str = "ppo"  # folder under runs/
    resume: bool = False  # continue from the last complete checkpoint
    device: str = "auto"  # auto | cpu | cuda
    track: bool = False  # mirror the metrics
    save_every: int = 100  # updates between checkpoints
    model: str | None = None  # folder of the model [default: runs/sft/final]
    # -- optimisation (Table 7)
    lr: float = 1.5e-6  # peak learning rate [paper: 3e-6]
    batch_size: int = 128  # episodes an update [paper: 512]
    num_minibatches: int = 1  # optimizer steps a PPO epoch
    microbatch_tokens: int = 4096  # tokens in one forward
    # fmt: off
    max_updates: int | None = None  # stop early after this many updates,
                                    # for a trial run
    # fmt: on
    # An aside about the next field, which is no help text.
    kl_coef: float = 0.05  # weight of the KL penalty (detail 23.2)
    lam: float = 0.95  # GAE lambda
    kl_estimator: Literal["k1", "full"] = "k1"  # how KL is measured: "#1" is the paper's
    whiten_rewards: bool = False  # shift and scale
    missing_eos_score: float = -1.0  # replaces the score of a response without EOS

    def updates(self) -> int:
        return 3  # not part of any help text


PRESETS = {"llama-1b": {}, "paper": dict(batch_size=512, lr=3e-6), "smollm2": {},
           "tiny": dict(lr=2e-4, whiten_rewards=True)}  # fmt: skip
DOC = """PPO on TL;DR: improve a summariser.

    python train_ppo.py --batch_size 128 --lr 1.5e-6

1. A step that --help does not repeat.
"""


def flags(line: str) -> Config:
    return parse(Config, PRESETS, DOC, line.split())


def refusal(line: str) -> str:
    with pytest.raises(UserError) as caught:
        flags(line)
    return str(caught.value)


def help_text(line: str, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        flags(line + " --help")
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_an_explicit_flag_beats_the_preset_and_the_preset_beats_the_class():
    cfg = flags("--preset paper --lr 1e-5")
    assert (cfg.lr, cfg.batch_size, cfg.kl_coef) == (1e-5, 512, 0.05)
    assert flags("--lr 1e-5 --preset paper") == cfg


def test_the_resolved_config_is_the_scripts_own_class_and_knows_its_preset():
    cfg = flags("--preset tiny")
    assert type(cfg) is Config
    assert (cfg.preset, cfg.preset_reason) == ("tiny", "chosen with --preset")
    assert cfg.argv == ["--preset", "tiny"]


def test_every_kind_of_field_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --resume looks for a run to go on with
    cfg = flags("--preset tiny --model a/b --max_updates 3 --kl_estimator full --no_whiten_rewards --resume --lr=1e-3")
    assert (cfg.model, cfg.max_updates, cfg.kl_estimator, cfg.whiten_rewards, cfg.resume, cfg.lr) == (
        "a/b", 3, "full", False, True, 1e-3
    )  # fmt: skip
    cfg = flags("--preset tiny --max_updates None --missing_eos_score -2.5")
    assert (cfg.max_updates, cfg.missing_eos_score) == (None, -2.5)


def test_hyphens_are_accepted_and_the_last_of_two_equal_flags_counts():
    assert flags("--preset tiny --batch-size 8 --batch_size 16 --no-whiten-rewards").batch_size == 16
    assert flags("--preset paper --preset tiny").preset == "tiny"


def test_auto_is_tiny_without_a_large_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = flags("")
    assert (cfg.preset, cfg.preset_reason, cfg.lr) == ("tiny", "no CUDA device", 2e-4)


@pytest.mark.parametrize("gigabytes, preset", [(141, "llama-1b"), (24, "smollm2")])
def test_auto_depends_on_the_memory_of_the_gpu(monkeypatch, gigabytes, preset):
    card = SimpleNamespace(name="Card", total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    cfg = flags("")
    assert cfg.preset == preset
    assert f"Card has {gigabytes} GB" in cfg.preset_reason


def test_auto_is_tiny_when_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flags("--device cpu").preset == "tiny"


def test_an_unknown_preset_lists_the_presets():
    assert refusal("--preset tini") == "preset tini is not one of auto, llama-1b, paper, smollm2, tiny: see --help"


def test_a_preset_with_a_misspelt_field_is_our_own_error():
    with pytest.raises(AssertionError, match="batchsize"):
        parse(Config, {"tiny": dict(batchsize=3)}, DOC, ["--preset", "tiny"])


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("--learning_rate", "--lr"),
        ("--per-device-train-batch-size", "--batch_size"),
        ("--gradient_accumulation_steps", "--microbatch_tokens"),
        ("--num_mini_batches", "--num_minibatches"),
        ("--output_dir", "--run_name"),
        ("--model_name_or_path", "--model"),
        ("--init_kl_coef", "--kl_coef"),
        ("--ppo.kl_coef", "--kl_coef"),
        ("--gae_lambda", "--lam"),
        ("--missing_eos_penalty", "--missing_eos_score"),
    ],
)
def test_another_projects_spelling_is_answered_with_ours(theirs, ours):
    message = refusal(f"--preset tiny {theirs} 1")
    assert message.startswith(f"unknown flag {theirs}: use {ours} (")


def test_no_foreign_spelling_hides_a_flag_of_ours():
    assert not set(OTHER_SPELLINGS) & set(OTHER_SPELLINGS.values())


def test_an_unknown_flag_names_the_nearest_with_its_meaning():
    nearest = "did you mean --batch_size (episodes an update [paper: 512])?"
    assert refusal("--batchsize 3") == f"unknown flag --batchsize: {nearest}"
    assert refusal("--qqq 3") == "unknown flag --qqq: --help lists all flags"


def test_left_over_words_and_missing_values_are_refused():
    assert "unexpected argument 'true' after --resume" in refusal("--resume true")
    assert "--resume takes no value" in refusal("--resume=true")
    assert refusal("--lr --batch_size 3").startswith("--lr needs a value: peak learning rate")
    assert "unexpected argument '5'" in refusal("--lr 3 5")


@pytest.mark.parametrize("line", ["--lr abc", "--batch_size 1.5", "--max_updates x", "--kl_estimator k9"])
def test_a_value_of_the_wrong_kind_is_named_and_exits_2(line, capsys):
    with pytest.raises(SystemExit) as caught:
        flags("--preset tiny " + line)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in line.split())


def test_help_shows_groups_comments_and_the_defaults_of_the_preset(capsys):
    text = " ".join(help_text("--preset paper", capsys).replace("│", " ").split())
    assert "run options" in text and "optimisation (Table 7) options" in text
    assert "peak learning rate [paper: 3e-6] (default: 3e-06)" in text
    assert "stop early after this many updates, for a trial run (default: None)" in text
    assert "Defaults below: preset paper (chosen with --preset)." in text
    assert text.index("optimisation (Table 7)") < text.index("--lr FLOAT") < text.index("--kl_coef FLOAT")
    assert "--max_updates INT" in text and "{None}" not in text
    assert "(default: 0.0002)" not in text and "(default: 0.0002)" in help_text("--preset tiny", capsys)


def test_help_opens_with_the_purpose_and_an_example(capsys):
    text = help_text("--preset tiny", capsys)
    assert text.index("PPO on TL;DR") < text.index("    python train_ppo.py --batch_size 128") < text.index("--lr")
    assert "A step that --help does not repeat" not in text


def test_comments_are_read_from_the_source_of_the_class():
    comments, groups = describe(Config)
    assert list(groups) == ["run", "optimisation (Table 7)"]
    assert [name for names in groups.values() for name in names] == list(Config.__dataclass_fields__)
    assert comments["kl_estimator"] == 'how KL is measured: "#1" is the paper\'s'
    assert comments["max_updates"] == "stop early after this many updates, for a trial run"
    assert comments["missing_eos_score"] == "replaces the score of a response without EOS"
    assert all(comments.values())


def test_check_speaks_the_house_wording():
    check(True, "lr", 1.0, "greater than 0")
    with pytest.raises(UserError, match=r"^temperature 0.0 is not greater than 0: choose 0.7$"):
        check(0.0 > 0, "temperature", 0.0, "greater than 0", "choose 0.7")
    with pytest.raises(UserError, match=r"^lr nan is not greater than 0$"):
        check(float("nan") > 0, "lr", float("nan"), "greater than 0")


# -- ranges


@pytest.mark.parametrize(
    "line, said",
    [
        ("--lr 0", "lr 0.0 is not greater than 0, and finite"),
        ("--lr -1e-6", "lr -1e-06 is not greater than 0"),
        ("--lr nan", "lr nan is not greater than 0"),
        ("--lr inf", "lr inf is not greater than 0, and finite"),
        ("--batch_size 0", "batch_size 0 is not at least 1"),
        ("--microbatch_tokens -5", "microbatch_tokens -5 is not at least 1"),
        ("--max_updates 0", "max_updates 0 is not at least 1"),
        ("--kl_coef -0.1", "kl_coef -0.1 is not 0 or more, and finite"),
        ("--kl_coef inf", "kl_coef inf is not 0 or more, and finite"),
        ("--lam 1.01", "lam 1.01 is not from 0 to 1"),
        ("--lam nan", "lam nan is not from 0 to 1"),
        ("--missing_eos_score inf", "missing_eos_score inf is not a finite number"),
        ("--save_every -1", "save_every -1 is not 0 or more"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(line, said):
    assert refusal(f"--preset tiny {line}").startswith(said)


def test_the_ends_of_a_range_are_accepted_and_none_is_no_number():
    cfg = flags("--preset tiny --kl_coef 0 --lam 0 --batch_size 1 --save_every 0 --missing_eos_score -3")
    assert (cfg.kl_coef, cfg.lam, cfg.batch_size, cfg.save_every) == (0, 0, 1, 0) and cfg.max_updates is None
    assert flags("--preset tiny --lam 1").lam == 1


SCRIPTS = (train_sft, train_rm, train_ppo, eval_script)


def test_every_number_of_every_script_has_one_rule_and_every_rule_a_number():
    ruled = [name for _, _, names in RULES for name in names.split()]
    numbers = {
        field.name
        for script in (*SCRIPTS, pretrain)
        for field in script.Config.__dataclass_fields__.values()
        if field.type in (int, float, int | None, float | None)
    }
    assert sorted(ruled) == sorted(numbers)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_preset_keeps_the_rules(script):
    for preset in script.PRESETS:
        assert parse(script.Config, script.PRESETS, script.__doc__, ["--preset", preset]).preset == preset


def test_unread_fields_finds_dead_flags(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text(
        "def main(cfg):\n    print(cfg.lr, other.lam)\n    cfg.kl_coef = 3\n    # cfg.batch_size\n", encoding="utf-8"
    )
    second.write_text('print(getattr(cfg, "resume", False))', encoding="utf-8")
    dead = unread_fields(Config, first, second)
    assert {"lam", "kl_coef", "batch_size"} <= set(dead)
    assert not {"lr", "resume"} & set(dead)


def ended(error, capsys) -> tuple[int, str]:
    """The exit status and stderr of a script whose main raises error."""

    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as caught:
        cli(main, Config, PRESETS, DOC, ["--preset", "tiny"])
    return caught.value.code, capsys.readouterr().err


def test_what_a_user_can_cause_ends_in_one_sentence_and_status_2(capsys):
    assert ended(UserError("no such model"), capsys) == (2, "error: no such model\n")
    status, said = ended(OSError(errno.ENOSPC, "No space left on device", "runs/ppo/x"), capsys)
    assert (status, said) == (
        2, "error: No space left on device: runs/ppo/x: free some space and continue with --resume\n"
    )  # fmt: skip
    assert ended(PermissionError(errno.EACCES, "Permission denied", "runs"), capsys)[0] == 2


def test_an_interrupt_exits_130_with_one_line(capsys):
    assert ended(KeyboardInterrupt(), capsys) == (130, "interrupted: continue with --resume\n")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no file", "x"), ValueError("a"), OSError("b")])
def test_every_other_exception_keeps_its_traceback(error):
    def main(cfg):
        raise error

    with pytest.raises(type(error)):
        cli(main, Config, PRESETS, DOC, ["--preset", "tiny"])


def test_a_script_run_with_an_unknown_flag_prints_one_line_and_exits_2(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent('''
        """Train."""
        from dataclasses import dataclass
        from nanorlhf.run.config import cli
        import sys

        @dataclass
        class Config:
            # -- run
            preset: str = "auto"  # which preset
            lr: float = 1e-6  # peak learning rate

        if __name__ == "__main__":
            cli(lambda cfg: print(cfg.lr, "torch" in sys.modules), Config, {"tiny": {}}, __doc__)
        '''),
        encoding="utf-8",
    )

    def run(*argv):
        return subprocess.run(
            [sys.executable, script, *argv],
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=60,
            encoding="utf-8",
        )

    wrong = run("--learning_rate", "3")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown flag --learning_rate: use --lr (peak learning rate)\n"
    right = run("--preset", "tiny", "--lr", "3")
    assert right.stdout == "3.0 False\n", "flags alone should not import torch"


# -- lists


@dataclass
class ListConfig:
    # -- run
    preset: str = "auto"  # which preset
    policy: tuple[str, ...] = ()  # name=DIR ...
    seed: int = 1  # a seed


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", ()),
        ("--policy a=x", ("a=x",)),
        ("--policy a=x b=y --seed 2", ("a=x", "b=y")),
        ("--policy a=x --seed 2 --policy b=y", ("a=x", "b=y")),
        ("--policy=a=x b", ("a=x", "b")),
    ],
)
def test_a_list_flag_takes_all_words_up_to_the_next_flag(line, expected):
    cfg = parse(ListConfig, {"tiny": {}}, "Doc.", ["--preset", "tiny", *line.split()])
    assert cfg.policy == expected and cfg.seed == (2 if "--seed" in line else 1)


def test_a_list_flag_needs_a_word_and_other_flags_take_only_one():
    with pytest.raises(UserError, match="--policy needs a value: name=DIR"):
        parse(ListConfig, {"tiny": {}}, "Doc.", ["--preset", "tiny", "--policy"])
    with pytest.raises(UserError, match="unexpected argument '3'"):
        parse(ListConfig, {"tiny": {}}, "Doc.", ["--preset", "tiny", "--seed", "2", "3"])
