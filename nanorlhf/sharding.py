"""A model in parts: each process holds a part of every weight, and all of them come together where they are used.

    policy, critic           fp32 masters, gradients and Adam's moments: 16 bytes a parameter, divided by the processes
    reference, reward model  in the dtype of the run, divided too
    actor                    the policy as a whole, in the dtype of the run: it samples, scores and is saved

PyTorch's FSDP2 (`fully_shard`) does it: before a block computes, its weights are gathered in the dtype of the run;
after it, they are given up again; in the backward pass they are gathered once more, and the gradients are summed in
fp32 to the process that holds the part (ZeRO-3; Rajbhandari et al. 2020). Decoding a token at a time would gather the
model 53 times a response, so it reads the actor, whose addresses never move: its captured graph stays (decoder.py).

Without torchrun nothing is in parts: `shard` is not called, the actor is the policy itself, the other functions are the
identity.
"""

import warnings

import torch
from torch import Tensor, nn

from nanorlhf import parallel

# Every method of a model that reads weights and is called from outside: FSDP gathers before `forward` alone, unless
# told. None of them calls another one: the inner one would give the weights up under the outer one.
METHODS = ("response_logprobs", "response_ppo_loss", "response_kl", "cross_entropy", "token_scores", "last_scores",
           "response_values")  # fmt: skip


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Splits a model on the meta device, in place: a block at a time, then what is left (embedding, norm, head).

    args: dtype: in which it computes, whatever its parameters are kept in
    """
    # Here: their import takes 0.7 s, which a single process should not wait for.
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = parallel.mesh()
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    if hasattr(model, "score"):  # fp32 in any case, see models.py
        fully_shard(model.score, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    # The scalar head gives a view, of which FSDP warns: nothing here writes into one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name in METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Our losses divide by counts of the whole minibatch, so gradients add up; FSDP would take their mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a factor goes into the sum, which gloo does not know
    model.computes_in = dtype
    return model


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which a model computes: that of its weights, unless they are the fp32 masters of one in parts."""
    return getattr(model, "computes_in", model.model.embed_tokens.weight.dtype)


def is_part(tensor: Tensor) -> bool:
    """Whether this process has a part of it only (torch's DTensor)."""
    if not parallel.on():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part: some rows, perhaps none; of a tensor that is not in parts all of it. A view."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it. Every process must ask, in the same order; a tensor that is not in parts is given back."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def rows(tensor: Tensor) -> tuple[int, int]:
    """Which rows `local` has: [begin, end)."""
    n = tensor.shape[0] if tensor.dim() else 1
    if not is_part(tensor):
        return 0, n
    each = -(-n // parallel.size())
    begin, end = (min(n, each * i) for i in (parallel.rank(), parallel.rank() + 1))
    assert tensor.to_local().shape[0] == end - begin, "FSDP cuts a tensor as torch.chunk does"
    return begin, end


def in_parts(model: nn.Module) -> bool:
    return hasattr(model, "computes_in")


@torch.no_grad()
def fill(target: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor, on any device, into one that may be in parts: each process its own rows."""
    begin, end = rows(target)
    local(target).copy_(tensor[begin:end] if tensor.dim() else tensor)


@torch.no_grad()
def copy_parts(target: nn.Module, source: nn.Module) -> None:
    """Weights from one model in parts to another of the same shapes, each process its own: nothing is sent."""
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        local(mine).copy_(local(theirs))


def actor_of(policy: nn.Module) -> nn.Module:
    """The policy as a whole, on every process and without gradients; the policy itself where it is not in parts."""
    if not in_parts(policy):
        return policy
    with torch.device("meta"):
        actor = type(policy)(policy.config).to(dtype_of(policy))  # FSDP's class makes one of ours
    actor = actor.to_empty(device=policy.head_weight.device).requires_grad_(False)
    refill(actor, policy)
    return actor


@torch.no_grad()
def refill(actor: nn.Module, policy: nn.Module) -> None:
    """Gathers the policy's weights into the actor, in place and a tensor at a time; nothing where they are one."""
    if actor is policy:
        return
    for target, part in zip(actor.parameters(), policy.parameters(), strict=True):
        target.copy_(whole(part.detach().to(target.dtype)))
