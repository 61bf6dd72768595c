"""The exact strategies: dense on one host, ring attention (plain and zigzag), Ulysses.

Ring: "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv 2310.01889),
keys travel round. Ulysses: "DeepSpeed Ulysses" (arXiv 2309.14509), heads are exchanged for tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apb.plan import (
    Block,
    Layer,
    Layout,
    Plan,
    Running,
    Shape,
    contiguous,
    kv_message,
    split,
    triangle,
    zigzag,
)


class Dense:
    """All of the document on host 0; the others wait. What the rest is compared with."""

    name, exact = "dense", True

    def plan(self, document: int, hosts: int, query: int) -> Plan:
        """Host 0 owns everything."""
        return Plan((tuple(split(document, 1)), *((),) * (hosts - 1)), (0,) * hosts)

    def attend(self, layer: Layer) -> Tensor:
        """Causal attention of the whole document."""
        return layer.attend(layer.q, layer.k, layer.v, causal=True)[0]

    def pairs(self, plan: Plan, rank: int, shape: Shape) -> float:
        """n (n + 1) / 2 on host 0."""
        return triangle(plan.local(rank))

    def values_sent(self, plan: Plan, rank: int, shape: Shape) -> int:
        """Nothing."""
        return 0

    def messages_sent(self, plan: Plan, rank: int) -> int:
        """None."""
        return 0


class Ring:
    """Keys and values go round the ring, H - 1 hops; each host attends to what passes by."""

    exact = True

    def __init__(self, name: str, layout: Layout) -> None:
        self.name, self._layout = name, layout

    def plan(self, document: int, hosts: int, query: int) -> Plan:
        """Blocks by the layout; no anchor."""
        return Plan(self._layout(document, hosts), (0,) * hosts)

    def attend(self, layer: Layer) -> Tensor:
        """Own keys first, while the next ones are on their way."""
        rank, size = layer.host.rank, layer.host.size
        running = [Running() for _ in layer.plan.blocks[rank]]
        holding = kv_message(layer.k, layer.v) if size > 1 else None
        for hop in range(size):
            source = (rank - hop) % size
            pending = None
            if hop < size - 1 and holding is not None:
                following = (rank - hop - 1) % size
                shape = list(holding.shape)
                shape[3] = layer.plan.local(following)
                pending = layer.host.exchange(
                    {(rank + 1) % size: holding}, {(rank - 1) % size: tuple(shape)}, holding
                )
            kv = (layer.k, layer.v) if holding is None else holding.unbind(0)
            self._visit(layer, running, source, *kv)
            if pending is not None:
                holding = pending.wait()[(rank - 1) % size]
        return torch.cat([r.out for r in running if r.out is not None], 2)

    def _visit(
        self, layer: Layer, running: list[Running], source: int, k: Tensor, v: Tensor
    ) -> None:
        for (mine, row), merged in zip(layer.plan.offsets(layer.host.rank), running, strict=True):
            q = layer.q[:, :, row : row + mine.length]
            # Earlier blocks of one source lie side by side: one call for all of them.
            earlier = sum(b.length for b in layer.plan.blocks[source] if b.index < mine.index)
            if earlier:
                merged.add(layer.attend(q, k[:, :, :earlier], v[:, :, :earlier]))
            if source == layer.host.rank:
                end = row + mine.length
                own = layer.k[:, :, row:end], layer.v[:, :, row:end]
                merged.add(layer.attend(q, *own, causal=True))

    def pairs(self, plan: Plan, rank: int, shape: Shape) -> float:
        """Each of a host's blocks: its triangle, and all tokens before it."""
        return sum(triangle(b.length) + b.length * b.start for b in plan.blocks[rank])

    def values_sent(self, plan: Plan, rank: int, shape: Shape) -> int:
        """K and V of every host but the right neighbour's own."""
        size = len(plan.blocks)
        tokens = sum(plan.local(r) for r in range(size)) - plan.local((rank + 1) % size)
        return 2 * shape.batch * shape.kv_heads * shape.head_dim * tokens if size > 1 else 0

    def messages_sent(self, plan: Plan, rank: int) -> int:
        """One a hop."""
        return len(plan.blocks) - 1


