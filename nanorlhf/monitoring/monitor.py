"""What PPO logs about an update, under the names of the published runs so that curves overlay.

Averages count the tokens that count. Where the paper's code averages over padding too, its
version stands beside ours with the suffix `_paper`: there a padded slot adds 0 to approxkl
and clipfrac, 1 to the ratio, and -1 to the entropy of a response (traps T51 and T53).
"""

import torch
from torch import Tensor

from nanorlhf import parallel
from nanorlhf.data.tldr import Post
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.evaluation import hacks
from nanorlhf.evaluation.metrics import mean, mean_pairwise_edit_distance
from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy
from nanorlhf.monitoring.flops import mfu, ppo_update_flops
from nanorlhf.ppo import masked_mean
from nanorlhf.rollout import Summary, generate, read_responses
from nanorlhf.run.device import peak_gib
from nanorlhf.tiny import gold

DIVERSITY_POSTS, DIVERSITY_SAMPLES = 8, 4  # of a batch, and of each: a quarter of a tiny batch's rollout
DIVERSITY_NOISE = 1 << 62  # episodes from here on: numbers that no rollout uses


def objective(
    scores: Tensor,
    logprobs: Tensor,
    kl: Tensor,
    action_mask: Tensor,
    kl_coef: float,
    full_kl: Tensor | None = None,
) -> dict[str, float]:
    """What PPO maximises: means over responses of sums over tokens, in nats.

    args: scores (B,); logprobs, kl, action_mask (B, R); full_kl (B, R), with --kl_estimator full: what is penalised
    """
    penalised = kl if full_kl is None else full_kl
    non_score_reward = -kl_coef * penalised.sum(1).mean()
    surprise = torch.where(action_mask, -logprobs, 0.0).sum(1).mean()  # -log p of what was said estimates the entropy
    return {
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std().item(),
        "objective/kl": kl.sum(1).mean().item(),
        **({} if full_kl is None else {"objective/kl_full": full_kl.sum(1).mean().item()}),
        "objective/non_score_reward": non_score_reward.item(),
        "objective/rlhf_reward": (scores.mean() + non_score_reward).item(),
        "objective/entropy": surprise.item(),
        "objective/entropy_paper": (surprise - (~action_mask).float().sum(1).mean()).item(),
    }


def ensemble(member_scores: Tensor) -> dict[str, float]:
    """How far several reward models disagree: mean over responses of the standard deviation between them; nothing of
    one. member_scores (B, K)."""
    between = member_scores.std(dim=1, unbiased=False).mean().item()
    return {"objective/scores_std_between": between} if member_scores.shape[1] > 1 else {}


def learning(totals: dict[str, Tensor], optimizer_steps: int, action_mask: Tensor) -> dict[str, float]:
    """Averages over the optimizer steps of an update, from their sums; in a --critic_warmup those of the critic alone.
    action_mask (B, R)."""
    metrics = {name: (total / optimizer_steps).item() for name, total in totals.items()}
    if "val/ratio" not in metrics:
        return metrics
    metrics["val/ratio_var"] = metrics.pop("val/ratio_squared") - metrics["val/ratio"] ** 2
    counted = action_mask.float().mean().item()  # share of the B*R slots that count
    metrics["policy/approxkl_avg_paper"] = metrics["policy/approxkl_avg"] * counted
    metrics["policy/clipfrac_avg_paper"] = metrics["policy/clipfrac_avg"] * counted
    metrics["val/ratio_paper"] = metrics["val/ratio"] * counted + 1 - counted
    return metrics


def critic(
    values: Tensor, returns: Tensor, advantages: Tensor, action_mask: Tensor, value_mask: Tensor
) -> dict[str, float]:
    """How well the critic predicts: 1 is perfectly, 0 as well as a constant.

    args: all (B, R); advantages before whitening
    """
    errors, targets = (returns - values)[value_mask], returns[value_mask]
    return {
        "returns_mean": targets.mean().item(),
        "values_mean": values[value_mask].mean().item(),
        "explained_variance": (1 - errors.var() / targets.var()).item(),
        "advantages_max": advantages[action_mask].max().item(),
    }


