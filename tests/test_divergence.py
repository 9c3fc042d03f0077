"""The exact KL of a policy's summaries from SFT."""

from pathlib import Path

import pytest
import torch

from nanorlhf.data.tldr import Post
from nanorlhf.evaluation import divergence
from nanorlhf.evaluation.divergence import kl_from_sft

CHECKPOINTS = Path(__file__).parents[1] / "nanorlhf" / "tiny" / "checkpoints"
POSTS = [
    Post(str(i), "AITA", f"My {who} lied", f"My {who} lied about my car. Should I move out?", "Short.")
    for i, who in enumerate(("boss", "cousin", "neighbor"))
]
SETTINGS = dict(
    max_query_length=104, response_length=32, temperature=0.7, noise=3, microbatch_tokens=4096,
    device=torch.device("cpu"), dtype=torch.float32,
)  # fmt: skip


def test_a_policy_is_at_0_from_itself_and_ppo_is_not():
    assert kl_from_sft(CHECKPOINTS / "sft", CHECKPOINTS / "sft", POSTS, **SETTINGS) == pytest.approx([0] * 3, abs=1e-4)
    kls = kl_from_sft(CHECKPOINTS / "ppo", CHECKPOINTS / "sft", POSTS, **SETTINGS)
    assert len(kls) == 3 and all(kl > 0.01 for kl in kls)


def test_what_comes_after_eos_does_not_count(monkeypatch):
    whole = kl_from_sft(CHECKPOINTS / "ppo", CHECKPOINTS / "sft", POSTS, **SETTINGS)
    monkeypatch.setattr(divergence.ppo, "action_mask", lambda responses, eos_id: torch.ones_like(responses).bool())
    assert all(more > kl for more, kl in zip(
        kl_from_sft(CHECKPOINTS / "ppo", CHECKPOINTS / "sft", POSTS, **SETTINGS), whole, strict=True
    ))  # fmt: skip
