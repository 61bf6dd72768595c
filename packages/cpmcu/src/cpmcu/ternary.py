"""Weights that are ternary already: {-a, 0, a} in every group of a row, as `bitcpm` packs them.

They are taken as they are, laid out exactly, and never quantised again.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor


def is_installed() -> tuple[bool, str]:
    """Whether bitcpm is there, and what to do if not."""
    if importlib.util.find_spec("bitcpm") is None:
        return False, "ternary weights need bitcpm: pip install minicpm4-bitcpm"
    return True, ""


def packed(weight: Tensor, codec: str) -> Any:
    """A matrix `[rows, cols]` in the largest groups that fit it, a `bitcpm.PackedTensor`; None: not
    ternary.
    """
    from bitcpm import PackedTensor
    from bitcpm.group_size import fit_sizes
    from bitcpm.recover import looks_ternary

    group = fit_sizes(weight).largest() if looks_ternary(weight) else None
    return None if group is None else PackedTensor.from_weights(weight, group, codec)


def check_found(matrices: int) -> None:
    """ValueError where quant="ternary" found no ternary matrix in a model."""
    if not matrices:
        raise ValueError(
            "quant='ternary' needs weights that are ternary, and no matrix is: quantise the model "
            "with bitcpm first, or take another quant"
        )
