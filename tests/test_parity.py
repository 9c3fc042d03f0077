"""Two updates of train_ppo.py against the naive PPO of naive_ppo.py: metrics, losses and every weight after them."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import naive_ppo
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_ppo
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import batch_indices, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.llama import LlamaConfig, initialise
from nanorlhf.models import Policy, reward_model_from
from nanorlhf.run.config import parse
from nanorlhf.run.run import read_metrics
from nanorlhf.storage.checkpoint import save_policy, save_scalar
from nanorlhf.tiny.data import write_world

ROOT = Path(__file__).parents[1]
TOKENIZER = load_tokenizer(ROOT / "nanorlhf" / "tiny")
R, BATCH, LR, UPDATES = 14, 8, 3e-4, 2  # from the second update on KL is not 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders with a small world, an SFT model that stops in about half of its responses, and a reward model."""
    folder = tmp_path_factory.mktemp("parity")
    world = write_world(folder / "data", posts={"train": 16, "valid": 1, "test": 1}, comparisons={"train": 1})
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)  # fmt: skip
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4,
        rope_scaling=scaling, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    policy = Policy(config)
    initialise(policy, std=0.03, seed=3)
    with torch.no_grad():
        policy.model.embed_tokens.weight.add_(0.1)  # what all states have in common, EOS answers to
        policy.model.embed_tokens.weight[TOKENIZER.eos_id] += 0.11
    save_policy(policy, folder / "sft", TOKENIZER)
    reward_model = reward_model_from(policy, seed=4)
    reward_model.score_shift = 0.3
    save_scalar(reward_model, folder / "rm", TOKENIZER)
    return SimpleNamespace(world=world, sft=folder / "sft", rm=folder / "rm")


def ours(inputs, flags: str, monkeypatch):
    """Run train_ppo.py -> (its config, sampled responses and metrics of each update, policy and critic weights)."""
    line = f"--preset tiny --device cpu --data {inputs.world} --sft_model {inputs.sft} --reward_model {inputs.rm}"
    line += f" --batch_size {BATCH} --max_updates {UPDATES} --response_length {R} --lr {LR} --no_preflight"
    line += " --critic_lr None --critic_warmup 0 --lr_warmup 0 --lr_schedule linear"  # as the paper has it
    line += f" --num_minibatches 1 {flags}"
    cfg = parse(train_ppo.Config, train_ppo.PRESETS, train_ppo.__doc__, line.split())
    sample, sampled = train_ppo.generate, []

    def listen(*args):
        responses, logprobs = sample(*args)
        sampled.append(responses.tolist())
        return responses, logprobs

    monkeypatch.setattr(train_ppo, "generate", listen)
    train_ppo.main(cfg)
    files = (Path("runs/ppo") / name / "model.safetensors" for name in ("final", "final_critic"))
    return cfg, sampled, read_metrics("runs/ppo"), *(load_file(file) for file in files)


def double(weights: dict) -> dict:
    return {name: tensor.double() for name, tensor in weights.items()}


def naive(inputs, cfg, sampled):
    """The same updates by naive_ppo -> (episodes and logged numbers of each update, policy and critic weights)."""
    config = json.loads((inputs.sft / "config.json").read_text(encoding="utf-8"))
    policy, reward_model = (double(load_file(folder / "model.safetensors")) for folder in (inputs.sft, inputs.rm))
    shift = json.loads((inputs.rm / "config.json").read_text(encoding="utf-8"))["score_shift"]
    reference, critic = copy.deepcopy(policy), copy.deepcopy(reward_model)
    critic["score.bias"] = torch.tensor([-shift], dtype=torch.float64)
    hp = SimpleNamespace(**vars(cfg), eos_id=TOKENIZER.eos_id, score_shift=shift)
    adam = naive_ppo.adam_state(policy, critic)

    posts = load_posts(inputs.world, "train")
    every, _ = encode_posts(posts, TOKENIZER, cfg.max_query_length)
    updates = []
    for update, responses in enumerate(sampled):
        queries = [every[i] for i in batch_indices(len(posts), cfg.batch_size, cfg.seed, update)]
        episodes = naive_ppo.rollout(policy, reference, critic, reward_model, config, queries, responses, hp)
        orders = [
            np.split(np.random.default_rng([cfg.seed, update, epoch]).permutation(cfg.batch_size), cfg.num_minibatches)
            for epoch in range(cfg.num_ppo_epochs)
        ]
        lr = cfg.lr * (1 - update / len(sampled))
        updates.append((episodes, naive_ppo.update(policy, critic, config, episodes, orders, adam, lr, hp)))
    return updates, policy, critic


