"""Guard elements around every tensor that a kernel gets: neither the interpreter nor a GPU notices a stray write."""

import torch

LARGEST = 2**24  # elements; larger tensors exist by their addresses only and are not copied
GUARD = 64  # elements before and behind every tensor: whole cache lines, so that alignment stays as it was
WRITES = {  # what each kernel may write
    "_logprob_entropy_fwd": {"logprobs", "entropies", "lses", "tops", "log2sums"},
    "_logprob_entropy_bwd": {"grad_logits"},
    "_kl_fwd": {"kls", "logprobs", "ref_logprobs", "tops", "ref_tops", "log2sums", "ref_log2sums"},
    "_kl_bwd": {"grad_logits"},
    "_tile_stats": {"tops", "sums", "tilts", "label_logits"},
    "_tile_kl": {"tops", "sums", "ref_tops", "ref_sums", "gaps", "label_logits", "ref_label_logits"},
    "_merge": {"kls", "logprobs", "ref_logprobs", "entropies", "row_tops", "log2sums"},
    "_loss_rows": {"grad_logits", "losses", "logprobs", "entropies", "clipped_rows"},
    "_pick": {"tokens", "logprobs", "entropies"},
    "_decode": {"outs", "lses"},
    "_merge_splits": {"outs"},
}


def elements_spanned(x: torch.Tensor) -> int:
    """From its first element to its last one; for a view that is more than it has."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def guarded(start):
    """A `runtime.start` that runs each kernel on guarded copies, and afterwards finds guards and inputs unchanged."""

    def guarded_start(kernel, grid, args, constants, options):
        name = kernel.fn.__name__
        copies, checks = [], []
        for parameter, value in zip(kernel.arg_names, args, strict=False):
            if not isinstance(value, torch.Tensor) or (extent := elements_spanned(value)) > LARGEST:
                copies.append(value)
                continue
            fill = -777.25 if value.is_floating_point() else -77
            buffer = value.new_full((extent + 2 * GUARD,), fill)
            inner = buffer[GUARD:].as_strided(value.shape, value.stride())
            inner.copy_(value.detach())
            copies.append(inner)
            checks.append((parameter, value, buffer, inner, fill))
        start(kernel, grid, tuple(copies), constants, options)
        for parameter, value, buffer, inner, fill in checks:
            if parameter in WRITES[name]:
                value.detach().copy_(inner)
            else:
                assert torch.equal(inner.nan_to_num(1e9), value.detach().nan_to_num(1e9)), f"{name} wrote {parameter}"
            inner.fill_(fill)
            assert (buffer == fill).all(), f"{name} wrote around {parameter}"  # before, behind, in the gaps of a view

    return guarded_start
