"""Codes and scales of weights that are ternary already, without quantising them again.

Absmean is not idempotent: on weights in {-a, 0, a} the mean |W_g| counts the zeros too, so each
pass shrinks the scale by the share of non-zeros (10 % zeros: 0.9, 0.81, ...). The scale of a
finished group is max |W_g|, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import SMALLEST_EVIDENCE as SMALLEST_EVIDENCE
from .reference import check_matrix, split_groups


def on_grid(w: Tensor, group_size: int) -> Tensor:
    """Bool [O, groups]: whether all of a group's weights are in {-a, 0, a} for one finite a."""
    check_matrix(w)
    return torch.cat([_agrees(part).all(-1) for part in split_groups(w, group_size)], 1)


def off_grid_values(w: Tensor, group_size: int) -> int:
    """How many weights are neither zero nor as large as the largest of their group."""
    check_matrix(w)
    return sum(int((~_agrees(part)).sum()) for part in split_groups(w, group_size))


def recover(w: Tensor, group_size: int, name: str = "the matrix") -> tuple[Tensor, Tensor]:
    """Codes int8 [O, I] and scales [O, groups] (dtype of `w`) with codes * scales == w exactly.

    A group of zeros has scale 0. A weight of -0.0 becomes +0.0, which no product can tell apart.

    Raises:
        ValueError: a group is not in {-a, 0, a}; says where the first one is.
    """
    good = on_grid(w, group_size)
    if not good.all():
        row, group = (int(i) for i in (~good).nonzero()[0])
        raise ValueError(
            f"{name} is not ternary in groups of {group_size}: {int((~good).sum())} of "
            f"{good.numel()} groups hold values besides -a, 0 and a, first in row {row}, group "
            f"{group}. Find the group size with `bitcpm inspect`, or quantise the weights first"
        )
    scales = [part.abs().amax(-1) for part in split_groups(w, group_size)]
    return w.sign().to(torch.int8), torch.cat(scales, 1)


def looks_ternary(w: Tensor) -> bool:
    """Whether `w` is ternary in some group size that is a multiple of 8, and not all zero.

    Groups of 8 lie inside every such group, so one test answers for all of them.
    """
    if w.dim() != 2 or w.shape[1] < SMALLEST_EVIDENCE or not w.is_floating_point():
        return False
    # A few rows settle it for nearly every dense matrix.
    for rows in (w[:4], w):
        if not on_grid(rows, SMALLEST_EVIDENCE).all():
            return False
    return bool((w != 0).any())


def _agrees(w_Ong: Tensor) -> Tensor:
    """Bool [O, n, g]: the weight is zero, or as large as its group's largest."""
    size = w_Ong.abs()
    largest = size.amax(-1, keepdim=True)
    # NaN equals nothing, so that only infinity needs a test of its own.
    return ((size == largest) | (size == 0)) & torch.isfinite(largest)
