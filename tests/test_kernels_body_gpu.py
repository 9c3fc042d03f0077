"""The kernels of the model's body on a GPU, at Llama-3.2-1B's shape in bf16, against float64.

    python -m pytest tests/test_kernels_body_gpu.py

What the interpreter cannot show: rounding in bf16, the tensor cores, loads in flight, CUDA graphs.
"""

import importlib

import pytest
import torch

import kernels
from kernels import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or runtime.triton is None, reason="no CUDA device with Triton"),
]
N, D, F, H, HKV, DH = 12_896, 2048, 8192, 32, 8, 64  # 32 packed sequences, and a prime number of tokens beside
TOKENS = [N, 997, 1]
ROUNDING = 2**-8  # the most by which rounding to bf16 changes a number, relative to it


def reference(name: str):
    file = "rms_norm" if name == "add_rms_norm" else name
    return getattr(importlib.import_module(f"kernels.{file}"), f"{name}_reference")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, device="cuda", generator=generator)).bfloat16()


def operands(name: str, tokens: int) -> tuple[dict, tuple[str, ...]]:
    """Arguments of an operation, and which of them have a gradient."""
    if name in ("rms_norm", "add_rms_norm"):
        inputs = dict(x=normal(tokens, D), weight=(1 + 0.3 * normal(D, seed=1).float()).bfloat16(), eps=1e-5)
        if name == "rms_norm":
            return inputs, ("x", "weight")
        return inputs | dict(residual=normal(tokens, D, seed=2, scale=3)), ("x", "residual", "weight")
    if name == "rope":
        angles = torch.arange(tokens, device="cuda")[:, None] * 500_000 ** (-torch.arange(0, 1, 2 / DH, device="cuda"))
        return dict(qkv=normal(tokens, H + 2 * HKV, DH), cos=angles.cos(), sin=angles.sin(), kv_heads=HKV), ("qkv",)
    return dict(gate_up=normal(tokens, 2 * F, scale=3)), ("gate_up",)


