"""Block-sparse attention backward in Triton, without atomics: every sum has one owner, in order.

Queries' gradients follow the forward's structure, a tile of tokens over its merged list. Keys' and
values' gradients go by block: one program owns the keys and walks the tokens that visit them
(`triton_lists.visitors`), so results do not vary from run to run. The first block is visited by
everybody and its program is the longest; it starts first.

With P = exp(S − lse) the weights: dS = P ∘ (dO·Vᵀ − delta), delta = Σ_d dO·O − dlse,
dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO. Letters as in `infllm2.backends.triton_forward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm2.backends import triton_lists
from infllm2.backends.triton_forward import UNSPECIALISED, list_of, list_width, sees
from infllm2.backends.triton_launch import Tiles


@triton.jit(do_not_specialize=UNSPECIALISED)
def queries_kernel(
    q, k, v, out, lse, grad, grad_lse, delta, dq, lists, members, counts,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    g_b, g_h, g_t, g_d, l_b, l_h, l_t, K, T, S, first, end, tiles, width, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    R: tl.constexpr, GP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq [B, H, T, D] and delta [B, H, T]; out, lse, dq and delta contiguous."""
    tile, m = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    rows = tl.arange(0, R * GP)
    r, g = rows // GP, rows % GP
    token = first + tile * R + r
    real = (token < end) & (g < G)
    position = S - T + token
    d = tl.arange(0, DIM)
    column = tl.arange(0, TILE)
    batch, kv_head = (m // K).to(tl.int64), (m % K).to(tl.int64)
    head, far = kv_head * G + g, token.to(tl.int64)
    whole = real[:, None] & (d < D)[None, :]
    q_rows = (batch * q_b + head * q_h + far * q_t)[:, None] + d[None, :] * q_d
    q_tile = tl.load(q + q_rows, mask=whole, other=0.0)
    g_rows = (batch * g_b + head * g_h + far * g_t)[:, None] + d[None, :] * g_d
    grad_tile = tl.load(grad + g_rows, mask=whole, other=0.0)
    own = (m * G + g).to(tl.int64) * T + token
    out_tile = tl.load(out + own[:, None] * D + d[None, :], mask=whole, other=0.0)
    slope = tl.load(grad_lse + batch * l_b + head * l_h + far * l_t, mask=real, other=0.0)
    less = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1) - slope
    tl.store(delta + own, less, mask=real)
    log_total = tl.load(lse + own, mask=real, other=0.0) * 1.4426950408889634
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    at, count = list_of(lists, counts, m, tile, T, S, tiles, width, R, BLOCK, WIDTH)
    PER: tl.constexpr = (BLOCK + TILE - 1) // TILE

    sums = tl.zeros([R * GP, DIM], tl.float32)
    for step in range(0, count * PER):
        entry = step // PER
        inner = (step % PER) * TILE + column
        key = tl.load(lists + at + entry) * BLOCK + inner
        inside = (inner < BLOCK) & (key < S)
        visits = sees(members, at, entry, r, R)
        offset = key.to(tl.int64)
        some = inside[:, None] & (d < D)[None, :]
        keys = tl.load(k + offset[:, None] * k_s + d[None, :] * k_d, mask=some, other=0.0)
        values = tl.load(v + offset[:, None] * v_s + d[None, :] * v_d, mask=some, other=0.0)
        logits = tl.dot(q_tile, tl.trans(keys), input_precision="ieee") * (
            scale * 1.4426950408889634
        )
        visible = visits[:, None] & inside[None, :] & (key[None, :] <= position[:, None])
        weights = tl.where(visible, tl.exp2(logits - log_total[:, None]), 0.0)
        products = tl.dot(grad_tile, tl.trans(values), input_precision="ieee")
        slopes = weights * (products - less[:, None])
        sums += tl.dot(slopes.to(keys.dtype), keys, input_precision="ieee")
    tl.store(dq + own[:, None] * D + d[None, :], sums * scale, mask=whole)


