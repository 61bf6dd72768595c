"""Attention of a chunk over what is held: the old entries unmasked, its own tokens causally.

One call over both would need a mask, which is read for every head and stops the kernel from
skipping what lies in the future. In two parts nothing is masked, a group's query heads share
their keys in the first, and the parts are merged by their log-sum-exp. A single token needs the
first part only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the newest T of n entries.

    Args:
        q: `[B, H, T, D]`.
        k, v: `[B, J, n, D]`, the last T are the queries' own.
        mask: bool `[B or 1, 1 or J, T, n]`, True where a query may look, for rows with padding;
            None: each query sees what is older, and itself.
        scaling: what q · k is multiplied by.
        bias: float `[B, J, n − T]`, added to the scores of the older entries: −∞ where a head holds
            nothing, log m for an entry that stands for m; every head holds one. None: nothing.

    Returns:
        `[B, H, T, D]`.
    """
    new, held = q.shape[2], k.shape[2]
    if mask is None and new < held and q.device.type == "cpu":
        if v.shape[-1] == q.shape[-1] and not q.requires_grad:
            return _in_two(q, k, v, scaling, bias) if new > 1 else _one(q, k, v, scaling, bias)
    causal = mask is None and new > 1
    if causal and (new < held or bias is not None):
        at = torch.arange(held, device=q.device)
        mask, causal = at[None] <= held - new + at[:new, None], False
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, new)).to(q.dtype)[:, :, None]
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True, is_causal=causal
    )


def _one(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """One token sees everything; a call with a head's keys for each query head would copy them."""
    added = None if bias is None else torch.nn.functional.pad(bias, (0, 1))
    return _folded(q, k, v, scaling, added)[0]


def _folded(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Unmasked attention and its log-sum-exp `[B, H, T]`; a group's query heads, one after another,
    are more queries of the same keys."""
    b, h, new, d = q.shape
    added = None if bias is None else bias.to(q.dtype)[:, :, None]
    folded = q.reshape(b, k.shape[1], -1, d)
    out, lse = _flash(folded, k, v, attn_mask=added, scale=scaling)
    return out.reshape(b, h, new, d), lse.reshape(b, h, new)


def _in_two(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    b, h, new, d = q.shape
    j, old = k.shape[1], k.shape[2] - new
    past, past_lse = _folded(q, k[:, :, :old], v[:, :, :old], scaling, bias)
    own_k, own_v = (
        x[:, :, None, old:].expand(b, j, h // j, new, d).reshape(b, h, new, d) for x in (k, v)
    )
    own, own_lse = _flash(q, own_k, own_v, 0.0, True, scale=scaling)
    # softmax over both parts: each weighs as much as its sum of exponentials.
    share = torch.sigmoid(own_lse - past_lse)[..., None].to(own.dtype)
    return torch.lerp(past, own, share)
