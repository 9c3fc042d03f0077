"""Whole training steps through the Triton kernels: the same metrics as through the PyTorch references."""

import pytest

import train_ppo
import train_sft
from kernels import runtime
from nanorlhf.run.config import parse
from nanorlhf.run.run import read_metrics

COMMON = "--preset tiny --device cpu --overwrite --save_every 0"
RUNS = {
    train_sft: "--max_updates 2 --batch_size 1 --eval_posts 1 --response_length 4",
    train_ppo: "--max_updates 2 --batch_size 2 --response_length 4 --num_ppo_epochs 2 --sample_every 0 --kl_estimator full"
    " --num_minibatches 1 --critic_warmup 0 --no_preflight",
}


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_a_script_logs_the_same_with_triton_as_with_the_references(script, world, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"{COMMON} --data {world} {models[script.__name__]} {RUNS[script]} --run_name"
    rows = {}
    for mode in ("torch", "triton"):
        monkeypatch.setattr(runtime, "MODE", mode)
        script.main(parse(script.Config, script.PRESETS, script.__doc__, [*flags.split(), mode]))
        rows[mode] = read_metrics(tmp_path / "runs" / mode)
    assert len(rows["torch"]) == len(rows["triton"]) >= 2
    for plain, ours in zip(rows["torch"], rows["triton"], strict=True):
        assert plain.keys() == ours.keys()
        for name, value in plain.items():
            if isinstance(value, (int, float)) and not name.startswith(("time", "perf")):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
