"""The C interface of the CPU kernels (`csrc/args.h`) as ctypes sees it."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from infllm2 import _native
from infllm2.config import COARSE_FACTOR, InfLLMv2Config

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Strided(Structure):
    """infllm2_tensor: address and strides of `[batch, head, row, D]`, the last axis contiguous."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> Strided:
        """Describe a tensor; it must outlive the call."""
        batch, head, row, _ = x.stride()
        return cls(x.data_ptr(), batch, head, row)


class Shape(Structure):
    """infllm2_shape."""

    _fields_ = [
        *((n, c_int64) for n in ("batch", "kv_heads", "group", "queries", "keys", "dim")),
        *((n, c_int32) for n in ("dtype", "unused")),
    ]

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, keys: int) -> Shape:
        """Of q `[B, H, T, D]` and the number of keys."""
        B, H, T, D = q.shape
        return cls(B, kv_heads, H // kv_heads, T, keys, D, DTYPES[q.dtype], 0)


class Selection(Structure):
    """infllm2_selection."""

    _fields_ = [
        *(
            (n, c_int32)
            for n in (
                "kernel_size", "kernel_stride", "coarse_factor", "block_size",
                "init_blocks", "window_blocks", "budget", "exact",
            )
        ),
        ("scale", c_float),
        ("unused", c_int32),
    ]  # fmt: skip

    @classmethod
    def of(cls, config: InfLLMv2Config, dim: int) -> Selection:
        """Of the configuration, for heads of `dim`."""
        return cls(
            config.kernel_size, config.kernel_stride, COARSE_FACTOR, config.block_size,
            config.init_blocks, config.window_blocks, config.budget, config.lse == "exact",
            dim**-0.5, 0,
        )  # fmt: skip


class SelectArgs(Structure):
    """infllm2_select_args."""

    _fields_ = [
        ("shape", Shape),
        ("selection", Selection),
        ("q", Strided),
        ("fine", Strided),
        ("coarse", Strided),
        ("blocks", c_void_p),
        ("work", c_void_p),
        ("work_stride", c_int64),
    ]


class AttendArgs(Structure):
    """infllm2_attend_args."""

    _fields_ = [
        ("shape", Shape),
        ("q", Strided),
        ("k", Strided),
        ("v", Strided),
        ("blocks", c_void_p),
        ("width", c_int64),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("work", c_void_p),
        ("work_stride", c_int64),
        ("partial", c_void_p),
        ("splits", c_int64),
        ("block_size", c_int32),
        ("unused", c_int32),
        ("scale", c_float),
        ("unused2", c_int32),
    ]


class RunArgs(Structure):
    """infllm2_run_args."""

    _fields_ = [("select", SelectArgs), ("attend", AttendArgs)]


class Kernels:
    """The loaded library: its operations, sizes and level.

    Attributes:
        select, attend, merge, run: operations; see `csrc/args.h`.
        level: instruction set in use: "scalar", "avx2", "avx512" or "avx512_bf16".
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        names = ("select", "attend", "merge", "run")
        self.select, self.attend, self.merge, self.run = (
            _native.Operation(library, "infllm2", name) for name in names
        )
        self._select_work = _sizer(library.infllm2_select_work, 2)
        self._attend_work = _sizer(library.infllm2_attend_work, 1)
        self._partial_floats = _sizer(library.infllm2_partial_floats, 1)
        library.infllm2_level_name.restype = c_char_p
        self.level = library.infllm2_level_name(library.infllm2_level()).decode()

    def select_work(self, shape: Shape, selection: Selection) -> int:
        """Bytes of scratch a thread for `select` and `run`."""
        return self._select_work(ctypes.addressof(shape), ctypes.addressof(selection))

    def attend_work(self, shape: Shape) -> int:
        """Bytes of scratch a thread for `attend`, `merge` and `run`."""
        return self._attend_work(ctypes.addressof(shape))

    def partial_floats(self, shape: Shape) -> int:
        """Floats for each unit of work and split."""
        return self._partial_floats(ctypes.addressof(shape))


def _sizer(function: ctypes._FuncPointer, arguments: int) -> ctypes._FuncPointer:
    function.restype, function.argtypes = c_int64, [c_void_p] * arguments
    return function


@functools.cache
def kernels() -> tuple[Kernels | None, str]:
    """The kernels, or None and why not. `INFLLM2_CPU_LEVEL` names a lower level to use."""
    wanted = os.environ.get("INFLLM2_CPU_LEVEL")
    if wanted not in (None, "scalar", "avx2", "avx512", "avx512_bf16"):
        return None, (
            f"INFLLM2_CPU_LEVEL must be scalar, avx2, avx512 or avx512_bf16, got {wanted!r}"
        )
    library, reason = _native.load("infllm2", Path(__file__).parent.parent)
    return (None, reason) if library is None else (Kernels(library), "")
