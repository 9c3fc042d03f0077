"""Schedules, AdamW against torch's, fp32 masters of bf16 weights, and a resume that is exact."""

import math

import pytest
import torch
from torch import nn

from nanorlhf.errors import NotFinite, UserError
from nanorlhf.models import ScalarModel
from nanorlhf.optim import MOMENTS, SCHEDULES, AdamW, constant_lr, cosine_lr, linear_lr, wsd_lr
from nanorlhf.storage.resume import load_state, save_state


def make_model(seed: int = 0, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def train(model, optimizer, steps, max_grad_norm=None) -> list[float]:
    """Steps whose gradients differ in size by orders of magnitude; returns their norms."""
    norms = []
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        (model(x).pow(2).mean() * 10.0 ** (step % 3 - 1)).backward()
        norms.append(optimizer.step(1e-2 / (step + 1), max_grad_norm).item())
    return norms


def test_golden_cosine_schedule():
    expected = [3e-6, 2.9999910808426766e-06, 2.9999643234767745e-06, 2.999919728220498e-06]
    assert [cosine_lr(step, 911, 3e-6) for step in range(4)] == pytest.approx(expected, rel=1e-14)
    assert cosine_lr(910, 911, 3e-6) == pytest.approx(8.919e-12, rel=1e-3)
    expected = [2.9999964793339335e-06, 2.99998591735226e-06, 2.999968314104561e-06]
    assert [cosine_lr(step, 1450, 3e-6) for step in (1, 2, 3)] == pytest.approx(expected, rel=1e-14)


def test_golden_linear_schedule():
    # The paper numbers updates from 1: update u is our 0-based u - 1.
    expected = {1: 3e-6, 2: 2.9984639016897084e-06, 977: 1.500768049155146e-06, 1953: 1.536098310291778e-09}
    for update, lr in expected.items():
        assert linear_lr(update - 1, 1953, 3e-6) == pytest.approx(lr, rel=1e-12)


def test_every_schedule_begins_at_the_peak_and_a_constant_one_stays():
    assert [schedule(0, 10, 3e-6) for schedule in SCHEDULES.values()] == [3e-6] * 4
    assert constant_lr(9, 10, 3e-6) == 3e-6
    assert SCHEDULES == {"cosine": cosine_lr, "linear": linear_lr, "constant": constant_lr, "wsd": wsd_lr}


def test_wsd_stays_at_the_peak_for_70_percent_of_the_steps_and_falls_to_0_by_equal_parts():
    assert [wsd_lr(step, 10, 3.0) for step in (1, 6, 7, 8, 9, 10)] == pytest.approx([3.0, 3.0, 3.0, 2.0, 1.0, 0.0])
    assert sum(wsd_lr(step, 16, 1.0) for step in range(16)) == pytest.approx(12 + (4 + 3 + 2 + 1) / 4.8)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_five_steps_equal_those_of_torchs_adamw(max_grad_norm):
    ours, theirs = make_model(), make_model()
    norms = train(ours, AdamW([ours], lr=1.0), range(5), max_grad_norm)

    class Torchs:
        adam = torch.optim.AdamW(theirs.parameters(), lr=1.0, eps=1e-5)  # betas and weight decay are torch's defaults

        def step(self, lr, max_grad_norm):
            self.adam.param_groups[0]["lr"] = lr
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or math.inf)
            self.adam.step()
            self.adam.zero_grad()
            return norm

    expected = train(theirs, Torchs(), range(5), max_grad_norm)
    assert norms == pytest.approx(expected, rel=1e-5) and max(norms) > 1 > min(norms)  # some are clipped, some are not
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert mine.grad is None


def test_each_model_has_its_own_learning_rate_and_only_that():
    """Two models trained at once, each at its rate, end as each alone does, bit for bit: where no gradient is clipped
    the other model changes nothing."""
    together, alone = [make_model(0), make_model(1)], [make_model(0), make_model(1)]
    optimizer, rates = AdamW(together, lr=1.0), (1e-2, 3e-3)
    apart = [AdamW([model], lr=1.0) for model in alone]
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for model in (*together, *alone):
            model(x).pow(2).mean().backward()
        optimizer.step(rates)
        for one, rate in zip(apart, rates, strict=True):
            one.step(rate)
    for mine, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError):
        optimizer.step((1e-2,))  # one rate for two models


