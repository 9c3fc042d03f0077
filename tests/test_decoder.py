"""The decoder: memory that is used again leaks nothing, and the loop never waits for the device."""

import copy
import gc
import sys

import pytest
import torch
from conftest import scramble

from kernels.cpu import by_hand
from kernels.decode_attention import decode_attention, decode_attention_reference
from nanorlhf import decoder
from nanorlhf.decoder import KEPT, Decoder, decoder_for
from nanorlhf.models import Policy
from nanorlhf.optim import AdamW
from nanorlhf.packing import pack
from nanorlhf.rollout import generate, uniforms

QUERY_LENGTHS = [9, 1, 30, 4]
R = 12


def kept(policy: Policy) -> list[Decoder]:  # newest first
    return list(reversed(decoder._kept.get(policy, {}).values()))


def apart(policy: Policy, queries, responses, logprobs, temperature: float) -> torch.Tensor:
    """|log-prob of the sampler - of the training forward|, (B, R)."""
    return (logprobs - forward(policy, queries, responses, temperature)).abs()


def forward(policy: Policy, queries, responses, temperature: float) -> torch.Tensor:
    """Log-probs of the training forward, (B, R)."""
    packed = pack(
        [query + response for query, response in zip(queries, responses.tolist(), strict=True)],
        device=responses.device,
    )
    with torch.no_grad():
        return policy.response_logprobs(packed, responses, temperature)[0]


def off_by_rounding_only(policy: Policy, queries, responses, logprobs, temperature: float) -> None:
    """The sampler is no further from the training forward than two roundings of the same numbers are apart.

    How far that is depends on the weights; the forward pass in bf16 against the one in fp32 tells it. Two errors of
    that size, of opposite sign now and then, make a root mean square of 1.4 of it.
    """
    ours = forward(policy, queries, responses, temperature)
    exact = forward(copy.deepcopy(policy).float(), queries, responses, temperature)
    rounding, off = ((x - ours).square().mean().sqrt().item() for x in (exact, logprobs))
    assert logprobs.dtype == torch.float32 and 0 < off < 2 * rounding, f"{off:.2e}, rounding {rounding:.2e}"


# --- memory that is used again ----------------------------------------------------------------------------------------


def test_a_decoder_that_was_used_before_generates_what_a_new_one_does(make_policy, make_sequences):
    policy = make_policy()
    batches = [QUERY_LENGTHS, [30], [9, 1, 29, 4], [2, 2, 2, 2], [1], [7, 8, 9], QUERY_LENGTHS]
    for seed, lengths in enumerate(batches):
        queries = make_sequences(lengths, seed)
        for temperature in (0.7, 0.0):
            again = generate(policy, queries, R, temperature, seed)
            fresh = generate(copy.deepcopy(policy), queries, R, temperature, seed)
            assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])


