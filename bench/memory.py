"""How much memory a piece of the real code takes, without a GPU: it runs on the meta device, and storages are counted.

A meta tensor has a shape, a dtype and a lifetime, and no data. So a forward and backward pass of the 1B model takes a
fraction of a second and no memory, autograd keeps exactly what it would keep on a GPU, and `Meter` sees every storage
come and go. What it cannot see, an operation's own workspace, is in WORKSPACE.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear_logprob import TILE
from kernels.runtime import chunks

BLOCK = 512  # bytes: torch's allocator rounds up to it


def _head_loss(hidden, weight, labels, weights, old_logprobs, advantages, temperature, cliprange, *wanted) -> int:
    """Of linear_ppo_loss and linear_cross_entropy: a chunk of fp32 logits, and of their gradient in the dtype of W."""
    rows = chunks(hidden.shape[0], weight.shape[0])[0].stop
    return rows * weight.shape[0] * (4 + (weight.element_size() if any(wanted) else 0))


def _head(hidden, weight, *_) -> int:
    """Of linear_logprob: a chunk of fp32 logits."""
    return chunks(hidden.shape[0], weight.shape[0])[0].stop * weight.shape[0] * 4


def _head_in_tiles(hidden, weight, *_) -> int:
    """Of linear_logprob on Hopper: three numbers for each row and tile of the vocabulary."""
    return 3 * 4 * hidden.shape[0] * -(-weight.shape[0] // TILE["BLOCK_N"])


def _attention_backward(grad, q, *_) -> int:
    """Of flash attention: the gradient of the queries adds up in fp32."""
    return q.numel() * 4


WORKSPACE: dict[str, Callable[..., int]] = {
    "nanorlhf::linear_loss": _head_loss,
    "nanorlhf::linear_logprob": _head,
    "torch_attn::_varlen_attn_backward": _attention_backward,
}


class Meter(TorchDispatchMode):
    """Bytes of the storages on one device that were made inside and still live, and the most there were.

    with Meter() as meter: ...; meter.live, meter.peak. `meter.reset()` forgets the peak. hopper: count the workspace of
    the kernels that an H100 or H200 has; without it that of any other card, which is larger.
    """

    def __init__(self, device: str = "meta", hopper: bool = False):
        super().__init__()
        self.workspace = WORKSPACE | ({"nanorlhf::linear_logprob": _head_in_tiles} if hopper else {})
        self.device, self.live, self.peak = device, 0, 0
        self._known: set[int] = set()

    def reset(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # else a view of what was there
                    self._count(storage)
        workspace = self.workspace.get(function._schema.name)
        self.peak = max(self.peak, self.live + (workspace(*args) if workspace else 0))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def saved_bytes(forward: Callable[[], object], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`: every storage once, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
