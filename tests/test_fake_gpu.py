"""The passes of training on tensors that say they are on a GPU, without one: the lane that stands in for a card.

    python -m pytest tests/test_fake_gpu.py       in this environment, and so in `make test`: seconds
    make test-oldest test-newest                  with the oldest and the newest torch of pyproject.toml, built for CUDA

Two stand-ins, neither with data. The meta device, and a check that no operation mixes a tensor of it with one of the
host, as a card would refuse. And fake CUDA tensors, torch's own for its compiler, which check the same by themselves;
they need a torch that was built for CUDA, though no card, and have no backward pass without one. In both a number that
is read on the host raises. What neither can see: wrong numbers, races, and time.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ppo
import train_rm
import train_sft
from kernels import runtime
from nanorlhf import optim, ppo
from nanorlhf.decoder import decoder_for
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.optim import AdamW
from nanorlhf.ppo import Experience

R, B = 5, 4
SEQUENCES = [[3] * n for n in (40, 9, 77, 30)]
pytestmark = pytest.mark.skipif(
    runtime.triton is None, reason="Triton is not installed, so a GPU would have no kernels"
)


class OneDevice(TorchDispatchMode):
    """Refuses what a card would refuse: operands on the device and on the host. A number may be, and a copy must."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        copies = function._schema.name in ("aten::copy_", "aten::_to_copy")
        if len({x.device.type for x in tensors}) > 1 and not copies:
            raise RuntimeError(f"{function._schema.name}: tensors on the device and on the host")
        return function(*args, **kwargs)


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA"))


@pytest.fixture(params=["meta", CUDA])
def card(request, monkeypatch):
    """The device to make tensors on; inside, nothing there has data. Memory need not be pinned for a copy to it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    with OneDevice() if request.param == "meta" else FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param


def models(card: str, make_config) -> tuple[Policy, ScalarModel]:
    """A policy and a critic in bf16, the critic's head in fp32."""
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=128)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(card):
            policy, critic = Policy(make_config(**sizes)), ScalarModel(make_config(**sizes), bias=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in list(critic.score.named_parameters()):
        setattr(critic.score, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.float32)))
    return policy, critic


def on_card(*results) -> None:
    tensors = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
    assert tensors and all(x.device.type in ("cuda", "meta") for x in tensors)


def experience(card: str, sequences: list[list[int]]) -> Experience:
    numbers, mask = torch.zeros(B, R, device=card), torch.ones(B, R, device=card, dtype=torch.bool)
    return Experience(sequences, torch.zeros(B, R, device=card, dtype=torch.int64), mask, mask, *(numbers,) * 4)


@pytest.mark.parametrize("kl_estimator", ["k1", "full"])
def test_scoring(card, make_config, kl_estimator):
    policy, critic = models(card, make_config)
    sequences = SEQUENCES
    cfg = train_ppo.Config(microbatch_tokens=80, kl_estimator=kl_estimator)
    responses = experience(card, sequences).responses
    scored = train_ppo.score(policy, policy, critic, critic, sequences, sequences, responses, cfg)
    on_card(scored)
    assert scored.values.shape == (B, R) and scored.raw_scores.shape == (B,)


def test_rewards_and_advantages(card, make_config):
    e = experience(card, [[1]] * B)
    cfg = train_ppo.Config()
    rewards = ppo.token_rewards(e.values[:, 0], e.logprobs, e.responses, 2, cfg.kl_coef)
    advantages, returns = ppo.gae(rewards, e.values, cfg.gamma, cfg.lam)
    on_card(ppo.action_mask(e.responses, 2), ppo.value_mask(e.responses, 2), returns, advantages)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_learning_and_the_optimizer(card, make_config, monkeypatch, stage, recompute):
    """Two micro-steps, so that gradients add up, and a step, which asks once whether they are finite."""
    policy, critic = models(card, make_config)
    for model in (policy, critic):
        model.model.activation_checkpointing = recompute
    sequences = SEQUENCES
    trained = {"sft": [policy], "rm": [critic], "ppo": [policy, critic]}[stage]
    optimizer = AdamW(trained, lr=1e-3)
    order, e = np.array([2, 0, 1, 3]), experience(card, sequences)
    pairs = [(sequences[0], sequences[1], sequences[2]), (sequences[2], sequences[3], sequences[1])]
    learn = {
        "sft": lambda: train_sft.learn(policy, sequences, train_sft.Config(batch_size=B, microbatch_tokens=80)),
        "rm": lambda: train_rm.learn(critic, pairs, train_rm.Config(batch_size=2)),
        "ppo": lambda: train_ppo.learn(
            policy, critic, e, order, order[:2], train_ppo.Config(batch_size=B, response_length=R)
        ),
    }[stage]
    if card == "cuda":  # torch's engine wants the card itself for a backward pass: what one would leave is put there
        leave = lambda _: [setattr(m, "grad", torch.empty_like(m)) for m in optimizer.masters]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "backward", leave)
    on_card(learn(), learn())
    asked = []
    monkeypatch.setattr(optim.torch, "isfinite", lambda tensor: asked.append(tensor) or True)
    if card == "meta":  # which the fused step refuses
        monkeypatch.setattr(optimizer.adam, "step", lambda: None)
    norm = optimizer.step(1e-3, max_grad_norm=1.0)
    on_card(norm, optimizer.masters, *optimizer.parameters)
    assert len(asked) == 1 and all(master.grad is None for master in optimizer.masters)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_a_rollout_step_by_step(card, make_config, temperature):
    policy, _ = models(card, make_config)
    loop = decoder_for(policy, 3, 77, R, temperature)
    noise = torch.zeros(3, R, dtype=torch.float64)
    responses, logprobs = loop.decode(policy, [[3] * n for n in (40, 9, 77)], noise, use_graph=False)
    on_card(responses, logprobs)
    assert responses.shape == logprobs.shape == (3, R)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(3),
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[torch.ones(3) > 0],
    ],
    ids=["a tensor of the host", "a number that is read", "a condition", "a mask of the host"],
)
def test_what_a_card_would_refuse_or_wait_for_raises(card, wrong):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wrong(torch.ones(3, device=card))
