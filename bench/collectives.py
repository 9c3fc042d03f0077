"""Counts what a process says to others: collectives of the model and of the batch, by kind, and their bytes.

with Collectives() as said: ...; said.count["gather"], said.bytes["gather"]. Kinds: gather and scatter are FSDP's and
the actor's; sum is an all-reduce (rows of a batch, metrics, norms), told what goes over gloo as JSON.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "_allgather_base_": "gather",  # of a group of weights, by FSDP
    "all_gather_into_tensor": "gather",  # of one tensor, by DTensor.full_tensor
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "sum",
    "all_reduce": "sum",
    "allgather_": "told",
}


class Collectives(TorchDispatchMode):
    """Sees every collective of the code inside it, those of the backward pass included, on a CPU."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        result = function(*args, **(kwargs or {}))
        if space in ("c10d", "_c10d_functional") and name in KINDS:
            kind = KINDS[name]
            sizes = [x.nbytes for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            self.count[kind] += 1
            self.bytes[kind] += max(sizes)  # of a gather the result, of a scatter what goes in
        return result
