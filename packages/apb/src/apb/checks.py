"""Checks of the tensors a user passes, with messages that name what is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, same_tokens: bool, where: str = "") -> None:
    """Check q [B, Hq, M, D] against k and v [B, Hkv, N, D]; ValueError where they do not fit.

    same_tokens: M must be N. where: put before k and v in messages, such as "kv_per_host[2]: ".
    """
    for name, x in (("q", q), (f"{where}k", k), (f"{where}v", v)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor [batch, heads, tokens, head size], got "
                f"{tuple(x.shape)} of {x.dtype}; reshape or cast it"
            )
    if k.shape != v.shape:
        raise ValueError(
            f"{where}k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}; "
            "pass the keys and values of the same tokens"
        )
    batch, heads, tokens, size = q.shape
    if (k.shape[0], k.shape[3]) != (batch, size) or 0 in (batch, heads, k.shape[1], tokens, size):
        raise ValueError(
            f"{where}q and k must agree in batch and head size and not be empty, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}; reshape them"
        )
    if heads % k.shape[1]:
        raise ValueError(
            f"{where}query heads must be a multiple of KV heads, got {heads} and {k.shape[1]}; "
            "check which dimension holds the heads"
        )
    if same_tokens and k.shape[2] != tokens:
        raise ValueError(
            f"q, k and v must hold the same tokens, got {tokens} in q and {k.shape[2]} in k; "
            "pass the whole prompt in all three"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"{where}q, k and v must share dtype and device, got {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device}, {v.dtype} on {v.device}; cast or move them"
        )


def check_ids(name: str, ids: Any, *, least: int) -> None:
    """ValueError unless ids are int64 [B, at least `least`]."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.long:
        got = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids)
        raise ValueError(f"{name} must be int64 token ids [batch, tokens], got {got}")
    if not ids.shape[0] or ids.shape[1] < least:
        raise ValueError(
            f"{name} must hold at least {least} token(s) in each row, got {tuple(ids.shape)}"
        )
