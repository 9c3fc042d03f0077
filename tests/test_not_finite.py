"""Numbers that go wrong in the scripts: they stop the run or are left out, are named, and are never saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import SCRIPTS, assert_same_weights, run, start

import train_ppo
from nanorlhf.errors import UserError
from nanorlhf.optim import AdamW
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.storage.resume import latest_checkpoint


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_ppo_stops_at_a_gradient_that_is_not_finite_and_its_checkpoint_can_be_resumed(world, models, monkeypatch):
    flags = f"{models['train_ppo']} --max_updates 3 --save_every 1"
    straight = run("train_ppo", world, f"{flags} --run_name straight")
    learn, calls = train_ppo.learn, []

    def explode(policy, *rest):
        calls.append(1)
        stats = learn(policy, *rest)
        if len(calls) == 6:  # in the second update
            policy.model.norm.weight.grad[0] = torch.nan
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "learn", explode)
        named = r"update 2: gradient of Policy.model.norm.weight \(nan\), .* samples tiny-.* is runs/ppo/check\S*step_1"
        with pytest.raises(UserError, match=named):
            run("train_ppo", world, flags)
    told = json.loads(Path("runs/ppo/not_finite.json").read_text(encoding="utf-8"))
    assert told["step"] == 2 and len(told["ids"]) == 8
    assert [row["step"] for row in read_metrics("runs/ppo")] == [1] and not Path("runs/ppo/final").exists()
    assert_same_weights(straight, start("train_ppo", "--resume --device cpu"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_with_on_nan_skip_a_step_with_a_bad_gradient_is_left_out_counted_and_remembered(
    name, world, models, monkeypatch, capsys
):
    step, calls = AdamW.step, []

    def spoil(self, *args):
        calls.append(1)
        if len(calls) == 2:
            self.masters[0].grad.flatten()[0] = torch.nan
        return step(self, *args)

    monkeypatch.setattr(AdamW, "step", spoil)
    more = "--num_ppo_epochs 1 --num_minibatches 1 --critic_warmup 0" if name == "train_ppo" else ""
    folder = run(name, world, f"{models[name]} --on_nan skip --save_every 1 {more}")
    out = capsys.readouterr().out
    assert out.count("was skipped, 1 steps so far: gradient of") == 1
    assert json.loads((latest_checkpoint(folder) / "state.json").read_text(encoding="utf-8"))["skipped"] == 1
    tensors = load_file(folder / "final" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert [row.get("not_finite") for row in read_metrics(folder)][1] == {"grad_norm": "nan"}


def test_a_score_that_is_not_finite_is_named_with_its_sample_and_the_run_can_go_on_without_it(
    world, models, monkeypatch, capsys
):
    flags = f"{models['train_ppo']} --save_every 1 --no_preflight"
    score, calls = train_ppo.ScalarModel.last_scores, []

    def spoil(self, packed):
        calls.append(1)
        return score(self, packed).index_fill(0, torch.tensor([2]), torch.nan if len(calls) == 2 else 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(train_ppo.ScalarModel, "last_scores", spoil)
        with pytest.raises(UserError, match=r"update 2: scores \(nan\), expected finite numbers; samples tiny-\S+; "):
            run("train_ppo", world, flags)
    assert len(json.loads(Path("runs/ppo/not_finite.json").read_text(encoding="utf-8"))["ids"]) == 1
    assert [row["step"] for row in read_metrics("runs/ppo")] == [1]
    calls.clear()
    calls.append(1)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo.ScalarModel, "last_scores", spoil)
        start("train_ppo", "--resume --device cpu --on_nan skip")
    assert "warning update 2: scores (nan); samples tiny-" in capsys.readouterr().out
    assert len(read_metrics("runs/ppo")) == 4
    tensors = load_file("runs/ppo/final/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_weights_that_are_not_finite_are_never_saved(world, models, monkeypatch):
    log = Run.log

    def spoil(self, step, metrics):
        if step == 3:
            spoilt[0].masters[0].data.flatten()[0] = torch.inf
        log(self, step, metrics)

    spoilt = []
    began = Run.resume
    monkeypatch.setattr(Run, "resume", lambda self, optimizer: (spoilt.append(optimizer), began(self, optimizer))[1])
    monkeypatch.setattr(Run, "log", spoil)
    with pytest.raises(UserError, match=r"step 3: weight Policy\S+ \(inf\), .* last good checkpoint is \S+step_2"):
        run("train_sft", world, f"{models['train_sft']} --save_every 1 --on_nan skip")
    assert latest_checkpoint("runs/sft").name == "step_2" and not Path("runs/sft/final").exists()


def test_a_kl_above_stop_kl_ends_the_run_before_it_is_saved(world, models):
    with pytest.raises(UserError, match=r"objective/kl \S+ is not at most --stop_kl 1e-09: .* --resume"):
        run("train_ppo", world, f"{models['train_ppo']} --save_every 1 --stop_kl 1e-9 --lr 1e-2")
    step = read_metrics("runs/ppo")[-1]["step"]
    assert step > 1 and latest_checkpoint("runs/ppo").name == f"step_{step - 1}"