def test_what_was_generated_stays_when_the_buffers_are_used_again(make_policy, make_sequences):
    policy, queries = make_policy(), make_sequences(QUERY_LENGTHS)
    first = generate(policy, queries, R, 0.7, seed=1)
    before = [x.clone() for x in first]
    others = generate(policy, queries, R, 0.7, seed=2)
    assert len(kept(policy)) == 1, "the second batch was to use the buffers of the first"
    assert not torch.equal(first[0], others[0])
    assert all(torch.equal(*pair) for pair in zip(first, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_the_optimizer_rewrote_are_seen_at_the_same_addresses(make_policy, make_sequences, dtype):
    policy, queries = make_policy().to(dtype), make_sequences(QUERY_LENGTHS)
    optimizer = AdamW([policy], lr=1e-2)
    before = generate(policy, queries, R, 0.7)
    (used,) = kept(policy)
    addresses = [parameter.data_ptr() for parameter in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = None
    policy.response_logprobs(pack(queries[2:3]), torch.tensor([[5, 6, 7]]), 0.7)[0].sum().backward()
    optimizer.step(lr=1e-2)
    assert [parameter.data_ptr() for parameter in policy.parameters()] == addresses  # what a captured graph reads
    after, fresh = generate(policy, queries, R, 0.7), generate(copy.deepcopy(policy), queries, R, 0.7)
    assert kept(policy) == [used]
    assert torch.equal(after[0], fresh[0]) and torch.equal(after[1], fresh[1])
    assert not torch.equal(after[1], before[1])


def test_nan_of_an_earlier_batch_does_not_stay_in_the_cache(make_policy, make_sequences):
    policy, queries = make_policy(), make_sequences(QUERY_LENGTHS)
    healthy = generate(policy, queries, R, 0.7)
    weights = copy.deepcopy(policy.state_dict())
    with torch.no_grad():
        policy.model.layers[0].self_attn.qkv_proj.weight.fill_(torch.nan)
        kept(policy)[0].prefill(policy, make_sequences([30] * 4))  # fills slots behind those of shorter queries
    assert kept(policy)[0].cache.keys.isnan().any()
    policy.load_state_dict(weights)
    again = generate(policy, queries, R, 0.7)
    assert torch.equal(again[0], healthy[0]) and torch.equal(again[1], healthy[1])


def test_equal_sizes_share_a_decoder_and_no_more_than_a_few_are_kept(make_policy):
    policy = make_policy()
    first = decoder_for(policy, batch=4, longest=30, response_length=R, temperature=0.7)
    assert decoder_for(policy, 4, 30, R, 0.7) is first
    others = [(3, 30, R, 0.7), (4, 99, R, 0.7), (4, 30, R + 1, 0.7), (4, 30, R, 1.0)]
    for shape in others:
        assert decoder_for(policy, *shape) is not first
        assert decoder_for(policy, 4, 30, R, 0.7) is first  # the one used last stays
        assert len(kept(policy)) == KEPT
    policy.to(torch.bfloat16)
    assert decoder_for(policy, 4, 30, R, 0.7) is not first


def test_the_cache_of_llama_3_2_1b_takes_32_768_bytes_a_slot(make_config):
    sizes = dict(num_hidden_layers=16, num_key_value_heads=8, num_attention_heads=32, head_dim=64)
    with torch.device("meta"):
        policy = Policy(make_config(**sizes)).bfloat16()
    cache = decoder_for(policy, batch=128, longest=512, response_length=53, temperature=0.7).cache
    size = cache.keys.nbytes + cache.values.nbytes
    assert size == 32_768 * 128 * cache.keys.shape[3]
    assert cache.keys.shape[3] == 568  # 512 + 53, and on a GPU 576


def test_the_decoders_of_a_policy_go_with_it(make_policy, make_sequences):
    policy = make_policy()
    generate(policy, make_sequences([3]), R, 0.7)
    before = len(decoder._kept)
    del policy
    gc.collect()
    assert len(decoder._kept) == before - 1


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_the_decoding_loop_reads_no_number_on_the_host(make_policy, make_sequences, temperature):
    """On the meta device tensors have shapes and no numbers: item(), tolist(), nonzero() or a copy to the CPU raise."""
    policy = make_policy().to("meta")
    loop = Decoder(policy, batch=4, slots=42, response_length=R, temperature=temperature)
    try:
        responses, logprobs = loop.decode(policy, make_sequences(QUERY_LENGTHS), uniforms(0, [0, 1, 2, 3], R))
    except RuntimeError as error:
        pytest.fail(f"the loop asks the device for a number: {error}")
    assert responses.shape == logprobs.shape == (4, R) and responses.is_meta


def test_a_step_moves_none_of_its_buffers(make_policy, make_sequences):
    policy, queries = make_policy(), make_sequences(QUERY_LENGTHS)
    generate(policy, queries, R, 0.7)
    (loop,) = kept(policy)
    state = [*vars(loop).values(), *vars(loop.cache).values()]
    addresses = {id(x): x.data_ptr() for x in state if isinstance(x, torch.Tensor)}
    generate(policy, queries, R, 0.7, seed=1)
    again = [*vars(loop).values(), *vars(loop.cache).values()]
    assert {id(x): x.data_ptr() for x in again if isinstance(x, torch.Tensor)} == addresses and len(addresses) == 9


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [7, 7, 7], QUERY_LENGTHS], ids=str)
@pytest.mark.parametrize("tokens", [8, 4096])
def test_any_lengths_in_any_number_of_prefill_passes(make_policy, make_sequences, monkeypatch, lengths, tokens):
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", {"cpu": tokens})  # 8: a pass for each query or two
    policy, queries = make_policy(), make_sequences(lengths)
    responses, logprobs = generate(policy, queries, R, 0.7)
    assert apart(policy, queries, responses, logprobs, 0.7).max() < 1e-5


def test_in_bf16_the_sampler_is_off_the_training_forward_by_rounding_only(make_policy, make_sequences):
    """Attention rounds to bf16 at other places: the log-probs differ, and train_ppo.py computes them again."""
    policy, queries = make_policy().to(torch.bfloat16), make_sequences([20] * 64)
    responses, logprobs = generate(policy, queries, R, 0.7)
    off_by_rounding_only(policy, queries, responses, logprobs, 0.7)
    for wrong in (logprobs.roll(1, dims=1), logprobs * 0.7):  # another token's, another temperature's
        with pytest.raises(AssertionError, match="rounding"):
            off_by_rounding_only(policy, queries, responses, wrong, 0.7)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 8), (5, 23, 4, 2, 16), (3, 40, 8, 1, 32), (2, 17, 3, 3, 8)], ids=str)
