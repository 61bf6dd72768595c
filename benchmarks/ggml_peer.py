"""ggml's own matrix products, for comparison: the library that llama-cpp-python builds here.

    python -m venv .venv-peers
    .venv-peers/bin/pip install --no-deps --no-binary :all: llama-cpp-python==0.3.36

builds it natively (minutes). `GGML_FOLDER` names another folder that holds libggml-base and
libggml-cpu. The products run through ggml's public interface: one graph, planned once.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"F32": 0, "TQ1_0": 34, "TQ2_0": 35}
HERE = Path(__file__).parent.parent


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
        ("room", ctypes.c_char * 64),  # for what a newer version may append
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_version": (c_char_p, []),
    "ggml_cpu_init": (None, []),
}


def find() -> tuple[dict[str, Any] | None, str]:
    """ggml's functions by name, or None and why not."""
    folders = [Path(os.environ["GGML_FOLDER"])] if "GGML_FOLDER" in os.environ else []
    folders += sorted(HERE.glob(".venv-peers/lib/python*/site-packages/llama_cpp/lib"))
    for folder in folders:
        try:
            libraries = [
                ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
                for name in ("ggml-base", "ggml-cpu")
            ]
        except OSError:
            continue
        functions: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            for library in libraries:
                if hasattr(library, name):
                    function = getattr(library, name)
                    function.restype, function.argtypes = result, arguments
                    functions[name] = function
                    break
        functions["ggml_cpu_init"]()
        return functions, ""
    return None, "no ggml library: see benchmarks/ggml_peer.py"


class Products:
    """y = W x for several matrices of one shape, in one graph.

    Args:
        ggml: from `find`.
        kind: a key of `TYPES`.
        weights: float32 [O, I], quantised once; the matrices are copies of it.
        x: float32 [T, I].
        copies: how many matrices.
        threads: of ggml's own pool.
    """

    def __init__(
        self,
        ggml: dict[str, Any],
        kind: str,
        weights: np.ndarray,
        x: np.ndarray,
        copies: int,
        threads: int,
    ) -> None:
        self.ggml = ggml
        O, I = weights.shape
        T = len(x)
        weights, x = (np.ascontiguousarray(a, np.float32) for a in (weights, x))
        room = copies * (O * I // 2 + T * O * 4 + 4096) + T * I * 4 + (16 << 20)
        # numpy asks for large pages, as ours does.
        self._arena = np.empty(room, np.uint8)
        self.context = ggml["ggml_init"](_InitParams(room, self._arena.ctypes.data, False))
        graph = ggml["ggml_new_graph_custom"](self.context, copies + 8, False)
        inputs = ggml["ggml_new_tensor_2d"](self.context, TYPES["F32"], I, T)
        ctypes.memmove(ggml["ggml_get_data"](inputs), x.ctypes.data, x.nbytes)
        first = None
        for _ in range(copies):
            w = ggml["ggml_new_tensor_2d"](self.context, TYPES[kind], I, O)
            data = ggml["ggml_get_data"](w)
            if first is None:
                ggml["ggml_quantize_chunk"](TYPES[kind], weights.ctypes.data, data, 0, O, I, None)
                first = data
            else:
                ctypes.memmove(data, first, ggml["ggml_nbytes"](w))
            self.bytes = copies * ggml["ggml_nbytes"](w)
            out = ggml["ggml_mul_mat"](self.context, w, inputs)
            ggml["ggml_build_forward_expand"](graph, out)
        self._out = ggml["ggml_get_data"](out), (T, O)
        self._graph = graph
        self._plan = ggml["ggml_graph_plan"](graph, threads, None)
        self._work = np.empty(self._plan.work_size + 64, np.uint8)
        self._plan.work_data = self._work.ctypes.data

    def __call__(self) -> None:
        """Compute all products."""
        if self.ggml["ggml_graph_compute"](self._graph, ctypes.byref(self._plan)):
            raise RuntimeError("ggml_graph_compute failed")

    def result(self) -> np.ndarray:
        """The last product, float32 [T, O]."""
        address, shape = self._out
        size = shape[0] * shape[1]
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)
