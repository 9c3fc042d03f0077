"""One fused operation a file, each beside the plain PyTorch that specifies it.

Imports torch only, and triton where it exists.

    linear                x W^T: cuBLAS on a GPU, oneDNN on a CPU in fp32         (every matrix of the model)
    linear_fp32           the same for a head: bf16 in, fp32 out
    linear_logprob        hidden, head weight, labels -> log-prob, entropy        (PPO: policy and reference)
    linear_cross_entropy  hidden, head weight, labels, token weights -> loss      (SFT)

`NANORLHF_KERNELS=torch` takes the reference everywhere.
"""

from kernels.linear import chosen, linear, linear_fp32
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob

__all__ = ["chosen", "linear", "linear_fp32", "linear_cross_entropy", "linear_logprob"]
