"""How the Triton kernels are cut into programs: the one place to tune, and what all launches share.

No import of Triton here. None of these sizes was timed by us, as no GPU was at hand; they are what
fits: compiled for sm80 and sm90 in 16-bit formats with head sizes of 64 and 128, no kernel spills
registers, and none asks for more shared memory than there is (99 KiB before sm90). To tune on a
GPU, change one value at a time below, rerun the tests (any powers of two are correct, `keys`,
`tokens`·`group` and `dim` at least 16, `tokens` at most 32), and time it: `make gpu`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows (tokens x heads of a group) that one program of the prefill kernels holds. More rows share
# each key they load among more queries, and each token then skips more blocks of its neighbours.
ROWS = 64
# With fewer programs than this a launch is split along the keys, until there are as many.
PROGRAMS = 128
# Bytes of one scratch buffer (merged block lists, block scores); longer prompts go in strips.
SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program; all powers of two.

    Attributes:
        tokens: queries (R).
        group: heads of a query, padded (GP); rows of a matrix product are tokens · group.
        dim: head size, padded (DIM).
        keys: keys, or kernels, or blocks of one step.
        warps: warps of 32 threads.
        stages: steps whose loads are under way at once.
    """

    tokens: int
    group: int
    dim: int
    keys: int
    warps: int
    stages: int


def attention_tiles(
    G: int,
    D: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    tokens: int | None = None,
    backward: bool = False,
    roomy: bool = True,
) -> Tiles:
    """Sizes for attention, forward and backward.

    Args:
        G: heads per group.
        D: head size.
        block_size: keys per block; one step never crosses a block.
        dtype: of q, k and v.
        tokens: queries of a program (1 in decoding), or as many as fit `ROWS`. Then a program
            reads each block that any of its tokens visits once: neighbours share the window and
            most of the chosen blocks, so this saves most of the loading, and small groups fill
            the matrix units, at the price of products that are masked away where the tokens
            differ.
        backward: for the backward kernels, which hold twice as many sums.
        roomy: what `is_roomy` says of the GPU.
    """
    # The merged lists keep one bit of an int32 for each token of a tile.
    group, tokens = _rows(G, tokens, min(_most_rows(D, dtype), 32 * power_of_two(G)))
    dim = max(16, power_of_two(D))
    keys = _keys(D, dtype)
    if backward and not roomy and D < 128:
        keys = min(keys, 32)
    return Tiles(
        tokens=tokens,
        group=group,
        dim=dim,
        keys=min(keys, max(16, power_of_two(block_size))),
        warps=8 if backward else _warps(tokens * group * dim, dtype),
        # Two would load a step's keys only when the step before has done with its own.
        stages=3 if (roomy or not backward) and D <= 128 else 2,
    )


def selection_tiles(G: int, D: int, T: int, dtype: torch.dtype) -> Tiles:
    """Sizes for scoring compressed keys: as attention, `keys` counting kernels (or blocks)."""
    group, tokens = _rows(G, min(power_of_two(T), ROWS), _most_rows(D, dtype))
    dim = max(16, power_of_two(D))
    warps = _warps(tokens * group * dim, dtype)
    return Tiles(tokens, group, dim, _keys(D, dtype), warps, 3 if D <= 128 else 2)


def is_roomy(x: Tensor) -> bool:
    """Whether x's GPU has matrix units that read shared memory, and over 200 KiB of that a program
    (sm90, sm100); the others need smaller tiles in backward. What is no GPU counts as roomy."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in (9, 10)


# float32 without rounding has no matrix units: operands stand in registers, which few rows leave
# room for.


def _most_rows(D: int, dtype: torch.dtype) -> int:
    """Rows of a program."""
    return ROWS // (1 if D <= 128 else 2) // (2 if dtype == torch.float32 else 1)


def _keys(D: int, dtype: torch.dtype) -> int:
    """Keys of a step: 16 KiB of them at most."""
    if dtype == torch.float32:
        return 16
    return 64 if D <= 128 else 32


def _warps(numbers: int, dtype: torch.dtype) -> int:
    """For tiles of queries with so many numbers."""
    return 8 if dtype == torch.float32 or numbers > ROWS * 128 else 4


def _rows(G: int, tokens: int | None, most: int) -> tuple[int, int]:
    """Padded group and tokens: at least 16 rows, which matrix products need, and about `most`."""
    group = power_of_two(G)
    if tokens == 1:
        return max(16, group), 1
    fit = max(1, most // group)
    return group, max(fit if tokens is None else min(tokens, fit), -(-16 // group))


def splits(programs: int, steps: int) -> int:
    """Parts to cut `steps` steps of each of `programs` programs into: a power of two."""
    wanted = -(-PROGRAMS // max(1, programs))
    return min(power_of_two(wanted), 1 << max(0, steps.bit_length() - 1))


def power_of_two(x: int) -> int:
    """The least power of two that is not below x."""
    return 1 << max(0, x - 1).bit_length()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on x's GPU, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
