"""The best blocks of each token in Triton: a threshold by bisection, then one pass in index order.

Scores are finite and at least 0, so their bits, read as integers, are in their order. Thirty-one
counts find the last score that makes the cut, bit by bit, whatever the number of blocks; nothing is
sorted, and writing in index order gives ascending lists with ties to the lower index.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from infllm2.backends.triton_launch import power_of_two
from infllm2.backends.triton_length import length_of

# Scores that a program holds at once, of one token and of all its tokens.
CHUNK = 8192
# Tokens of a program, where there are so many.
TOKENS = 8


@triton.jit
def bits_at(scores, at, INIT: tl.constexpr, stop, SIZE: tl.constexpr):
    """Scores of blocks at … at + SIZE − 1 as integers, −1 where a block is no candidate; and the
    blocks."""
    block = at + tl.arange(0, SIZE)[None, :]
    candidate = (block >= INIT) & (block < stop)
    score = tl.load(scores + block, mask=candidate, other=0.0)
    return tl.where(candidate, score.to(tl.int32, bitcast=True), -1), block


@triton.jit(do_not_specialize=["T", "S", "first", "end", "tiles", "width"])
def choose_kernel(
    scores, out, T, S, first, end, tiles, width,
    BLOCK: tl.constexpr, INIT: tl.constexpr, WINDOW: tl.constexpr, BUDGET: tl.constexpr,
    PAD: tl.constexpr, SIZE: tl.constexpr, SCORED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [M, T, BUDGET] from scores [M, end − first, width], R tokens a program."""
    S = length_of(S)
    tile, m = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    index = tile * R + tl.arange(0, R)[:, None]
    token = first + index
    own = (S - T + token) // BLOCK
    free = own < BUDGET  # everything there is
    out += (m * T + token) * BUDGET
    slot = tl.arange(0, PAD)[None, :]
    window = slot - BUDGET + 1 + own
    fixed = tl.where(free, tl.where(slot <= own, slot, -1), tl.where(slot < INIT, slot, window))
    mask = (slot < BUDGET) & (free | (slot < INIT) | (slot >= BUDGET - WINDOW))
    tl.store(out + slot, fixed, mask=mask & (token < end))
    if SCORED:
        CHOSEN: tl.constexpr = BUDGET - WINDOW - INIT
        scores += (m * (end - first) + index) * width
        stop = tl.where(free | (token >= end), 0, own - WINDOW + 1)  # candidates INIT … stop − 1
        most = tl.max(stop)
        held, _ = bits_at(scores, 0, INIT, stop, SIZE)
        least = tl.zeros([R, 1], tl.int32)
        for back in range(31):
            trial = least | (1 << (30 - back))
            count = tl.sum((held >= trial).to(tl.int32), 1, keep_dims=True)
            for at in range(SIZE, most, SIZE):
                bits, _ = bits_at(scores, at, INIT, stop, SIZE)
                count += tl.sum((bits >= trial).to(tl.int32), 1, keep_dims=True)
            least = tl.where(count >= CHOSEN, trial, least)
        ties = tl.zeros([R, 1], tl.int32) + CHOSEN  # less those above the last that makes the cut
        for at in range(0, most, SIZE):
            bits, _ = bits_at(scores, at, INIT, stop, SIZE)
            ties -= tl.sum((bits > least).to(tl.int32), 1, keep_dims=True)
        tied = tl.zeros([R, 1], tl.int32)
        written = tl.zeros([R, 1], tl.int32) + INIT
        for at in range(0, most, SIZE):
            bits, block = bits_at(scores, at, INIT, stop, SIZE)
            level = (bits == least).to(tl.int32)
            taken = (bits > least) | ((level > 0) & (tied + tl.cumsum(level, 1) <= ties))
            place = written + tl.cumsum(taken.to(tl.int32), 1) - 1
            tl.store(out + place, block, mask=taken)
            tied += tl.sum(level, 1, keep_dims=True)
            written += tl.sum(taken.to(tl.int32), 1, keep_dims=True)


def choose(
    out: Tensor, scores: Tensor, first: int, end: int, length: int | Tensor, width: int,
    *, block_size: int, init_blocks: int, window_blocks: int, budget: int,
) -> None:  # fmt: skip
    """Write the blocks of tokens first … end − 1 to out `[B, K, T, budget]`.

    Args:
        out: int32, contiguous.
        scores: float32 `[B·K, end − first, width]`, block scores; not read for `width` 0, which is
            for tokens that have no choice to make.
        first: first token.
        end: token after the last.
        length: number of keys, or where on the GPU it stands.
        width: blocks scored.
        block_size: tokens per block.
        init_blocks: blocks at the start that everybody visits.
        window_blocks: blocks of the window.
        budget: blocks in all.
    """
    B, K, T, _ = out.shape
    size = min(CHUNK, power_of_two(max(1, width)))
    tokens = min(TOKENS, CHUNK // size, power_of_two(end - first))
    tiles = -(-(end - first) // tokens)
    choose_kernel[(tiles * B * K,)](
        scores, out, T, length, first, end, tiles, width,
        BLOCK=block_size, INIT=init_blocks, WINDOW=window_blocks, BUDGET=budget,
        PAD=power_of_two(budget), SIZE=size, SCORED=width > 0, R=tokens,
        num_warps=4 if size * tokens <= CHUNK // 2 else 8,
    )  # fmt: skip
