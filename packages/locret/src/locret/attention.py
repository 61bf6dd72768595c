"""Attention of a chunk over what is held: the old entries unmasked, its own tokens causally.

One call over both would need a mask, which is read for every head and stops the kernel from
skipping what lies in the future. In two parts nothing is masked, a group's query heads share
their keys in the first, and the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of the newest T of n entries.

    Args:
        q: `[B, H, T, D]`.
        k, v: `[B, J, n, D]`, the last T are the queries' own.
        mask: bool `[B or 1, 1, T, n]`, True where a query may look, for rows with padding; None:
            each query sees what is older, and itself.
        scaling: what q · k is multiplied by.

    Returns:
        `[B, H, T, D]`.
    """
    new, held = q.shape[2], k.shape[2]
    if mask is None and 1 < new < held:
        if q.device.type == "cpu" and v.shape[-1] == q.shape[-1] and not q.requires_grad:
            return _in_two(q, k, v, scaling)
        at = torch.arange(held, device=q.device)
        mask = at[None] <= held - new + at[:new, None]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True,
        is_causal=mask is None and new == held and new > 1,
    )  # fmt: skip


def _in_two(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    b, h, new, d = q.shape
    j, old = k.shape[1], k.shape[2] - new
    group = h // j
    # Query heads of a group, one after another, are more queries of the same keys.
    folded = q.reshape(b, j, group * new, d)
    past, past_lse = _flash(folded, k[:, :, :old], v[:, :, :old], scale=scaling)
    past, past_lse = past.reshape(b, h, new, d), past_lse.reshape(b, h, new)
    own_k, own_v = (
        x[:, :, None, old:].expand(b, j, group, new, d).reshape(b, h, new, d) for x in (k, v)
    )
    own, own_lse = _flash(q, own_k, own_v, 0.0, True, scale=scaling)
    # softmax over both parts: each weighs as much as its sum of exponentials.
    share = torch.sigmoid(own_lse - past_lse)[..., None].to(own.dtype)
    return torch.lerp(past, own, share)
