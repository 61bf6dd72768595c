"""The C interface of the CPU kernels (`csrc/args.h`) as ctypes sees it.

A decoding step is a few hundred microseconds, so what Python adds is kept small: structures are
flat and filled in one call, scratch memory is kept between calls, its sizes are remembered.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm2 import _native
from infllm2.config import COARSE_FACTOR, InfLLMv2Config

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
OPERATIONS = ("select", "attend", "merge", "run", "backward", "gather", "compress", "append")


def _fields(kind: Any, prefix: str, names: str) -> list[tuple[str, Any]]:
    return [(prefix + name, kind) for name in names.split()]


def _strided(name: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p), *_fields(c_int64, name + "_", "batch head row")]


_SHAPE = [
    *_fields(c_int64, "", "batch kv_heads group queries keys dim"),
    *_fields(c_int32, "", "dtype shape_unused"),
]
_SELECTION = [
    *_fields(c_int32, "", "kernel_size kernel_stride coarse_factor block_size"),
    *_fields(c_int32, "", "init_blocks window_blocks budget exact"),
    ("selection_scale", c_float),
    ("selection_unused", c_int32),
]
_SELECT = [
    *_SHAPE,
    *_SELECTION,
    *_strided("q"),
    *_strided("fine"),
    *_strided("coarse"),
    *_fields(c_void_p, "", "blocks work"),
    ("work_stride", c_int64),
]
_ATTEND = [
    *_SHAPE,
    *_strided("q"),
    *_strided("k"),
    *_strided("v"),
    ("blocks", c_void_p),
    ("width", c_int64),
    *_fields(c_void_p, "", "out lse work"),
    ("work_stride", c_int64),
    ("partial", c_void_p),
    *_fields(c_int64, "", "splits tile"),
    ("block_size", c_int32),
    ("scale", c_float),
    ("window", c_int64),  # 0: none
]

_BACKWARD = [
    *_ATTEND,
    *_strided("grad"),
    *_fields(c_void_p, "", "given_lse delta grad_q grad_k grad_v gradients"),
    ("slots", c_int64),
]

_COMPRESS = [
    *_strided("keys"),
    *_strided("fine"),
    *_strided("coarse"),
    *_fields(c_int64, "", "batch kv_heads dim fine_begin fine_end coarse_begin coarse_end"),
    *_fields(c_int32, "", "kernel_size kernel_stride coarse_factor dtype int8 unused"),
]

_APPEND = [
    *_strided("new_k"),
    *_strided("new_v"),
    *_strided("k"),
    *_strided("v"),
    *_fields(c_int64, "", "batch heads rows dim at"),
    *_fields(c_int32, "", "dtype unused"),
]


def _structure(name: str, fields: list[tuple[str, Any]]) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": fields})


# Built from the tuples below, in the order of csrc/args.h.
Shape = _structure("Shape", _SHAPE)
Selection = _structure("Selection", _SELECTION)
SelectArgs = _structure("SelectArgs", _SELECT)
AttendArgs = _structure("AttendArgs", _ATTEND)
RunArgs = _structure("RunArgs", [("select", SelectArgs), ("attend", AttendArgs)])
BackwardArgs = _structure("BackwardArgs", _BACKWARD)
CompressArgs = _structure("CompressArgs", _COMPRESS)
AppendArgs = _structure("AppendArgs", _APPEND)


def shape_of(q: Tensor, kv_heads: int, keys: int) -> tuple[int, ...]:
    """infllm2_shape of q `[B, H, T, D]`."""
    B, H, T, D = q.shape
    return B, kv_heads, H // kv_heads, T, keys, D, DTYPES[q.dtype], 0


def strided(x: Tensor) -> tuple[int, ...]:
    """infllm2_tensor of `[batch, head, row, D]`, whose last axis is contiguous."""
    return x.data_ptr(), *x.stride()[:3]


@functools.lru_cache(64)
def selection_of(config: InfLLMv2Config, dim: int) -> tuple[float, ...]:
    """infllm2_selection for heads of `dim`."""
    return (
        config.kernel_size, config.kernel_stride, COARSE_FACTOR, config.block_size,
        config.init_blocks, config.window_blocks, config.budget, config.lse == "exact",
        dim**-0.5, 0,
    )  # fmt: skip


class Kernels:
    """The loaded library: its operations, sizes and level.

    Attributes:
        select, attend, merge, run, backward, gather, compress, append: operations; see
            `csrc/args.h`.
        level: instruction set in use, one of `LEVELS`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name in OPERATIONS:
            setattr(self, name, _native.Operation(library, "infllm2", name))
        self._library = library
        self._select_work = _sizer(library.infllm2_select_work, 2)
        self._attend_work = _sizer(library.infllm2_attend_work, 1, 1)
        self._backward_work = _sizer(library.infllm2_backward_work, 1, 1)
        self._gradient_floats = _sizer(library.infllm2_gradient_floats, 1)
        self._partial_floats = _sizer(library.infllm2_partial_floats, 1)
        library.infllm2_level_name.restype = c_char_p
        self.level = library.infllm2_level_name(library.infllm2_level()).decode()
        self._local = threading.local()

    @functools.lru_cache(1024)  # noqa: B019 - one instance, alive as long as the process
    def _sizes(
        self, shape: tuple[int, ...], block_size: int, selection: tuple[float, ...] | None
    ) -> tuple[int, int, int]:
        ours = Shape(*shape)
        chosen = None if selection is None else Selection(*selection)
        return (
            0 if chosen is None else self._select_work(ctypes.byref(ours), ctypes.byref(chosen)),
            self._attend_work(ctypes.byref(ours), block_size),
            self._partial_floats(ctypes.byref(ours)),
        )

    def sizes(
        self,
        shape: tuple[int, ...],
        block_size: int = 64,
        selection: tuple[float, ...] | None = None,
    ) -> tuple[int, int, int]:
        """(bytes a thread for `select`, bytes a thread for `attend`, floats of a partial result).

        For the number of keys rounded up, so that decoding steps share an answer.
        """
        return self._sizes(
            (*shape[:4], -(-shape[4] // 4096) * 4096, *shape[5:]), block_size, selection
        )

    def backward_sizes(self, shape: tuple[int, ...], block_size: int) -> tuple[int, int]:
        """(bytes a thread, floats of one accumulator) for `backward`."""
        ours = ctypes.byref(Shape(*shape))
        return self._backward_work(ours, block_size), self._gradient_floats(ours)

    def steps(self, steps: list[tuple[_native.Operation, Structure, int]]) -> _native.Steps:
        """Operations that run one after the other in one call: (operation, structure, threads)."""
        return _native.Steps(self._library, "infllm2", steps)

    def scratch(self, size: int) -> int:
        """Address of at least `size` bytes, this Python thread's own until its next call."""
        kept = getattr(self._local, "memory", None)
        if kept is None or kept.numel() < size:
            kept = self._local.memory = torch.empty(size, dtype=torch.uint8)
        return kept.data_ptr()


def _sizer(function: Any, pointers: int, numbers: int = 0) -> Any:
    function.restype, function.argtypes = c_int64, [c_void_p] * pointers + [c_int64] * numbers
    return function


@functools.cache
def kernels() -> tuple[Kernels | None, str]:
    """The kernels, or None and why not. `INFLLM2_CPU_LEVEL` names a lower level to use."""
    wanted = os.environ.get("INFLLM2_CPU_LEVEL")
    if wanted not in (None, *LEVELS):
        return None, f"INFLLM2_CPU_LEVEL must be one of {', '.join(LEVELS)}, got {wanted!r}"
    library, reason = _native.load("infllm2", Path(__file__).parent.parent)
    return (None, reason) if library is None else (Kernels(library), "")
