"""Keys and values in eight bits: rows of D int8 codes and the float32 that they are multiplied by.

One scale for each token and head, that of its largest number. The same rows as in
`csrc/native/int8_rows.hpp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpmcu._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BYTES = 4


def to_rows(x: Tensor) -> Tensor:
    """Floats `[..., D]` as int8 `[..., D + 4]`; a row that is not finite becomes all NaN."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    scale = torch.where(most < torch.inf, most / 127, torch.nan)
    codes = torch.where((most > 0) & (most < torch.inf), x * (127 / most), 0.0).round()
    return torch.cat([codes.to(torch.int8), scale.view(torch.int8)], -1)


def of_floats(x: np.ndarray) -> np.ndarray:
    """`to_rows` of finite float32 numbers, without PyTorch."""
    most = np.abs(x).max(-1, keepdims=True)
    by = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.rint(x * by).astype(np.int8)
    return np.concatenate([codes, (most / np.float32(127)).view(np.int8)], -1)


def from_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats `[..., D]` of int8 `[..., D + 4]`."""
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES].float() * scale).to(dtype)