@triton.jit(do_not_specialize=["K", "T", "S", "N", "M", "strips", "step", "pairs"])
def keys_kernel(
    q, k, v, lse, grad, delta, dk, dv, tokens, offsets,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, g_b, g_h, g_t, g_d,
    K, T, S, N, M, strips, step, pairs, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    R: tl.constexpr, GP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, K, S, D] of one step of keys of one block; lse, delta, dk, dv contiguous.

    The first programs are those of all heads' first blocks, which take longest.
    """
    PER: tl.constexpr = (BLOCK + TILE - 1) // TILE
    place, m = tl.program_id(0) // M, tl.program_id(0) % M
    block = place // PER
    inner = (place % PER) * TILE + tl.arange(0, TILE)
    key = block * BLOCK + inner
    inside = (inner < BLOCK) & (key < S)
    d = tl.arange(0, DIM)
    rows = tl.arange(0, R * GP)
    r, g = rows // GP, rows % GP
    batch, kv_head = (m // K).to(tl.int64), (m % K).to(tl.int64)
    head, offset = kv_head * G + g, key.to(tl.int64)
    some = inside[:, None] & (d < D)[None, :]
    k_rows = (batch * k_b + kv_head * k_h + offset * k_s)[:, None] + d[None, :] * k_d
    v_rows = (batch * v_b + kv_head * v_h + offset * v_s)[:, None] + d[None, :] * v_d
    keys = tl.load(k + k_rows, mask=some, other=0.0)
    values = tl.load(v + v_rows, mask=some, other=0.0)

    sum_k = tl.zeros([TILE, DIM], tl.float32)
    sum_v = tl.zeros([TILE, DIM], tl.float32)
    # No token before the block visits it, and so none in the strips before its first key.
    for strip in range(tl.maximum(block * BLOCK - (S - T), 0) // step, strips):
        base = pairs.to(tl.int64) * strip
        bounds = offsets + (M * N + 1).to(tl.int64) * strip + m * N + block
        begin, stop = tl.load(bounds), tl.load(bounds + 1)
        for index in range(begin, stop, R):
            real = (index + r < stop) & (g < G)
            token = tl.load(tokens + base + index + r, mask=index + r < stop, other=0)
            far = token.to(tl.int64)
            whole = real[:, None] & (d < D)[None, :]
            q_rows = (batch * q_b + head * q_h + far * q_t)[:, None] + d[None, :] * q_d
            g_rows = (batch * g_b + head * g_h + far * g_t)[:, None] + d[None, :] * g_d
            q_tile = tl.load(q + q_rows, mask=whole, other=0.0)
            grad_tile = tl.load(grad + g_rows, mask=whole, other=0.0)
            own = (m * G + g).to(tl.int64) * T + token
            log_total = tl.load(lse + own, mask=real, other=0.0) * 1.4426950408889634
            less = tl.load(delta + own, mask=real, other=0.0)
            logits = tl.dot(keys, tl.trans(q_tile), input_precision="ieee") * (
                scale * 1.4426950408889634
            )
            visible = inside[:, None] & real[None, :] & (key[:, None] <= (S - T + token)[None, :])
            weights = tl.where(visible, tl.exp2(logits - log_total[None, :]), 0.0)
            sum_v += tl.dot(weights.to(grad_tile.dtype), grad_tile, input_precision="ieee")
            products = tl.dot(values, tl.trans(grad_tile), input_precision="ieee")
            slopes = weights * (products - less[None, :])
            sum_k += tl.dot(slopes.to(q_tile.dtype), q_tile, input_precision="ieee")
    to = (m.to(tl.int64) * S + key)[:, None] * D + d[None, :]
    tl.store(dk + to, sum_k * scale, mask=some)
    tl.store(dv + to, sum_v, mask=some)


def backward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor, *, block_size: int, scale: float, tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous and in their dtypes.

    Args:
        q: `[B, H, T, D]`, any strides, as k, v and both gradients.
        k: `[B, K, S, D]`.
        v: as k.
        blocks: contiguous int32 `[B·K, T, n]`.
        out: the forward's output, contiguous.
        lse: the forward's log-sum-exp, contiguous.
        grad: of the output, in q's dtype.
        grad_lse: of the log-sum-exp, float32 `[B, H, T]`.
        block_size: keys per block.
        scale: factor on the logits.
        tiles: sizes, of several tokens.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    G, N = H // K, -(-S // block_size)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = torch.empty_like(lse)
    sizes = {
        "G": G, "D": D, "BLOCK": block_size, "R": tiles.tokens, "GP": tiles.group,
        "DIM": tiles.dim, "TILE": tiles.keys, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    for first, end in triton_lists.strips(blocks, S, block_size, tiles.tokens):
        lists = triton_lists.merged(blocks, S, block_size, tiles.tokens, first, end)
        width = lists.lists.shape[2]
        queries_kernel[(lists.tiles * B * K,)](
            q, k, v, out, lse, grad, grad_lse, delta, dq,
            lists.lists, lists.members, lists.counts,
            *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *grad_lse.stride(),
            K, T, S, lists.first, lists.end, lists.tiles, width, scale,
            WIDTH=list_width(width, tiles), **sizes,
        )  # fmt: skip
    tokens, offsets, step = triton_lists.visitors(blocks, S, block_size)
    per_block = -(-block_size // tiles.keys)
    keys_kernel[(N * per_block * B * K,)](
        q, k, v, lse, grad, delta, dk, dv, tokens, offsets,
        *q.stride(), *k.stride(), *v.stride(), *grad.stride(),
        K, T, S, N, B * K, len(offsets), step, B * K * step * blocks.shape[2], scale, **sizes,
    )  # fmt: skip
    return dq, dk, dv
