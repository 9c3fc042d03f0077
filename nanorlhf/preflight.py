"""Pre-flight: what must hold before the first update of PPO, measured on the first real batch.

PPO fails silently. A temperature missing in one of three places, a shifted index or a
critic that is not the reward model does not crash; it shows as a slow, odd run. These
checks cost one forward pass and stop such a run before it starts.
"""

import torch
from torch import Tensor

from nanorlhf.errors import UserError
from nanorlhf.models import Policy
from nanorlhf.packing import in_microbatches
from nanorlhf.ppo import Experience

RATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the mean; other microbatches round differently
VALUE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def preflight(policy: Policy, episode: Experience, ref_logprobs: Tensor, scores: Tensor, cfg) -> dict[str, float]:
    """Check the identities that hold while the policy is still the SFT model and the critic still the reward model.

        KL(policy || SFT) = 0       the same weights, the same temperature, the same code
        ratio = 1                   a second forward pass, cut into other microbatches, gives the same log-probs
        V(after EOS) = score        the critic starts as the reward model (N+ detail 22)

    args: ref_logprobs (B, R); scores (B,) before the missing-EOS rule; cfg: temperature and microbatch_tokens
    -> {"preflight/kl", "preflight/ratio", "preflight/value_error"}. Raises UserError naming the likely cause.
    """
    sequences, responses, mask, logprobs, values = (
        episode.sequences, episode.responses, episode.action_mask, episode.logprobs, episode.values,
    )  # fmt: skip
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1).abs().max().item()
    if not kl <= 1e-3:  # so that a nan fails too
        raise UserError(
            f"pre-flight: KL(policy, SFT) is {kl:.4g} nats before the first update, expected 0: "
            "policy and reference differ in weights, in temperature or in code"
        )

    def second_pass(packed, rows):
        return policy.response_logprobs(packed, responses[rows], cfg.temperature)

    smaller = max(1, cfg.microbatch_tokens // 2)
    new_logprobs, _ = in_microbatches(second_pass, sequences, smaller, responses.device)  # (B, R)
    ratio = (torch.where(mask, (new_logprobs - logprobs).exp(), 0.0).sum() / mask.sum()).item()
    dtype = policy.head_weight.dtype
    if not abs(ratio - 1) <= RATIO_TOLERANCE[dtype]:
        raise UserError(
            f"pre-flight: the ratio is {ratio:.6f} before the first update, expected 1 within "
            f"{RATIO_TOLERANCE[dtype]}: log-probs depend on how the batch is cut, so padding or another sequence "
            "leaks in"
        )

    after_eos = mask.sum(1).clamp(max=mask.shape[1] - 1)  # (B,) L+1, the index of the state after EOS
    has_slot = ~mask[:, -1]  # a response that fills all R slots has no such state
    difference = values.gather(1, after_eos[:, None])[:, 0] - scores
    value_error = torch.where(has_slot, difference, 0.0).abs().max().item()
    if not value_error <= VALUE_TOLERANCE[dtype]:
        raise UserError(
            f"pre-flight: V(after EOS) differs from the score by {value_error:.4g}, expected 0: "
            "the critic did not start as the reward model, or one of them reads the wrong token"
        )
    return {"preflight/kl": kl, "preflight/ratio": ratio, "preflight/value_error": value_error}
