"""The C interface of the CPU kernels (`csrc/args.h`) as ctypes sees it."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native

if TYPE_CHECKING:
    import torch

CODECS = {"2bit": 0, "1.6bit": 1}
DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}  # by their `str`
MODES = {"int8": 0, "int8-group": 1, "exact": 2}
LEVELS = ("scalar", "avx2", "avx512", "avx512_vnni", "amx")


class Shape(Structure):
    """bitcpm_shape."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("group", c_int64),
        ("codec", c_int32),
        ("scale_dtype", c_int32),
    )


class PrepareArgs(Structure):
    """bitcpm_prepare_args."""

    _fields_ = (
        ("shape", Shape),
        ("x", c_void_p),
        ("tokens", c_int64),
        ("x_stride", c_int64),
        ("x_dtype", c_int32),
        ("mode", c_int32),
        ("prepared", c_void_p),
    )


class MultiplyArgs(Structure):
    """bitcpm_multiply_args."""

    _fields_ = (
        ("shape", Shape),
        ("weights", c_void_p),
        ("prepared", c_void_p),
        ("tokens", c_int64),
        ("out_stride", c_int64),
        ("out_dtype", c_int32),
        ("mode", c_int32),
        ("out", c_void_p),
        ("bias", c_void_p),
        ("work", c_void_p),
        ("work_stride", c_int64),
    )


class LayoutArgs(Structure):
    """bitcpm_layout_args."""

    _fields_ = (
        ("shape", Shape),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("weights", c_void_p),
    )


class Kernels:
    """The loaded library: its operations, sizes and level.

    Attributes:
        prepare, multiply, lay_out, take_out: operations; see `csrc/args.h`.
        level: instruction set in use, one of `LEVELS`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name in ("prepare", "multiply", "lay_out", "take_out"):
            setattr(self, name, _native.Operation(library, "bitcpm", name))
        self._weight_bytes = _sizer(library.bitcpm_weight_bytes)
        self._prepared_bytes = _sizer(library.bitcpm_prepared_bytes, c_int64, c_int32)
        self._work_bytes = _sizer(library.bitcpm_work_bytes, c_int64)
        library.bitcpm_level_name.restype = c_char_p
        self.level = library.bitcpm_level_name(library.bitcpm_level()).decode()
        self._local = threading.local()

    def weight_bytes(self, shape: Shape) -> int:
        """Bytes of a matrix in the kernel layout."""
        return self._weight_bytes(ctypes.byref(shape))

    def sizes(self, shape: Shape, tokens: int, mode: int) -> tuple[int, int]:
        """(bytes of prepared activations, bytes of scratch a thread)."""
        ours = ctypes.byref(shape)
        return self._prepared_bytes(ours, tokens, mode), self._work_bytes(ours, tokens)

    def scratch(self, size: int) -> int:
        """Address of `size` bytes on a cache line, this Python thread's until its next call."""
        kept = getattr(self._local, "memory", None)
        if kept is None or kept.numel() < size:
            kept = self._local.memory = aligned_bytes(size)
        return kept.data_ptr()


def _sizer(function: Any, *numbers: Any) -> Any:
    function.restype, function.argtypes = c_int64, [c_void_p, *numbers]
    return function


def aligned_bytes(size: int) -> torch.Tensor:
    """Uninitialised uint8 [size] that begins on a cache line."""
    import torch

    memory = torch.empty(size + 63, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


@functools.cache
def kernels() -> tuple[Kernels | None, str]:
    """The kernels, or None and why not. `BITCPM_CPU_LEVEL` names a lower level to use."""
    wanted = os.environ.get("BITCPM_CPU_LEVEL")
    if wanted not in (None, *LEVELS):
        return None, f"BITCPM_CPU_LEVEL must be one of {', '.join(LEVELS)}; got {wanted!r}"
    library, reason = _native.load("bitcpm", Path(__file__).parent)
    return (None, reason) if library is None else (Kernels(library), "")
