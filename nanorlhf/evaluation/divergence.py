"""How far a policy has gone from the SFT policy: the exact KL of its summaries, over the whole vocabulary.

PPO logs `objective/kl`, the sampled estimate k1, of its own rollouts. Here, on held-out posts, each token of a fresh
sample contributes the whole sum over the vocabulary instead: less noise, and never negative.
"""

from pathlib import Path

import torch

from nanorlhf import ppo
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import Post
from nanorlhf.data.tokenizer import check_same, load_tokenizer
from nanorlhf.models import response_kl
from nanorlhf.packing import in_microbatches
from nanorlhf.rollout import generate
from nanorlhf.storage.checkpoint import load_policy


@torch.no_grad()
def kl_from_sft(
    folder: Path,
    sft_folder: Path,
    posts: list[Post],
    max_query_length: int,
    response_length: int,
    temperature: float,
    noise: int,
    microbatch_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[float]:
    """KL(policy || SFT) of one sampled summary a post, in nats: the sum over its tokens, EOS included.

    Both distributions are at `temperature`, that of the sampling. Raises UserError when the tokenizers differ.
    """
    tokenizer = load_tokenizer(folder)
    check_same(tokenizer, load_tokenizer(sft_folder), f"the policy in {folder}", f"that of SFT ({sft_folder})")
    queries, _ = encode_posts(posts, tokenizer, max_query_length)
    policy, reference = (load_policy(path, device, dtype, tokenizer) for path in (folder, sft_folder))
    responses, _ = generate(policy, list(queries), response_length, temperature, noise)  # (B, R)
    sequences = [query + response for query, response in zip(queries, responses.tolist(), strict=True)]
    kl, _, _ = in_microbatches(
        lambda packed, rows: response_kl(policy, reference, packed, responses[rows], temperature),
        sequences, microbatch_tokens, device,
    )  # fmt: skip
    return torch.where(ppo.action_mask(responses, tokenizer.eos_id), kl, 0.0).sum(1).tolist()
