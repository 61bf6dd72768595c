"""Attention over the visited blocks, and InfLLM v2 as one call (arXiv 2509.24663, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm2 import backends
from infllm2.checks import check_blocks, check_kv, check_qk
from infllm2.compression import CompressedKeys
from infllm2.config import InfLLMv2Config
from infllm2.selection import compressed


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the visited blocks, cut by causality; differentiable in q, k and
    v.

    Args:
        q: queries `[B, Hq, T, D]`, the last T of S positions.
        k: keys `[B, Hkv, S, D]`.
        v: values `[B, Hkv, S, D]`; finite (keys need not be: a key that is not finite spoils
            exactly the queries that see it).
        blocks: int32 or int64 `[B, Hkv, T, n]`, ascending without repetition, then −1, for example
            from `select_blocks`. Blocks after a query's own are ignored.
        block_size: tokens per block.
        scale: factor on the logits; 1/√D if not given.
        backend: "auto", or one of `infllm2.backends.ORDER`.
        return_lse: also return the natural log of the sum of exponentials, `[B, Hq, T]`, float32
            (float64 for float64 inputs), with gradient.

    Returns:
        `[B, Hq, T, D]` in q's dtype. A query whose blocks hold no visible key gets 0 (and −inf).

    Raises:
        ValueError: shapes, dtypes, devices or block indices do not fit together, or the backend
            cannot run.
    """
    check_qk(q, k)
    check_kv(k, v)
    check_blocks(q, k, blocks, block_size)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    chosen = backends.choose(backend, backends.Inputs.of(q, k))
    out, lse = chosen.attend(q, k, v, blocks, block_size=block_size, scale=scale)
    return (out, lse) if return_lse else out


def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: InfLLMv2Config,
    *,
    cache: None = None,
    backend: str = "auto",
) -> Tensor:
    """InfLLM v2 in one call: dense below `config.dense_len` keys, else selection and sparse
    attention.

    Args:
        q: queries `[B, Hq, T, D]`, the last T of S positions.
        k: keys `[B, Hkv, S, D]`.
        v: values `[B, Hkv, S, D]`.
        config: sizes and budget. The switch looks at S of this call, as MiniCPM4's does: early
            chunks of a long prompt may be dense where the whole prompt at once is sparse.
            `dense_len=-1` avoids it.
        cache: compressed keys kept between calls; not available yet, they are recomputed (O(S·D)).
        backend: "auto", "torch" or "reference"; has no say in dense attention.

    Returns:
        `[B, Hq, T, D]` in q's dtype.

    Raises:
        ValueError: as `select_blocks` and `block_sparse_attention`, or `cache` is given.
    """
    if cache is not None:
        raise ValueError(
            "cache must be None: keeping compressed keys between calls is not available yet"
        )
    return attend(q, k, v, config, backend=backend)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: InfLLMv2Config,
    *,
    keys: CompressedKeys | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """As `infllmv2_attention`, with the visited blocks, `None` where attention was dense."""
    check_qk(q, k)
    check_kv(k, v)
    scale = q.shape[-1] ** -0.5
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chosen = backends.choose(backend, backends.Inputs.of(q, k))
    if k.shape[2] < config.dense_len:
        if not training and hasattr(chosen, "dense"):
            return chosen.dense(q, k, v, scale), None
        return dense_attention(q, k, v), None
    if keys is None:
        keys = compressed(k.detach(), config)
    if not training and hasattr(chosen, "run"):
        return chosen.run(q, k, v, keys.fine, keys.coarse, config, scale)
    with torch.no_grad():
        blocks = chosen.select(q, keys.fine, keys.coarse, keys.length, config)
    out, _ = chosen.attend(q, k, v, blocks, block_size=config.block_size, scale=scale)
    return out, blocks


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by PyTorch's fused kernel; the T queries are the last of S positions."""
    T, S = q.shape[2], k.shape[2]
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril_(S - T)
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
