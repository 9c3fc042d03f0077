"""The trunk against transformers' Llama, on random weights in fp32: logits, gradients, padding, rotary frequencies."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble

from kernels import linear_cross_entropy
from nanorlhf.attention import causal
from nanorlhf.llama import initialise, rope_frequencies
from nanorlhf.losses import next_token_labels
from nanorlhf.models import Policy
from nanorlhf.packing import pack
from nanorlhf.storage.checkpoint import load_policy

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {
    # Llama-3.2-1B's true sizes, with 2 layers of 16 and a cut vocabulary.
    "llama-3.2-1b": dict(
        vocab_size=2000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    # Llama 2: one key/value head a query head, a head of its own.
    "llama-2": dict(
        vocab_size=320, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_parameters=PLAIN_ROPE, max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
    # TinyLlama: 32 query heads on 4 key/value heads.
    "tinyllama": dict(
        vocab_size=320, hidden_size=512, intermediate_size=704, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=4, rms_norm_eps=1e-5, rope_parameters=PLAIN_ROPE, max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LENGTHS = [23, 1, 40, 7]


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """(transformers' model with random weights, ours read from the folder that it saved)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**FAMILIES[request.param], attn_implementation="eager")
    oracle = transformers.LlamaForCausalLM(config).eval()
    scramble(oracle, seed=1)
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(folder)
    policy = load_policy(folder)
    yield oracle, policy
    shutil.rmtree(folder)  # half a gigabyte, which pytest would keep for three runs


@pytest.fixture
def sequences(pair):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, pair[0].config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def assert_relative(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """The largest error, relative to the largest element."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def test_logits_equal_those_of_transformers(pair, sequences):
    oracle, policy = pair
    for sequence, logits in zip(sequences, policy.logits(sequences), strict=True):
        with torch.no_grad():
            theirs = oracle(torch.tensor([sequence])).logits[0]
        assert logits.dtype == torch.float32
        assert_relative(logits, theirs, 1e-4)


def test_a_packed_batch_equals_a_left_padded_batch_of_transformers(pair, sequences):
    oracle, policy = pair
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64), torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = oracle(ids, attention_mask=mask, position_ids=positions).logits
    for row, logits in enumerate(policy.logits(sequences)):
        assert_relative(logits, theirs[row, width - LENGTHS[row] :], 1e-4)


def test_gradients_of_every_parameter_equal_those_of_transformers(pair, sequences):
    oracle, policy = pair
    oracle.zero_grad()
    policy.zero_grad()
    for sequence in sequences:
        if len(sequence) > 1:
            logits = oracle(torch.tensor([sequence])).logits[0, :-1]
            F.cross_entropy(logits, torch.tensor(sequence[1:]), reduction="sum").backward()
    packed = pack(sequences)
    labels, counts = next_token_labels(packed)
    linear_cross_entropy(policy.hidden(packed), policy.head_weight, labels, counts.float()).backward()

    theirs = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    compared = 0
    for name, parameter in policy.named_parameters():
        parts = [name]
        for merged, separate in MERGED.items():
            if merged in name:
                parts = [name.replace(merged, part) for part in separate]
        expected = torch.cat([theirs[part] for part in parts])
        assert_relative(parameter.grad, expected, 1e-4)
        compared += len(parts)
    assert compared == len(theirs)
    oracle.zero_grad()
    policy.zero_grad()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("read", [[5], [40, 3, 3 + LENGTHS[0]], "all"], ids=str)
def test_rows_that_are_read_alone_have_the_states_and_gradients_of_all_rows(
    make_policy, make_sequences, read, recompute
):
    policy = make_policy()
    policy.model.activation_checkpointing = recompute
    packed = pack(make_sequences(LENGTHS))
    read = torch.arange(len(packed.tokens)) if read == "all" else torch.tensor(read)
    alone, all_rows = policy.hidden(packed, read), policy.hidden(packed)
    assert_relative(alone, all_rows[read], 1e-5)

    towards = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(policy.model.parameters())
    found, expected = (torch.autograd.grad((x * towards).sum(), parameters) for x in (alone, all_rows[read]))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.any()
        assert_relative(ours, theirs, 1e-5)


def test_a_sequence_of_one_token_has_the_logits_of_transformers(pair):
    oracle, policy = pair
    with torch.no_grad():
        assert_relative(policy.logits([[5]])[0], oracle(torch.tensor([[5]])).logits[0], 1e-4)


def test_bf16_is_as_close_to_fp32_as_transformers_in_bf16(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**FAMILIES["tinyllama"], attn_implementation="eager")
    oracle = transformers.LlamaForCausalLM(config).eval()
    scramble(oracle, seed=2)
    oracle.to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = torch.randint(3, 320, (64,), generator=torch.Generator().manual_seed(3))
    exact = load_policy(tmp_path).logits([tokens.tolist()])[0].log_softmax(-1)
    ours = load_policy(tmp_path, dtype=torch.bfloat16).logits([tokens.tolist()])[0].log_softmax(-1)
    with torch.no_grad():
        theirs = oracle(tokens[None]).logits[0].float().log_softmax(-1)
    our_error, their_error = ((x - exact).pow(2).mean().sqrt().item() for x in (ours, theirs))
    assert 0 < our_error < 1.2 * their_error < 0.1


def test_rope_frequencies_of_llama_3_2_are_the_published_ones(make_config):
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    frequencies = rope_frequencies(make_config(head_dim=64, rope_theta=500000.0, rope_scaling=scaling))
    golden = [1, 3.211445995e-3, 1.290547928e-3, 4.295567966e-4, 9.708287803e-5, 1.946163818e-5, 9.418306725e-8]
    torch.testing.assert_close(frequencies[[0, 14, 15, 16, 17, 18, 31]], torch.tensor(golden), rtol=1e-5, atol=0)


def test_rope_frequencies_without_scaling_are_powers_of_theta(make_config):
    frequencies = rope_frequencies(make_config(head_dim=8, rope_theta=10000.0, rope_scaling=None))
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]), rtol=1e-6, atol=0)


def test_only_the_difference_of_positions_matters(make_policy, make_sequences):
    policy = make_policy()
    packed = pack(make_sequences([20]))
    with torch.no_grad():
        near = policy.model(packed.tokens, packed.positions, causal(packed))
        far = policy.model(packed.tokens, packed.positions + 300, causal(packed))
        stretched = policy.model(packed.tokens, packed.positions * 3, causal(packed))
    assert_relative(far, near, 1e-4)
    assert (stretched - near).abs().max() > 0.1


def test_a_token_does_not_see_what_comes_after_it(make_policy, make_sequences):
    policy = make_policy()
    (sequence,) = make_sequences([12])
    changed = sequence[:7] + [token - 1 for token in sequence[7:]]
    before, after = policy.logits([sequence])[0], policy.logits([changed])[0]
    assert torch.equal(before[:7], after[:7])
    assert ((before[7:] - after[7:]).abs().max(-1).values > 0.01).all()


def test_initialise_draws_the_same_weights_for_the_same_seed(make_config):
    first, second = Policy(make_config(hidden_size=256)), Policy(make_config(hidden_size=256))
    initialise(first, std=0.02, seed=5)
    initialise(second, std=0.02, seed=5)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.dim() == 1:
            assert (a == 1).all(), name
        else:
            assert math.isclose(a.std().item(), 0.02, rel_tol=0.05), name


def test_activation_checkpointing_changes_no_bit_and_keeps_less(make_policy, make_sequences):
    policy = make_policy(num_hidden_layers=3)
    packed = pack(make_sequences([9, 17, 4]))
    found = []
    for policy.model.activation_checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            hidden = policy.hidden(packed)
        hidden.square().sum().backward()
        found.append((hidden, {name: p.grad for name, p in policy.named_parameters()}, sum(kept)))
        policy.zero_grad(set_to_none=True)
    (plain, gradients, whole), (recomputed, again, less) = found
    assert torch.equal(plain, recomputed) and 0 < less < whole / 2
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name
