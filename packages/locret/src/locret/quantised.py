"""How keys and values are stored: as they are, or as integers of 8 or 4 bits with their scales.

int8: one float32 scale for an entry, whose largest number becomes ±127. int4: codes 0 … 15 between
the least and the largest number of each group of up to 32, two codes in a byte, a scale and an
offset of bfloat16 for a group. Both are rounded outwards, so that no number lies beyond the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = ("model", "int8", "int4")
GROUP = 32  # most numbers that share an int4 scale

Planes = tuple[Tensor, ...]


def encode(x: Tensor, storage: str) -> Planes:
    """Planes of `[..., D]` numbers, each `[..., w]` with the same leading shape.

    Returns:
        "model": x. "int8": codes int8 `[..., D]` and scales float32 `[..., 1]`. "int4": codes uint8
        `[..., D / 2]`, scales and offsets bfloat16 `[..., D / group]`.
    """
    if storage == "model":
        return (x,)
    return _encode8(x.float()) if storage == "int8" else _encode4(x.float())


def decode(planes: Planes, storage: str, dtype: torch.dtype) -> Tensor:
    """What `encode` made planes of, within half a scale, in `dtype`."""
    if storage == "model":
        return planes[0]
    if storage == "int8":
        codes, scales = planes
        return (codes.float() * scales).to(dtype)
    packed, scales, offsets = planes
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    codes = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    return (codes * scales.float()[..., None] + offsets.float()[..., None]).flatten(-2).to(dtype)


def entry_bytes(storage: str, width: int, bytes_per_value: int) -> int:
    """Bytes of one key or value of `width` numbers.

    Args:
        storage: one of `STORAGES`.
        width: head_dim.
        bytes_per_value: of a number of the model's dtype.
    """
    if storage == "model":
        return width * bytes_per_value
    if storage == "int8":
        return width + 4
    return width // 2 + 4 * (width // group_of(width))


def group_of(width: int) -> int:
    """Numbers that share an int4 scale: the largest even divisor of `width` up to `GROUP`.

    Raises:
        ValueError: an odd width, which two codes in a byte do not divide.
    """
    if width % 2:
        raise ValueError(f'storage "int4" needs an even head size, got {width}: use "int8"')
    return max(n for n in range(2, min(GROUP, width) + 1, 2) if width % n == 0)


def _encode8(x: Tensor) -> Planes:
    scales = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return codes.to(torch.int8), scales


def _encode4(x: Tensor) -> Planes:
    groups = x.unflatten(-1, (-1, group_of(x.shape[-1])))
    offsets = _outwards(groups.amin(-1), down=True)
    scales = _outwards((groups.amax(-1) - offsets) / 15, down=False)
    step = scales.clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - offsets[..., None]) / step[..., None]).round().clamp(0, 15)
    codes = codes.to(torch.uint8).flatten(-2)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed, scales.to(torch.bfloat16), offsets.to(torch.bfloat16)


def _outwards(x: Tensor, down: bool) -> Tensor:
    """The bfloat16 number next to float32 x that is not above it, or (down=False) not below it."""
    bits = x.contiguous().view(torch.int32)
    cut = bits & -65536  # towards zero
    away = ((x < 0 if down else x > 0) & (cut != bits)).int()
    return (cut + away * 65536).view(torch.float32)
