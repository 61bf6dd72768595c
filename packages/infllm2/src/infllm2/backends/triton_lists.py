"""Block lists as the Triton kernels walk them: merged for a tile of tokens, and by block.

Letters as in `infllm2.reference`; M = B·K, R = tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm2.backends.triton_launch import SCRATCH_BYTES


@triton.jit(do_not_specialize=["T", "S", "first", "end", "tiles", "n", "width"])
def merge_kernel(
    blocks, lists, members, counts, T, S, first, end, tiles, n, width,
    BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Union of the ascending lists of R tokens: an R-way merge, one entry of the union a step.

    blocks [M, T, n]; lists and members (bit r: token r visits the block) [M, tiles, width]; counts
    [M, tiles]. Entries after a token's own block are dropped.
    """
    LAST: tl.constexpr = 2147483647
    tile, m = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    r = tl.arange(0, R)
    token = first + tile * R + r
    own = (S - T + token) // BLOCK
    source = blocks + (m.to(tl.int64) * T + token) * n
    place = tl.zeros([R], tl.int32)
    head = tl.load(source + place, mask=(token < end) & (place < n), other=-1)
    head = tl.where((head < 0) | (head > own), LAST, head)
    block = tl.min(head, 0)
    at = m.to(tl.int64) * tiles + tile
    count = 0
    while block < LAST:
        here = head == block
        tl.store(lists + at * width + count, block)
        tl.store(members + at * width + count, tl.sum(tl.where(here, 1 << r, 0), 0))
        count += 1
        place += here.to(tl.int32)
        head = tl.load(source + place, mask=(token < end) & (place < n), other=-1)
        head = tl.where((head < 0) | (head > own), LAST, head)
        block = tl.min(head, 0)
    tl.store(counts + at, count)


@dataclass(frozen=True)
class Lists:
    """Blocks that the tiles of tokens first … end − 1 visit.

    Attributes:
        lists: int32 `[M, tiles, width]`, ascending; `counts` of them are filled in.
        members: int32, bit r: the tile's token r visits it. Unused for tiles of one token.
        counts: int32 `[M, tiles]`. Unused for tiles of one token: the kernels count.
        first: first token.
        end: token after the last.
    """

    lists: Tensor
    members: Tensor
    counts: Tensor
    first: int
    end: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.lists.shape[1]


def strips(blocks: Tensor, S: int, block_size: int, tokens: int) -> list[tuple[int, int]]:
    """Cut the tokens of blocks `[M, T, n]` so that merged lists fit the scratch."""
    M, T, n = blocks.shape
    if tokens == 1:
        return [(0, T)]
    width = min(tokens * n, -(-S // block_size))
    step = max(1, SCRATCH_BYTES // (8 * width * M)) * tokens
    return [(first, min(T, first + step)) for first in range(0, T, step)]


def merged(blocks: Tensor, S: int, block_size: int, tokens: int, first: int, end: int) -> Lists:
    """The lists of tokens first … end − 1, merged tile by tile; blocks int32 `[M, T, n]`."""
    M, T, n = blocks.shape
    if tokens == 1:
        return Lists(blocks, blocks, blocks, 0, T)
    tiles, width = -(-(end - first) // tokens), min(tokens * n, -(-S // block_size))
    lists = torch.empty(M, tiles, width, dtype=torch.int32, device=blocks.device)
    members = torch.empty_like(lists)
    counts = torch.empty(M, tiles, dtype=torch.int32, device=blocks.device)
    merge_kernel[(tiles * M,)](
        blocks, lists, members, counts, T, S, first, end, tiles, n, width,
        BLOCK=block_size, R=tokens, num_warps=1,
    )  # fmt: skip
    return Lists(lists, members, counts, first, end)


def visitors(blocks: Tensor, S: int, block_size: int) -> tuple[Tensor, Tensor, int]:
    """Which tokens visit each block, the block lists transposed, by strips of tokens.

    Only sorts and searches, so it is deterministic and does not wait for the GPU. A strip bounds
    what sorting needs, 20 bytes for each pair of token and block; the result is 4 bytes a pair.

    Args:
        blocks: int32 `[M, T, n]`.
        S: number of keys.
        block_size: keys per block.

    Returns:
        tokens int32 `[M·T·n]`, offsets int32 `[strips, M·N + 1]`, and the tokens of a strip: block
        j of row m is visited by `part[offsets[s, m·N + j] : offsets[s, m·N + j + 1]]`, ascending,
        with part the s-th of the pieces of `tokens` that hold M · strip · n each.
    """
    M, T, n = blocks.shape
    N = -(-S // block_size)
    step = max(1, min(T, SCRATCH_BYTES // (20 * M * n)))
    firsts = range(0, T, step)
    tokens = torch.empty(M * T * n, dtype=torch.int32, device=blocks.device)
    offsets = torch.empty(len(firsts), M * N + 1, dtype=torch.int32, device=blocks.device)
    row = torch.arange(M, dtype=torch.int32, device=blocks.device)[:, None, None] * N
    bounds = torch.arange(M * N + 1, dtype=torch.int32, device=blocks.device)
    for strip, first in enumerate(firsts):
        part = blocks[:, first : first + step]
        t = part.shape[1]
        position = torch.arange(t, dtype=torch.int32, device=blocks.device) + (S - T + first)
        absent = (part < 0) | (part > position[:, None] // block_size)
        key, order = torch.where(absent, M * N, part + row).flatten().sort(stable=True)
        offsets[strip] = torch.searchsorted(key, bounds, out_int32=True)
        tokens[M * first * n :][: M * t * n] = (order // n) % t + first
    return tokens, offsets, step
