"""Checks of the tensors a user passes, with messages that name what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infllm2.config import InfLLMv2Config


def check_qk(q: Tensor, k: Tensor, *, aligned: bool = False) -> None:
    """Check q `[B, Hq, T, D]` against k `[B, Hkv, S, D]`; `aligned`: T = S, of new tokens.

    Raises:
        ValueError: rank, sizes, dtype or device do not fit together.
    """
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
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
    if aligned and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"with a cache, q, k and v are of the new tokens alone, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
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
    if not isinstance(v, Tensor):
        raise ValueError(f"v must be a torch.Tensor, got {type(v).__name__}")
    if v.shape != k.shape:
        raise ValueError(
            f"k and v must have one shape, got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    check_same_kind("k", k, "v", v)


def check_config(config: InfLLMv2Config) -> None:
    """Check that it is one.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(config, InfLLMv2Config):
        raise ValueError(
            f"config must be an InfLLMv2Config, got {type(config).__name__}: build one, or read a "
            "model's with InfLLMv2Config.from_pretrained_config(...)"
        )


def check_unrotated(q: Tensor, k: Tensor, unrotated: tuple[Tensor, Tensor] | None) -> None:
    """Check (q, k) before rotary embedding against those after it; head sizes may differ.

    Raises:
        ValueError: there is none, or its shapes are others: selection would name blocks of other
            keys than those attended to.
    """
    if unrotated is None:
        raise ValueError(
            "use_nope=True scores with queries and keys before rotary embedding: pass them as "
            "unrotated=(q, k)"
        )
    if not isinstance(unrotated, tuple | list) or len(unrotated) != 2:
        raise ValueError(f"unrotated must be (q, k), got {type(unrotated).__name__}")
    check_qk(*unrotated)
    for name, x, rotated in zip("qk", unrotated, (q, k), strict=True):
        if x.shape[:3] != rotated.shape[:3]:
            raise ValueError(
                f"unrotated {name} must have {name}'s batch, heads and length, got "
                f"{tuple(x.shape)} and {tuple(rotated.shape)}"
            )


def packed_ends(q: Tensor, k: Tensor, cu_seqlens: Tensor | Sequence[int]) -> list[int]:
    """Check packed sequences: batch 1, q as long as k, ends ascending from 0 to the length.

    Raises:
        ValueError: they are not.
    """
    ends = cu_seqlens
    if isinstance(ends, Tensor) and ends.dim() == 1 and not ends.is_floating_point():
        ends = ends.tolist()
    if not isinstance(ends, tuple | list) or not all(type(end) is int for end in ends):
        got = f"{ends.dtype} {tuple(ends.shape)}" if isinstance(ends, Tensor) else repr(ends)
        raise ValueError(f"cu_seqlens must be integers [sequences + 1], got {got}")
    if not ends or ends[0] != 0 or ends[-1] != q.shape[2] or sorted(ends) != list(ends):
        raise ValueError(
            f"cu_seqlens must ascend from 0 to the {q.shape[2]} packed positions, got {ends}"
        )
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(
            "packed q and k must have batch 1 and one length, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    return list(ends)


def check_blocks(q: Tensor, k: Tensor, blocks: Tensor, block_size: int) -> None:
    """Check blocks `[B, Hkv, T, n]`: integers, ascending without repetition, −1 only at the end.

    Raises:
        ValueError: they are not, or name a block that does not exist.
    """
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")
    if not isinstance(blocks, Tensor):
        raise ValueError(f"blocks must be a torch.Tensor, got {type(blocks).__name__}")
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
