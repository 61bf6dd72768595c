# Copied from common/_native.py by common/sync.py: change it there.
"""Load a tool's library of CPU kernels, and run its operations on PyTorch's own threads.

The library has a C interface and knows nothing of Python or PyTorch. A call through ctypes costs
about a microsecond. Where the library is missing (the wheel was built without a compiler) there is
a reason to show and the tool's PyTorch path runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from pathlib import Path


@functools.cache
def load(name: str, folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library `lib<name>` in `folder`, or None and the reason.

    Args:
        name: tool's name, also the prefix of its C functions.
        folder: the package's own, where a wheel puts the library. An editable install leaves it in
            the folder of that name in site-packages instead. Another build may be named by the
            environment, for debugging: NATIVE_DIR is a folder that holds it.
    """
    places = [folder, Path(sysconfig.get_path("platlib")) / name]
    if "NATIVE_DIR" in os.environ:
        places.insert(0, Path(os.environ["NATIVE_DIR"]))
    found = [library for place in places for library in sorted(place.glob(f"lib{name}.*"))]
    if not found:
        return None, (
            f"the CPU kernels were not built (no C++ compiler when {name} was installed): install "
            "one and reinstall"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} does not load: {error}"
    return library, ""


class Operation:
    """One C operation, called with a structure of arguments on `torch.get_num_threads()` threads.

    Args:
        library: from `load`.
        tool: prefix of its C functions.
        name: the operation's own name.

    Raises:
        RuntimeError: (when called) the operation answered with an error code.
    """

    def __init__(self, library: ctypes.CDLL, tool: str, name: str) -> None:
        self.name = f"{tool}_{name}"
        self._parallel = getattr(library, f"{tool}_parallel")
        self._parallel.restype = ctypes.c_int32
        self._parallel.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int32]
        self.address = ctypes.cast(getattr(library, self.name), ctypes.c_void_p)

    def __call__(self, arguments: ctypes.Structure, threads: int) -> None:
        error = self._parallel(
            _pool(), self.address, ctypes.cast(ctypes.byref(arguments), ctypes.c_void_p), threads
        )
        if error:
            raise RuntimeError(f"{self.name} failed with code {error}: please report this")


class _Step(ctypes.Structure):
    _fields_ = [
        ("operation", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("nth", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


class Steps:
    """Operations that run one after the other in one call, with structures made beforehand.

    Between calls only what has changed is written into the structures. In a loop that reads more
    memory than the caches hold, every line of Python costs several times what it costs alone.

    Args:
        library: from `load`.
        tool: prefix of its C functions.
        steps: (operation, its structure, threads).

    Raises:
        RuntimeError: (when called) an operation answered with an error code.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        tool: str,
        steps: list[tuple[Operation, ctypes.Structure, int]],
    ) -> None:
        self._names = ", ".join(operation.name for operation, _, _ in steps)
        self._kept = steps  # the structures must live as long as their addresses
        self._run = getattr(library, f"{tool}_steps")
        self._run.restype = ctypes.c_int32
        self._run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int32]
        self._steps = (_Step * len(steps))(
            *(_Step(o.address, ctypes.addressof(a), n, 0) for o, a, n in steps)
        )
        self._address, self._pool, self._count = ctypes.addressof(self._steps), _pool(), len(steps)

    def __call__(self) -> None:
        error = self._run(self._pool, self._address, self._count)
        if error:
            raise RuntimeError(f"one of {self._names} failed with code {error}: please report this")


@functools.cache
def _pool() -> ctypes.c_void_p:
    """PyTorch's `parallel_for` (plain C since 2.10); null where it has none: one thread then."""
    import torch  # only here: an engine with threads of its own needs none of it

    for library in sorted(Path(torch.__file__).parent.glob("lib/*torch_cpu.*")):
        try:
            function = ctypes.CDLL(str(library)).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p)
    return ctypes.c_void_p(None)
