"""The C interface of the CPU kernels (`csrc/args.h`) as ctypes sees it, and a pool of threads."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from cpmcu import _native, dtypes

address = dtypes.address
FLOAT32, BFLOAT16, INT8, INT4, ROWS = range(5)  # kinds of weights
DTYPES = {"float32": 0, "bfloat16": 1}  # of keys, values and queries
# Where lay_out takes weights from: numbers, codes, blocks of GGUF.
SOURCES = {
    "float32": 0, "bfloat16": 1, "int8": 2, "float16": 3, "nibbles": 4, "Q4_0": 5, "Q8_0": 6,
    "Q4_1": 7, "Q4_K": 8,
}  # fmt: skip
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
OPERATIONS = (
    "embed", "norm", "pack", "swiglu", "multiply", "add", "rotate", "compress", "select",
    "attend", "merge", "lay_out",
)  # fmt: skip
SIZES = ("matrix_bytes", "multiply_work", "attend_work", "select_work", "partial_floats")


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


def _structure(name: str, *parts: list[tuple[str, Any]]) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": [field for part in parts for field in part]})


TensorView = _structure("TensorView", [("data", c_void_p)], _fields(c_int64, "batch head row"))
Shape = _structure(
    "Shape",
    _fields(c_int64, "batch kv_heads group queries keys dim"),
    _fields(c_int32, "dtype int8"),
)
NativeAttend = _structure(
    "NativeAttend",
    [("shape", Shape), *_fields(TensorView, "q k v"), ("blocks", c_void_p), ("width", c_int64)],
    _fields(c_void_p, "out lse work"),
    [("work_stride", c_int64), ("partial", c_void_p)],
    _fields(c_int64, "splits tile"),
    [("block_size", c_int32), ("scale", c_float), ("window", c_int64)],
)
Selection = _structure(
    "Selection",
    _fields(c_int32, "kernel_size kernel_stride coarse_factor block_size"),
    _fields(c_int32, "init_blocks window_blocks budget exact"),
    [("scale", c_float), ("unused", c_int32)],
)
NativeSelect = _structure(
    "NativeSelect",
    [("shape", Shape), ("selection", Selection), *_fields(TensorView, "q fine coarse")],
    [*_fields(c_void_p, "blocks work"), ("work_stride", c_int64)],
)
NativeCompress = _structure(
    "NativeCompress",
    _fields(TensorView, "keys fine coarse"),
    _fields(c_int64, "batch kv_heads dim fine_begin fine_end coarse_begin coarse_end"),
    _fields(c_int32, "kernel_size kernel_stride coarse_factor dtype int8 unused"),
)
Step = _structure(
    "Step",
    _fields(c_int64, "tokens start"),
    _fields(c_void_p, "ids cos sin"),
    _fields(c_int32, "every unused"),
)
Matrix = _structure(
    "Matrix",
    _fields(c_void_p, "data scales shifts"),
    _fields(c_int64, "rows cols"),
    _fields(c_int32, "kind group"),
)
Packed = _structure(
    "Packed",
    _fields(c_void_p, "data scales offsets zeros"),
    [("cols", c_int64)],
    _fields(c_int32, "kind group"),
)
EmbedArgs = _structure(
    "EmbedArgs",
    [("step", c_void_p), ("table", Matrix), ("x", c_void_p), ("scale", c_float)],
    [("unused", c_int32)],
)
NormArgs = _structure(
    "NormArgs",
    _fields(c_void_p, "step x weight"),
    [("to", Packed), *_fields(c_float, "eps scale"), *_fields(c_int32, "last unused")],
)
PackArgs = _structure(
    "PackArgs",
    _fields(c_void_p, "step out"),
    [("to", Packed), *_fields(c_int64, "heads dim"), *_fields(c_int32, "dtype unused")],
)
SwigluArgs = _structure(
    "SwigluArgs", _fields(c_void_p, "step gate_up"), [("to", Packed), ("weights", Matrix)]
)
MultiplyArgs = _structure(
    "MultiplyArgs",
    [("step", c_void_p), ("weights", Matrix), ("source", Packed)],
    _fields(c_void_p, "out bias work"),
    [("work_stride", c_int64), ("alpha", c_float), *_fields(c_int32, "add last unused")],
    [("gated", Packed)],
)
AddArgs = _structure(
    "AddArgs",
    [*_fields(c_void_p, "step y x"), ("width", c_int64), ("alpha", c_float), ("unused", c_int32)],
)
RotateArgs = _structure(
    "RotateArgs",
    _fields(c_void_p, "step qkv q_norm k_norm q k v"),
    _fields(c_int64, "heads kv_heads dim room"),
    [("eps", c_float), *_fields(c_int32, "dtype int8 unused")],
)
AttendArgs = _structure(
    "AttendArgs",
    [("step", c_void_p), ("attend", NativeAttend), ("select", NativeSelect)],
    [("sparse_from", c_int64)],
)
CompressArgs = _structure("CompressArgs", [("step", c_void_p), ("compress", NativeCompress)])
LayOutArgs = _structure(
    "LayOutArgs",
    [
        ("source", c_void_p),
        ("row", c_int64),
        ("to", Matrix),
        ("scales", c_void_p),
        *_fields(c_int32, "kind group"),
        *_fields(c_int64, "first rows heads"),
        *_fields(c_int32, "through kept"),
    ],
)
Record = _structure("Record", _fields(c_void_p, "operation args"))


class Kernels:
    """The loaded library.

    Attributes:
        operations: addresses by name, for records.
        level: instruction set in use, one of `LEVELS`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.operations = {
            name: ctypes.cast(getattr(library, f"cpmcu_{name}"), c_void_p).value
            for name in OPERATIONS
        }
        for name in SIZES:
            getattr(library, f"cpmcu_{name}").restype = c_int64
        library.cpmcu_level_name.restype = c_char_p
        self.level = library.cpmcu_level_name(library.cpmcu_level()).decode()
        library.cpmcu_pool.restype, library.cpmcu_pool.argtypes = c_void_p, [c_int32]
        library.cpmcu_free_pool.restype, library.cpmcu_free_pool.argtypes = None, [c_void_p]
        library.cpmcu_join_texts.restype = c_int64
        library.cpmcu_join_texts.argtypes = [c_void_p, *[c_int64] * 3, c_void_p]
        library.cpmcu_run.restype = c_int32
        library.cpmcu_run.argtypes = [c_void_p, c_void_p, c_int32]
        library.cpmcu_share_out.restype = c_int32
        library.cpmcu_share_out.argtypes = [c_void_p, c_void_p, c_int32, c_void_p]

    def size(self, name: str, struct: Structure) -> int:
        """A size that the library computes, one of `SIZES`, from the structure it wants; "work" is
        bytes a thread.
        """
        return getattr(self._library, f"cpmcu_{name}")(ctypes.byref(struct))

    def texts(self, data: np.ndarray, at: int, count: int) -> tuple[bytes, int] | None:
        """`count` texts of a GGUF file with a zero byte after each, and where they end; None where
        they run over the end of `data`, or hold zero bytes of their own.
        """
        if not 0 <= count <= len(data):
            return None
        join, start = self._library.cpmcu_join_texts, data.ctypes.data
        end = join(start, len(data), at, count, None)
        if end < 0:
            return None
        out = ctypes.create_string_buffer(max(1, end - at - 7 * count))
        join(start, len(data), at, count, out)
        return out.raw[: end - at - 7 * count], end


