"""The kernels of the model's body against float64: norms, rotary embedding, SwiGLU. Values, gradients, edges, bits."""

import importlib

import pytest
import torch

from kernels import add_rms_norm, rms_norm, rope, runtime, swiglu

norm_file, rope_file, swiglu_file = (
    importlib.import_module(f"kernels.{name}") for name in ("rms_norm", "rope", "swiglu")
)

# (N, D): one number, one row, whole blocks, primes, more rows than the programs take at once.
MATRICES = [(1, 1), (1, 97), (2, 64), (67, 53), (150, 11), (4, 512)]
# (N, H, Hkv, Dh): Dh of 64, 128, 32, and 6 and 20 that are no powers of 2; H / Hkv of 1, 3, 4, 8.
HEADS = [(1, 1, 1, 2), (3, 4, 4, 64), (5, 8, 2, 128), (7, 8, 1, 32), (3, 6, 2, 20), (67, 3, 1, 6)]


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_inputs(N: int, D: int) -> dict:
    """Rows of size 1, one of 1e-4 and one of 1e4, and one that cancels to 0 when it is added."""
    x, residual = normal(N, D), normal(N, D, seed=1)
    for row, scale in ((1, 1e-4), (2, 1e4)):
        if row < N:
            x[row] *= scale
            residual[row] *= scale
    if N > 3:
        residual[3] = -x[3]
    return dict(x=x, residual=residual, weight=1 + 0.3 * normal(D, seed=2), eps=1e-5)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_rms_norm_and_its_gradients_are_those_of_float64(within_budget, shape):
    inputs = norm_inputs(*shape)
    inputs.pop("residual")
    ours = within_budget(rms_norm, norm_file.rms_norm_reference, inputs, ("x", "weight"))
    assert ours["gradient of weight"].abs().max() > 0


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_add_rms_norm_and_its_gradients_are_those_of_float64(within_budget, shape):
    inputs, leaves = norm_inputs(*shape), ("x", "residual", "weight")
    ours = within_budget(add_rms_norm, norm_file.add_rms_norm_reference, inputs, leaves)
    assert torch.equal(ours["output 1"], inputs["residual"] + inputs["x"])
    assert torch.equal(ours["gradient of x"], ours["gradient of residual"])


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_of_add_rms_norm_may_go_unread(which):
    def gradients(op):
        inputs = norm_inputs(7, 53)
        leaves = [inputs[name].requires_grad_() for name in ("x", "residual", "weight")]
        (op(**inputs)[which] * normal(7, 53, seed=3)).sum().backward()
        return [leaf.grad for leaf in leaves]

    ours, plain = gradients(add_rms_norm), gradients(norm_file.add_rms_norm_reference)
    for mine, reference in zip(ours, plain, strict=True):
        assert (mine is None) == (reference is None) == False or which == 1  # noqa: E712
        if reference is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def rope_inputs(N: int, H: int, Hkv: int, Dh: int, dtype=torch.float32) -> dict:
    angles = 100 * normal(N, Dh // 2, seed=1, dtype=torch.float64)
    angles[0] = 0.0
    return dict(qkv=normal(N, H + 2 * Hkv, Dh), cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), kv_heads=Hkv)


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rope_and_its_gradient_are_those_of_float64(within_budget, shape):
    inputs, (N, H, Hkv, Dh) = rope_inputs(*shape), shape
    ours = within_budget(rope, rope_file.rope_reference, inputs, ("qkv",))
    assert [ours[f"output {i}"].shape for i in range(3)] == [(N, H, Dh), (N, Hkv, Dh), (N, Hkv, Dh)]
    assert torch.equal(ours["output 2"], inputs["qkv"][:, -Hkv:])  # v is not turned
    assert torch.equal(ours["output 0"][0], inputs["qkv"][0, :H])  # nor is anything at angle 0


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rope_reads_a_view_where_it_lies(shape):
    inputs, (N, H, Hkv, Dh) = rope_inputs(*shape), shape
    expected = rope(**inputs)
    wide = normal(2 * N, H + 2 * Hkv + 3, Dh + 5, seed=4)
    view = wide[::2, 1:-2, 2:-3]
    view.copy_(inputs["qkv"])
    assert all(torch.equal(a, b) for a, b in zip(rope(**inputs | dict(qkv=view)), expected, strict=True))


