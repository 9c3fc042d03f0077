"""Folders in and out: what we save comes back bit for bit, means the same in transformers, and damage is named."""

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanorlhf import checkpoint
from nanorlhf.checkpoint import (
    atomic_folder,
    latest_checkpoint,
    load_policy,
    load_scalar,
    load_state,
    read_config,
    save_checkpoint,
    save_policy,
    save_scalar,
    save_state,
)
from nanorlhf.errors import UserError
from nanorlhf.models import critic_from, reward_model_from
from nanorlhf.optim import AdamW


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
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
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
    assert loaded.score.bias is None and loaded.score_shift == model.score_shift
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
    assert json.loads((tmp_path / "final" / "config.json").read_text())["torch_dtype"] == "bfloat16"
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
    assert json.loads((tmp_path / "final" / "config.json").read_text())["torch_dtype"] == "bfloat16"

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
        assert json.loads((tmp_path / "final" / file).read_text())["pad_token_id"] == 42
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


def test_a_folder_whose_writing_fails_does_not_appear(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "step_5") as partial:
        (partial / "state.json").write_text("half")
        raise RuntimeError("killed")
    assert not (tmp_path / "a" / "step_5").exists()


def test_a_folder_whose_rewriting_fails_is_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "final") as partial:
        (partial / "text").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "final") as partial:
        (partial / "text").write_text("new")
        raise RuntimeError("killed")
    assert (tmp_path / "final" / "text").read_text() == "old"


def test_a_rewritten_folder_holds_only_what_is_new(tmp_path):
    for number in range(2):
        with atomic_folder(tmp_path / "final") as partial:
            (partial / f"{number}.txt").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["1.txt"]


def test_a_kill_between_the_renames_leaves_the_old_folder_aside_and_the_next_save_puts_it_back(tmp_path, monkeypatch):
    def save(text):
        with atomic_folder(tmp_path / "final") as partial:
            (partial / "text").write_text(text)

    def kill_at_the_second(source, target):
        if source.suffix == ".partial":
            raise KeyboardInterrupt
        rename(source, target)

    save("first")
    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill_at_the_second)
        save("second")
    assert (tmp_path / "final.old" / "text").read_text() == "first"
    assert (tmp_path / "final.partial" / "text").read_text() == "second"

    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "final"):
        raise RuntimeError("killed again")
    assert (tmp_path / "final" / "text").read_text() == "first"
    save("third")
    assert (tmp_path / "final" / "text").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_model_that_cannot_be_saved_leaves_the_saved_one(saved, tokenizer, make_policy):
    policy, folder = saved

    def full_disk(folder):
        raise OSError(28, "No space left on device")

    tokenizer.save = full_disk
    with pytest.raises(OSError):
        save_policy(make_policy(seed=1, tie_word_embeddings=False), folder, tokenizer)
    assert_same_weights(load_policy(folder), policy)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_state_comes_back_exactly(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7.0), "c": torch.arange(3, dtype=torch.bfloat16)}
    save_state(tmp_path / "step_3", tensors, {"step": 3, "lr": 1e-6})
    loaded, state = load_state(tmp_path / "step_3")
    assert state == {"step": 3, "lr": 1e-6} and loaded.keys() == tensors.keys()
    assert all(
        loaded[name].dtype == tensors[name].dtype and torch.equal(loaded[name], tensors[name]) for name in tensors
    )


def test_a_damaged_state_is_named(tmp_path):
    save_state(tmp_path / "step_3", {"a": torch.ones(100)}, {})
    path = tmp_path / "step_3" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="step_3: the checkpoint cannot be read"):
        load_state(tmp_path / "step_3")


@pytest.mark.parametrize("name", ["0.weight.master", "0.weight.step", "0.weight.exp_avg_sq"])
def test_a_state_without_one_of_its_tensors_is_refused_by_name(tmp_path, name):
    layer = torch.nn.Linear(2, 2, bias=False)
    optimizer = AdamW([layer], lr=1e-3)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step(1e-3)
    save_state(tmp_path / "step_1", {key: tensor for key, tensor in optimizer.state().items() if key != name}, {})
    with pytest.raises(UserError, match=f"checkpoint: tensor {name} is missing"):
        AdamW([layer], lr=1e-3).load_state(load_state(tmp_path / "step_1")[0])


def test_the_latest_checkpoint_is_the_largest_complete_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("step_9", "step_100", "step_20", "step_300.partial", "step_200.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == "step_100"


def test_of_a_runs_checkpoints_the_newest_two_are_kept(tmp_path):
    assert checkpoint.KEEP == 2
    for name in ("step_300.partial", "step_200.old"):  # what a kill leaves is not counted
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (8, 9, 10, 100):  # 9 is newer than 10 as a word
        save_checkpoint(tmp_path, step, {"a": torch.tensor(float(step))})
        tensors, state = load_state(latest_checkpoint(tmp_path))
        assert state == {"step": step} and tensors["a"].item() == step
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_10", "step_100", "step_200.old", "step_300.partial"]


def full_disk(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # its own words


def test_an_older_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": torch.tensor(float(step))})
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, 3, {"a": torch.tensor(3.0)})
    kept = [path for path in (tmp_path / "checkpoints").iterdir() if not path.suffix]
    assert sorted(load_state(path)[1]["step"] for path in kept) == [1, 2]


def test_a_full_disk_is_an_oserror_that_says_so(make_policy, make_scalar, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    for save in (
        lambda: save_checkpoint(tmp_path, 3, {"a": torch.ones(2)}),
        lambda: save_policy(make_policy(), tmp_path / "final", tokenizer),
        lambda: save_scalar(make_scalar(bias=True), tmp_path / "final_critic", tokenizer),
    ):
        with pytest.raises(OSError, match="No space left on device") as caught:
            save()
        assert caught.value.errno == errno.ENOSPC and caught.value.filename.endswith(".safetensors")
    assert latest_checkpoint(tmp_path) is None and not (tmp_path / "final").exists()


def test_another_error_of_safetensors_keeps_its_name(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("something else")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(SafetensorError, match="something else"):
        save_checkpoint(tmp_path, 3, {"a": torch.ones(2)})
