"""A token's computation as a CUDA graph: recorded once, then one launch a token, without Python.

What is recorded reads a token and a position from fixed places in GPU memory, so only these two
numbers change from one token to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpmcu import gpu_device

log = logging.getLogger("cpmcu")


class Step:
    """Runs `compute` for one token after another: the first time as it is, then as a graph.

    Args:
        compute: (token, position) -> logits, tensors on `device`. Reads nothing else that changes,
            and never waits for the GPU. Run again at the same position it gives the same.
        device: where; without CUDA there are no graphs.
        pool: memory that the graphs of an engine, which run one at a time, share.

    Attributes:
        token: int64 [1], the id.
        position: int64 [1].
        reason: why there is no graph; "" where there is one, or will be.
    """

    def __init__(
        self, compute: Callable[[Tensor, Tensor], Tensor], device: torch.device, pool: Any
    ) -> None:
        self.token, self.position = (torch.zeros(1, dtype=torch.int64, device=device)
                                     for _ in range(2))  # fmt: skip
        self.reason = "" if device.type == "cuda" else "CUDA graphs need a CUDA device"
        self.compute, self._device, self._pool = compute, device, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        self._ran = False

    def __call__(self, token: int, position: int) -> Tensor:
        """The logits after a token; valid until the next call."""
        self.token.fill_(token)
        self.position.fill_(position)
        if self._graph is None and self._ran and not self.reason:
            self._record()
        self._ran = True
        if self._graph is None:
            return self.compute(self.token, self.position)
        self._graph.replay()
        return self._logits

    def _record(self) -> None:
        """Capture a graph. The run before it, on a stream of its own, sets up what libraries make
        at their first call.
        """
        try:
            with gpu_device.on(self._device):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.compute(self.token, self.position)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    self._logits = self.compute(self.token, self.position)
        except RuntimeError as error:
            self.reason = f"the step could not be captured: {error}"
            log.warning("decoding without a CUDA graph: %s", self.reason)
            return
        self._graph = graph
