"""What of ternary weights needs no PyTorch: codes in bytes, sizes, the codes of NumPy's numbers.

For engines that read packed models without it, and for `packing` and `group_size`, which have the
same for tensors. Letters: O output features, I input features.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .config import groups_of

# Codes per byte, and the base of the digits.
CODECS: dict[str, tuple[int, int]] = {"2bit": (4, 4), "1.6bit": (5, 3)}
# Fewer channels than this agree by chance, and a group of one always does.
SMALLEST_EVIDENCE = 8


def codec_of(codec: str) -> tuple[int, int]:
    """(codes per byte, base of the digits); ValueError where the codec is unknown."""
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}; got {codec!r}")
    return CODECS[codec]


def bytes_per_row(in_features: int, codec: str) -> int:
    """Bytes that hold one row of codes.

    Raises:
        ValueError: the codec is unknown.
    """
    per_byte, _ = codec_of(codec)
    return -(-in_features // per_byte)


def expected_shapes(
    shape: tuple[int, int], group_size: int, codec: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of `codes` and `scales` for a matrix of `shape` (O, I), both >= 1."""
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be (out, in), both >= 1, got {shape}")
    _, full, tail = groups_of(shape[1], group_size)
    return (shape[0], bytes_per_row(shape[1], codec)), (shape[0], full + bool(tail))


def unpack(packed: np.ndarray, in_features: int, codec: str) -> np.ndarray:
    """Codes int8 [O, in_features] of bytes uint8 [O, bytes_per_row], as `packing.pack_codes` made.

    Raises:
        ValueError: a byte is not one that the codec uses, or is used beyond the last column.
    """
    table, valid = _table(codec)
    if not valid[packed].all():
        raise ValueError(f"packed codes hold a byte that codec {codec} does not use: damaged data")
    codes = table[packed].reshape(packed.shape[0], -1)
    if codes[:, in_features:].any():
        raise ValueError(f"packed codes use places beyond column {in_features}: damaged data")
    return np.ascontiguousarray(codes[:, :in_features])


def dequantise(codes: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    """Weights float32 [O, I] from codes int8 [O, I] and scales float32 [O, groups]; exact."""
    size, _, _ = groups_of(codes.shape[1], group_size)
    return codes.astype(np.float32) * np.repeat(scales, size, 1)[:, : codes.shape[1]]


def fitting_sizes(
    rows: np.ndarray, columns: np.ndarray, magnitude: np.ndarray, width: int
) -> tuple[frozenset[int], bool]:
    """Group sizes in [8, `width`) that explain the non-zero weights of a matrix, and whether one
    group for a row does: see `group_size`.

    Args:
        rows, columns: of the non-zero weights, sorted by both.
        magnitude: of each.
        width: I.
    """
    change = (rows[1:] == rows[:-1]) & (magnitude[1:] != magnitude[:-1])
    # The same few borders recur in every row: one look at each pair is enough.
    pairs = np.unique(columns[:-1][change] * np.int64(width) + columns[1:][change])
    p, q = pairs // width, pairs % width
    sizes = range(SMALLEST_EVIDENCE, width)
    return frozenset(g for g in sizes if np.all(p // g != q // g)), not len(pairs)


def recover(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """The ternary weights float32 [O, I] in the largest groups that fit them.

    Returns:
        codes int8 [O, I], scales float32 [O, groups] with codes * scales == w exactly, and the
        group size (-1: whole rows); None where `w` is not ternary in groups of 8 or more.
    """
    if w.shape[1] < SMALLEST_EVIDENCE or not w.any():
        return None
    # Groups of 8 lie inside every larger one; and a few rows settle it for nearly all matrices.
    if not _on_grid(w[:4], SMALLEST_EVIDENCE) or not _on_grid(w, SMALLEST_EVIDENCE):
        return None
    rows, columns = np.nonzero(w)
    sizes, whole = fitting_sizes(rows, columns, np.abs(w[rows, columns]), w.shape[1])
    group = -1 if whole else max(sizes, default=None)
    if group is None or not _on_grid(w, group):
        return None
    scales = [np.abs(part).max(-1) for part in _groups(w, group)]
    return np.sign(w).astype(np.int8), np.concatenate(scales, 1), group


def _groups(w: np.ndarray, group_size: int) -> list[np.ndarray]:
    """Views of the groups: [O, n, g] of full groups, and [O, 1, tail] if the row has a tail."""
    size, full, tail = groups_of(w.shape[1], group_size)
    parts = [w[:, : full * size].reshape(len(w), full, size)]
    return [*parts, w[:, None, full * size :]] if tail else parts


def _on_grid(w: np.ndarray, group_size: int) -> bool:
    for part in _groups(w, group_size):
        size = np.abs(part)
        largest = size.max(-1, keepdims=True)
        if not (((size == largest) | (size == 0)) & np.isfinite(largest)).all():
            return False
    return True


@cache
def _table(codec: str) -> tuple[np.ndarray, np.ndarray]:
    """For each byte its codes int8 [256, per_byte], and whether the codec uses it."""
    per_byte, base = codec_of(codec)
    digits = np.arange(256)[:, None] // base ** np.arange(per_byte) % base
    # Base 3 has no digit above 2, but five digits end at 242.
    valid = (digits < 3).all(1) & (np.arange(256) < base**per_byte)
    return (digits - 1).astype(np.int8), valid
