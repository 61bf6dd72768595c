"""Checks of the tensors a user passes, with messages that name what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def check_qk(q: Tensor, k: Tensor) -> None:
    """Check q `[B, Hq, T, D]` against k `[B, Hkv, S, D]`.

    Raises:
        ValueError: rank, sizes, dtype or device do not fit together.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, length, head size], got "
                f"{tuple(x.shape)}"
            )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head size, got q {tuple(q.shape)} and "
            f"k {tuple(k.shape)}"
        )
    if q.shape[3] == 0 or k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "the number of query heads must be a positive multiple of that of key-value heads, and "
            f"the head size positive, got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            "queries are the last of the key positions, so q must not be longer than k, got "
            f"{q.shape[2]} queries and {k.shape[2]} keys: pass the cached keys too"
        )
    check_same_kind("q", q, "k", k)


def check_kv(k: Tensor, v: Tensor) -> None:
    """Check that v has k's shape, dtype and device.

    Raises:
        ValueError: it has not.
    """
    if v.shape != k.shape:
        raise ValueError(
            f"k and v must have one shape, got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    check_same_kind("k", k, "v", v)


def check_blocks(q: Tensor, k: Tensor, blocks: Tensor, block_size: int) -> None:
    """Check blocks `[B, Hkv, T, n]`: integers, ascending without repetition, −1 only at the end.

    Raises:
        ValueError: they are not, or name a block that does not exist.
    """
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")
    if blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"blocks must be int32 or int64, got {blocks.dtype}")
    wanted = (k.shape[0], k.shape[1], q.shape[2])
    if blocks.dim() != 4 or tuple(blocks.shape[:3]) != wanted:
        raise ValueError(
            f"blocks must be [batch, key-value heads, queries, n] = {[*wanted, 'n']}, "
            f"got {tuple(blocks.shape)}"
        )
    if blocks.device != q.device:
        raise ValueError(f"blocks must be on q's device {q.device}, got {blocks.device}")
    if blocks.numel() == 0:
        return
    count = -(-k.shape[2] // block_size)
    if blocks.min() < -1 or blocks.max() >= count:
        raise ValueError(
            f"blocks must lie in -1 … {count - 1} ({k.shape[2]} keys in blocks of {block_size}), "
            f"got {int(blocks.min())} … {int(blocks.max())}: was block_size the same when they "
            "were selected?"
        )
    left, right = blocks[..., :-1], blocks[..., 1:]
    if not (((left < right) & (left >= 0)) | (right == -1)).all():
        raise ValueError("blocks must ascend without repetition, with -1 only at the end of a row")


def check_same_kind(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Check that two tensors share dtype and device.

    Raises:
        ValueError: they do not.
    """
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"{name_a} and {name_b} must share dtype and device, got {a.dtype} on {a.device} and "
            f"{b.dtype} on {b.device}"
        )
