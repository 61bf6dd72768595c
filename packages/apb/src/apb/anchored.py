"""APB, Star and Spava: blocks that see an anchor, and what earlier blocks pass on.

One strategy, three settings. APB (arXiv 2502.12085): one block a host, anchor and passing. Star
(arXiv 2411.17116): an anchor as long as a block, nothing passed. Spava (arXiv 2601.21444): APB on
zigzag blocks, so that each host has an early and a late one and all do equal work.

Rows of a host are [anchor | blocks]; the mask M' of the paper is never made:
    anchor rows   see the anchor, causally
    block rows    see [anchor | what earlier blocks passed], all of it, and their block, causally
Block 0 sees itself only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compressors import Compressor, at_layer, needs_query
from apb.config import APBConfig
from apb.plan import Layer, Layout, Plan, Running, Shape, contiguous, kv_message, triangle, zigzag
from apb.reference import select_passing


@dataclass(frozen=True, slots=True)
class Anchored:
    """APB and its relatives.

    name: for people. layout: contiguous or zigzag. compressor: None passes nothing.
    anchor_length: l_a; None is a quarter of the longest block; "block" all of it.
    passing_length: l_p; None is an eighth of it. pool_kernel: see `APBConfig`.
    sink: first tokens of the anchor's document part that stay before the query (BOS, system).
    """

    name: str
    layout: Layout
    compressor: Compressor | None
    anchor_length: int | str | None = None
    passing_length: int | None = None
    pool_kernel: int = 5
    sink: int = 0
    exact = False

    def plan(self, document: int, hosts: int, query: int) -> Plan:
        """Blocks, anchor and passing for one document."""
        blocks = self.layout(document, hosts)
        count = sum(len(mine) for mine in blocks)
        # "block" is the longest block; one block alone has no anchor.
        longest = -(-document // count)
        anchor = longest if self.anchor_length == "block" else self.anchor_length
        lengths = APBConfig(
            hosts=count,
            anchor_length=anchor,  # type: ignore[arg-type]  # checked there
            passing_length=self.passing_length,
            pool_kernel=self.pool_kernel,
        ).lengths(document)
        anchor = lengths.anchor if count > 1 else 0
        if not 0 <= self.sink <= document:
            raise ValueError(f"sink must be 0 to {document} tokens, got {self.sink}")
        sink = min(self.sink, anchor)
        rows = anchor + query if count > 1 else 0
        wants_query = self.compressor is not None and needs_query(self.compressor)
        if wants_query and count > 1 and not query:
            raise ValueError(
                f"{type(self.compressor).__name__} scores keys by the query: give the prefill one "
                "(query=...), or use another compressor such as key-norm"
            )
        passing = []
        for block in sorted((b for mine in blocks for b in mine), key=lambda b: b.index):
            last = block.index == count - 1
            free = block.length - max(min(anchor - block.start, block.length), 0)
            silent = last or self.compressor is None
            passing.append(0 if silent else min(lengths.passing, free))
        # Host 0's only block sees no anchor; it computes one where its query vectors are needed.
        has_anchor = [
            any(b.index for b in mine) or (wants_query and any(passing[b.index] for b in mine))
            for mine in blocks
        ]
        return Plan(
            blocks=blocks,
            anchors=tuple(rows if has else 0 for has in has_anchor),
            query=(sink, query),
            document_anchor=anchor,
            sink=sink,
            passing=tuple(passing),
        )

    def attend(self, layer: Layer) -> Tensor:
        """Select, send; attend to what is here while it travels; attend to what came."""
        plan, rank = layer.plan, layer.host.rank
        anchor = plan.anchors[rank]
        offsets = plan.offsets(rank)
        mine = {
            block.index: self._selected(layer, block.index, row, row + block.length, block.start)
            for block, row in offsets
        }
        pending = self._exchange(layer, mine)
        outs, blocks = [], []
        if anchor:
            parts = (x[:, :, :anchor] for x in (layer.q, layer.k, layer.v))
            outs.append(layer.attend(*parts, causal=True)[0])
        for block, row in offsets:
            parts = (x[:, :, row : row + block.length] for x in (layer.q, layer.k, layer.v))
            running = Running()
            running.add(layer.attend(*parts, causal=True))
            blocks.append(running)
        passed = {**mine, **self._arrived(layer, pending.wait())}
        for (block, row), running in zip(offsets, blocks, strict=True):
            if block.index:
                before = [passed[i] for i in range(block.index) if plan.passing[i]]
                k = torch.cat([layer.k[:, :, :anchor], *(kv[0] for kv in before)], 2)
                v = torch.cat([layer.v[:, :, :anchor], *(kv[1] for kv in before)], 2)
                if k.shape[2]:
                    q = layer.q[:, :, row : row + block.length]
                    running.add(layer.attend(q, k, v))
            outs.append(running.out)
        return torch.cat(outs, 2)

    def _selected(self, layer: Layer, index: int, row: int, end: int, start: int) -> Tensor:
        """Keys and values [2, B, Hkv, P, D] that a block passes on."""
        q, k, v = (x[:, :, row:end] for x in (layer.q, layer.k, layer.v))
        count = layer.plan.passing[index]
        if not count or self.compressor is None:
            return kv_message(k[:, :, :0], v[:, :, :0])
        first, length = layer.plan.query
        query = layer.q[
            :, :, first : first + (length if layer.plan.anchors[layer.host.rank] else 0)
        ]
        scores = at_layer(self.compressor, layer, row, end)(q, k, v, query=query, host=index)
        at_home = max(layer.plan.document_anchor - start, 0)
        chosen = select_passing(scores, k, at_home, count, self.pool_kernel)
        where = chosen.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
        return kv_message(k.gather(2, where), v.gather(2, where))

    def _exchange(self, layer: Layer, mine: dict[int, Tensor]):
        rank, size = layer.host.rank, layer.host.size
        sends = {
            to: torch.cat([mine[i] for i in _wanted(layer.plan, rank, to)], 3)
            for to in range(size)
            if to != rank and _wanted(layer.plan, rank, to)
        }
        batch, heads, _, dim = layer.k.shape
        receives = {
            source: (2, batch, heads, sum(layer.plan.passing[i] for i in wanted), dim)
            for source in range(size)
            if source != rank and (wanted := _wanted(layer.plan, source, rank))
        }
        return layer.host.exchange(sends, receives, layer.k)

    def _arrived(self, layer: Layer, messages: dict[int, Tensor]) -> dict[int, Tensor]:
        found = {}
        for source, message in messages.items():
            wanted = _wanted(layer.plan, source, layer.host.rank)
            parts = message.split([layer.plan.passing[i] for i in wanted], 3)
            found.update(zip(wanted, parts, strict=True))
        return found

    def pairs(self, plan: Plan, rank: int, shape: Shape) -> float:
        """Triangles of anchor and blocks; each later block also sees anchor and passing."""
        total = triangle(plan.anchors[rank])
        for block in plan.blocks[rank]:
            seen = plan.anchors[rank] + sum(plan.passing[: block.index]) if block.index else 0
            total += triangle(block.length) + block.length * seen
        return total

    def values_sent(self, plan: Plan, rank: int, shape: Shape) -> int:
        """What each block passes, once for every other host that owns a later block."""
        tokens = sum(
            plan.passing[i]
            for to in range(len(plan.blocks))
            if to != rank
            for i in _wanted(plan, rank, to)
        )
        return 2 * shape.batch * shape.kv_heads * shape.head_dim * tokens

    def messages_sent(self, plan: Plan, rank: int) -> int:
        """One to each host that owns a later block."""
        return sum(bool(_wanted(plan, rank, to)) for to in range(len(plan.blocks)) if to != rank)


def _wanted(plan: Plan, source: int, to: int) -> list[int]:
    """Blocks of `source` that some block of `to` comes after."""
    latest = max((b.index for b in plan.blocks[to]), default=-1)
    return [b.index for b in plan.blocks[source] if b.index < latest and plan.passing[b.index]]


def star(**options: object) -> Anchored:
    """Star attention: the anchor is the first block, and nothing is passed."""
    return Anchored("star", contiguous, None, **{"anchor_length": "block", **options})


def apb(compressor: Compressor, **options: object) -> Anchored:
    """APB: one block a host."""
    return Anchored("apb", contiguous, compressor, **options)


def spava(compressor: Compressor, **options: object) -> Anchored:
    """Spava: zigzag blocks; l_a and l_p are counted from the shorter blocks, half as long."""
    return Anchored("spava", zigzag, compressor, **options)
