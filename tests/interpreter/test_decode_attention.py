"""decode_attention against float64: groups, head sizes, ragged lengths, splits, views, and what must not be read."""

import importlib

import pytest
import torch

from kernels import decode_attention

file = importlib.import_module("kernels.decode_attention")

# (B, S, H, Hkv, Dh): one of each; H / Hkv of 1, 4, 8, 3; Dh 64, 128, 32, and 20, which is no power of 2.
SHAPES = [
    (1, 1, 1, 1, 32),
    (3, 37, 4, 4, 64),
    (2, 53, 8, 2, 128),
    (5, 40, 8, 1, 32),
    (3, 16, 6, 2, 20),
    (2, 97, 32, 8, 64),
]


def cache(B: int, S: int, H: int, Hkv: int, Dh: int, seed: int = 0) -> dict:
    """Operands with logits of standard deviation 3, sequence 0 at position 0 and the last one at S - 1."""
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(B, H, Dh, generator=generator)
    keys, values = (torch.randn(B, S, Hkv, Dh, generator=generator) for _ in range(2))
    positions = torch.randint(S, (B,), generator=generator)
    positions[0], positions[-1] = 0, S - 1
    return dict(q=q, keys=keys, values=values, positions=positions)


@pytest.fixture(params=[1, 2, 5], ids=lambda splits: f"{splits} splits")
def splits(request, monkeypatch):
    """So many programs a sequence and key/value head; more than there are blocks in some of the sequences."""
    monkeypatch.setattr(file, "splits_of", lambda programs, slots: request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention_is_that_of_float64(within_budget, splits, shape):
    inputs = cache(*shape)
    ours = within_budget(decode_attention, file.decode_attention_reference, inputs)["output 0"]
    torch.testing.assert_close(ours[0], inputs["values"][0, 0].repeat_interleave(shape[2] // shape[3], 0))  # one slot


def test_the_slots_behind_a_sequence_are_not_read(splits):
    inputs = cache(4, 50, 4, 2, 32)
    expected = decode_attention(**inputs)
    for b, position in enumerate(inputs["positions"]):
        inputs["keys"][b, position + 1 :] = inputs["values"][b, position + 1 :] = float("nan")
    assert expected.isfinite().all() and torch.equal(decode_attention(**inputs), expected)


def test_a_position_past_the_cache_reads_nothing_past_it(splits):
    inputs = cache(2, 20, 4, 2, 32)
    expected = decode_attention(**inputs | dict(positions=torch.tensor([19, 19])))
    ours = file._forward(*(inputs | dict(positions=torch.tensor([20, 2**40]))).values())
    assert torch.equal(ours, expected)


def test_a_nan_stays_one_and_stays_in_its_sequence(splits):
    inputs = cache(3, 40, 4, 2, 32) | dict(positions=torch.tensor([39, 39, 39]))
    inputs["keys"][1, 7, 0, 0] = float("nan")
    out = decode_attention(**inputs)
    assert out[1, :2].isnan().all() and out[1, 2:].isfinite().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_far_from_0_lose_nothing_to_overflow(splits, shift):
    """A coordinate that is 1 in every key shifts all logits of a query; the softmax does not see it."""
    inputs = cache(2, 40, 4, 2, 32) | dict(positions=torch.tensor([39, 30]))
    inputs["keys"][..., 0], inputs["q"][..., 0] = 1.0, 0.0
    plain = decode_attention(**inputs)
    inputs["q"][..., 0] = shift
    torch.testing.assert_close(decode_attention(**inputs), plain, rtol=1e-3, atol=1e-3)


def test_views_of_larger_tensors_are_read_where_they_lie(splits):
    inputs = cache(3, 37, 8, 2, 32)
    expected = decode_attention(**inputs)
    keys = torch.randn(37, 3, 2, 2, 32)[:, :, 1].transpose(0, 1)  # another order of dimensions,
    values = torch.randn(3, 40, 5, 36)[:, 2:39, 1:3, 3:35]  # and another one than the keys have
    q = torch.randn(3, 12, 32)[:, 2:10]
    for view, name in ((q, "q"), (keys, "keys"), (values, "values")):
        view.copy_(inputs[name])
        assert not view.is_contiguous()
    ours = decode_attention(q, keys, values, inputs["positions"])
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dimension", [0, 1])
def test_offsets_beyond_32_bits_are_found(splits, dimension):
    """The last sequence, or the last slot, begins 2^31 elements after the first."""
    inputs = cache(3, 3, 4, 2, 32) | dict(positions=torch.tensor([2, 2, 2]))
    expected = decode_attention(**inputs)
    strides = [0, 0, 32, 1]
    strides[dimension], strides[1 - dimension] = 2**30 + 64, 64
    for name in ("keys", "values"):
        # Torch asks for 8 GB of addresses and the operating system gives only the pages that are touched.
        far = torch.empty(2 * strides[dimension] + 1024).as_strided((3, 3, 2, 32), strides)
        inputs[name] = far.copy_(inputs[name])
    assert torch.equal(decode_attention(**inputs), expected)


def test_a_small_batch_is_split_and_a_large_one_is_not():
    assert file.splits_of(128 * 8, 565) == 1 and file.splits_of(1 * 8, 10**6) == file.PROGRAMS // 8
    assert file.splits_of(8, 3) == 1  # no more parts than blocks
    assert file.splits_of(16 * 8, 565) == 2


def test_it_is_what_torch_expects_of_an_operation_and_compiles_whole():
    inputs = cache(3, 20, 4, 2, 32)
    torch.library.opcheck(file._forward, tuple(inputs.values()))
    whole = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(**inputs), decode_attention(**inputs))


def test_no_sequences_at_all():
    q, cache = torch.zeros(0, 4, 32), torch.zeros(0, 9, 2, 32)
    assert decode_attention(q, cache, cache, torch.zeros(0, dtype=torch.int64)).shape == (0, 4, 32)
