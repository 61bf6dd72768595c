"""Who computes which rows: the division of a document that strategy, network and costs agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from apb.partial import merge_two, partial_attention

if TYPE_CHECKING:
    from apb.transport import Host


@dataclass(frozen=True, slots=True)
class Block:
    """A run of document tokens. index: its place among all blocks; tokens start .. end - 1."""

    index: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """A document divided among hosts.

    blocks: for each rank, the blocks that it owns, in document order; together all of it.
    anchors: for each rank, rows that it computes before its blocks: the anchor's, or 0.
    query: where in the anchor the query lies, (first row, rows).
    document_anchor: l_a, document tokens of the anchor. sink: those of them before the query.
    passing: for each block, tokens that it passes on, per KV head.
    """

    blocks: tuple[tuple[Block, ...], ...]
    anchors: tuple[int, ...]
    query: tuple[int, int] = (0, 0)
    document_anchor: int = 0
    sink: int = 0
    passing: tuple[int, ...] = ()

    def local(self, rank: int) -> int:
        """Document tokens of a rank."""
        return sum(block.length for block in self.blocks[rank])

    def rows(self, rank: int) -> int:
        """Rows of a rank, anchor included."""
        return self.anchors[rank] + self.local(rank)

    def offsets(self, rank: int) -> list[tuple[Block, int]]:
        """A rank's blocks, each with the row it starts at."""
        found, row = [], self.anchors[rank]
        for block in self.blocks[rank]:
            found.append((block, row))
            row += block.length
        return found


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one layer's attention: batch, query heads, KV heads, head dimension."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int


class Layer:
    """One layer on one host, as a strategy sees it.

    Attributes:
        index: of the layer, 0-based.
        host, plan: where, and who else.
        q [B, Hq, M, D], k and v [B, Hkv, M, D]: after RoPE, rows [anchor | blocks].
        scaling: of the logits.
        context: an `apb.interface.LayerContext` for the compressor; None outside models.
        pairs: pairs of query row and key computed so far, each in Hq heads and B batch rows.
    """

    def __init__(
        self,
        index: int,
        host: Host,
        plan: Plan,
        qkv: tuple[Tensor, Tensor, Tensor],
        scaling: float,
        context: Any = None,
    ) -> None:
        self.index, self.host, self.plan = index, host, plan
        self.q, self.k, self.v = qkv
        self.scaling = scaling
        self.context = context
        self.pairs = 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`partial_attention`, counted."""
        rows, keys = q.shape[2], k.shape[2]
        share = q.shape[1] / self.q.shape[1]  # Ulysses: some of the heads, more of the rows
        self.pairs += share * (rows * (rows + 1) // 2 if causal else rows * keys)
        return partial_attention(q, k, v, causal=causal, scaling=self.scaling)


class Running:
    """Partial attentions of the same rows, merged as they come."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, part: tuple[Tensor, Tensor]) -> None:
        """Take one more part (out, lse)."""
        if self.out is None or self.lse is None:
            self.out, self.lse = part
        else:
            self.out, self.lse = merge_two(self.out, self.lse, *part)


class Strategy(Protocol):
    """A way to prefill on several hosts. The same object runs on virtual and on real ones."""

    name: str
    exact: bool

    def plan(self, document: int, hosts: int, query: int) -> Plan:
        """Divide `document` tokens among `hosts`; `query`: tokens of the query in the anchor.

        Raises ValueError where that makes no sense.
        """
        ...

    def attend(self, layer: Layer) -> Tensor:
        """One layer's attention on one host: [B, Hq, M, D] for its rows."""
        ...

    def pairs(self, plan: Plan, rank: int, shape: Shape) -> float:
        """Closed form of `Layer.pairs`."""
        ...

    def values_sent(self, plan: Plan, rank: int, shape: Shape) -> int:
        """Closed form of the numbers that a rank sends in one layer, all receivers together."""
        ...

    def messages_sent(self, plan: Plan, rank: int) -> int:
        """Closed form of the messages that a rank sends in one layer."""
        ...


def split(document: int, parts: int) -> list[Block]:
    """Blocks whose lengths differ by at most one, longest first.

    Raises ValueError for fewer tokens than parts.
    """
    if document < parts:
        raise ValueError(
            f"{parts} blocks need at least one document token each, got {document} tokens; use "
            "fewer hosts"
        )
    short, longer = divmod(document, parts)
    blocks, start = [], 0
    for index in range(parts):
        end = start + short + (index < longer)
        blocks.append(Block(index, start, end))
        start = end
    return blocks


def contiguous(document: int, hosts: int) -> tuple[tuple[Block, ...], ...]:
    """One block a host, in order."""
    return tuple((block,) for block in split(document, hosts))


def zigzag(document: int, hosts: int) -> tuple[tuple[Block, ...], ...]:
    """Two blocks a host, r and 2H - 1 - r: an early and a late one, so that all do equal work."""
    blocks = split(document, 2 * hosts)
    return tuple((blocks[r], blocks[2 * hosts - 1 - r]) for r in range(hosts))


Layout = Callable[[int, int], tuple[tuple[Block, ...], ...]]


def triangle(rows: int) -> int:
    """Pairs of a causal square."""
    return rows * (rows + 1) // 2


def kv_message(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one message [2, B, Hkv, N, D]."""
    return torch.stack([k, v])