def test_a_model_without_gradients_keeps_its_weights_and_has_no_moments():
    idle, busy = make_model(0), make_model(1)
    before, optimizer = [p.clone() for p in idle.parameters()], AdamW([idle, busy], lr=1e-2)
    train(busy, optimizer, range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, idle.parameters(), strict=True))  # no weight decay either
    state = optimizer.state()
    assert {name.rsplit(".", 1)[1] for name in state if name.startswith("0.")} == {"master"}
    assert {name.rsplit(".", 1)[1] for name in state if name.startswith("1.")} == {"master", *MOMENTS}


def test_defaults_are_the_papers():
    (group,) = AdamW([make_model()], lr=3e-6).adam.param_groups
    assert group["eps"] == 1e-5 and tuple(group["betas"]) == (0.9, 0.999)
    assert group["weight_decay"] == 0.01 and group["lr"] == 3e-6


def test_several_models_are_one_optimizer_with_all_their_parameters():
    first, second = make_model(), make_model(seed=1)
    optimizer = AdamW([first, second], lr=1e-3)
    trained = sum(p.numel() for group in optimizer.adam.param_groups for p in group["params"])
    assert trained == 2 * sum(p.numel() for p in first.parameters())
    assert len(set(optimizer.names)) == len(optimizer.names) == 12


def test_a_bf16_weight_with_a_master_moves_where_a_bf16_weight_alone_would_not():
    def weight():
        layer = nn.Linear(1, 1, bias=False).bfloat16()
        nn.init.constant_(layer.weight, 0.02)
        return layer

    ours, alone = weight(), weight()
    optimizer, pure = AdamW([ours], lr=3e-6), torch.optim.AdamW(alone.parameters(), lr=3e-6, eps=1e-5)
    start = alone.weight.item()
    for _ in range(100):
        for layer in (ours, alone):
            (-layer(torch.ones(1, 1, dtype=torch.bfloat16))).sum().backward()
        optimizer.step(3e-6)
        pure.step()
        pure.zero_grad()
    assert alone.weight.item() == start  # a step of 3e-6 is below half of bf16's spacing there, 6e-5
    (master,) = optimizer.masters
    assert master.dtype == torch.float32 and master.item() == pytest.approx(start + 100 * 3e-6, rel=1e-3)
    assert ours.weight.dtype == torch.bfloat16 and ours.weight.item() == master.bfloat16().item() > start


def test_the_bf16_copy_is_rewritten_in_place():
    model = make_model(dtype=torch.bfloat16)
    pointers = [p.data_ptr() for p in model.parameters()]
    train(model, AdamW([model], lr=1e-2), range(3))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_an_fp32_model_is_its_own_master():
    model = make_model()
    masters = AdamW([model], lr=1.0).masters
    assert all(master is parameter for master, parameter in zip(masters, model.parameters(), strict=True))


def test_gradients_of_microbatches_add_up_in_fp32():
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = AdamW([layer], lr=1.0)
    (layer.weight * 1.0).sum().backward()
    for _ in range(64):
        (layer.weight * 2.0**-10).sum().backward()  # half of bf16's spacing at 1, or less: each would be lost
        assert layer.weight.grad is None
    assert optimizer.masters[0].grad.item() == 1 + 64 * 2.0**-10
    assert torch.bfloat16 == layer.weight.dtype
    optimizer.step(0.0)
    assert optimizer.masters[0].grad is None


def test_microbatches_give_the_gradient_of_the_batch_and_a_step_clears_it():
    whole, pieces = make_model(), make_model()
    a, b = AdamW([whole], lr=1e-3), AdamW([pieces], lr=1e-3)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second step would see what the first one left behind
        (whole(x).pow(2).sum() / 8).backward()
        for part in x.split([1, 4, 3]):
            (pieces(part).pow(2).sum() / 8).backward()
        torch.testing.assert_close(a.step(1e-3), b.step(1e-3), rtol=1e-5, atol=1e-6)
    for mine, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_the_norm_returned_is_the_one_before_clipping():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = AdamW([layer], lr=1.0)
    (layer.weight * torch.tensor([[3.0, 4.0]])).sum().backward()
    assert optimizer.step(0.0, max_grad_norm=1.0).item() == pytest.approx(5.0)
    moment = optimizer.adam.state[layer.weight]["exp_avg"]
    assert moment.flatten().tolist() == pytest.approx([0.06, 0.08], rel=1e-4)  # a tenth of 3/5, 4/5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, dtype, steps):
    model = make_model(dtype=dtype)
    optimizer = AdamW([model], lr=1e-2)
    train(model, optimizer, range(steps))
    save_state(tmp_path / "step", optimizer.state(), {})

    resumed = make_model(seed=9, dtype=dtype)  # other weights: all must come from the state
    resumed_optimizer = AdamW([resumed], lr=1e-2)
    resumed_optimizer.load_state(load_state(tmp_path / "step")[0])
    for mine, other in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)

    more = range(steps, steps + 4)
    assert train(model, optimizer, more) == train(resumed, resumed_optimizer, more)
    first, second = optimizer.state(), resumed_optimizer.state()
    assert first.keys() == second.keys() and len(first) == 4 * 6
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loading_an_early_state_forgets_later_moments():
    model = make_model()
    optimizer = AdamW([model], lr=1e-2)
    start = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    first = train(model, optimizer, range(3))
    optimizer.load_state(start)
    assert train(model, optimizer, range(3)) == first


