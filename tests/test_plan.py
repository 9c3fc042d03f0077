"""bench.plan against real tensors: what it counts is what is there."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from bench import plan
from bench.memory import Meter, saved_bytes
from bench.shapes import four_models, llama_config, random_model, shape_for
from kernels import runtime
from nanorlhf.models import Policy
from nanorlhf.optim import AdamW
from nanorlhf.packing import pack
from nanorlhf.run import waiting

REAL = shape_for("meta")
SMALL = shape_for("cpu")


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_weights_masters_gradients_and_moments_are_those_of_a_real_optimizer():
    models = policy, _, critic, _ = four_models(SMALL.config, "cpu", torch.bfloat16)
    optimizer = AdamW([policy, critic], lr=1e-3)
    for parameter in optimizer.parameters:
        parameter.sum().backward()
    gradients = nbytes(master.grad for master in optimizer.masters)
    optimizer.step(1e-3)
    moments = [x for s in optimizer.adam.state.values() for key, x in s.items() if key != "step"]
    masters = [m for m, p in zip(optimizer.masters, optimizer.parameters, strict=True) if m is not p]
    real = [nbytes(p for m in models for p in m.parameters()), nbytes(masters), gradients, nbytes(moments)]
    states = plan.predict("ppo", SMALL, batch_size=4).states
    assert list(states) == ["weights of four models", "fp32 masters", "fp32 gradients", "Adam's two moments"]
    for name, size in zip(states, real, strict=True):
        rounding = 512 * 4 * len(optimizer.parameters)  # the allocator's, a tensor
        assert size <= states[name] <= size + rounding, name


def test_the_models_of_the_plan_have_the_size_of_llama_32_1b():
    policy = random_model(Policy, llama_config(), "meta", torch.bfloat16)
    assert sum(p.numel() for p in policy.parameters()) == 1_235_814_400


def test_what_a_token_keeps_for_the_backward_pass_by_hand():
    """In bf16 on a GPU, a layer: 75,912 bytes a token. The list to shorten when a layer is to cost less."""
    c = llama_config()
    D, F, heads, q, kv = 2048, 8192, 32, 2 * 2048, 2 * 8 * 64  # q, kv: bytes of queries, of keys
    norm = 2 * D + 4 + 2 * D  # the sum with the update, 1/rms, the output: it enters a matmul
    attention = q + 2 * kv + q + 4 * heads  # q, k and v, the output, its log-sums
    mlp = 2 * 2 * F + 2 * F  # gate and up, what enters the last matmul
    layer = 2 * norm + attention + mlp
    rotations, last_norm, ids = 2 * 4 * 32, norm - 2 * D, 8  # cos and sin for all layers; the output goes to the head
    assert layer == 75_912
    kept = plan.saved_per_token(REAL)
    assert kept == pytest.approx(c.num_hidden_layers * layer + rotations + last_norm + ids, abs=1)


class Made(TorchDispatchMode):
    """Notes every operation that makes or fills a tensor of at least so many bytes, and its name."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.nbytes >= self.least for x in tree_leaves(result)):
            self.found.append(function._schema.name)
        return result


@pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed: the references make other tensors")
@pytest.mark.parametrize("name", ["linear_ppo_loss", "linear_cross_entropy", "linear_logprob"])
def test_the_head_fills_no_gradients_of_zeros(name):
    """Of its outputs only the loss has a gradient. torch would make zeros for the others: of dW, 1.05 GB a micro-step."""
    V, D, M = 128_256, 2048, 64
    hidden, weight = (torch.empty(n, D, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (M, V))
    rows, labels = torch.empty(M, device="meta"), torch.empty(M, device="meta", dtype=torch.int64)
    loss = {
        "linear_ppo_loss": lambda: kernels.linear_ppo_loss(hidden, weight, labels, rows, rows, rows).loss,
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(hidden, weight, labels, rows),
        "linear_logprob": lambda: kernels.linear_logprob(hidden, weight, labels)[0].sum(),
    }[name]
    with Made(least=V * D) as made:
        loss().backward()
    assert weight.grad is not None
    assert not [op for op in made.found if "zero" in op or "fill" in op], made.found


def test_a_second_gradient_is_added_without_a_copy_in_fp32():
    """Llama 3's embedding: 0.5 GB in bf16. The first gradient of a step is written in fp32, those after it are added."""
    layer = torch.nn.Linear(2048, 4096, bias=False, dtype=torch.bfloat16, device="meta")
    optimizer = AdamW([layer], lr=1e-6)
    for micro_step in range(2):
        x = torch.empty(8, 2048, dtype=torch.bfloat16, device="meta")
        loss = layer(x).sum()
        with Made(least=4 * layer.weight.numel()) as made:  # bytes of fp32
            loss.backward()
        assert made.found == [["aten::_to_copy"], ["aten::add_"]][micro_step]
    assert optimizer.masters[0].grad.dtype == torch.float32


def test_checkpointing_keeps_the_inputs_of_each_block_and_the_rotations():
    inputs = 16 * 2 * 2048 + 15 * 2 * 2048  # x, and the update of the block before
    rotations, last_norm, ids = 2 * 4 * 32, 2 * 2048 + 4, 8
    assert plan.saved_per_token(REAL, recompute=True) == pytest.approx(inputs + rotations + last_norm + ids, abs=1)


def test_the_meter_sees_what_autograd_keeps_in_real_tensors(monkeypatch):
    """On the CPU: what lives after a forward pass is what saved_tensors_hooks are shown, and the result."""
    monkeypatch.setattr(runtime, "MODE", "torch")
    monkeypatch.setattr("bench.memory.BLOCK", 1)
    policy = random_model(Policy, SMALL.config, "cpu", torch.float32)
    sequences = SMALL.with_summaries(5)
    policy.hidden(pack(sequences))  # the frequencies are made once

    def forward():
        return policy.hidden(pack(sequences))

    saved = saved_bytes(forward, list(policy.parameters()))
    with Meter("cpu") as meter:
        hidden = forward()
        live = meter.live
    ids = 8 * hidden.shape[0]  # made from a list, by no operation that a meter sees
    assert live - hidden.nbytes == saved - ids
    assert meter.peak > live


def test_the_meter_counts_a_storage_once_and_forgets_it():
    with Meter() as meter:
        x = torch.empty(1000, device="meta")  # 4,000 bytes in blocks of 512
        view = x[:10]
        assert meter.live == 4096
        del x
        assert meter.live == 4096
        del view
        assert (meter.live, meter.peak) == (0, 4096)


def test_the_head_works_in_chunks_of_logits(make_policy):
    """A chunk of fp32 logits and its gradient: at most CHUNK_ELEMENTS of each, however many rows there are."""
    few, many = (plan.predict("sft", REAL, tokens, batch_size=128).phases["learn"] for tokens in (4096, 8192))
    kept = plan.saved_per_token(REAL)
    assert many - few == pytest.approx(4096 * kept, rel=0.1)  # all that grows is what the trunk keeps


@pytest.mark.parametrize("file", ["train_sft", "train_rm", "train_ppo", "eval", "bench/update", "bench/rollout"])
def test_the_allocator_is_told_how_to_grow_before_torch_is_imported(file):
    """PPO's 69 of 72 GiB leave no room for holes. torch reads the variable once, when it is imported."""
    source = (Path(__file__).parents[1] / f"{file}.py").read_text(encoding="utf-8")
    told = source.index('os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")')
    before = r"^(import|from) (torch|nanorlhf(?!\.run\.waiting)|kernels)"  # waiting.py itself imports no torch
    assert told < re.search(before, source, re.MULTILINE).start()
    imported = re.findall(r"^(?:import|from) (\w+)", Path(waiting.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert "torch" not in imported


def test_an_80_gb_card_takes_ppo_as_the_preset_has_it_below_75_gib():
    proposal = plan.propose("ppo", REAL, 80)
    assert proposal.flags == "" and not proposal.plan.checkpointing and proposal.plan.peak < 75 * 2**30
    assert plan.propose("ppo", REAL, 141).flags == ""


def test_the_command_says_what_helps_and_ends_in_json(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.plan", "--gpu_gb", "48"])
    plan.main()
    out = capsys.readouterr().out
    assert "does not fit, and no flag helps" in out
    assert [result["fits"] for result in json.loads(out.splitlines()[-1])["results"]] == [True, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", list(plan.STAGES))
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointing"])
def test_a_gpu_holds_the_prediction_within_a_tenth(stage, recompute):
    """Llama-3.2-1B's width and vocabulary with 4 layers; every phase against max_memory_allocated."""
    shape = replace(REAL, config=replace(REAL.config, num_hidden_layers=4))
    passes, script = plan.STAGES[stage]
    cfg = script.Config(batch_size=64, microbatch_tokens=8192)
    torch.cuda.empty_cache()
    there = torch.cuda.memory_allocated()
    measured = passes(shape, plan.CudaMemory(), "cuda", cfg, recompute)
    meter = Meter(hopper=torch.cuda.get_device_capability() == (9, 0))
    predicted = passes(shape, meter, "meta", cfg, recompute)
    for phase, size in measured.phases.items():
        assert predicted.phases[phase] == pytest.approx(size - there, rel=0.1), phase
