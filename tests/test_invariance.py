"""What must not matter does not: padding on either side. And the numbers that must be the paper's are."""

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from nanorlhf.data.tldr import Comparison, Post
from nanorlhf.optim import cosine_lr, linear_lr
from nanorlhf.rollout import generate
from nanorlhf.storage.checkpoint import save_policy

LENGTHS = [9, 1, 30, 4]


@pytest.fixture
def oracle(make_policy, tokenizer, tmp_path):
    """(ours, transformers' model with the same weights)"""
    transformers = pytest.importorskip("transformers")
    policy = make_policy()
    save_policy(policy, tmp_path / "model", tokenizer)
    return policy, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")


def padded(sequences: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both (B, T), PAD = 0."""
    width = max(map(len, sequences))
    gaps = [[0] * (width - len(s)) for s in sequences]
    ids = [gap + s if left else s + gap for gap, s in zip(gaps, sequences, strict=True)]
    ones = [gap + [1] * len(s) if left else [1] * len(s) + gap for gap, s in zip(gaps, sequences, strict=True)]
    return torch.tensor(ids), torch.tensor(ones)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_on_either_side_gives_what_packing_gives(oracle, make_sequences, left):
    policy, theirs = oracle
    sequences = make_sequences(LENGTHS)
    ids, mask = padded(sequences, left)
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for row, packed in enumerate(policy.logits(sequences)):
        torch.testing.assert_close(packed, logits[row][mask[row].bool()], rtol=1e-4, atol=1e-4)


def test_greedy_generation_equals_left_padded_generation_of_transformers(oracle, make_sequences):
    policy, theirs = oracle
    queries = make_sequences(LENGTHS)
    ids, mask = padded(queries, left=True)
    theirs.generation_config.eos_token_id = None  # else it would stop, or with min_new_tokens forbid EOS (trap T17)
    out = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0)
    ours, _ = generate(policy, queries, response_length=12, temperature=0)
    assert torch.equal(ours, out[:, ids.shape[1] :])


def test_schedules_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for ours, name in ((cosine_lr, "get_cosine_schedule_with_warmup"), (linear_lr, "get_linear_schedule_with_warmup")):
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-6)
        schedule = getattr(transformers, name)(adam, num_warmup_steps=0, num_training_steps=911)
        for step in range(911):
            assert ours(step, 911, 3e-6) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12, abs=1e-20)
            adam.step()
            schedule.step()


# --- the paper's numbers (its Table 7, and details 9, 10, 20) ---------------------------------------------------------


def test_the_preset_paper_has_the_papers_numbers():
    ppo = vars(train_ppo.Config(**train_ppo.PRESETS["paper"]))
    table_7 = dict(
        total_episodes=1_000_000, batch_size=512, lr=3e-6, lr_schedule="linear", num_ppo_epochs=4, num_minibatches=1,
        kl_coef=0.05, gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, temperature=0.7,
        response_length=53, max_query_length=512, whiten_rewards=False, missing_eos_score=-1.0, max_grad_norm=None,
    )  # fmt: skip
    assert {name: ppo[name] for name in table_7} == table_7
    assert ppo["total_episodes"] // ppo["batch_size"] == 1953
    sft, rm = vars(train_sft.Config(**train_sft.PRESETS["paper"])), vars(train_rm.Config(**train_rm.PRESETS["paper"]))
    both = dict(lr=3e-6, lr_schedule="cosine", num_epochs=1, max_grad_norm=None, max_query_length=512)
    assert {name: sft[name] for name in both} == {name: rm[name] for name in both} == both
    assert (sft["batch_size"], rm["batch_size"]) == (128, 64)
    assert (116_722 // sft["batch_size"], 92_858 // rm["batch_size"]) == (911, 1450)


def test_accuracy_is_split_by_batch_split_and_confidence():
    def pair(batch: str, split: str, confidence: int | None) -> Comparison:
        return Comparison(Post("1", "s", "t", "p", ""), " a", " b", "x", "y", batch, split, confidence, "w")

    pairs = [pair("11", "valid1", 9), pair("11", "valid2", 9), pair("13", "valid1", None)]
    name = "eval/rm/validation/accuracy"
    assert train_rm.accuracy_by(pairs, [True, False, False]) == {
        name: 1 / 3, f"{name}/split/valid1": 0.5, f"{name}/split/valid2": 0, f"{name}/batch/11": 0.5,
        f"{name}/batch/13": 0, f"{name}/confidence/9": 0.5, f"{name}/confidence/None": 0,
    }  # fmt: skip
