"""No micro-step waits for the device: nothing asks it for a number, and nothing is copied to it the waiting way.

The micro-steps run on the meta device, which takes the path of a GPU and has no data: whatever would fetch a number
from a GPU (`.item()`, `nonzero`, an index by a mask, `bool()`, `.cpu()`) raises there. Copies towards it are listed.
"""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ppo
import train_rm
import train_sft
from nanorlhf import decoder
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.optim import AdamW
from nanorlhf.ppo import Experience
from nanorlhf.rollout import generate

R, GPU = 5, torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="no CUDA device")


class Lists(TorchFunctionMode):
    """Notes where a Python list or numpy array becomes a tensor on the device: below what a dispatch mode sees."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor) and result.device.type != "cpu"
        indexing = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type != "cpu"
        listed = indexing and any(isinstance(x, list | np.ndarray) for x in (args[1], *tree_leaves(args[1])))
        # x[rows] = 0: the number becomes a tensor on the host and is copied over (x[2:] = 0 rides in the launch)
        scattered = indexing and len(args) > 2 and not isinstance(args[2], torch.Tensor)
        scattered &= any(isinstance(x, torch.Tensor) for x in tree_leaves(args[1:2]))
        if made or listed or scattered:
            self.found.append(function.__name__)
        return result


class Copies(TorchDispatchMode):
    """Notes copies from the host after which it would have to wait for a GPU, and the numbers it asks for."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name
        on_device = isinstance(result, torch.Tensor) and not result.device.type == "cpu"
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        from_host = [x for x in tensors if x.device.type == "cpu" and x.dim()]  # a number rides in the launch
        waiting = name == "aten::_local_scalar_dense"
        if on_device:
            waiting |= name == "aten::_to_copy" and bool(from_host) and not kwargs.get("non_blocking")
            waiting |= name in ("aten::index", "aten::index_put", "aten::index_put_") and bool(from_host)
            waiting |= name == "aten::copy_" and bool(from_host) and not any(x is True for x in args[2:])
        if waiting:
            self.found.append(name)
        return result


def models(make_config, device: str, dtype=torch.bfloat16) -> tuple[Policy, ScalarModel]:
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=128)  # the copy engine wants multiples
    with torch.device("meta"):
        policy, critic = Policy(make_config(**sizes)), ScalarModel(make_config(**sizes), bias=True)
    both = policy.to(dtype).to_empty(device=device), critic.to(dtype).to_empty(device=device)
    critic.score.float()
    if device != "meta":
        with torch.no_grad():
            for parameter in [*policy.parameters(), *critic.parameters()]:
                parameter.normal_(0, 0.05)
    return both


def steps(make_config, make_sequences, device: str) -> dict:
    """The micro-steps of the three stages: name -> function of no arguments."""
    policy, critic = models(make_config, device)
    sequences = make_sequences([40, 9, 77, 30])
    B = len(sequences)
    zeros, mask = torch.zeros(B, R, device=device), torch.ones(B, R, device=device, dtype=torch.bool)
    responses = torch.zeros(B, R, device=device, dtype=torch.int64)
    episode = Experience(sequences, responses, mask, mask, zeros, zeros, zeros, zeros)
    ppo_cfg = train_ppo.Config(batch_size=B, response_length=R)
    sft_cfg, rm_cfg = train_sft.Config(batch_size=B), train_rm.Config(batch_size=2)
    pairs = [(sequences[0], sequences[1], sequences[2]), (sequences[2], sequences[3], sequences[1])]
    AdamW([policy, critic], lr=1e-3)  # its hooks move the gradients, microbatch by microbatch
    return {
        "ppo": lambda: train_ppo.learn(policy, critic, episode, np.array([2, 0, 1, 3]), np.array([2, 0]), ppo_cfg),
        "sft": lambda: train_sft.learn(policy, sequences, sft_cfg),
        "rm": lambda: train_rm.learn(critic, pairs, rm_cfg),
    }


def waits(step) -> list[str]:
    step()  # the first one builds tables: the frequencies of the rotations
    found: list[str] = []
    with Lists(found), Copies(found):
        step()
    return found


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_micro_step_asks_the_device_for_nothing_and_waits_for_no_copy(make_config, make_sequences, stage):
    assert waits(steps(make_config, make_sequences, "meta")[stage]) == []


def test_scoring_asks_the_device_for_nothing(make_config, make_sequences):
    policy, critic = models(make_config, "meta")
    sequences, cfg = make_sequences([40, 9, 77]), train_ppo.Config(microbatch_tokens=80)
    responses = torch.zeros(3, R, device="meta", dtype=torch.int64)
    scored = train_ppo.score(policy, policy, critic, critic, sequences, sequences, responses, cfg)
    assert scored.values.shape == (3, R)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_a_rollout_waits_for_no_copy(make_config, make_sequences, monkeypatch, temperature):
    """Its prefill in several passes too: 128 queries of Llama-3.2-1B are three of them on a GPU."""
    policy, _ = models(make_config, "meta")
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", {"cuda": 80})
    assert waits(lambda: generate(policy, make_sequences([40, 9, 77]), R, temperature)) == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.repeat_interleave(x, x.long()),
    ],
    ids=["item", "bool", "mask", "cpu", "repeat_interleave"],
)
def test_each_way_to_ask_the_device_raises_on_meta(ask):
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.ones(3, device="meta"))


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.ones(3).to("meta"),
        lambda x: torch.tensor([1, 2], device="meta"),
        lambda x: x[np.array([1, 0])],
        lambda x: x[[1, 0]],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.__setitem__(x.long(), 0.0),
    ],
    ids=["to", "tensor", "numpy index", "list index", "copy_", "number at an index"],
)
def test_each_way_to_copy_and_wait_is_listed(copy):
    assert waits(lambda: copy(torch.ones(3, device="meta"))) != []


def test_an_optimizer_step_asks_once_whether_the_gradient_is_finite(make_policy, make_sequences):
    policy = make_policy()
    optimizer = AdamW([policy], lr=1e-3)
    cfg = train_sft.Config(batch_size=2)
    train_sft.learn(policy, make_sequences([9, 12]), cfg)
    found = []
    with Copies(found):
        optimizer.step(1e-3, max_grad_norm=1.0)
    assert found == ["aten::_local_scalar_dense"]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_micro_step_does_not_synchronise_with_the_gpu(make_config, make_sequences, stage):
    step = steps(make_config, make_sequences, "cuda")[stage]
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
