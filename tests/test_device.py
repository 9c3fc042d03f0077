"""Device, dtype and seed: what auto chooses, and what is refused; work side by side gives what it gives in turn."""

import threading

import pytest
import torch

from nanorlhf.errors import UserError
from nanorlhf.run.device import pick_device, pick_dtype, side_by_side

CPU = torch.device("cpu")


def test_auto_takes_cuda_in_bfloat16_where_there_is_one_and_else_the_cpu_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu") and pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert pick_device("auto") == torch.device("cuda") and pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(UserError, match="device cuda:1 is not among the 1 CUDA devices here"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4 has no bf16
    assert pick_dtype("auto", torch.device("cuda")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16  # who asks for it gets it


def test_a_device_or_dtype_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="among the 0 CUDA devices"):
        pick_device("cuda")
    with pytest.raises(UserError, match="device gpu is not auto, cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(UserError, match="dtype float16 is not auto, float32 or bfloat16"):
        pick_dtype("float16", torch.device("cpu"))


# --- work side by side ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_the_number_of_threads_is_as_before(threads):
    assert side_by_side(lambda: 1, lambda: 2, device=CPU) == [1, 2]
    assert torch.get_num_threads() == threads


def test_two_tasks_run_at_the_same_time_where_there_are_cores(threads):
    if threads == 1:
        names = side_by_side(*[threading.current_thread] * 2, device=CPU)
        assert names == [threading.current_thread()] * 2  # no thread is started
    else:
        meeting = threading.Barrier(2, timeout=20)  # breaks unless both arrive
        assert sorted(side_by_side(meeting.wait, meeting.wait, device=CPU)) == [0, 1]


def test_each_task_has_its_share_of_the_threads(threads):
    assert side_by_side(*[torch.get_num_threads] * 2, device=CPU) == [max(1, threads // 2)] * 2


def test_gradients_are_those_of_one_after_the_other(threads):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    models = [torch.nn.Linear(32, 32) for _ in range(2)]
    one_after_the_other = [torch.autograd.grad(m(x).square().sum(), m.parameters()) for m in models]
    together = side_by_side(*[lambda m=m: torch.autograd.grad(m(x).square().sum(), m.parameters()) for m in models],
                            device=CPU)  # fmt: skip
    for ours, theirs in zip(together, one_after_the_other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_an_error_is_raised_and_the_number_of_threads_is_as_before(threads):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda: 1, fails, device=CPU)
    assert torch.get_num_threads() == threads
