"""Block selection in Triton: kernel scores are summed over heads and max-pooled in registers, so
only block scores of a strip of tokens are ever in memory, within a bounded scratch.

Three launches for a strip: the log-sum-exp over compressed keys (`lse_kernel`), the pooled scores
(`score_kernel`), the best blocks (`triton_topk`). Nothing waits for the GPU. The definition is that
of `infllm2.reference`; letters too. M = B·K, R tokens of a tile, GP = G padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm2.backends import triton_topk
from infllm2.backends.triton_launch import SCRATCH_BYTES, selection_tiles, splits
from infllm2.backends.triton_length import length_of
from infllm2.config import COARSE_FACTOR

UNSPECIALISED = ["K", "T", "S", "J", "first", "end", "tiles", "width"]


@triton.jit
def seen_by(position, size, stride):
    """Kernels that end at or before a position."""
    return tl.where(position + 1 < size, 0, tl.maximum(position + 1 - size, 0) // stride + 1)


@triton.jit
def lse_of(
    q_tile, kernels, c_j, c_d, seen, begin, stop, factor,
    D: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each row over kernels begin … stop − 1 of those it sees: [ROWS].

    As torch.logsumexp: −inf over nothing, +inf where a logit is, NaN where one is.
    """
    d = tl.arange(0, DIM)
    column = tl.arange(0, TILE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(begin, stop, TILE):
        j = at + column
        keys = tl.load(
            kernels + j.to(tl.int64)[None, :] * c_j + d[:, None] * c_d,
            mask=(j < stop)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(q_tile, keys, input_precision="ieee") * factor
        visible = (j < stop)[None, :] & (j[None, :] < seen[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        now = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(tl.abs(now) < float("inf"), now, 0.0)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        top = now
    return tl.where(tl.abs(top) < float("inf"), top, 0.0) + tl.log2(total)


@triton.jit
def queries_of(
    q, q_b, q_h, q_t, q_d, batch, head, token, real, g,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows of q: [ROWS, DIM], 0 where there is no token or head."""
    d = tl.arange(0, DIM)
    at = batch * q_b + (head * G + g) * q_h + token.to(tl.int64) * q_t
    return tl.load(
        q + at[:, None] + d[None, :] * q_d, mask=real[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=UNSPECIALISED)
def lse_kernel(
    q, kernels, lse, q_b, q_h, q_t, q_d, c_b, c_h, c_j, c_d,
    K, T, S, J, first, end, tiles, scale,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, SPLITS: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, GP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp over a part of the kernels: lse [SPLITS, M, tokens of the strip, G]."""
    S = length_of(S)
    tile, m, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    rows = tl.arange(0, R * GP)
    r, g = rows // GP, rows % GP
    token = first + tile * R + r
    real = (token < end) & (g < G)
    batch, head = (m // K).to(tl.int64), (m % K).to(tl.int64)
    q_tile = queries_of(q, q_b, q_h, q_t, q_d, batch, head, token, real, g, G, D, DIM)
    seen = seen_by(S - T + token, SIZE, STRIDE)
    most = tl.minimum(seen_by(S - T + tl.minimum(first + tile * R + R, end) - 1, SIZE, STRIDE), J)
    share = (most + SPLITS * TILE - 1) // (SPLITS * TILE) * TILE
    begin = tl.minimum(split * share, most)
    stop = tl.minimum(begin + share, most)
    kernels += batch * c_b + head * c_h
    found = lse_of(
        q_tile, kernels, c_j, c_d, seen, begin, stop, scale * 1.4426950408889634,
        D, R * GP, DIM, TILE,
    )  # fmt: skip
    M = tl.num_programs(0) // tiles
    row = (split * M + m).to(tl.int64) * (end - first) + token - first
    tl.store(lse + row * G + g, found, mask=real)


@triton.jit(do_not_specialize=UNSPECIALISED)
def score_kernel(
    q, fine, lse, scores, q_b, q_h, q_t, q_d, c_b, c_h, c_j, c_d,
    K, T, S, J, first, end, tiles, width, scale,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    EXACT: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, GP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """scores [M, tokens of the strip, width]: the largest score of the kernels touching a block.

    Blocks that no token of the tile can choose, as they begin after all have their window, are left
    out. One step scores kernel `phase` of each of TILE blocks, so that the maximum over a block's
    kernels, those that start before it included, is one between steps.
    """
    S = length_of(S)
    tile, m, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    rows = tl.arange(0, R * GP)
    r, g = rows // GP, rows % GP
    token = first + tile * R + r
    real = (token < end) & (g < G)
    batch, head = (m // K).to(tl.int64), (m % K).to(tl.int64)
    q_tile = queries_of(q, q_b, q_h, q_t, q_d, batch, head, token, real, g, G, D, DIM)
    fine += batch * c_b + head * c_h
    seen = seen_by(S - T + token, SIZE, STRIDE)
    factor = scale * 1.4426950408889634

    tokens = end - first
    row = m.to(tl.int64) * tokens + token - first
    step_over = (tl.num_programs(0) // tiles).to(tl.int64) * tokens * G
    top = tl.full([R * GP], float("-inf"), tl.float32)
    for split in range(SPLITS):
        other = tl.load(lse + split * step_over + row * G + g, mask=real, other=0.0)
        top = tl.maximum(top, other)
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    total = tl.zeros([R * GP], tl.float32)
    for split in range(SPLITS):
        other = tl.load(lse + split * step_over + row * G + g, mask=real, other=0.0)
        total += tl.exp2(other - shift)
    log_total = shift + tl.log2(total)
    last = S - T + tl.minimum(first + tile * R + R, end) - 1
    if not EXACT:
        # No coarse kernel is complete yet: the exact sum takes its place, in tiles where any row
        # lacks one.
        lacks = log_total == float("-inf")
        most = tl.minimum(seen_by(last, SIZE, STRIDE), J)
        most = tl.where(tl.max(lacks.to(tl.int32), 0) > 0, most, 0)
        exact = lse_of(
            q_tile, fine, c_j, c_d, seen, 0, most, factor, D, R * GP, DIM, TILE
        )  # fmt: skip
        log_total = tl.where(lacks, exact, log_total)

    PER: tl.constexpr = BLOCK // STRIDE
    EARLY: tl.constexpr = SIZE // STRIDE - 1  # kernels that start before a block and reach into it
    PHASES: tl.constexpr = PER + EARLY
    d = tl.arange(0, DIM)
    column = tl.arange(0, TILE)
    row_token = first + tile * R + tl.arange(0, R)
    to = (m.to(tl.int64) * tokens + row_token - first) * width
    useful = (tl.minimum(width, last // BLOCK - WINDOW + 1) + TILE - 1) // TILE
    share = (useful + PARTS - 1) // PARTS
    begin = tl.minimum(part * share, useful)
    stop = tl.minimum(begin + share, useful)
    best = tl.zeros([R, TILE], tl.float32)
    for step in range(begin * PHASES, stop * PHASES):
        phase = step % PHASES
        block = step // PHASES * TILE + column
        j = block * PER + phase - EARLY
        keys = tl.load(
            fine + j.to(tl.int64)[None, :] * c_j + d[:, None] * c_d,
            mask=((j >= 0) & (j < J))[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(q_tile, keys, input_precision="ieee") * factor
        visible = (j >= 0)[None, :] & (j[None, :] < seen[:, None]) & real[:, None]
        shares = tl.where(visible, tl.exp2(logits - log_total[:, None]), 0.0)
        summed = tl.sum(tl.reshape(shares, (R, GP, TILE)), 1)
        summed = tl.where(summed == summed, tl.minimum(summed, 3.4028234663852886e38), 0.0)
        best = tl.where(phase == 0, summed, tl.maximum(best, summed))
        if phase == PHASES - 1:
            mask = (row_token < end)[:, None] & (block < width)[None, :]
            tl.store(scores + to[:, None] + block[None, :], best, mask=mask)


def select(
    q: Tensor, fine: Tensor, coarse: Tensor, length: int, *, kernel_size: int, kernel_stride: int,
    block_size: int, init_blocks: int, window_blocks: int, topk: int, exact: bool,
    keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Blocks each query visits: int32 `[B, K, T, topk + window_blocks]`, ascending, then −1.

    Arguments as `infllm2.reference.select_blocks`, the configuration's fields one by one. With
    `keys`, integer [1] on the GPU, that is the number of keys, of one token (T = 1); `length` is
    then the most there may be, and rows of `fine` and `coarse` need not be complete kernels.
    """
    B, H, T, D = q.shape
    K = fine.shape[1]
    M, G, start = B * K, H // K, length - T
    budget = topk + window_blocks
    S = length if keys is None else keys
    out = torch.empty(B, K, T, budget, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    choice = {
        "block_size": block_size, "init_blocks": init_blocks,
        "window_blocks": window_blocks, "budget": budget,
    }  # fmt: skip
    free = min(T, max(0, budget * block_size - start))
    if topk == init_blocks or free == T:
        triton_topk.choose(out, out, 0, T, S, 0, **choice)
        return out
    if free:
        triton_topk.choose(out, out, 0, free, S, 0, **choice)

    tiles = selection_tiles(G, D, T - free, q.dtype)
    kernels, factor = (fine, 1) if exact else (coarse, COARSE_FACTOR)
    most = -(-length // block_size)
    strip = max(1, SCRATCH_BYTES // (4 * M * most * tiles.tokens)) * tiles.tokens
    sizes = {
        "G": G, "D": D, "R": tiles.tokens, "GP": tiles.group, "DIM": tiles.dim,
        "TILE": tiles.keys, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    for first in range(free, T, strip):
        end = min(T, first + strip)
        # Blocks whose score can matter: those before the last token's window.
        width = (start + end - 1) // block_size - window_blocks + 1
        count = -(-(end - first) // tiles.tokens)
        parts = splits(count * M, -(-width // tiles.keys))
        cuts = splits(count * M, max(1, -(-kernels.shape[2] // tiles.keys)))
        lse = torch.empty(cuts, M, end - first, G, dtype=torch.float32, device=q.device)
        lse_kernel[(count * M, cuts)](
            q, kernels, lse, *q.stride(), *kernels.stride(),
            K, T, S, kernels.shape[2], first, end, count, D**-0.5,
            SIZE=factor * kernel_size, STRIDE=factor * kernel_stride, SPLITS=cuts, **sizes,
        )  # fmt: skip
        scores = torch.empty(M, end - first, width, dtype=torch.float32, device=q.device)
        score_kernel[(count * M, parts)](
            q, fine, lse, scores, *q.stride(), *fine.stride(),
            K, T, S, fine.shape[2], first, end, count, width, D**-0.5,
            SIZE=kernel_size, STRIDE=kernel_stride, BLOCK=block_size, WINDOW=window_blocks,
            EXACT=exact, SPLITS=cuts, PARTS=parts, **sizes,
        )  # fmt: skip
        triton_topk.choose(out, scores, first, end, S, width, **choice)
    return out
