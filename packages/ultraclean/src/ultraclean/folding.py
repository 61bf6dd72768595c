"""The normalisers as tables for the native code: what each code point becomes.

Lower case, NFKD and the dropping of marks act on one code point at a time, but for two cases that
the table marks as slow: a capital sigma, whose lower case depends on its place in the word, and
marks that are kept and may change places. Texts with those take the Python path.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable

import numpy as np

from ultraclean import native, native_args

# All that Unicode changes lies below the first bound, but for variation selectors.
_RANGES = (range(0x30000), range(0xE0000, 0xE0200))
_SLOW = 0xFF


class Fold:
    """A table of code points.

    Attributes:
        args: for the native code.
        expansion: most bytes that one byte becomes.
    """

    def __init__(self, changed: dict[int, str | None], newlines: int = 0, trim: bool = False):
        entries = np.zeros(0x110000, np.uint32)
        text, expansion = bytearray(), 1
        seen: dict[bytes, int] = {}
        for point, becomes in changed.items():
            if becomes is None:
                entries[point] = _SLOW << 24
                continue
            data = becomes.encode()
            assert len(data) < _SLOW
            if data not in seen:
                seen[data] = len(text)
                text += data
            # Bit 23 tells "nothing" from "itself".
            entries[point] = len(data) << 24 | seen[data] | (0 if data else 1 << 23)
            expansion = max(expansion, -(-len(data) // len(chr(point).encode())))
        rows, place = np.unique(entries.reshape(-1, 256), axis=0, return_inverse=True)
        pages, rows = place.astype(np.uint16).ravel(), np.ascontiguousarray(rows)
        blob = np.frombuffer(bytes(text) + b"\0", np.uint8)
        assert len(text) < 1 << 23
        self.expansion = expansion
        self.args = native.keep(
            native_args.FoldArgs(
                pages.ctypes.data, rows.ctypes.data, blob.ctypes.data, newlines, int(trim)
            ),
            pages, rows, blob,
        )  # fmt: skip


@functools.cache
def _folded() -> dict[int, str | None]:
    """Code point -> lower case, NFKD, no marks; only what changes."""
    points = [p for r in _RANGES for p in r if not 0xD800 <= p < 0xE000 and p != 10]
    whole = "\n".join(map(chr, points)).lower()
    made = unicodedata.normalize("NFKD", whole).split("\n")
    changed: dict[int, str | None] = {}
    for point, becomes in zip(points, made, strict=True):
        if point < 0x300:
            if len(becomes) == 1 and ord(becomes) == point:
                continue
        elif becomes == chr(point) and unicodedata.category(becomes) != "Mn":
            if not unicodedata.combining(becomes):
                continue
        rest = [c for c in becomes if unicodedata.category(c) != "Mn"]
        slow = point == 0x3A3 or any(unicodedata.combining(c) for c in rest)
        changed[point] = None if slow else "".join(rest)
    return changed


def _mapped(
    base: dict[int, str | None], each: Callable[[str], str], newlines: int = 0, trim: bool = False
) -> Fold:
    """A table followed by a map of single characters."""
    changed = dict(base)
    for point in (p for r in _RANGES for p in r if not 0xD800 <= p < 0xE000):
        before = base.get(point, chr(point))
        if before is None:
            continue
        after = "".join(map(each, before))
        if after != chr(point):
            changed[point] = after
    # Unified ideographs beyond the ranges.
    for point in range(0x30000, 0x40000):
        if (after := each(chr(point))) != chr(point):
            changed[point] = after
    return Fold(changed, newlines, trim)


@functools.cache
def fold_of(name: str) -> Fold:
    """The table of a normaliser of `normalise.NORMALISERS`, or of `minhash`."""
    from ultraclean.normalise import CJK

    if name == "ultrafine":
        return Fold(_folded(), newlines=2)
    if name == "ultrafine-words":
        spelled = {"\n": " \\n ", "\r": "\\r", "\t": " "}
        return _mapped(_folded(), lambda c: spelled.get(c, c), newlines=2, trim=True)
    if name == "whitespace":
        return _mapped({}, lambda c: " " if c.isspace() else c)
    if name == "dclm":
        return _mapped({}, lambda c: " " if c.splitlines() == [""] else c, trim=True)
    if name == "zh-char":
        return _mapped(_folded(), lambda c: f" {c} " if CJK.match(c) else " " if c.isspace() else c)
    if name != "minhash":
        raise ValueError(f"no table of characters is called {name!r}: expected a normaliser's name")
    # Slow characters are kept as they are: a signature need not be a normaliser's equal.
    easy = {p: (chr(p) if t is None else t).lower() for p, t in _folded().items()}
    return _mapped(easy, lambda c: f" {c} " if CJK.match(c) else c if c.isalnum() else " ")
