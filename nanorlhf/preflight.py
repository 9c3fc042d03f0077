"""Pre-flight: what must hold before the first update of PPO, measured on the first real batch.

PPO fails silently. A temperature missing in one of three places, a shifted index or a critic that is not the reward model does
not crash; it shows as a slow, odd run. These checks cost one forward pass and stop such a run before it starts.
"""

import torch
from torch import Tensor

from nanorlhf.errors import UserError

RATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the mean; other microbatches round differently


def preflight(
    *, logprobs: Tensor, ref_logprobs: Tensor, new_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Check the identities that hold while the policy is still the SFT model and the critic still the reward model.

        KL(policy || SFT) = 0       the same weights, the same temperature, the same code
        ratio = 1                   the log-probs of a second forward pass, cut into other microbatches
        V(after EOS) = score        the critic starts as the reward model (N+ detail 22)

    args: logprobs, ref_logprobs, new_logprobs, values (B, R); scores (B,) of the reward model, before the missing-EOS rule;
    mask (B, R) = action_mask -> {"preflight/kl", "preflight/ratio", "preflight/value_error"}. Raises UserError naming the likely cause.
    """
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1).abs().max().item()
    ratio = torch.where(mask, (new_logprobs - logprobs).exp(), 0.0).sum().item() / mask.sum().item()
    last = mask.sum(1) - 1  # L: the index of EOS
    has_next = last + 1 < mask.shape[1]  # the state after EOS has a slot
    after_eos = values.gather(1, (last + 1).clamp(max=mask.shape[1] - 1)[:, None])[:, 0]
    value_error = torch.where(has_next, after_eos - scores, 0.0).abs().max().item()

    tolerance = RATIO_TOLERANCE[dtype]
    if kl > 1e-3:
        raise UserError(f"pre-flight: KL(policy, SFT) is {kl:.4g} before the first update, expected 0: are --sft_model and the reference the same folder?")
    if abs(ratio - 1) > tolerance:
        raise UserError(f"pre-flight: the ratio is {ratio:.6f} before the first update, expected 1 within {tolerance}: old and new log-probs differ in temperature or in code")
    if value_error > (1e-3 if dtype == torch.float32 else 0.1):
        raise UserError(f"pre-flight: V(after EOS) differs from the score by {value_error:.4g}, expected 0: the critic did not start as the reward model")
    return {"preflight/kl": kl, "preflight/ratio": ratio, "preflight/value_error": value_error}