def speed(
    config: LlamaConfig,
    sequences: list[list[int]],
    finished: list[list[int]],
    response_length: int,
    epochs: int,
    seconds: float,
    device: torch.device,
    warming: bool = False,
    reward_models: int = 1,
) -> dict[str, float]:
    """What an update cost. sequences: queries with their R tokens; finished: up to EOS; seconds: of the update;
    warming: it trained the critic alone; reward_models: how many scored it."""
    lengths = [len(sequence) for sequence in sequences]
    until_eos = [len(sequence) for sequence in finished]
    flops = ppo_update_flops(config, lengths, until_eos, response_length, epochs, warming, reward_models)
    share = mfu(flops / parallel.size(), seconds, device)  # of the peak of all GPUs
    metrics = {"perf/tokens_per_s": sum(lengths) / seconds, "perf/peak_gib": peak_gib(device)}
    return metrics if share is None else metrics | {"perf/mfu": share}


def texts(
    summaries: list[Summary], posts: list[Post], scores: Tensor, entropy: Tensor, action_mask: Tensor
) -> dict[str, float]:
    """What can be seen in the text itself: whether it stops, and the ways in which a policy games a reward model.

    In the tiny world, where the truth is known, also its gold score. scores (B,); entropy, action_mask (B, R)
    """
    written = [s.text for s in summaries]
    metrics = {
        "val/num_eos_tokens": sum(s.has_eos for s in summaries),
        "val/eos_rate": sum(s.has_eos for s in summaries) / len(summaries),
        "hack/entropy": masked_mean(entropy, action_mask).item(),  # nats a token, when it was sampled
    }
    metrics |= {f"hack/{name}": value for name, value in hacks.panel(written, posts, scores.tolist()).items()}
    if posts[0].id.startswith("tiny-"):
        metrics["objective/gold"] = mean([gold.judge(p.id, text) for p, text in zip(posts, written, strict=True)])
    return metrics


def diversity(
    policy: Policy, tokenizer: Tokenizer, queries: list[list[int]], response_length: int, temperature: float, seed: int
) -> dict[str, float]:
    """How much several samples of one post differ: mean over posts of the mean pairwise edit distance, 0 to 1."""
    queries = [query for query in queries[:DIVERSITY_POSTS] for _ in range(DIVERSITY_SAMPLES)]
    noise = range(DIVERSITY_NOISE, DIVERSITY_NOISE + len(queries))
    responses, _ = generate(policy, queries, response_length, temperature, seed, list(noise))
    written = [s.text for s in read_responses(tokenizer, responses)]
    groups = [written[i : i + DIVERSITY_SAMPLES] for i in range(0, len(written), DIVERSITY_SAMPLES)]
    return {"hack/edit_distance": mean([mean_pairwise_edit_distance(group) for group in groups])}


def trace(
    tokenizer: Tokenizer, post: Post, response: Tensor, action_mask: Tensor, value_mask: Tensor, **tensors: Tensor
) -> dict:
    """One episode, token by token, from the very tensors that PPO learns from: response and all others (R,).

    Ends at the state after EOS, whose value is trained and which receives the score.
    """
    shown = int(value_mask.sum())
    ids = response[:shown].tolist()
    masks = {"action_mask": action_mask[:shown].tolist(), "value_mask": value_mask[:shown].tolist()}
    numbers = {name: tensor[:shown].tolist() for name, tensor in tensors.items()}
    about = {"id": post.id, "title": post.title, "post": post.post}
    pieces = ["<EOS>" if i == tokenizer.eos_id else tokenizer.decode([i]) for i in ids]
    return about | {"ids": ids, "tokens": pieces} | numbers | masks
