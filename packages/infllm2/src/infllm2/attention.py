"""Attention over the visited blocks, and InfLLM v2 as one call (arXiv 2509.24663, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infllm2 import backends
from infllm2.checks import (
    check_blocks,
    check_config,
    check_kv,
    check_qk,
    check_unrotated,
    packed_ends,
)
from infllm2.compression import CompressedKeys
from infllm2.config import InfLLMv2Config
from infllm2.eager import eager
from infllm2.layer_cache import LayerCache, store_of
from infllm2.selection import blocks_of, compressed
from infllm2.switch import dense_below

# (q [B, Hq, T, D], k [B, Hkv, S, D], config) -> blocks, as `select_blocks` gives them.
Select = Callable[[Tensor, Tensor, InfLLMv2Config], Tensor]


@eager
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


@eager
def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: InfLLMv2Config,
    *,
    cache: LayerCache | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    unrotated: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfLLM v2 in one call: dense below `config.dense_len` keys, else selection and sparse
    attention.

    Args:
        q: queries `[B, Hq, T, D]`, the last T of S positions.
        k: keys `[B, Hkv, S, D]`; with `cache` or `cu_seqlens`, see there.
        v: values, of k's shape.
        config: sizes and budget. The switch looks at the keys of this call, as MiniCPM4's does:
            early chunks of a long prompt may be dense where the whole prompt at once is sparse.
            `dense_len=-1` avoids it, `dense_len="auto"` measures where sparse attention pays.
        cache: keys, values and compressed keys of the tokens before: a `LayerCache`, or one layer
            of a `SparseCache`. q, k and v are then of the new tokens alone, `[B, ·, T, D]`; they
            are appended, unless an error is raised. No gradient flows through a cache, and
            `backward` says so.
        cu_seqlens: integers `[n + 1]`, ascending from 0: packed sequences. Batch is 1;
            sequence i is positions cu_seqlens[i] … cu_seqlens[i + 1] − 1 and attends to no other.
        unrotated: (q, k) before rotary embedding, which selection scores with if
            `config.use_nope`; shapes as q and k.
        backend: "auto", or one of `infllm2.backends.ORDER`.

    Returns:
        `[B, Hq, T, D]` in q's dtype.

    Raises:
        ValueError: as `select_blocks` and `block_sparse_attention`; a cache of another kind or
            other sizes; `cu_seqlens` that do not fit or come with a cache; `use_nope` without
            `unrotated`, or with a cache.
    """
    if cache is not None and cu_seqlens is None:
        store = getattr(cache, "store", cache)  # a layer of `SparseCache` has one
        step = getattr(store, "step", None)
        if step is not None and step.fits(store, q, k, v, config, backend):
            return step.run(store, q, k, v)
    # Whatever is wrong is found before a cache changes.
    check_config(config)
    check_qk(q, k, aligned=cache is not None)
    check_kv(k, v)
    if config.use_nope and cache is None:
        check_unrotated(q, k, unrotated)
    if cu_seqlens is not None:
        if cache is not None:
            raise ValueError("cu_seqlens and cache exclude each other: give a cache per sequence")
        return _packed(q, k, v, config, cu_seqlens, unrotated, backend)
    keys = None
    if cache is not None:
        store = store_of(cache)
        store.check_sizes(config)
        if config.use_nope:
            raise ValueError(
                "use_nope=True scores with keys before rotary embedding, which a cache does not "
                "hold: pass all keys, and unrotated=(q, k), without a cache"
            )
        chosen = backends.choose(backend, backends.Inputs.of(q, k))
        k, v = cache.update(k, v)
        keys = store.compressed
    out = attend(q, k, v, config, keys=keys, unrotated=unrotated, backend=backend)[0]
    if cache is not None and q.shape[2] == 1 and hasattr(chosen, "step"):
        # Once for many: the next tokens come along the same way.
        store.step = chosen.step(store, q, config, backend, dense_below(config, q, k, backend))
    return out


@eager
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: InfLLMv2Config,
    *,
    keys: Callable[[], CompressedKeys] | None = None,
    unrotated: tuple[Tensor, Tensor] | None = None,
    select: Select | None = None,
    list_blocks: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """As `infllmv2_attention`, with the visited blocks, `None` where attention was dense.

    `keys`: gives the compressed keys of k, where a cache has them; called if they are needed.
    `select`: chooses the blocks in place of InfLLM v2's own scores. `list_blocks`: do so also where
    all are visited and dense attention gives the same.
    """
    check_qk(q, k)
    check_kv(k, v)
    scale = q.shape[-1] ** -0.5
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chosen = backends.choose(backend, backends.Inputs.of(q, k))
    own_dense = hasattr(chosen, "dense")
    all_visited = k.shape[2] <= config.budget * config.block_size and select is None
    if k.shape[2] < dense_below(config, q, k, backend):
        return (chosen.dense(q, k, v, scale) if own_dense else dense_attention(q, k, v)), None
    if own_dense and all_visited and not list_blocks:
        return chosen.dense(q, k, v, scale), None
    if select is not None:
        blocks = select(q, k, config)
        check_blocks(q, k, blocks, config.block_size)
        out, _ = chosen.attend(q, k, v, blocks, block_size=config.block_size, scale=scale)
        return out, blocks
    plain = not config.use_nope and config.compat is None
    if plain and not training and hasattr(chosen, "run"):
        known = compressed(k, config) if keys is None else keys()
        return chosen.run(q, k, v, known.fine, known.coarse, config, scale)
    scored_q, scored_k = q, k
    if config.use_nope:
        check_unrotated(q, k, unrotated)
        scored_q, scored_k = unrotated
    known = None if keys is None else keys()
    blocks = blocks_of(scored_q, scored_k, config, keys=known, backend=backend)
    out, _ = chosen.attend(q, k, v, blocks, block_size=config.block_size, scale=scale)
    return out, blocks


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: InfLLMv2Config,
    cu_seqlens: Tensor | Sequence[int],
    unrotated: tuple[Tensor, Tensor] | None,
    backend: str,
) -> Tensor:
    """One sequence after the other."""
    ends = packed_ends(q, k, cu_seqlens)
    parts = []
    for start, end in zip(ends, ends[1:], strict=False):
        one = slice(start, end)
        alone = None if unrotated is None else tuple(x[:, :, one] for x in unrotated)
        parts.append(
            attend(q[:, :, one], k[:, :, one], v[:, :, one], config, unrotated=alone,
                   backend=backend)[0]
        )  # fmt: skip
    return torch.cat(parts, 2) if parts else torch.zeros_like(q)


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