def test_rope_keeps_lengths_and_the_angle_between_query_and_key():
    """A query and a key at positions 3 and 10 make the same product as at 103 and 110."""
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    tables = [torch.tensor([[3.0], [10.0], [103.0], [110.0]]) * frequencies]
    qkv = normal(1, 3, 8).repeat(4, 1, 1)
    q, k, _ = rope(qkv, tables[0].cos(), tables[0].sin(), 1)
    torch.testing.assert_close(q.norm(dim=-1), qkv[:, :1].norm(dim=-1))
    torch.testing.assert_close((q[0] * k[1]).sum(), (q[2] * k[3]).sum())
    assert ((q[0] * k[1]).sum() - (q[0] * k[3]).sum()).abs() > 1e-2


def gate_up(N: int, F: int) -> torch.Tensor:
    """Gates of size 3, one of 100 and one of -100: exp(100) is infinite in fp32."""
    x = 3 * normal(N, 2 * F)
    x[0, 0], x[-1, F - 1] = 100.0, -100.0
    return x


@pytest.mark.parametrize("shape", [*MATRICES, (2, 2049)], ids=str)
def test_swiglu_and_its_gradient_are_those_of_float64(within_budget, shape):
    ours = within_budget(swiglu, swiglu_file.swiglu_reference, dict(gate_up=gate_up(*shape)), ("gate_up",))
    assert all(x.isfinite().all() for x in ours.values())


def test_swiglu_rounded_once_is_nearer_than_torch_rounded_twice():
    """A GPU rounds fp32 to the nearest bf16, which the interpreter does not: so the rounding is done here."""
    x = gate_up(64, 53).bfloat16()
    exact = swiglu_file.swiglu_reference(x.double())
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    once = (swiglu(x.float()).bfloat16().double() - exact).abs() / spacing
    twice = (swiglu_file.swiglu_reference(x).double() - exact).abs() / spacing
    normal_numbers = exact.abs() > 1e-30
    assert once[normal_numbers].max() < 0.501 and twice[normal_numbers].max() > 0.9


def in_bf16(inputs: dict, names: tuple[str, ...]) -> dict:
    return inputs | {name: inputs[name].bfloat16() for name in names}


CASES = {
    "rms_norm": (rms_norm, norm_file.rms_norm_reference, ("x", "weight"),
                 lambda: {k: v for k, v in norm_inputs(7, 53).items() if k != "residual"}),
    "add_rms_norm": (add_rms_norm, norm_file.add_rms_norm_reference, ("x", "residual", "weight"),
                     lambda: norm_inputs(7, 53)),
    "rope": (rope, rope_file.rope_reference, ("qkv",), lambda: rope_inputs(7, 6, 2, 20)),
    "swiglu": (swiglu, swiglu_file.swiglu_reference, ("gate_up",), lambda: dict(gate_up=gate_up(7, 53))),
}  # fmt: skip


