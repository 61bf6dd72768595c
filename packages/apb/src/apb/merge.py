"""Attention over keys that lie on several hosts, from each host's own softmax.

D: head dimension. A host that holds part of the keys returns its normalised output and the
log-sum-exp (lse) of its logits; these two are all that has to cross the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_lse(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partial attentions into the attention over all their keys.

    With L = log sum_h exp(lse_h), the result is sum_h exp(lse_h - L) out_h. The largest lse is
    subtracted first, so nothing overflows however large the logits are (the authors' code does
    not). At |lse| near 10000 a float32 lse is itself only good to 0.0005, and so are the weights.

    outs: one tensor [..., D] for each host. lses: one tensor [...] for each host, natural
    logarithms; -inf where a host holds no key, whose output (NaN included) is then ignored.
    Returns out [..., D] and lse [...], in the inputs' widest dtype but at least float32, ready to
    be merged again. Where no host holds a key, out is 0 and lse is -inf.
    Raises ValueError where the two lists do not fit together.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must hold one tensor each for every host, got {len(outs)} and "
            f"{len(lses)}; pass two lists of equal, non-zero length"
        )
    for host, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape[:-1] != lse.shape or out.shape != outs[0].shape:
            raise ValueError(
                f"outs[{host}] is {tuple(out.shape)} with lses[{host}] {tuple(lse.shape)}; "
                f"expected {tuple(outs[0].shape)} with {tuple(outs[0].shape[:-1])}: pass lses "
                "without the head dimension and the same shapes for every host"
            )
    dtype = torch.float32
    for tensor in (*outs, *lses):
        dtype = torch.promote_types(dtype, tensor.dtype)
    lse_H = torch.stack([lse.to(dtype) for lse in lses])
    top = lse_H.amax(0)
    # Where every lse is -inf, -inf - -inf would be NaN: shift by 0 there.
    weight_H = torch.exp(lse_H - torch.where(top == -torch.inf, 0.0, top))
    total = weight_H.sum(0)
    merged = torch.zeros_like(outs[0], dtype=dtype)
    for weight, lse, out in zip(weight_H, lse_H, outs, strict=True):
        empty = (lse == -torch.inf).unsqueeze(-1)
        merged += torch.where(empty, 0.0, weight.unsqueeze(-1) * out.to(dtype))
    merged /= torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return merged, top + torch.log(torch.where(total == 0, 1.0, total))
