"""PPO on a tiny random model towards a goal whose outcome is known: shorter, full of a token, unmoved, stopping.

The reward model's score is replaced by a rule; everything else is train_ppo.py as it runs. A few seconds each.
"""

import pytest
import torch
from torch import Tensor

import train_ppo
from nanorlhf import ppo
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy, ScalarModel, reward_model_from
from nanorlhf.packing import Packed
from nanorlhf.run.config import parse
from nanorlhf.run.run import read_metrics
from nanorlhf.storage.checkpoint import save_policy, save_scalar
from nanorlhf.tiny.data import write_world

ROOT = train_ppo.__file__.removesuffix("train_ppo.py")
TOKENIZER = load_tokenizer(f"{ROOT}nanorlhf/tiny")
END_OF_QUERY = TOKENIZER.encode("TL;DR:")
WORD = TOKENIZER.encode(" my")[-1]
R = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags for a small world, a random policy that stops in about 4 of 5 responses, and a reward model that says 0."""
    folder = tmp_path_factory.mktemp("smoke")
    world = write_world(folder / "data", posts={"train": 64, "valid": 1, "test": 1}, comparisons={"train": 1})
    policy = Policy(
        LlamaConfig(
            vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4,
            rope_scaling=None, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    )  # fmt: skip
    initialise(policy, std=0.03, seed=3)
    with torch.no_grad():
        policy.model.embed_tokens.weight.add_(0.1)
        policy.model.embed_tokens.weight[TOKENIZER.eos_id] += 0.12
        policy.model.embed_tokens.weight[WORD] += 0.08
    save_policy(policy, folder / "sft", TOKENIZER)
    reward_model = reward_model_from(policy, seed=4)
    with torch.no_grad():
        reward_model.score.weight.zero_()
    save_scalar(reward_model, folder / "rm", TOKENIZER)
    return f"--data {world} --sft_model {folder / 'sft'} --reward_model {folder / 'rm'}"


def response(tokens: list[int]) -> list[int]:
    """What stands after the first "TL;DR:"."""
    n = len(END_OF_QUERY)
    return tokens[next(i for i in range(len(tokens)) if tokens[i : i + n] == END_OF_QUERY) + n :]


@pytest.fixture
def train(inputs, tmp_path, monkeypatch):
    """train(rule, updates, flags) -> rows of metrics.jsonl; rule: summary's token list -> score."""
    monkeypatch.chdir(tmp_path)

    def train(rule, updates: int, flags: str = "") -> list[dict]:
        def last_scores(self: ScalarModel, packed: Packed) -> Tensor:  # only the reward model is read like this
            return torch.tensor([float(rule(response(row.tolist()))) for row in packed.unpack(packed.tokens)])

        monkeypatch.setattr(ScalarModel, "last_scores", last_scores)
        line = f"--preset tiny --device cpu {inputs} --batch_size 32 --response_length {R} --max_updates {updates}"
        line += " --total_episodes 3200 --max_query_length 64 --sample_every 0 --save_every 0"
        line += f" --kl_coef 0.01 --lr 4e-3 --lr_schedule constant --no_preflight {flags}"
        train_ppo.main(parse(train_ppo.Config, train_ppo.PRESETS, train_ppo.__doc__, line.split()))
        return read_metrics("runs/ppo")

    return train


def mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_a_score_of_minus_the_length_makes_responses_shorter(train):
    rows = train(lambda tokens: -len(tokens), 16, f"--missing_eos_score {-R}")
    length = [-row["objective/scores"] for row in rows]  # the score tells the length
    assert length[0] > 8 and mean(rows[-3:], "objective/scores") > -2 and mean(rows[-3:], "val/eos_rate") > 0.98


def test_a_score_for_a_token_fills_the_responses_with_it(train):
    rows = train(lambda tokens: tokens.count(WORD), 16, "--missing_eos_score 0")
    assert rows[0]["objective/scores"] < 0.5 and mean(rows[-3:], "objective/scores") > 1.5


def test_without_any_score_and_without_whitening_kl_stays_near_0(train, monkeypatch):
    # Whitening would scale rounding errors to unit variance. With the penalty's sign reversed KL reaches 2.8 nats here.
    monkeypatch.setattr(ppo, "masked_whiten", lambda x, mask: torch.where(mask, x, 0.0))
    rows = train(lambda tokens: 0, 20, "--missing_eos_score 0 --lr 2e-4 --kl_coef 0.15")
    assert all(abs(row["objective/kl"]) < 0.2 and row["objective/scores"] == 0 for row in rows)


def test_a_missing_eos_is_unlearned(train):
    rows = train(lambda tokens: 0, 8)
    assert rows[0]["val/eos_rate"] < 0.9 and mean(rows[-3:], "val/eos_rate") > 0.97
