"""One fused operation a file, each beside the plain PyTorch that specifies it. Imports torch (and triton where it exists) only.

    linear_logprob        hidden, head weight, labels -> log-prob, entropy        (PPO: policy and reference)
    linear_cross_entropy  hidden, head weight, labels, token weights -> loss      (SFT)

`NANORLHF_KERNELS` chooses the path: `torch` is the reference, which is what exists so far on every device.
"""

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob

__all__ = ["linear_cross_entropy", "linear_logprob"]
