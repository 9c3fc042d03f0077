"""One fused operation a file (the two norms share one), each beside the plain PyTorch that specifies it.

Imports torch, and triton where it exists. From logits, M rows of a vocabulary of V:

    logprob_entropy       logits, labels -> log-prob, entropy, logsumexp
    kl                    two logits, labels -> exact KL, both log-probs

and straight from hidden states h (M, D) and the head's weight W (V, D), so that no (M, V) matrix is kept:

    linear_logprob        log-prob and entropy                          PPO's scoring
    linear_ppo_loss       PPO's clipped policy loss and its gradient    PPO's learning
    linear_cross_entropy  weighted cross-entropy and its gradient       SFT
    linear_kl             exact KL between two heads                    --kl_estimator full, evaluation
    sample_head           next token, its log-prob                      rollout

for the body of the model, N packed tokens:

    rms_norm              x / rms(x) * weight
    add_rms_norm          the same of a sum, which is the new residual stream
    rope                  merged q, k, v -> three, q and k turned by their positions
    swiglu                merged gate, up -> silu(gate) * up
    decode_attention      one new token a sequence over a cache of keys and values                  rollout

    linear, linear_fp32   x W^T: cuBLAS on a GPU, oneDNN or MKL on a CPU in fp32

cpu.py has the elementwise ones of the body once more, for a CPU in fp32: PyTorch, with the gradients written by hand.

`NANORLHF_KERNELS=torch` takes the references everywhere; runtime.py says how the path is chosen.
"""

from kernels.decode_attention import decode_attention
from kernels.kl import kl
from kernels.linear import chosen, linear, linear_fp32
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob
from kernels.linear_ppo_loss import PPOLoss, linear_ppo_loss
from kernels.logprob_entropy import logprob_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.sample_head import sample_head
from kernels.swiglu import swiglu

__all__ = [
    "PPOLoss",
    "add_rms_norm",
    "chosen",
    "decode_attention",
    "kl",
    "linear",
    "linear_cross_entropy",
    "linear_fp32",
    "linear_kl",
    "linear_logprob",
    "linear_ppo_loss",
    "logprob_entropy",
    "rms_norm",
    "rope",
    "sample_head",
    "swiglu",
]
