"""Where a run computes: work side by side gives what it gives one after the other."""

import threading

import pytest
import torch

from nanorlhf.device import side_by_side

CPU = torch.device("cpu")


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