def test_two_models_that_share_a_parameter_are_refused(make_policy, make_config):
    policy, critic = make_policy(), ScalarModel(make_config(), bias=True)
    AdamW([policy, critic], lr=1e-3)
    critic.model = policy.model
    with pytest.raises(AssertionError, match="share a parameter"):
        AdamW([policy, critic], lr=1e-3)
    with pytest.raises(AssertionError, match="share a parameter"):
        AdamW([policy, policy], lr=1e-3)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_any_weight_moves(bad, dtype, max_grad_norm):
    model = make_model(dtype=dtype)
    optimizer = AdamW([model], lr=1e-2)
    train(model, optimizer, range(2))
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    weights = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 6, dtype=dtype)).sum().backward()
    (model[2].bias * torch.tensor([0.0, bad, 0.0], dtype=dtype)).sum().backward()  # one element of one parameter
    kind = "nan" if math.isnan(bad) else "inf"
    with pytest.raises(NotFinite, match=rf"gradient of Sequential\.2\.bias \({kind}\), expected finite numbers"):
        optimizer.step(1e-2, max_grad_norm)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    after = optimizer.state()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_step_that_is_skipped_moves_nothing_is_counted_and_leaves_no_gradient_behind():
    model, other = make_model(), make_model()
    optimizer, clean = AdamW([model], lr=1e-2), AdamW([other], lr=1e-2)
    train(model, optimizer, range(2))
    train(other, clean, range(2))
    (model[2].bias * math.nan).sum().backward()
    assert math.isnan(optimizer.step(1e-2, 1.0, on_nan="skip")) and optimizer.skipped == 1
    assert optimizer.last_skip == "gradient of Sequential.2.bias (nan)"
    assert train(model, optimizer, range(2, 4)) == train(other, clean, range(2, 4))  # as if it had not been
    assert optimizer.skipped == 1


def test_finite_gradients_whose_norm_overflows_are_named_as_such():
    model = make_model()
    optimizer = AdamW([model], lr=1e-2)
    (model[2].bias * 3e38).sum().backward()
    with pytest.raises(NotFinite, match="norm inf of the gradients"):
        optimizer.step(1e-2)


@pytest.mark.parametrize("key", ["master", "exp_avg", "exp_avg_sq"])
def test_a_weight_or_moment_that_is_not_finite_is_named(key):
    model = make_model()
    optimizer = AdamW([model], lr=1e-2)
    train(model, optimizer, range(1))
    optimizer.check_weights()
    bias = model[2].bias
    (bias.data if key == "master" else optimizer.adam.state[bias][key])[0] = math.inf
    named = "weight Sequential.2.bias" if key == "master" else f"moment {key} of Sequential.2.bias"
    with pytest.raises(NotFinite, match=rf"{named} \(inf\)"):
        optimizer.check_weights()


def test_the_announced_sizes_are_those_of_the_state_and_the_models():
    model = make_model(dtype=torch.bfloat16)
    optimizer = AdamW([model], lr=1e-2)
    train(model, optimizer, range(1))
    moments = [tensor for name, tensor in optimizer.state().items() if not name.endswith(".step")]
    assert optimizer.state_bytes == sum(tensor.nbytes for tensor in moments)
    assert optimizer.model_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_a_state_of_another_model_is_refused_with_both_shapes():
    narrow, wide = nn.Linear(3, 2, bias=False), nn.Linear(4, 2, bias=False)
    state = AdamW([narrow], lr=1e-3).state()
    with pytest.raises(UserError, match=r"tensor 0.weight.master has shape \(2, 3\), expected \(2, 4\)"):
        AdamW([wide], lr=1e-3).load_state(state)
    with pytest.raises(UserError, match=r"has shape \(1, 4\), expected \(2, 4\)"):  # copy_ alone would broadcast it
        AdamW([wide], lr=1e-3).load_state({"0.weight.master": torch.zeros(1, 4)})
