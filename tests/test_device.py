"""Device, dtype and seed: what auto chooses, and what is refused."""

import pytest
import torch

from nanorlhf.device import pick_device, pick_dtype
from nanorlhf.errors import UserError


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