def run(op, inputs: dict, leaves: tuple[str, ...]) -> list[torch.Tensor]:
    """Outputs, and gradients of the leaves for fixed cotangents."""
    inputs = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in leaves}
    outputs = op(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((x * normal(*x.shape, seed=5).to(x.dtype)).sum() for x in outputs).backward()
    return [x.detach() for x in outputs] + [inputs[name].grad for name in leaves]


@pytest.mark.parametrize("name", CASES)
def test_in_bf16_only_the_ends_are_rounded(name):
    """The interpreter cuts bits off where a GPU rounds them: a spacing a rounding, and there are at most three."""
    op, reference, leaves, build = CASES[name]
    inputs = in_bf16(build(), leaves)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for mine, truth in zip(run(op, inputs, leaves), run(reference, exact, leaves), strict=True):
        assert mine.dtype == torch.bfloat16 and mine.isfinite().all()
        rows = truth.abs().amax(dim=-1, keepdim=True)
        rounding = 3 * 2**-7 * (truth.abs() if name == "swiglu" else rows) + 1e-30
        assert ((mine.double() - truth).abs() <= rounding + 2**-7 * (name == "add_rms_norm") * rows.max()).all()


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_come_out_every_time(name):
    op, _, leaves, build = CASES[name]
    assert all(torch.equal(a, b) for a, b in zip(run(op, build(), leaves), run(op, build(), leaves), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    op, _, leaves, build = CASES[name]
    inputs = {k: v[:2].double() if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in build().items()}
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    if name == "rope":
        inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in rope_inputs(2, 2, 1, 4).items()}
    else:
        inputs = {k: v[..., :6] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    tensors = [inputs[leaf].contiguous().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *xs: op(**inputs | dict(zip(leaves, xs, strict=True))), tensors)


def test_the_operations_are_what_torch_expects_of_an_operation():
    x, residual, weight, eps = norm_inputs(5, 40).values()
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    torch.library.opcheck(norm_file._forward, (x, weight, eps))
    torch.library.opcheck(norm_file._add_forward, (*leaves, eps))
    qkv, cos, sin, kv_heads = rope_inputs(3, 4, 2, 8).values()
    torch.library.opcheck(rope_file._forward, (qkv.requires_grad_(), cos, sin, kv_heads))
    torch.library.opcheck(swiglu_file._forward, (gate_up(3, 10).requires_grad_(),))


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name):
    op, _, leaves, build = CASES[name]
    whole = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(whole, build(), leaves), run(op, build(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_no_rows_at_all(name):
    op, _, leaves, build = CASES[name]
    inputs = {k: v[:0] if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in build().items()}
    results = run(op, inputs, leaves)
    assert all(x.isfinite().all() for x in results) and results[0].shape[0] == 0


def test_a_nan_stays_one_and_stays_in_its_row():
    for name, (op, _, _, build) in CASES.items():
        inputs = build()
        first = next(iter(inputs))
        inputs[first].view(7, -1)[2, 0] = float("nan")
        outputs = op(**inputs)
        out = (outputs[0] if isinstance(outputs, tuple) else outputs).view(7, -1)
        assert out[2].isnan().any() and out[[0, 1, 3, 4, 5, 6]].isfinite().all(), name


def test_the_tokens_of_rope_may_lie_beyond_32_bits():
    """Token 2 begins 2^31 elements after token 0; of the 8 GB only the pages that are touched exist."""
    inputs = rope_inputs(3, 4, 2, 32)
    far = torch.empty(2 * 2**30 + 1024).as_strided((3, 8, 32), (2**30, 32, 1)).copy_(inputs["qkv"])
    ours = rope(**inputs | dict(qkv=far))
    assert all(torch.equal(a, b) for a, b in zip(ours, rope(**inputs), strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_rows_beyond_32_bits_are_found(name):
    """Row 4 begins 2^31 elements after row 0. Of each row only the first 64 columns are computed, and exist."""
    D = 2**29

    def far(columns: int, *values: torch.Tensor) -> torch.Tensor:
        x = torch.empty(5, columns, dtype=torch.float16)
        for block, value in enumerate(values):
            x[4, block * columns // len(values) :][:64] = value
        return x

    a, b, g = (normal(64, seed=seed).half() for seed in (6, 7, 8))
    constants = dict(BLOCK=64, COMPUTE=runtime.tl.float32)
    if name == "rms_norm":
        eps, scales, weight = 1e-5, torch.empty(5), torch.ones(64, dtype=torch.float16)
        normed, summed = far(D), far(D)
        x, residual, grad_normed, grad_summed, grad_x = far(D, a), far(D, b), far(D, g), far(D, g), far(D)
        constants |= dict(D=D, ADD=True, ROWS=2)
        runtime.launch(norm_file._rms_norm_fwd, (3,), x, residual, weight, normed, summed, scales, eps, 5, **constants)
        s = (a + b).float()
        torch.testing.assert_close(summed[4, :64], a + b)
        torch.testing.assert_close(scales[4], (s.pow(2).sum() / D + eps).rsqrt())
        torch.testing.assert_close(normed[4, :64], (s * scales[4]).half(), rtol=2e-3, atol=0)
        arguments = (summed, weight, scales, grad_normed, grad_summed, grad_x, torch.empty(2, D), 5)
        runtime.launch(norm_file._rms_norm_bwd, (2,), *arguments, **constants)
        n = s * scales[4]
        expected = (g.float() - n * (g.float() * n).sum() / D) * scales[4] + g.float()
        torch.testing.assert_close(grad_x[4, :64], expected.half(), rtol=2e-3, atol=1e-2)
    else:
        gate_up, out, grad_out, grad = far(D, a, b), far(D // 2), far(D // 2, g), far(D)
        runtime.launch(swiglu_file._swiglu_fwd, (3, 1), gate_up, out, 5, F=D // 2, ROWS=2, **constants)
        runtime.launch(swiglu_file._swiglu_bwd, (3, 1), gate_up, grad_out, grad, 5, F=D // 2, ROWS=2, **constants)
        near = torch.cat((a, b))[None].float().requires_grad_()
        swiglu_file.swiglu_reference(near).backward(g[None].float())
        torch.testing.assert_close(
            out[4, :64], swiglu_file.swiglu_reference(near)[0].detach().half(), rtol=2e-3, atol=0
        )
        torch.testing.assert_close(grad[4, :64], near.grad[0, :64].half(), rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(grad[4, D // 2 :][:64], near.grad[0, 64:].half(), rtol=2e-3, atol=1e-4)
