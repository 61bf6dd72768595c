"""Block-sparse attention forward in Triton: a running softmax over the blocks of a tile of tokens.

One program handles R tokens of one key-value head, with all their heads: R·GP rows of a matrix
product. It walks the union of the tokens' block lists (`triton_lists.merged`) and masks, row by
row, what a token does not visit. A tile of one token (R = 1) walks the token's own list.

Letters as in `infllm2.reference`; M = B·K, GP = G padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm2.backends import triton_lists
from infllm2.backends.triton_launch import Tiles, power_of_two
from infllm2.backends.triton_length import length_of

LOG2E = 1.4426950408889634

UNSPECIALISED = ["K", "T", "S", "first", "end", "tiles", "width"]


@triton.jit
def list_of(
    lists, counts, m, tile, T, S, tiles, width,
    R: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where a tile's list starts, and how many entries of it count."""
    if R == 1:  # the token's own list, cut at −1 and after its own block
        at = (m.to(tl.int64) * T + tile) * width
        entry = tl.arange(0, WIDTH)
        block = tl.load(lists + at + entry, mask=entry < width, other=-1)
        count = tl.sum(((block >= 0) & (block <= (S - T + tile) // BLOCK)).to(tl.int32), 0)
    else:
        row = m.to(tl.int64) * tiles + tile
        at = row * width
        count = tl.load(counts + row)
    return at, count


@triton.jit
def sees(members, at, entry, r, R: tl.constexpr):
    """Which rows visit an entry of the list; r is each row's token."""
    if R == 1:
        return r == 0
    else:
        return ((tl.load(members + at + entry) >> r) & 1) == 1


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q, k, v, lists, members, counts, out, lse,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    K, T, S, first, end, tiles, width, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    R: tl.constexpr, GP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Output [splits, B·H, T, D] and log-sum-exp [splits, B·H, T] (base 2 with several splits)."""
    S = length_of(S)
    tile, m, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    rows = tl.arange(0, R * GP)
    r, g = rows // GP, rows % GP
    token = first + tile * R + r
    real = (token < end) & (g < G)
    position = S - T + token
    d = tl.arange(0, DIM)
    column = tl.arange(0, TILE)
    batch, head = (m // K).to(tl.int64), (m % K).to(tl.int64)
    q_rows = batch * q_b + (head * G + g) * q_h + token.to(tl.int64) * q_t
    q_tile = tl.load(
        q + q_rows[:, None] + d[None, :] * q_d, mask=real[:, None] & (d < D)[None, :], other=0.0
    )
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    at, count = list_of(lists, counts, m, tile, T, S, tiles, width, R, BLOCK, WIDTH)
    PER: tl.constexpr = (BLOCK + TILE - 1) // TILE  # steps of a block
    share = (count + SPLITS - 1) // SPLITS
    begin = tl.minimum(split * share, count)
    stop = tl.minimum(begin + share, count)

    top = tl.full([R * GP], float("-inf"), tl.float32)
    total = tl.zeros([R * GP], tl.float32)
    seen = tl.zeros([R * GP], tl.int32)
    sums = tl.zeros([R * GP, DIM], tl.float32)
    for step in range(begin * PER, stop * PER):
        entry = step // PER
        inner = (step % PER) * TILE + column
        key = tl.load(lists + at + entry) * BLOCK + inner
        inside = (inner < BLOCK) & (key < S)
        visits = sees(members, at, entry, r, R)
        seen = tl.maximum(seen, visits.to(tl.int32))
        offset = key.to(tl.int64)
        keys = tl.load(
            k + offset[None, :] * k_s + d[:, None] * k_d,
            mask=inside[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(q_tile, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        visible = visits[:, None] & inside[None, :] & (key[None, :] <= position[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        # Infinite and undefined maxima shift by 0: what is not finite then spoils this row's sum,
        # and this row's alone.
        now = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(tl.abs(now) < float("inf"), now, 0.0)
        shrink = tl.exp2(top - shift)
        weights = tl.exp2(logits - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            v + offset[:, None] * v_s + d[None, :] * v_d,
            mask=inside[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        sums = sums * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        top = now

    result = sums / total[:, None]
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    log_total = shift + tl.log2(total)
    if SPLITS == 1:
        result = tl.where((seen > 0)[:, None], result, 0.0)
        log_total *= 0.6931471805599453
    else:  # a part without weight is left to the merge
        result = tl.where((total == 0.0)[:, None], 0.0, result)
    heads = tl.num_programs(0) // tiles * G
    to = (split * heads + m * G + g).to(tl.int64) * T + token
    tl.store(out + to[:, None] * D + d[None, :], result, mask=real[:, None] & (d < D)[None, :])
    tl.store(lse + to, log_total, mask=real)


def list_width(width: int, tiles: Tiles) -> int:
    """WIDTH of `list_of`: merged lists do not need it, and it would compile them again."""
    return power_of_two(width) if tiles.tokens == 1 else 1


def launch(
    q: Tensor, k: Tensor, v: Tensor, lists: triton_lists.Lists, out: Tensor, lse: Tensor,
    *, block_size: int, scale: float, tiles: Tiles, splits: int, keys: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the kernel over one strip of tokens; out and lse contiguous, `splits` times over."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2] if keys is None else keys
    width = lists.lists.shape[2]
    forward_kernel[(lists.tiles * B * K, splits)](
        q, k, v, lists.lists, lists.members, lists.counts, out, lse,
        *q.stride(), *k.stride(), *v.stride(), K, T, S, lists.first, lists.end,
        lists.tiles, width, scale,
        G=H // K, D=D, BLOCK=block_size, SPLITS=splits, R=tiles.tokens, GP=tiles.group,
        DIM=tiles.dim, TILE=tiles.keys, WIDTH=list_width(width, tiles),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def prefill(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    *, block_size: int, scale: float, tiles: Tiles, keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, H, T, D]` and log-sum-exp `[B, H, T]`; blocks contiguous int32 `[M, T, n]`.

    With `keys`, integer [1] on the GPU, there are so many keys, the rest is room; T = 1.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for first, end in triton_lists.strips(blocks, k.shape[2], block_size, tiles.tokens):
        lists = triton_lists.merged(blocks, k.shape[2], block_size, tiles.tokens, first, end)
        launch(
            q, k, v, lists, out, lse,
            block_size=block_size, scale=scale, tiles=tiles, splits=1, keys=keys,
        )  # fmt: skip
    return out, lse
