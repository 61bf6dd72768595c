"""Group-wise absmean quantiser in plain PyTorch: BitCPM-CANN §3.2, MiniCPM4 report §3.3.1.

    s  = max(mean |W_g|, eps)                  for each group g of a row
    Wq = clamp(round(W_g / s), -1, 1) * s

Letters: O output features, I input features, n groups in a row, g channels of a group.

Two choices that the papers leave open are fixed here. The scale is rounded to the weights' dtype
before anything is divided by it, because that is the scale a checkpoint can store. The mean itself
is taken in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import GRIDS, TernaryConfig, groups_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def split_groups(w_OI: Tensor, group_size: int) -> list[Tensor]:
    """Views of the groups: [O, n, g] of full groups, and [O, 1, tail] if the row has a tail."""
    out_features, in_features = w_OI.shape
    size, full, tail = groups_of(in_features, group_size)
    parts = [w_OI[:, : full * size].unflatten(1, (full, size))]
    if tail:
        parts.append(w_OI[:, full * size :].unflatten(1, (1, tail)))
    return parts


def scale_of(w_Ong: Tensor, config: TernaryConfig) -> Tensor:
    """Scales [O, n, 1] of groups [O, n, g], in the weights' dtype.

    Ternary: the absolute mean. The other grids of §3.1: the absolute maximum over their outermost
    level (1.5 for the asymmetric and half-symmetric grids, 2 for the others).
    """
    if config.grid == "ternary":
        s = w_Ong.abs().mean(-1, keepdim=True, dtype=torch.float32)
    else:
        outermost = 1.5 if config.grid in ("asymmetric", "half-symmetric") else 2.0
        s = w_Ong.abs().amax(-1, keepdim=True).float() / outermost
    # No smaller than the dtype can hold: fp16 would round eps = 1e-9 to zero. (clamp_ keeps NaN, so
    # that a NaN weight stays visible in the output.)
    finfo = torch.finfo(w_Ong.dtype)
    return s.clamp_(min=max(config.eps, finfo.tiny * finfo.eps)).to(w_Ong.dtype)


def level_of(x: Tensor, grid: str) -> Tensor:
    """Level (in GRIDS[grid], float) nearest to each x = W/s, fp32; ties as torch.round has them."""
    if grid == "half-symmetric":
        return (x.floor() + 0.5).clamp(-1.5, 1.5)
    if grid == "integer-symmetric":
        # No level at zero: what rounds to zero goes to -1 or +1 by its sign, and zero itself to +1.
        sign = torch.where(x < 0, -1.0, 1.0)
        return x.abs().round().clamp(1, 2) * sign
    return x.round().clamp(GRIDS[grid][0], GRIDS[grid][-1])


def code_unit(grid: str) -> float:
    """What one step of an int8 code is worth in units of s: 1, or 0.5 for the half-levels."""
    return 0.5 if grid == "half-symmetric" else 1.0


def quantise(w: Tensor, config: TernaryConfig | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight matrix.

    Args:
        w: [O, I], float32, bfloat16 or float16, finite.
        config: defaults to TernaryConfig().

    Returns:
        codes int8 [O, I] (ternary: -1, 0, 1; otherwise level / `code_unit`), and scales
        [O, groups] in the dtype of `w`. A group of zeros has codes 0 where the grid has a zero.

    Raises:
        ValueError: `w` is not a matrix, has another dtype, or holds NaN or infinity.
    """
    config = config or TernaryConfig()
    check_matrix(w)
    if not torch.isfinite(w).all():
        raise ValueError("the weights hold NaN or infinity: mend the checkpoint they come from")
    codes, scales = [], []
    for w_Ong in split_groups(w.detach(), config.group_size):
        s_On1 = scale_of(w_Ong, config)
        level = level_of(w_Ong.float() / s_On1.float(), config.grid)
        codes.append((level / code_unit(config.grid)).to(torch.int8).flatten(1))
        scales.append(s_On1.squeeze(-1))
    return torch.cat(codes, 1), torch.cat(scales, 1)


def dequantise(codes: Tensor, scales: Tensor, config: TernaryConfig | None = None) -> Tensor:
    """Weights [O, I] in the dtype of `scales` from codes int8 [O, I] and scales [O, groups].

    Raises:
        ValueError: the shapes do not belong together at config.group_size.
    """
    config = config or TernaryConfig()
    size, full, tail = groups_of(codes.shape[1], config.group_size)
    if scales.shape != (codes.shape[0], full + bool(tail)):
        raise ValueError(
            f"scales must be [{codes.shape[0]}, {full + bool(tail)}] for codes "
            f"{list(codes.shape)} in groups of {size}, got {list(scales.shape)}"
        )
    s_OI = scales.repeat_interleave(size, dim=1)[:, : codes.shape[1]]
    # Levels have at most two significant bits: exact in every dtype.
    return codes.to(scales.dtype) * code_unit(config.grid) * s_OI


def check_matrix(w: Tensor) -> None:
    """Raise ValueError unless `w` is a non-empty float matrix."""
    if w.dim() != 2 or not w.numel():
        raise ValueError(f"expected a weight matrix [out, in], got shape {list(w.shape)}")
    if w.dtype not in FLOATS:
        raise ValueError(f"expected float32, bfloat16 or float16 weights, got {w.dtype}")
