"""Compression of outputs, a block at a time: a file may hold many members or frames."""

from __future__ import annotations

PACKINGS = ("", "gz", "zst")


def pack(data: bytes, packing: str) -> bytes:
    """`data` as a whole gzip member or Zstandard frame; nothing stays nothing.

    The same bytes each time on the same kind of processor.
    """
    if not data or not packing:
        return data
    if packing == "gz":
        from isal import igzip

        return igzip.compress(data, compresslevel=2, mtime=0)
    import zstandard

    return zstandard.ZstdCompressor(level=3).compress(data)