class OperationError(RuntimeError):
    """What an operation answered, as `code`: see `csrc/args.h`; and which of those shared out."""

    def __init__(self, code: int, index: int = -1) -> None:
        super().__init__(f"an operation failed with code {code}: please report this")
        self.code, self.index = code, index


class Pool:
    """Threads that run lists of records, and sleep between them. `close` ends them.

    Args:
        threads: how many, the caller's own one of them.

    Raises:
        RuntimeError: the system has no more threads to give.
        ValueError: there are no kernels.
    """

    def __init__(self, threads: int) -> None:
        self.threads, self._library = threads, loaded()._library
        self._pool = self._library.cpmcu_pool(threads)
        if not self._pool:
            raise RuntimeError(f"the system gives no {threads} threads: ask for fewer")

    def run(self, records: Records) -> None:
        """Go through the records; Python's lock is free meanwhile.

        Raises:
            OperationError: an operation answered with an error.
        """
        if error := self._library.cpmcu_run(self._open(), records.address, records.count):
            raise OperationError(error)

    def share_out(self, records: Records) -> None:
        """Go through records that do not depend on each other, in any order, each on one thread;
        Python's lock is free meanwhile, and who takes it keeps no thread waiting.

        Raises:
            OperationError: an operation answered with an error.
        """
        share_out, failed = self._library.cpmcu_share_out, c_int32()
        if error := share_out(self._open(), records.address, records.count, ctypes.byref(failed)):
            raise OperationError(error, failed.value)

    def _open(self) -> int:
        if not self._pool:
            raise RuntimeError("the pool is closed")
        return self._pool

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._library.cpmcu_free_pool(self._pool)
            self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self.close()


class Records:
    """A list of (operation, arguments) for `Pool.run`; keeps the arguments alive. An operation is
    one of `OPERATIONS`, or the address of another library's.
    """

    def __init__(self, steps: Sequence[tuple[str | int, Structure]]) -> None:
        operations = loaded().operations
        self.steps = list(steps)
        self._array = (Record * len(steps))(
            *(Record(operations.get(what, what), ctypes.addressof(args)) for what, args in steps)
        )
        self.address, self.count = ctypes.addressof(self._array), len(steps)


@functools.cache
def kernels() -> tuple[Kernels | None, str]:
    """The kernels, or None and why not. `CPMCU_CPU_LEVEL` names a lower level to use."""
    wanted = os.environ.get("CPMCU_CPU_LEVEL")
    if wanted is not None and wanted not in LEVELS:
        return None, f"CPMCU_CPU_LEVEL must be one of {', '.join(LEVELS)}, got {wanted!r}"
    library, reason = _native.load("cpmcu", Path(__file__).parent)
    return (None, reason) if library is None else (Kernels(library), "")


def vectors() -> bool:
    """Whether the kernels compute with vectors (AVX2 or later)."""
    library, _ = kernels()
    return library is not None and library.level != "scalar"


def loaded() -> Kernels:
    """The kernels.

    Raises:
        ValueError: there are none, and why.
    """
    library, reason = kernels()
    if library is None:
        raise ValueError(f"backend 'cpu' cannot run: {reason}")
    return library
