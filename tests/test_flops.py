"""Model FLOPs against published counts, and against what PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import runtime
from nanorlhf.llama import LlamaConfig
from nanorlhf.monitoring import flops
from nanorlhf.packing import pack

LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None,
    max_position_embeddings=131072, tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001,
    pad_token_id=128004,
)  # fmt: skip


def test_llama_1b_takes_two_flops_a_weight_and_token():
    weights = 1_235_814_400 - 262_668_288 - 33 * 2048  # parameters less the embedding and the norms
    assert flops.trunk_flops(LLAMA_1B, [1] * 10) == pytest.approx(10 * 2 * weights + 10 * 16 * 4 * 2048)
    assert flops.head_flops(LLAMA_1B, 1) == 2 * 2048 * 128_256


def test_attention_is_causal():
    one, two = (flops.trunk_flops(LLAMA_1B, lengths) for lengths in ([100], [50, 50]))
    assert one - two == 16 * 4 * 2048 * (100 * 101 // 2 - 2 * 50 * 51 // 2)


def test_matrices_are_what_pytorch_counts(make_policy, make_sequences, monkeypatch):
    monkeypatch.setattr(runtime, "MODE", "torch")  # PyTorch counts its own matrices only, not oneDNN's
    policy = make_policy()
    packed = pack(make_sequences([7, 12]), round_to=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.hidden(packed)
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    attention = 2 * 4 * 4 * 8 * (7 * 8 // 2 + 12 * 13 // 2)  # L 4 H Dh (keys seen)
    assert flops.trunk_flops(policy.config, [7, 12]) - attention == counted > 0


@pytest.mark.parametrize("read", [[18], [6, 18], list(range(19))], ids=len)
def test_the_last_layer_runs_where_it_is_read(make_policy, make_sequences, monkeypatch, read):
    monkeypatch.setattr(runtime, "MODE", "torch")
    policy = make_policy()
    packed = pack(make_sequences([7, 12]), round_to=1)
    with FlopCounterMode(display=False) as counter:
        policy.hidden(packed, torch.tensor(read)).sum().backward()
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    attention = 2 * 4 * 4 * 8 * (7 * 8 // 2 + 12 * 13 // 2)
    assert 3 * (flops.trunk_flops(policy.config, [7, 12], len(read)) - attention) == counted  # the backward pass as well
    assert flops.trunk_flops(policy.config, [7, 12], 19) == flops.trunk_flops(policy.config, [7, 12])


def test_an_update_by_hand():
    trunk, head = flops.trunk_flops(LLAMA_1B, [403] * 128, 128 * 53), flops.head_flops(LLAMA_1B, 128 * 53)
    read = flops.trunk_flops(LLAMA_1B, [403] * 128, 128)  # by the reward model
    total = flops.ppo_update_flops(LLAMA_1B, [403] * 128, [403] * 128, 53, epochs=4)
    assert total == pytest.approx(read + trunk * (1 + 3 + 24) + head * (1 + 2 + 12))
    assert 4 * 3 * (2 * trunk + head) == pytest.approx(2.36e15, rel=0.01)  # the learning phase alone
    of_critic = flops.ppo_update_flops(LLAMA_1B, [403] * 128, [403] * 128, 53, epochs=4, warming=True)
    assert total - of_critic == pytest.approx(4 * 3 * (trunk + head))  # the policy does not learn


def test_mfu_where_the_peak_is_known(monkeypatch):
    assert flops.mfu(1e12, 1.0, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert flops.mfu(494.5e12, 1.0, torch.device("cuda")) == pytest.approx(0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert flops.mfu(1e12, 1.0, torch.device("cuda")) is None
