"""Folders in and out: what we save comes back bit for bit, means the same in transformers, and damage is named."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nanorlhf.errors import UserError
from nanorlhf.models import critic_from, reward_model_from
from nanorlhf.storage import checkpoint
from nanorlhf.storage.checkpoint import (
    load_policy,
    load_scalar,
    read_config,
    save_policy,
    save_scalar,
)


def assert_same_weights(ours, theirs):
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name


@pytest.fixture
def auto():
    """transformers, the oracle; its loaders here also check that no weight is missing, left over or re-initialised."""
    transformers = pytest.importorskip("transformers")

    def load(kind: str, folder):
        model, info = getattr(transformers, kind).from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        return model.eval()

    return load


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_comes_back_bit_for_bit(make_policy, tokenizer, tmp_path, tied, dtype):
    policy = make_policy(tie_word_embeddings=tied).to(dtype)
    save_policy(policy, tmp_path / "final", tokenizer)
    loaded = load_policy(tmp_path / "final", dtype=dtype)
    assert_same_weights(loaded, policy)
    assert loaded.config == policy.config
    assert ("lm_head.weight" in load_file(tmp_path / "final" / "model.safetensors")) is not tied


def test_a_policy_in_shards_comes_back_bit_for_bit(make_policy, make_sequences, tokenizer, tmp_path, monkeypatch, auto):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    policy = make_policy()
    save_policy(policy, tmp_path / "final", tokenizer)
    files = sorted(path.name for path in (tmp_path / "final").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in policy.parameters())
    assert set(index["weight_map"].values()) == set(files)
    assert_same_weights(load_policy(tmp_path / "final"), policy)
    sequence = make_sequences([9])[0]
    with torch.no_grad():
        theirs = auto("AutoModelForCausalLM", tmp_path / "final")(torch.tensor([sequence])).logits[0]
    torch.testing.assert_close(policy.logits([sequence])[0], theirs, rtol=1e-4, atol=1e-4)


def test_a_reward_model_comes_back_with_its_shift(make_scalar, make_sequences, tokenizer, tmp_path):
    model = make_scalar(bias=False, score_shift=-1.2345678901234567)
    save_scalar(model, tmp_path / "final", tokenizer)
    loaded = load_scalar(tmp_path / "final")
    assert_same_weights(loaded, model)
    assert loaded.score.bias is None and loaded.score_shift == model.score_shift and loaded.shift_posts is None
    model.shift_posts = 1024
    save_scalar(model, tmp_path / "known", tokenizer)
    assert load_scalar(tmp_path / "known").shift_posts == 1024
    sequences = make_sequences([4, 11])
    assert torch.equal(loaded.scores(sequences), model.scores(sequences))


def test_a_critic_comes_back_with_its_bias(make_scalar, tokenizer, tmp_path):
    critic = critic_from(make_scalar(bias=False, score_shift=0.3))
    save_scalar(critic, tmp_path / "final_critic", tokenizer)
    loaded = load_scalar(tmp_path / "final_critic")
    assert_same_weights(loaded, critic)
    assert loaded.score_shift == 0.0 and loaded.score.bias.item() == pytest.approx(-0.3)


def test_a_policy_can_be_saved_in_bf16_and_says_so(make_policy, tokenizer, tmp_path):
    policy = make_policy()
    save_policy(policy, tmp_path / "final", tokenizer, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "final" / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.bfloat16}
    assert_same_weights(load_policy(tmp_path / "final", dtype=torch.bfloat16), policy.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["reward model", "critic"])
def test_the_head_of_a_bf16_model_stays_fp32_in_memory_and_in_files(
    make_policy, make_sequences, tokenizer, tmp_path, kind
):
    model = reward_model_from(make_policy().to(torch.bfloat16), seed=0)
    model.score_shift = 0.123456789
    if kind == "critic":
        model = critic_from(model)
    save_scalar(model, tmp_path / "final", tokenizer)
    stored = load_file(tmp_path / "final" / "model.safetensors")
    heads = {name for name in stored if name.startswith("score.")}
    assert heads == ({"score.weight"} if kind == "reward model" else {"score.weight", "score.bias"})
    assert {stored[name].dtype for name in heads} == {torch.float32}
    assert {stored[name].dtype for name in stored.keys() - heads} == {torch.bfloat16}
    assert json.loads((tmp_path / "final" / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"

    loaded = load_scalar(tmp_path / "final", dtype=torch.bfloat16)
    assert_same_weights(loaded, model)  # bit for bit: in bf16 the head would lose 16 of its 24 bits
    assert loaded.score.weight.dtype == torch.float32 and loaded.model.norm.weight.dtype == torch.bfloat16
    sequences = make_sequences([4, 11])
    assert torch.equal(loaded.scores(sequences), model.scores(sequences))
    save_scalar(loaded, tmp_path / "again", tokenizer)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "final" / "model.safetensors"
    ).read_bytes()


def test_pad_is_the_tokenizers_wherever_it_is_written(make_policy, tokenizer, tmp_path):
    tokenizer.pad_id = 42
    save_policy(make_policy(pad_token_id=None), tmp_path / "final", tokenizer)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "final" / file).read_text(encoding="utf-8"))["pad_token_id"] == 42
    assert read_config(tmp_path / "final").pad_token_id == 42


# --- transformers reads what we write ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_logits_of_a_saved_policy(make_policy, make_sequences, tokenizer, tmp_path, tied, auto):
    policy = make_policy(tie_word_embeddings=tied)
    save_policy(policy, tmp_path / "final", tokenizer)
    oracle = auto("AutoModelForCausalLM", tmp_path / "final")
    for sequence, logits in zip(sequences := make_sequences([30, 1, 8]), policy.logits(sequences), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, oracle(torch.tensor([sequence])).logits[0], rtol=1e-4, atol=1e-4)
    generation = oracle.generation_config  # plain sampling from the whole vocabulary, as in training (trap T16)
    assert (generation.do_sample, generation.temperature, generation.top_p, generation.top_k) == (True, 0.7, 1.0, 0)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


def test_transformers_score_minus_the_shift_is_ours(make_scalar, make_sequences, tokenizer, tmp_path, auto):
    model = make_scalar(bias=False, score_shift=0.85)
    save_scalar(model, tmp_path / "final", tokenizer)
    oracle = auto("AutoModelForSequenceClassification", tmp_path / "final")
    sequences = make_sequences([12, 5, 1, 9])
    ids = torch.tensor([s + [tokenizer.pad_id] * (12 - len(s)) for s in sequences])  # padded on the right
    with torch.no_grad():
        theirs = oracle(ids, attention_mask=ids.ne(tokenizer.pad_id).long()).logits
    assert theirs.shape == (4, 1) and oracle.config.score_shift == 0.85
    torch.testing.assert_close(theirs[:, 0] - oracle.config.score_shift, model.scores(sequences), rtol=1e-4, atol=1e-4)


def test_transformers_gives_the_values_of_a_saved_critic(make_scalar, make_sequences, tokenizer, tmp_path, auto):
    critic = critic_from(make_scalar(bias=False, score_shift=0.85))
    save_scalar(critic, tmp_path / "final_critic", tokenizer)
    oracle = auto("AutoModelForTokenClassification", tmp_path / "final_critic")
    (sequence,) = make_sequences([12])
    with torch.no_grad():
        theirs = oracle(torch.tensor([sequence])).logits[0, :, 0]
    torch.testing.assert_close(critic.values([sequence])[0], theirs, rtol=1e-5, atol=1e-5)


def test_a_policy_is_no_reward_model(saved):
    with pytest.raises(UserError, match="LlamaForCausalLM, expected a reward model or a critic"):
        load_scalar(saved[1])


# --- complete or absent -----------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_saved_leaves_the_saved_one(saved, tokenizer, make_policy):
    policy, folder = saved

    def full_disk(folder):
        raise OSError(28, "No space left on device")

    tokenizer.save = full_disk
    with pytest.raises(OSError):
        save_policy(make_policy(seed=1, tie_word_embeddings=False), folder, tokenizer)
    assert_same_weights(load_policy(folder), policy)
