"""train_ppo.py --critic_warmup, --critic_lr and --lr_warmup: who learns when, at which rate, and after a resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import Killed, assert_same_weights, run, start

from nanorlhf.optim import MOMENTS
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.storage.resume import latest_checkpoint, load_state


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


CRITIC, POLICY = "1.", "0."  # how the names of their tensors begin in a checkpoint


def tensors(name: str, world, models, flags: str) -> dict[str, torch.Tensor]:
    """What the checkpoint after update 2 of 4 holds: masters and moments of policy (0.) and critic (1.)."""
    folder = run("train_ppo", world, f"{models['train_ppo']} --run_name {name} --save_every 2 --no_preflight {flags}")
    return load_state(latest_checkpoint(folder))[0]


def of(model: str, found: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name: found[name] for name in found if name.startswith(model) and name.endswith(f".{kind}")}


def test_in_the_warmup_the_critic_learns_and_the_policy_is_bit_identical_and_has_no_moments(world, models):
    found = tensors("warm", world, models, "--critic_warmup 2")
    sft = load_policy(models["train_ppo"].split()[1])
    masters = of(POLICY, found, "master")
    assert all(torch.equal(masters.pop(f"{POLICY}{name}.master"), p) for name, p in sft.named_parameters())
    assert not masters
    assert not any(of(POLICY, found, key) for key in MOMENTS)
    assert all(step.item() == 2 * 4 for step in of(CRITIC, found, "step").values())  # 2 updates of 4 minibatches
    rows = read_metrics("runs/warm")
    assert [row["objective/kl"] for row in rows[:3]] == pytest.approx([0, 0, 0], abs=1e-4)  # of update 3 too: before it
    assert rows[3]["objective/kl"] != pytest.approx(0, abs=1e-4)
    assert ["loss/policy_avg" in row for row in rows] == [False, False, True, True]
    assert all("loss/value_avg" in row and row["critic_lr"] > 0 for row in rows)


def test_the_policy_is_checked_before_its_first_step_also_after_a_warmup(world, models):
    rows = read_metrics(run("train_ppo", world, f"{models['train_ppo']} --critic_warmup 2"))
    checked = [[key for key in row if key.startswith("preflight/")] for row in rows]
    in_the_loss = "preflight/ratio_in_the_loss"
    assert [in_the_loss in keys for keys in checked] == [False, False, True, False]
    assert [len(keys) for keys in checked] == [11, 6, 8, 0]


def test_the_critics_rate_moves_the_critic_alone(world, models):
    """One update: the policy ends as without the flag, bit for bit (no gradient is clipped), the critic elsewhere."""
    one = "--max_updates 1 --critic_warmup 0 --lr_warmup 0 --lr 3e-4 --max_grad_norm 1e9 --no_preflight --run_name"
    plain = run("train_ppo", world, f"{models['train_ppo']} {one} plain --critic_lr None")
    same = run("train_ppo", world, f"{models['train_ppo']} {one} same --critic_lr 3e-4")
    fast = run("train_ppo", world, f"{models['train_ppo']} {one} fast --critic_lr 1.5e-3")
    for folder in (same, fast):
        assert_same_weights(plain, folder)
    critics = [load_file(folder / "final_critic" / "model.safetensors") for folder in (plain, same, fast)]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[0])
    before = load_file(Path(models["train_ppo"].split()[3]) / "model.safetensors")
    moved = [sum((critic[name] - before[name]).norm() for name in critic if name in before) for critic in critics]
    assert moved[2] > 2 * moved[0] > 0
    rows = [read_metrics(folder)[0] for folder in (plain, fast)]
    assert [(row["lr"], row["critic_lr"]) for row in rows] == [(3e-4, 3e-4), (3e-4, 1.5e-3)]


def test_both_rates_follow_the_schedule(world, models):
    flags = "--critic_lr 1e-3 --lr_schedule linear --no_preflight"
    rows = read_metrics(run("train_ppo", world, f"{models['train_ppo']} {flags}"))
    assert [row["critic_lr"] for row in rows] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_the_policys_rate_rises_after_the_critics_warmup_and_the_critics_does_not(world, models):
    """Updates 0 to 3 of a constant rate: the critic alone, then a third, two thirds, the whole."""
    flags = "--critic_warmup 1 --lr_warmup 2 --lr 3e-4 --critic_lr None --lr_schedule constant --no_preflight"
    rows = read_metrics(run("train_ppo", world, f"{models['train_ppo']} {flags}"))
    assert [row["lr"] for row in rows] == pytest.approx([0, 1e-4, 2e-4, 3e-4])
    assert [row["critic_lr"] for row in rows] == [3e-4] * 4


def test_a_run_that_was_resumed_inside_the_warmup_ends_bit_identical(world, models, monkeypatch):
    flags = f"{models['train_ppo']} --save_every 1 --critic_warmup 3 --critic_lr 1e-3"
    straight = run("train_ppo", world, f"{flags} --run_name straight")
    log = Run.log

    def die_after_step_2(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die_after_step_2)
        with pytest.raises(Killed):
            run("train_ppo", world, f"{flags} --run_name resumed")
    resumed = start("train_ppo", "--run_name resumed --resume --device cpu")
    assert_same_weights(straight, resumed)
    critics = [load_file(folder / "final_critic" / "model.safetensors") for folder in (straight, resumed)]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[0])
    with pytest.raises(Exception, match="--critic_warmup 2 is not 3"):
        start("train_ppo", "--run_name resumed --resume --device cpu --critic_warmup 2")


def test_all_are_off_in_the_presets_of_the_paper():
    import train_ppo

    for preset in ("llama-1b", "paper"):
        cfg = train_ppo.Config(**train_ppo.PRESETS[preset])
        assert cfg.critic_warmup == cfg.lr_warmup == 0 and cfg.critic_lr is None