def expected_metrics(episodes, logged, cfg) -> dict[str, float]:
    """What metrics.jsonl should say, from the naive PPO's lists."""
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    score, penalty = mean([e.score for e in episodes]), mean([sum(e.penalised) for e in episodes])
    exact = {"objective/kl_full": mean([sum(e.full_kl) for e in episodes])} if cfg.kl_estimator == "full" else {}
    return exact | {
        "objective/scores": score,
        "objective/kl": mean([sum(e.kl) for e in episodes]),
        "objective/rlhf_reward": score - cfg.kl_coef * penalty,
        "objective/entropy": mean([-sum(e.logprobs) for e in episodes]),
        "objective/entropy_paper": mean([-sum(e.logprobs) - (e.R - len(e.tokens)) for e in episodes]),
        "returns_mean": mean([x for e in episodes for x in e.returns]),
        "values_mean": mean([x for e in episodes for x in e.values]),
        "val/num_eos_tokens": sum(e.tokens[-1] == TOKENIZER.eos_id for e in episodes),
        "loss/policy_avg": logged["policy"],
        "loss/value_avg": logged["value"],
        "policy/clipfrac_avg": logged["clipfrac"],
        "policy/approxkl_avg": logged["approxkl"],
        "val/ratio": logged["ratio"],
        "grad_norm": logged["grad_norm"],
    }


@pytest.mark.parametrize(
    "flags",
    [
        "--num_ppo_epochs 3 --max_grad_norm None",
        "--num_ppo_epochs 2 --num_minibatches 2 --microbatch_tokens 150",
        "--num_ppo_epochs 1 --whiten_rewards --gamma 0.9 --lam 0.5 --vf_coef 0.7 --missing_eos_score -2",
        "--num_ppo_epochs 3 --lr 3e-3 --cliprange 0.02 --cliprange_value 0.01 --temperature 0.8",
        "--num_ppo_epochs 2 --kl_estimator full --kl_coef 0.3",
    ],
    ids=["paper", "minibatches", "other settings", "clipped", "exact_kl"],
)
def test_an_update_equals_the_naive_ppo_in_float64(inputs, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, sampled, rows, policy, critic = ours(inputs, flags, monkeypatch)
    updates, naive_policy, naive_critic = naive(inputs, cfg, sampled)

    for row, (episodes, logged) in zip(rows, updates, strict=True):
        for name, value in expected_metrics(episodes, logged, cfg).items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=5e-6), (row["step"], name)
    for mine, theirs in ((policy, naive_policy), (critic, naive_critic)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            error = (mine[name].double() - theirs[name].detach()).abs().max().item()
            assert error < 0.02 * cfg.lr, (
                f"{name}: {error / cfg.lr:.3f} steps"
            )  # Adam moves a weight by about lr a step
    # The batch has every kind of row, and what could be 0 by accident is not.
    episodes, _ = updates[0]
    assert 0 < sum(e.tokens[-1] == TOKENIZER.eos_id for e in episodes) < BATCH
    assert len({len(e.tokens) for e in episodes}) > 2 and rows[1]["objective/kl"] != 0
    assert "0.02" not in flags or updates[0][1]["clipfrac"] > 0.05
