"""AdamW with fp32 masters, and the two learning-rate schedules of the paper.

At lr 3e-6 a bf16 weight of 0.02 would not move: half its spacing is 6e-5. So a model that trains in bf16 keeps an fp32
master of each weight here: gradients accumulate in fp32, Adam steps on the masters, and the bf16 copy that the forward
pass reads is rewritten in place. A model in fp32 is its own master. So is one in parts (sharding.py): each process has
masters, gradients and moments of its own part, and steps on that.

With one post's numbers: docs/walk.md, station 13.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from nanorlhf import parallel, sharding
from nanorlhf.errors import NotFinite, UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter, from its first step on


def cosine_lr(step: int, total: int, peak: float) -> float:
    """Cosine from peak to 0 for 0-based optimizer step `step` of `total`, no warm-up (N+ detail 9)."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def linear_lr(step: int, total: int, peak: float) -> float:
    """Linear from peak to 0 for 0-based update `step` of `total`, all epochs of an update alike (N+ detail 20)."""
    return peak * (1 - step / total)


def constant_lr(step: int, total: int, peak: float) -> float:
    """The peak, always."""
    return peak


def wsd_lr(step: int, total: int, peak: float) -> float:
    """Warmup-stable-decay (Hu et al. 2024, MiniCPM), without the warm-up: the peak, and in the last 30% linear to 0."""
    return peak * min(1.0, (1 - step / total) / 0.3)


SCHEDULES = {"cosine": cosine_lr, "linear": linear_lr, "constant": constant_lr, "wsd": wsd_lr}


class AdamW:
    """torch's AdamW over fp32 masters.

    Betas 0.9 and 0.999 and weight decay 0.01 are torch's defaults, which the paper never sets; eps 1e-5 it does.

    args: models: their parameters are trained together, each model at a learning rate of its own if `step` is given
    several; a parameter that two models share is an error.
    """

    def __init__(self, models: list[nn.Module], lr: float, eps: float = 1e-5, beta2: float = 0.999):
        self.names, self.labels, self.parameters, sizes = [], [], [], []
        self.skipped, self.last_skip = 0, ""  # steps not taken, and why the last one was not
        for index, model in enumerate(models):
            sizes.append(len(list(model.parameters())))
            for name, parameter in model.named_parameters():
                self.names.append(f"{index}.{name}")
                self.labels.append(f"{type(model).__name__.removeprefix('FSDP')}.{name}")  # what an error calls it
                self.parameters.append(parameter)
        # Tensors without data have a storage too.
        places = {sharding.local(p).untyped_storage()._cdata for p in self.parameters}
        assert len(places) == len(self.parameters), "two models share a parameter"
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(lambda p, m=master: _move_gradient(p, m))
        ends = list(accumulate(sizes))
        of_models = [self.masters[end - size : end] for size, end in zip(sizes, ends, strict=True)]  # a group a model
        groups = [{"params": masters} for masters in of_models]
        self.adam = torch.optim.AdamW(groups, lr=lr, eps=eps, betas=(0.9, beta2), fused=True)

    def step(self, lr: float | Sequence[float], max_grad_norm: float | None = None, on_nan: str = "stop") -> Tensor:
        """One optimizer step on the accumulated gradients, which it clears. Returns their norm before clipping, ().

        A parameter without a gradient keeps weight and moments as they are, weight decay included.

        args: lr: of all models, or one for each
        When the norm is not finite, weights and moments stay as they are. on_nan: stop raises NotFinite, which names
        the tensors; skip counts the step in `skipped`.
        """
        groups = self.adam.param_groups
        for group, rate in zip(groups, lr if isinstance(lr, Sequence) else [lr] * len(groups), strict=True):
            group["lr"] = rate
        gradients = [master.grad for master in self.masters if master.grad is not None]
        norm = sharding.whole(torch.nn.utils.get_total_norm(gradients))  # of all parts together
        if not torch.isfinite(norm):
            bad = not_finite({n: m.grad for n, m in zip(self.labels, self.masters, strict=True) if m.grad is not None})
            what = f"gradient of {bad}" if bad else f"norm {norm.item()} of the gradients"  # a sum that overflows
            self.adam.zero_grad(set_to_none=True)
            if on_nan == "stop":
                raise NotFinite(what)
            self.skipped += 1
            self.last_skip = what
            return norm
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters, max_grad_norm, norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return norm

    def check_weights(self) -> None:
        """Raises NotFinite, naming the tensors, when a weight or one of Adam's moments is nan or infinite."""
        if bad := not_finite(dict(zip(self.labels, self.masters, strict=True))):
            raise NotFinite(f"weight {bad}")
        for name, master in zip(self.labels, self.masters, strict=True):
            if bad := not_finite({f"{key} of {name}": value for key, value in self.adam.state.get(master, {}).items()}):
                raise NotFinite(f"moment {bad}")

    @property
    def state_bytes(self) -> int:
        """Size of `state` once a step has been taken: master and two moments, 4 bytes each."""
        return 3 * sum(master.numel() * master.element_size() for master in self.masters)

    @property
    def model_bytes(self) -> int:
        """Size of the models themselves."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name: fp32 masters and Adam's moments and step counts."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"{name}.master"] = master.detach()
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, into models of the same shapes. Raises UserError when a tensor is missing."""
        with torch.no_grad():
            for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
                keys = MOMENTS if any(f"{name}.{key}" in tensors for key in MOMENTS) else ()
                for key in ("master", *keys):
                    if f"{name}.{key}" not in tensors:
                        raise UserError(
                            f"checkpoint: tensor {name}.{key} is missing, expected the whole state of these models: "
                            "remove its folder to resume from an earlier one"
                        )
                if tensors[f"{name}.master"].shape != master.shape:
                    raise UserError(
                        f"checkpoint: tensor {name}.master has shape {tuple(tensors[f'{name}.master'].shape)}, "
                        f"expected {tuple(master.shape)}: it belongs to another model"
                    )
                sharding.fill(master, tensors[f"{name}.master"])
                if parameter is not master:
                    parameter.copy_(master)
                self.adam.state[master] = {key: _moment(tensors[f"{name}.{key}"], master) for key in keys}


def _moment(stored: Tensor, master: Tensor) -> Tensor:
    """A moment, or the number of steps, as Adam keeps it of this master."""
    if not stored.dim():
        return stored.to(master.device).clone()
    moment = torch.empty_like(master)
    sharding.fill(moment, stored)
    return moment


def not_finite(tensors: dict[str, Tensor]) -> str:
    """ "A.weight (nan) and 3 more": which of them have an element that is nan or infinite; "" when none has. Of tensors
    in parts, any part; every process must ask."""
    bad = []
    for name, tensor in tensors.items():
        part = sharding.local(tensor)
        found = 0 if torch.isfinite(part).all() else 2 if torch.isnan(part).any() else 1
        if found := parallel.most(found) if part is not tensor else found:
            bad.append(f"{name} ({'nan' if found == 2 else 'inf'})")
    return " and ".join([bad[0], f"{len(bad) - 1} more"]) if len(bad) > 1 else "".join(bad)


def _move_gradient(parameter: Tensor, master: Tensor) -> None:
    """After each backward pass: add the bf16 gradient to the fp32 one, so that many microbatches lose no low bits.

    The sum reads bf16 and writes fp32 in one operation: a copy in fp32 first would be 1.05 GB for Llama 3's embedding.
    """
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
