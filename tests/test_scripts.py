"""The scripts, end to end on the tiny world for a few steps: alone, resumed, into transformers, and with bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
import train_ppo
import train_rm
import train_sft
from nanorlhf.checkpoint import load_policy, load_scalar
from nanorlhf.config import parse, unread_fields
from nanorlhf.run import Run, read_metrics
from nanorlhf.tiny.data import write_world

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train_sft": train_sft, "train_rm": train_rm, "train_ppo": train_ppo}
SMALL = {  # flags that make each stage take a second or two
    "train_sft": "--batch_size 8 --eval_posts 8 --max_updates 4",
    "train_rm": "--batch_size 4 --eval_pairs 16 --shift_posts 16 --max_updates 4",
    "train_ppo": "--batch_size 8 --total_episodes 32 --response_length 24",
}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small tiny world on disk."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write_world(folder, posts={"train": 64, "valid": 32, "test": 8}, comparisons={"train": 32, "valid1": 32})


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name: str, world: Path, more: str = "") -> Path:
    """Run a script's main in this process; returns its run folder."""
    script = SCRIPTS[name]
    argv = f"--preset tiny --device cpu --data {world} {SMALL[name]} {more}".split()
    cfg = parse(script.Config, script.PRESETS, script.__doc__, argv)
    script.main(cfg)
    return Path("runs") / cfg.run_name


def test_each_stage_runs_alone_from_the_embedded_checkpoints_and_says_so(world, capsys):
    for name in SCRIPTS:
        folder = run(name, world)
        assert "embedded" in capsys.readouterr().out
        assert len(read_metrics(folder)) >= 4
        assert (folder / "final" / "model.safetensors").is_file()
        record = json.loads((folder / "config.json").read_text())
        assert record["config"]["preset"] == "tiny" and record["seed"] == 1


def test_a_stage_continues_from_the_run_of_the_stage_before(world, capsys):
    run("train_sft", world)
    run("train_rm", world)
    assert "the sft run" in capsys.readouterr().out
    run("train_ppo", world)
    out = capsys.readouterr().out
    assert "the sft run" in out and "the rm run" in out


def test_final_folders_load_in_transformers_with_equal_outputs(world):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    rm, ppo = run("train_rm", world), run("train_ppo", world)
    ids = [1, 50, 60, 70, 300, 2]
    theirs = AutoModelForCausalLM.from_pretrained(ppo / "final", attn_implementation="eager", dtype=torch.float32)
    ours = load_policy(ppo / "final").logits([ids])[0]
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-5)

    theirs = AutoModelForSequenceClassification.from_pretrained(rm / "final", attn_implementation="eager")
    ours = load_scalar(rm / "final")
    assert ours.score_shift != 0
    score = theirs(torch.tensor([ids])).logits[0, 0] - ours.score_shift
    torch.testing.assert_close(score, ours.scores([ids])[0], rtol=1e-4, atol=1e-5)

    theirs = AutoModelForTokenClassification.from_pretrained(ppo / "final_critic", attn_implementation="eager")
    values = theirs(torch.tensor([ids])).logits[0, :, 0]
    torch.testing.assert_close(values, load_scalar(ppo / "final_critic").values([ids])[0], rtol=1e-4, atol=1e-5)


def test_before_the_first_update_ratio_is_one_and_kl_is_zero(world):
    first = read_metrics(run("train_ppo", world, "--max_updates 1"))[0]
    assert first["preflight/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["preflight/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["preflight/value_error"] < 1e-4


def test_rlhf_reward_is_score_minus_kl_penalty_in_every_update(world):
    for row in read_metrics(run("train_ppo", world)):
        expected = row["objective/scores"] - 0.2 * row["objective/kl"]
        assert row["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)


def test_microbatch_tokens_change_no_metric_beyond_rounding(world):
    rows = [
        read_metrics(run("train_ppo", world, f"--max_updates 2 --run_name ppo_{tokens} --microbatch_tokens {tokens}"))
        for tokens in (150, 8192)
    ]
    for small, large in zip(*rows, strict=True):
        for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "objective/scores", "grad_norm"):
            assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-6), name


class Killed(Exception):
    """Stands in for a kill: nothing in the scripts catches it."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_ends_bit_identical_to_an_uninterrupted_one(name, world, monkeypatch):
    straight = run(name, world, "--save_every 2 --run_name straight")
    log = Run.log

    def die_after_step_3(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die_after_step_3)
        with pytest.raises(Killed):
            run(name, world, "--save_every 2 --run_name resumed")
    resumed = run(name, world, "--save_every 2 --run_name resumed --resume")

    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (straight, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    clocks = ("time", "perf/")  # what differs between any two runs

    def values(folder):
        return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(folder)]

    assert values(straight) == values(resumed)


def test_every_flag_is_read():
    for script in (*SCRIPTS.values(), eval_script):
        readers = script.__file__, ROOT / "nanorlhf/run.py", ROOT / "nanorlhf/preflight.py"
        assert unread_fields(script.Config, *readers) == []


def test_the_numbers_in_a_docstring_are_the_numbers_in_the_code():
    for script in (*SCRIPTS.values(), eval_script):
        source = Path(script.__file__).read_text()
        doc, code = source.split('"""', 2)[1:]
        announced = [line.split(".")[0].strip() for line in doc.splitlines() if line.strip()[:2].rstrip(".").isdigit()]
        headings = [line for line in code.splitlines() if line.strip()[:3] in NUMBERS]
        in_code = [line.split("#")[1].split(".")[0].strip() for line in headings]
        assert announced == in_code, script.__file__


NUMBERS = [f"# {digit}" for digit in range(1, 10)]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train_ppo.py --batch_size 100 --num_minibatches 3", ["batch_size 100", "num_minibatches 3"]),
        ("train_ppo.py --temperature 0", ["temperature 0", "greater than 0"]),
        ("train_ppo.py --learning_rate 1", ["--learning_rate", "--lr"]),
        ("train_rm.py --sft_model nowhere", ["sft_model", "nowhere"]),
        ("train_sft.py --data nowhere", ["data", "nowhere"]),
        ("train_sft.py --preset llama-1b --device cpu", ["--data", "--preset tiny"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(command, words, tmp_path):
    script, *flags = command.split()
    preset = [] if "--preset" in flags else ["--preset", "tiny"]
    done = subprocess.run(
        [sys.executable, ROOT / script, *preset, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not Path("runs").exists()


def test_an_existing_run_is_kept_unless_told_otherwise(world):
    from nanorlhf.errors import UserError

    folder = run("train_sft", world)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        run("train_sft", world)
    assert (folder / "metrics.jsonl").read_bytes() == before
    run("train_sft", world, "--overwrite")
