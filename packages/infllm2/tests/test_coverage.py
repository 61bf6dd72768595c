"""Every position up to 10,000 attends to exactly what the definition says, key by key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from infllm2 import (
    InfLLMv2Config,
    LayerCache,
    block_sparse_attention,
    infllmv2_attention,
    select_blocks,
)

BACKENDS = ("reference", "torch", "cpu")  # cpu is skipped where it was not built
LENGTH, BLOCK = 10_000, 64
# The kernels and blocks as trained; fewer of them, so that 157 blocks are a choice.
CONFIG = InfLLMv2Config(window_size=3 * BLOCK, topk=5, dense_len=-1)
COUNT = -(-LENGTH // BLOCK)


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, LENGTH, 8, generator=generator) for heads in (2, 1))


@pytest.fixture(scope="module")
def scores(tensors: tuple[Tensor, Tensor]) -> Tensor:
    """Scores of all blocks for all positions, [LENGTH, COUNT] in float64, −inf after the own one.

    Written from the paper's formulas, sharing no code with the package.
    """
    q, k = (x[0].double() for x in tensors)

    def kernels(size: int, stride: int) -> Tensor:
        sums = torch.cat([torch.zeros(1, 8).double(), k[0].cumsum(0)])
        starts = torch.arange(0, LENGTH - size + 1, stride)
        # A cache keeps compressed keys in the keys' own dtype.
        return ((sums[starts + size] - sums[starts]) / size).float().double()

    def logits(head: Tensor, size: int, stride: int) -> Tensor:
        x = head @ kernels(size, stride).T / math.sqrt(8)
        last = torch.arange(x.shape[1]) * stride + size - 1
        return x.masked_fill(last > torch.arange(LENGTH)[:, None], -math.inf)

    shares = torch.zeros(LENGTH, (LENGTH - 32) // 16 + 1).double()
    for head in q:
        fine, coarse = logits(head, 32, 16), logits(head, 128, 64).logsumexp(1)
        shares += (fine - torch.where(coarse.isinf(), fine.logsumexp(1), coarse)[:, None]).exp()
    shares.nan_to_num_(0.0)
    own = torch.arange(LENGTH)[:, None] // BLOCK
    found = torch.zeros(LENGTH, COUNT).double()
    for m in range(COUNT):
        # Kernels that touch tokens 64 m … 64 m + 63 start at 64 m − 31 … 64 m + 63.
        found[:, m] = shares[:, max(0, 4 * m - 1) : 4 * m + 4].amax(1)
    return found.masked_fill(torch.arange(COUNT) > own, -math.inf)


def visited(blocks: Tensor) -> Tensor:
    """Bool [T, COUNT] of blocks [1, 1, T, n]."""
    table = torch.zeros(blocks.shape[2], COUNT + 1, dtype=torch.bool)
    return table.scatter_(1, blocks[0, 0].long() % (COUNT + 1), True)[:, :COUNT]


def forced() -> Tensor:
    """Initial and window blocks of each position, bool [LENGTH, COUNT]."""
    block, own = torch.arange(COUNT), torch.arange(LENGTH)[:, None] // BLOCK
    return ((block < 1) | (own - block < 3)) & (block <= own)


def assert_is_the_definition(sets: Tensor, scores: Tensor) -> None:
    """Sets are init ∪ window ∪ the best others, except where float32 cannot tell scores apart."""
    own = torch.arange(LENGTH)[:, None] // BLOCK
    must = forced()
    assert sets[must].all() and not (sets & (torch.arange(COUNT) > own)).any()
    assert torch.equal(sets.sum(1), (own[:, 0] + 1).clamp(max=CONFIG.budget))
    chosen = scores.masked_fill(~sets | must, math.inf).amin(1)
    left = scores.masked_fill(sets | must, -math.inf).amax(1)
    close = left > chosen
    # At least as good as what was left out; a few positions may tie to float32's last digits.
    assert (left <= chosen * (1 + 1e-4)).all()
    assert close.sum() < 20


def one_hot() -> Tensor:
    """Values that say of which block and which place in it a key is: [1, 1, LENGTH, even]."""
    where = torch.arange(LENGTH)
    hot = torch.zeros(LENGTH, COUNT + BLOCK + (COUNT + BLOCK) % 2)
    hot[where, where // BLOCK] = 1
    hot[where, COUNT + where % BLOCK] = 1
    return hot[None, None]


def assert_seen(out: Tensor, sets: Tensor, first: int) -> None:
    """Output [T, ·] over one-hot values, of keys that weigh all the same, from position `first` on.

    Outputs times the number of keys count them: each block's share says how many of its keys were
    seen, each place's which ones.
    """
    position = torch.arange(first, first + len(out))[:, None]
    own, place = position // BLOCK, position % BLOCK
    keys = (sets * BLOCK).float().scatter_(1, own, place + 1.0)
    counted = out * keys.sum(1, keepdim=True)
    torch.testing.assert_close(counted[:, :COUNT], keys, rtol=0, atol=0.02)
    each = (sets.sum(1, keepdim=True) - 1 + (torch.arange(BLOCK) <= place)).float()
    torch.testing.assert_close(counted[:, COUNT : COUNT + BLOCK], each, rtol=0, atol=0.02)
    # Where nothing was seen there is nothing, not almost nothing.
    assert torch.equal(out[:, :COUNT] > 0, sets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_position_attends_to_exactly_its_blocks(
    backend: str, tensors: tuple[Tensor, Tensor], scores: Tensor
) -> None:
    (q, k), hot = tensors, one_hot()
    nothing = torch.zeros_like(hot)
    sets = []
    # The reference holds queries × keys: it goes in pieces, which must not matter.
    step = 1000 if backend == "reference" else LENGTH
    for first in range(0, LENGTH, step):
        part, past = slice(first, first + step), slice(0, first + step)
        blocks = select_blocks(q[:, :, part], k[:, :, past], CONFIG, backend=backend)
        sets.append(visited(blocks))
        out = block_sparse_attention(
            nothing[:, :, part], nothing[:, :, past], hot[:, :, past], blocks, backend=backend
        )
        assert_seen(out[0, 0], sets[-1], first)
    assert_is_the_definition(torch.cat(sets), scores)


@pytest.mark.parametrize(("backend", "step"), [("torch", 7), ("cpu", 1)])
def test_every_position_when_decoding(
    backend: str, step: int, tensors: tuple[Tensor, Tensor]
) -> None:
    """Token by token through a cache: the blocks of a prefill, and every key of theirs."""
    hot = one_hot()
    nothing, width = torch.zeros_like(hot), hot.shape[3]
    # Values are as wide as keys, so these get columns of zeros; the scale stays that of 8.
    q, k = (torch.nn.functional.pad(x[:, :1], (0, width - 8)) for x in tensors)
    q *= (width / 8) ** 0.5
    blocks = select_blocks(q, k, CONFIG, backend=backend)
    sets, cache = visited(blocks), LayerCache(CONFIG)
    shares = torch.empty(LENGTH, COUNT)
    for t in range(LENGTH):
        one, past = slice(t, t + 1), slice(0, t + 1)
        if t % step:  # PyTorch's steps take longer: 7 meets every place in a block, too
            cache.update(k[:, :, one], hot[:, :, one])
            continue
        new = (x[:, :, one] for x in (q, k, hot))
        out = infllmv2_attention(*new, CONFIG, cache=cache, backend=backend)
        shares[t] = out[0, 0, 0, :COUNT]
        if t % 7 == 0:
            out = block_sparse_attention(
                nothing[:, :, one], nothing[:, :, past], hot[:, :, past], blocks[:, :, one],
                backend=backend,
            )  # fmt: skip
            assert_seen(out[0, 0], sets[one], t)
    assert torch.equal(shares[::step] > 0, sets[::step])
