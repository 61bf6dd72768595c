"""What attention did while it was traced: seconds and blocks visited, call by call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One attention layer on one forward pass.

    Attributes:
        layer: index of the decoder layer.
        queries: query positions computed, summed over the batch (padding left out).
        keys: keys the last query could see, the longest row of the batch.
        seconds: wall-clock time in attention: selection and attention, no projections, no
            bookkeeping.
        visited: visited blocks, summed over queries and key-value heads.
        causal: the same if every block up to the query's own were visited.
        prefill: more than one query per row.
    """

    layer: int
    queries: int
    keys: int
    seconds: float
    visited: int
    causal: int
    prefill: bool


@dataclass
class Trace:
    """The calls recorded inside `sparse` or `traced_dense`, in order.

    Attributes:
        block_size: tokens per block, the unit of `visited` and `causal`.
        keep_blocks: whether `blocks` has anything to answer.
        calls: one entry per layer and forward pass.
    """

    block_size: int
    keep_blocks: bool = False
    calls: list[Call] = field(default_factory=list)
    _blocks: dict[int, tuple[int, list[Tensor]]] = field(default_factory=dict, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds in attention, all layers and calls."""
        return sum(call.seconds for call in self.calls)

    @property
    def prefill_seconds(self) -> float:
        """Seconds in attention on passes with more than one query per row."""
        return sum(call.seconds for call in self.calls if call.prefill)

    @property
    def decode_seconds(self) -> float:
        """Seconds in attention on passes with one query per row."""
        return sum(call.seconds for call in self.calls if not call.prefill)

    @property
    def visited_share(self) -> float:
        """Visited blocks over causal blocks, 0 … 1; 1 if nothing was recorded."""
        causal = sum(call.causal for call in self.calls)
        return sum(call.visited for call in self.calls) / causal if causal else 1.0

    def summary(self) -> dict[str, float]:
        """Totals: calls, queries (of one layer), seconds, visited and causal blocks and share."""
        first = min((call.layer for call in self.calls), default=0)
        return {
            "calls": len(self.calls),
            "queries": sum(call.queries for call in self.calls if call.layer == first),
            "attention_seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "visited_blocks": sum(call.visited for call in self.calls),
            "causal_blocks": sum(call.causal for call in self.calls),
            "visited_share": self.visited_share,
        }

    def by_layer(self) -> dict[int, dict[str, float]]:
        """Per layer: seconds, visited and causal blocks, and their share."""
        rows = {}
        for layer in sorted({call.layer for call in self.calls}):
            calls = [call for call in self.calls if call.layer == layer]
            visited, causal = (sum(getattr(c, n) for c in calls) for n in ("visited", "causal"))
            rows[layer] = {
                "seconds": sum(call.seconds for call in calls),
                "visited_blocks": visited,
                "causal_blocks": causal,
                "visited_share": visited / causal if causal else 1.0,
            }
        return rows

    def blocks(self, layer: int) -> Tensor:
        """Visited blocks of the last sparse prefill of a layer, first row of the batch.

        Chunks that follow each other without a gap count as one prefill.

        Returns:
            int32 `[Hkv, T, n]` on the CPU; the last query stands at the prefill's last position.

        Raises:
            ValueError: blocks were not kept, or this layer had no sparse prefill.
        """
        if not self.keep_blocks:
            raise ValueError("blocks were not kept: open sparse(model, config, keep_blocks=True)")
        if layer not in self._blocks:
            raise ValueError(
                f"layer {layer} had no sparse prefill; layers that had: {sorted(self._blocks)} "
                "(prompts shorter than config.dense_len run dense)"
            )
        return torch.cat(self._blocks[layer][1], 1)

    def record(self, call: Call) -> None:
        """Append one call."""
        self.calls.append(call)

    def keep(self, layer: int, blocks: Tensor, first: int) -> None:
        """Keep blocks `[Hkv, T, n]` of queries first … first + T − 1 if asked to."""
        if not self.keep_blocks or blocks.shape[1] < 2:
            return
        end, chunks = self._blocks.get(layer, (0, []))
        follows = chunks and end == first
        self._blocks[layer] = (
            first + blocks.shape[1],
            [*(chunks if follows else []), blocks.cpu()],
        )


def timed(function: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """Run a function and return its result and seconds; waits for a GPU on both sides."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def causal_blocks(first: int, last: int, block_size: int) -> int:
    """Blocks up to the query's own, summed over query positions first … last − 1."""

    def below(t: int) -> int:
        """Σ (u // B + 1) for u < t."""
        full, rest = divmod(t, block_size)
        return block_size * full * (full + 1) // 2 + rest * (full + 1)

    return below(last) - below(first)
