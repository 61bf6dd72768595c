"""The keys and values of one layer: coded when they come, kept or dropped, never coded again.

`Entries` are as many for every head; `PackedEntries` may be a different number for each row and
head, and take the memory of what there is.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from locret.quantised import Planes, decode, encode

KINDS = ("key", "value")


class Entries:
    """A buffer `[B, J, room, w]` for each plane of keys and values; `held` columns are in use.

    Args:
        storage: see `quantised`.
        keys, values: `[B, J, T, D]` that tell sizes, dtype and device; nothing is stored yet.
        most: columns there will ever be at most.
    """

    def __init__(self, storage: str, keys: Tensor, values: Tensor, most: int) -> None:
        self.storage, self.dtype, self.most, self.held = storage, keys.dtype, most, 0
        self.planes: dict[str, Planes] = {
            kind: encode(x[:, :, :0], storage)
            for kind, x in zip(KINDS, (keys, values), strict=True)
        }

    def append(self, keys: Tensor, values: Tensor) -> None:
        """One more column for each of `[B, J, T, D]`."""
        start, self.held = self.held, self.held + keys.shape[2]
        self._grow()
        for kind, x in zip(KINDS, (keys, values), strict=True):
            for plane, new in zip(self.planes[kind], encode(x, self.storage), strict=True):
                plane[:, :, start : self.held] = new

    def read(self, kind: str) -> Tensor:
        """Keys or values `[B, J, held, D]` in the model's dtype."""
        planes = tuple(plane[:, :, : self.held] for plane in self.planes[kind])
        return decode(planes, self.storage, self.dtype)

    def keep(self, index: Tensor, left: Tensor | None) -> None:
        """Let columns `[B, J, m]` become columns 0 … m − 1, and drop the others.

        Args:
            index: int64, ascending where `left`.
            left: bool `[B, J, m]`, False for columns that hold nothing; None: all hold something.
        """
        self.held = index.shape[2]
        for kind in KINDS:
            for plane in self.planes[kind]:
                plane[:, :, : self.held] = plane.gather(2, _wide(index, plane.shape[-1]))

    def write(self, kind: str, x: Tensor, where: Tensor | None = None) -> None:
        """Put `[B, J, held, D]` in place of what is there, where bool `[B, J, held]` says so."""
        for plane, new in zip(self.planes[kind], encode(x, self.storage), strict=True):
            old = plane[:, :, : self.held]
            old.copy_(new if where is None else torch.where(where[..., None], new, old))

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, scales included."""
        return sum(
            plane[:, :, : self.held].numel() * plane.element_size()
            for kind in KINDS
            for plane in self.planes[kind]
        )

    def fork(self) -> Entries:
        """A copy as large as what is held."""
        twin = copy.copy(self)
        twin.planes = {
            kind: tuple(plane[:, :, : self.held].clone() for plane in planes)
            for kind, planes in self.planes.items()
        }
        return twin

    def _grow(self) -> None:
        room = self.planes["key"][0].shape[2]
        if self.held <= room:
            return
        # Doubling, up to all that will ever be needed: short texts do not pay for the budget.
        wider = min(max(self.held, 2 * room), self.most)
        for kind in KINDS:
            grown = []
            for plane in self.planes[kind]:
                fresh = plane.new_empty(*plane.shape[:2], wider, plane.shape[3])
                fresh[:, :, :room] = plane
                grown.append(fresh)
            self.planes[kind] = tuple(grown)


class PackedEntries(Entries):
    """A list `[N, w]` for each plane, of all rows and heads, and where each one's entries lie.

    Reading makes the rectangle `[B, J, held, D]`, for one layer at a time; columns that hold
    nothing repeat some entry, and are for the caller to mask.
    """

    def __init__(self, storage: str, keys: Tensor, values: Tensor, most: int) -> None:
        super().__init__(storage, keys, values, most)
        self.planes = {
            kind: tuple(plane.flatten(0, 2) for plane in planes)
            for kind, planes in self.planes.items()
        }
        # int64 [B, J, held], −1 where nothing is.
        self.slots = torch.empty(*keys.shape[:2], 0, dtype=torch.int64, device=keys.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """As in `Entries`."""
        first = self.planes["key"][0].shape[0]
        new = torch.arange(keys[..., 0].numel(), device=keys.device).view(keys.shape[:3])
        self.slots = torch.cat([self.slots, new + first], 2)
        self.held = self.slots.shape[2]
        for kind, x in zip(KINDS, (keys, values), strict=True):
            fresh = encode(x, self.storage)
            pairs = zip(self.planes[kind], fresh, strict=True)
            self.planes[kind] = tuple(torch.cat([old, n.flatten(0, 2)]) for old, n in pairs)

    def read(self, kind: str) -> Tensor:
        """As in `Entries`."""
        at = self.slots.clamp(min=0)
        planes = tuple(plane[at] for plane in self.planes[kind])
        return decode(planes, self.storage, self.dtype)

    def keep(self, index: Tensor, left: Tensor | None) -> None:
        """As in `Entries`."""
        slots = self.slots.gather(2, index)
        if left is not None:
            slots = slots.masked_fill(~left, -1)
        there = slots >= 0
        stay = slots[there]
        slots[there] = torch.arange(len(stay), device=stay.device)
        self.slots, self.held = slots, slots.shape[2]
        for kind in KINDS:
            self.planes[kind] = tuple(plane[stay] for plane in self.planes[kind])

    def write(self, kind: str, x: Tensor, where: Tensor | None = None) -> None:
        """As in `Entries`."""
        there = self.slots >= 0 if where is None else where & (self.slots >= 0)
        for plane, new in zip(self.planes[kind], encode(x[there], self.storage), strict=True):
            plane[self.slots[there]] = new

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, scales included."""
        return sum(plane.nbytes for kind in KINDS for plane in self.planes[kind])

    def fork(self) -> PackedEntries:
        """A copy: nothing is ever written in place but by `write`."""
        twin = copy.copy(self)
        twin.planes = {k: tuple(p.clone() for p in planes) for k, planes in self.planes.items()}
        twin.slots = self.slots.clone()
        return twin


def _wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, -1, width)
