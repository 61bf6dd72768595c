"""Attention over part of the keys, by PyTorch's fused kernels, with the log-sum-exp that merges it.

A mask that is a staircase of rectangles and triangles needs no mask: each rectangle is one plain
call, each triangle one causal call, and `merge_two` joins what a row got from several of them.
B: batch; Hq, Hkv: query and KV heads, Hq = G * Hkv; M: rows; N: keys; D: head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose logits are held at once where no fused kernel returns the log-sum-exp.
_EAGER_ROWS = 512


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scaling: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [B, Hq, M, D] over k, v [B, Hkv, N, D] alone.

    causal: row i sees keys 0..i only; M must be N. scaling: of the logits; None is 1 / sqrt(D).
    Returns out [B, Hq, M, D] in q's dtype and lse [B, Hq, M], natural logarithms, float32 or
    better; without keys they are 0 and -inf. Never holds M x N numbers on CPU or CUDA.
    Raises ValueError where causal and M is not N.
    """
    rows, keys = q.shape[2], k.shape[2]
    if causal and rows != keys:
        raise ValueError(f"causal needs as many rows as keys, got {rows} and {keys}")
    scaling = q.shape[3] ** -0.5 if scaling is None else scaling
    if not rows or not keys:
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    if q.shape[1] == k.shape[1]:
        return _fused(q, k, v, causal, scaling)
    if not causal:
        # The heads of a group become rows of one head: keys are neither repeated nor re-read.
        folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        out, lse = _fused(folded, k, v, False, scaling)
        shape = (k.shape[1], q.shape[1] // k.shape[1], rows)
        return (
            out.unflatten(2, shape[1:]).flatten(1, 2),
            lse.unflatten(2, shape[1:]).flatten(1, 2),
        )
    group = q.shape[1] // k.shape[1]
    return _fused(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), True, scaling)


def merge_two(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial attentions of the same rows over different keys.

    The weight of the second is exp(b) / (exp(a) + exp(b)) = sigmoid(b - a), which overflows
    nowhere. A side may be empty (lse -inf), both may not.
    out, other [B, Hq, M, D]; lse, other_lse [B, Hq, M]. Returns the same two shapes.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scaling)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and q.shape[3] % 8 == 0 and q.shape[3] <= 256:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)[:2]
    return _eager(q, k, v, causal, scaling)


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """The same in blocks of rows, for devices without a fused kernel that returns lse."""
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for start in range(0, q.shape[2], _EAGER_ROWS):
        rows = q[:, :, start : start + _EAGER_ROWS].to(wide)
        logits = rows @ k.to(wide).transpose(2, 3) * scaling
        if causal:
            seen = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).tril(start)
            logits = logits.masked_fill(~seen, -torch.inf)
        lses.append(logits.logsumexp(-1))
        outs.append((logits.softmax(-1) @ v.to(wide)).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(lses, 2)