class Ulysses:
    """Each host attends for some heads over all tokens, between two all-to-all exchanges.

    Heads need not divide by hosts, nor hosts be fewer than heads: a host may get no head, and where
    a group of query heads is cut, its KV head goes to both hosts.
    """

    name, exact = "ulysses", True

    def plan(self, document: int, hosts: int, query: int) -> Plan:
        """Contiguous blocks; no anchor."""
        return Plan(contiguous(document, hosts), (0,) * hosts)

    def attend(self, layer: Layer) -> Tensor:
        """Tokens for heads, attend, heads for tokens."""
        rank, size = layer.host.rank, layer.host.size
        heads, kv_heads = layer.q.shape[1], layer.k.shape[1]
        group = heads // kv_heads
        shares = _shares(heads, kv_heads, size)
        batch, _, local, dim = layer.q.shape
        packed = {
            r: torch.cat([layer.q[:, a:b], layer.k[:, c:d], layer.v[:, c:d]], 1)
            for r, (a, b, c, d) in enumerate(shares)
        }
        a, b, c, d = shares[rank]
        width = (b - a) + 2 * (d - c)
        tokens = [layer.plan.local(r) for r in range(size)]
        arrived = layer.host.exchange(
            {r: x for r, x in packed.items() if r != rank},
            {r: (batch, width, tokens[r], dim) for r in range(size) if r != rank},
            layer.q,
        ).wait()
        arrived[rank] = packed[rank]
        mine = torch.cat([arrived[r] for r in range(size)], 2)
        q, k, v = mine.split([b - a, d - c, d - c], 1)
        if (b - a) != (d - c) * group or a % group:  # a cut group: name each head's key
            index = torch.arange(a, b, device=q.device) // group - c
            k, v = k[:, index], v[:, index]
        out = layer.attend(q, k, v, causal=True)[0] if b > a else q
        back = layer.host.exchange(
            {r: x for r, x in enumerate(out.split(tokens, 2)) if r != rank},
            {r: (batch, shares[r][1] - shares[r][0], local, dim) for r in range(size) if r != rank},
            layer.q,
        ).wait()
        back[rank] = out.split(tokens, 2)[rank]
        return torch.cat([back[r] for r in range(size)], 1)

    def pairs(self, plan: Plan, rank: int, shape: Shape) -> float:
        """A share of the heads of the whole triangle."""
        a, b, _, _ = _shares(shape.heads, shape.kv_heads, len(plan.blocks))[rank]
        n = sum(plan.local(r) for r in range(len(plan.blocks)))
        return (b - a) / shape.heads * triangle(n)

    def values_sent(self, plan: Plan, rank: int, shape: Shape) -> int:
        """Own tokens to the others' heads, own heads to the others' tokens."""
        shares = _shares(shape.heads, shape.kv_heads, len(plan.blocks))
        own = plan.local(rank)
        there = sum(b - a + 2 * (d - c) for r, (a, b, c, d) in enumerate(shares) if r != rank)
        a, b, _, _ = shares[rank]
        others = sum(plan.local(r) for r in range(len(plan.blocks)) if r != rank)
        return shape.batch * shape.head_dim * (own * there + (b - a) * others)

    def messages_sent(self, plan: Plan, rank: int) -> int:
        """Two all-to-alls, at most: a host without heads is sent no tokens and returns none."""
        return 2 * (len(plan.blocks) - 1)


def _shares(heads: int, kv_heads: int, hosts: int) -> list[tuple[int, int, int, int]]:
    """For each host, its query heads a .. b - 1 and the KV heads c .. d - 1 that they read."""
    group, found = heads // kv_heads, []
    # By whole groups where they suffice, else by single heads.
    unit = group if kv_heads >= hosts else 1
    for block in _ragged(heads // unit, hosts):
        a, b = block.start * unit, block.end * unit
        found.append(
            (a, b, a // group, -(-b // group)) if b > a else (a, a, a // group, a // group)
        )
    return found


def _ragged(items: int, hosts: int) -> list[Block]:
    """Like `split`, but hosts may get nothing."""
    given = split(items, min(items, hosts))
    return given + [Block(i, items, items) for i in range(len(given), hosts)]


def ring() -> Ring:
    """Ring attention on contiguous blocks: the last host does most of the work."""
    return Ring("ring", contiguous)


def balanced_ring() -> Ring:
    """Ring attention on zigzag blocks: head-tail load balance."""
    return Ring("zigzag", zigzag)