@pytest.mark.parametrize("maker", ["Intel", "another"])
def test_attention_on_a_cpu_is_the_reference(monkeypatch, sizes, maker):
    file, bags = sys.modules["kernels.decode_attention"], []
    monkeypatch.setattr(file, "INTEL", maker == "Intel")
    taken = file._bags
    monkeypatch.setattr(file, "_bags", lambda *inputs: bags.append(inputs) or taken(*inputs))
    B, S, H, Hkv, Dh = sizes
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, Dh, generator=generator)
    keys, values = torch.randn(2, B, Hkv, S, Dh, generator=generator).transpose(2, 3)  # slots inside, as in the cache
    turned = keys.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # slots innermost, as in the other one
    positions = torch.linspace(0, S - 1, B).long()
    taken_here = maker == "another" and by_hand(q)
    for k, v in ((keys, values), (keys.contiguous(), values.contiguous()), *[(turned, values)] * taken_here):
        out = decode_attention(q, k, v, positions)
        exact = decode_attention_reference(q.double(), k.double(), v.double(), positions)
        torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-6)
    assert len(bags) == (3 if taken_here else 0)


@pytest.mark.parametrize("maker", ["Intel", "another"])
def test_a_cache_on_a_cpu_is_read_where_it_lies(monkeypatch, make_policy, make_sequences, maker):
    """Keys lie as attention on that processor reads them, and log-probs are those of the training forward."""
    monkeypatch.setattr(sys.modules["kernels.decode_attention"], "INTEL", maker == "Intel")
    policy, queries = make_policy(), make_sequences(QUERY_LENGTHS)
    responses, logprobs = generate(policy, queries, R, 0.7)
    assert apart(policy, queries, responses, logprobs, 0.7).max() < 1e-5
    cache = kept(policy)[0].cache
    rows = cache.keys.mT if maker == "another" and by_hand(policy.head_weight) else cache.keys
    assert rows.is_contiguous() and cache.values.is_contiguous()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(make_config):
    """(a policy in bf16 on the GPU, with heads of 64; 16 queries of 1 to 300 tokens)"""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    policy = Policy(make_config(**sizes, vocab_size=1000))
    scramble(policy, seed=0)
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in range(1, 301, 20)]
    return policy.to("cuda", torch.bfloat16), queries


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_the_graph_samples_what_single_steps_do(on_gpu, temperature):
    policy, queries = on_gpu
    loop = decoder_for(policy, len(queries), 300, 53, temperature)
    noise = uniforms(0, list(range(len(queries))), 53)
    eager = loop.decode(policy, queries, noise, use_graph=False)
    for _ in range(2):  # and the replayed graph leaves nothing behind
        graph = loop.decode(policy, queries, noise)
        assert torch.equal(graph[0], eager[0])
        torch.testing.assert_close(graph[1], eager[1], rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_the_replays_never_wait_for_the_gpu(on_gpu):
    policy, queries = on_gpu
    loop = decoder_for(policy, len(queries), 300, 53, 0.7)
    loop.decode(policy, queries, uniforms(0, list(range(len(queries))), 53))
    graph = loop.captured(policy)
    with torch.no_grad():
        loop.t.zero_()
        hidden = loop.prefill(policy, queries)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.write(policy, hidden)
            for _ in range(52):
                graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loop.t.item() == 53


@pytest.mark.gpu
def test_a_graph_is_captured_once_and_reads_the_weights_as_they_are(on_gpu):
    policy, queries = on_gpu
    before = generate(policy, queries, 53, 0.0)
    graph = kept(policy)[0].graph
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)  # in place, as the optimizer does
    after, fresh = generate(policy, queries, 53, 0.0), generate(copy.deepcopy(policy), queries, 53, 0.0)
    assert kept(policy)[0].graph is graph
    assert torch.equal(after[0], fresh[0]) and not torch.equal(after[1], before[1])
    generate(policy, queries[:-1], 53, 0.0)
    assert kept(policy)[0].graph is not graph
    policy.load_state_dict({n: p.clone() for n, p in policy.state_dict().items()}, assign=True)  # weights have moved
    assert torch.equal(generate(policy, queries, 53, 0.0)[0], after[0])


@pytest.mark.gpu
def test_on_a_gpu_the_sampler_is_off_the_training_forward_by_rounding_only(on_gpu):
    policy, queries = on_gpu
    responses, logprobs = generate(policy, queries, 53, 0.7)
    off_by_rounding_only(policy, queries, responses, logprobs, 0.7)