def run(function, inputs: dict, leaves: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients for fixed cotangents, in the dtype of the inputs."""
    inputs = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in leaves}
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [normal(*x.shape, seed=5 + i).to(x.dtype) for i, x in enumerate(outputs)]
    torch.autograd.backward(outputs, cotangents)
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return named | {f"gradient of {name}": inputs[name].grad for name in leaves}


def in_double(inputs: dict) -> dict:
    return {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_values_and_gradients_in_bf16(name, tokens):
    inputs, leaves = operands(name, tokens)
    function = getattr(kernels, name)
    ours, plain = run(function, inputs, leaves), run(reference(name), inputs, leaves)
    exact = run(reference(name), in_double(inputs), leaves)
    for what, truth in exact.items():
        mine = ours[what]
        assert mine.dtype == torch.bfloat16 and mine.shape == truth.shape, what
        error, theirs = (((x.double() - truth).norm() / truth.norm()).item() for x in (mine, plain[what]))
        # No worse than PyTorch in bf16; and no number is rounded more often than three times.
        assert error <= 1.05 * theirs + 1e-5 and error < ROUNDING, f"{what}: {error:.2e}, PyTorch's {theirs:.2e}"
        largest = truth.abs().amax(dim=-1, keepdim=True)
        assert ((mine.double() - truth).abs() <= 3.1 * ROUNDING * largest).all(), what
    again = run(function, inputs, leaves)
    assert all(torch.equal(ours[what], again[what]) for what in ours)  # the same bits


def test_swiglu_rounds_once():
    inputs, _ = operands("swiglu", 997)
    exact = reference("swiglu")(inputs["gate_up"].double())
    spacing = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
    error = (kernels.swiglu(**inputs).double() - exact).abs() / spacing
    assert error[exact.abs() > 1e-30].max() < 0.51
    assert ((reference("swiglu")(**inputs).double() - exact).abs() / spacing).max() > 0.9


@pytest.mark.parametrize("batch", [1, 8, 33, 128])
def test_decode_attention_in_a_cuda_graph(batch):
    """One captured graph serves every step: the positions are read on the device."""
    slots = 576
    q, keys, values = normal(batch, H, DH), normal(batch, slots, HKV, DH, seed=1), normal(batch, slots, HKV, DH, seed=2)
    positions = torch.zeros(batch, dtype=torch.int64, device="cuda")
    kernels.decode_attention(q, keys, values, positions)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(q, keys, values, positions)
    generator = torch.Generator("cuda").manual_seed(3)
    for step in range(5):
        positions.random_(slots, generator=generator)
        positions[0], positions[-1] = step, slots - 1 - step
        graph.replay()
        exact = reference("decode_attention")(q.double(), keys.double(), values.double(), positions)
        plain = reference("decode_attention")(q, keys, values, positions)
        error, theirs = ((x.double() - exact).abs().max().item() for x in (out, plain))
        assert error <= 2 * theirs + 1e-3, f"{error:.2e}, PyTorch's {theirs:.2e}"
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first)


def test_decode_attention_reads_no_slot_behind_a_sequence():
    q, keys, values = normal(4, H, DH), normal(4, 200, HKV, DH, seed=1), normal(4, 200, HKV, DH, seed=2)
    positions = torch.tensor([0, 63, 64, 199], device="cuda")
    expected = kernels.decode_attention(q, keys, values, positions)
    for b, position in enumerate(positions.tolist()):
        keys[b, position + 1 :] = values[b, position + 1 :] = float("nan")
    assert expected.isfinite().all() and torch.equal(kernels.decode_attention(q, keys, values, positions), expected)


def test_nothing_is_written_outside_the_outputs(monkeypatch):
    """Every kernel works on copies with guard elements around them, and leaves the guards and its inputs alone."""
    from interpreter.guards import guarded

    monkeypatch.setattr(runtime, "start", guarded(runtime.start))
    for name in ("rms_norm", "add_rms_norm", "rope", "swiglu"):
        run(getattr(kernels, name), *operands(name, 97))
    cache = normal(3, 97, HKV, DH)
    kernels.decode_attention(normal(3, H, DH), cache, cache, torch.tensor([0, 50, 96], device="cuda"))


def test_packed_attention_on_the_gpu_is_that_of_rectangles():
    """attention.py: torch's variable-length flash attention, its heads grouped, against the way of a CPU."""
    from nanorlhf.attention import _padded, _Rectangles, _varlen
    from nanorlhf.packing import pack

    packed = pack([[1] * n for n in (300, 1, 57, 120)], device="cuda")
    tokens = packed.tokens.shape[0]
    qkv = dict(q=normal(tokens, H, DH), k=normal(tokens, HKV, DH, seed=1), v=normal(tokens, HKV, DH, seed=2))
    n = sum(packed.lengths)
    ours = run(lambda **x: _varlen(**x, packed=packed)[:n], qkv, ("q", "k", "v"))
    theirs = run(lambda **x: _padded(**x, rectangles=_Rectangles(packed))[:n], in_double(qkv), ("q", "k", "v"))
    for what, truth in theirs.items():
        assert ((ours[what].double() - truth).norm() / truth.norm()).item() < 2 * ROUNDING, what


def test_a_model_in_bf16_is_as_close_to_fp32_as_without_the_kernels(make_policy, make_sequences, monkeypatch):
    """Log-probs and the gradient of a small Llama on the GPU, through the kernels and through the references."""
    from nanorlhf.packing import pack

    policy = make_policy(hidden_size=256, head_dim=64).cuda()
    packed = pack(make_sequences([200, 33, 120]), device="cuda")

    def gradients(dtype: torch.dtype, mode: str) -> list[torch.Tensor]:
        monkeypatch.setattr(runtime, "MODE", mode)
        model = policy.to(dtype)
        model.zero_grad()
        hidden = model.hidden(packed)
        hidden.float().square().mean().backward()
        return [hidden.detach().double(), *(p.grad.double() for p in model.model.parameters())]

    exact = gradients(torch.float32, "torch")
    errors = {
        mode: [((x - y).norm() / y.norm()).item() for x, y in zip(gradients(torch.bfloat16, mode), exact, strict=True)]
        for mode in ("triton", "torch")
    }
    for ours, theirs in zip(errors["triton"], errors["torch"], strict=True):
        assert ours <= 1.5 * theirs + 1e-4
