"""A CUDA graph's stand-in where there is no GPU: what a function launches, recorded and replayed.

As a graph does, a replay runs the recorded operations and Triton launches again with the arguments
that they had, in the same memory, and no Python of the function. So what the function had read of
its inputs in Python, and every buffer it had chosen by them, stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

# A graph cannot hold these: the CPU waits for their results.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Recording(TorchDispatchMode):
    """What `function` launches, once called: `result` is its result, `replay` makes it anew."""

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._log: list[Callable[[], None]] = []
        original = GridExecutor.__call__

        def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            def run() -> None:
                with _disable_current_modes():
                    original(executor, *args, **kwargs)

            self._log.append(run)
            run()

        with mock.patch.object(GridExecutor, "__call__", launch), self:
            self.result = function()
        assert self._log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert name not in WAITING, f"{name} waits for the GPU"
        out = func(*args, **kwargs)
        if name not in EMPTY:
            self._log.append(lambda: self._again(func, args, kwargs, out))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Results go where they were; of a view, or an operation in place, they are there."""
        new = func(*args, **kwargs)
        for old, fresh in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
            if old.untyped_storage().data_ptr() != fresh.untyped_storage().data_ptr():
                old.copy_(fresh)

    def replay(self) -> torch.Tensor:
        """Everything once more; the result lies where it lay."""
        for run in self._log:
            run()
        return self.result
