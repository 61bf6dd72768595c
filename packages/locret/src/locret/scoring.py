"""What a scorer sees of a layer's call, and the attention of the queries that it remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from locret.interface import Call

if TYPE_CHECKING:
    from locret.layer_store import LayerStore


@dataclass
class Step:
    """One call of one layer, after its attention.

    Attributes:
        call: see `Call`; its k and v are all `[B, J, n, D]` held.
        layer: the layer's store; `positions` and `valid` already hold the new entries.
        rotation: int positions `[N, T]` to (cos, sin) `[N, T, D]`.
    """

    call: Call
    layer: LayerStore
    rotation: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def new(self) -> int:
        """Tokens of this call, T."""
        return self.call.q.shape[2]

    @property
    def new_keys(self) -> Tensor:
        """`[B, J, T, D]`."""
        return self.call.k[:, :, self.layer.held - self.new :]

    @property
    def new_positions(self) -> Tensor:
        """int64 `[B, J, T]`."""
        return self.layer.positions[:, :, self.layer.held - self.new :].long()

    @property
    def new_valid(self) -> Tensor | None:
        """bool `[B, T]`, or None."""
        valid = self.layer.valid
        return None if valid is None else valid[:, 0, -self.new :]

    def seen(self, part: slice) -> Tensor:
        """bool `[B or 1, J or 1, t, n]`: which entries the call's queries of `part` looked at."""
        return visible(self.layer.valid, part, self.new, self.layer.held, self.call.q.device)


def visible(valid: Tensor | None, part: slice, new: int, held: int, device: torch.device) -> Tensor:
    """bool `[B or 1, J or 1, t, n]`, True where a query may look.

    Args:
        valid: bool `[B, J, n]`, False where a head holds nothing; None: nowhere.
        part: queries asked for, of 0 … new − 1.
        new: newest entries, which are the queries' own.
        held: n.
        device: of the answer.
    """
    mine = held - new + torch.arange(new, device=device)[part, None]
    at = torch.arange(held, device=device)
    if valid is None:
        return (at <= mine)[None, None]
    # A padding query sees itself, or its softmax would be over nothing.
    return ((at <= mine) & valid[:, :, None]) | (at == mine)


class Scorer(ABC):
    """Base of all: static scores, given once.

    Attributes:
        foretells: whether `rescore` wants what `observe` said, as `layer.foretold`.
    """

    foretells: ClassVar[bool] = False

    @abstractmethod
    def observe(self, step: Step) -> Tensor:
        """Scores of the new entries, `[B, J, T]`, finite."""

    def rescore(self, layer: LayerStore) -> None:  # noqa: B027 - most have nothing to do
        """Write new scores of what is held into `layer.scores`, before an eviction."""

    def comparable(self, layer: LayerStore) -> Tensor:
        """Scores `[B, J, n]` in their heads' order that heads and layers may be compared by."""
        return layer.scores


def remember_queries(step: Step, window: int) -> None:
    """Keep each row's last real queries and their positions in the layer's state."""
    state = step.layer.state
    q, at = step.call.q, step.new_positions[:, 0]
    valid = step.new_valid
    valid = torch.ones_like(at, dtype=torch.bool) if valid is None else valid
    if "queries" in state:
        old = state["queries"]
        q, at = torch.cat([old[0], q], 2), torch.cat([old[1], at], 1)
        valid = torch.cat([old[2], valid], 1)
    if bool(valid.all()):
        newest = slice(max(q.shape[2] - window, 0), None)
        state["queries"] = (q[:, :, newest], at[:, newest], valid[:, newest])
    else:
        index = torch.sort(valid.long(), dim=1, stable=True).indices[:, -window:]
        wide = index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        state["queries"] = (q.gather(2, wide), at.gather(1, index), valid.gather(1, index))
    state["scaling"] = step.call.scaling


def window_attention(layer: LayerStore, softmax: bool) -> Tensor | None:
    """`[B, J, n]`: mean softmax weight, or else the largest logit, of the remembered queries."""
    if "queries" not in layer.state:
        return None
    q, at, real = layer.state["queries"]
    keys = layer.all("key")
    q = q.unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("bjgtd,bjnd->bjgtn", q, keys).float() * layer.state["scaling"]
    later = layer.positions[:, :, None] > at[:, None, :, None]
    hidden = later | ~real[:, None, :, None]
    if layer.valid is not None:
        hidden = hidden | ~layer.valid[:, :, None]
    logits = logits.masked_fill(hidden[:, :, None], -torch.inf)
    if not softmax:
        return logits.amax((2, 3)).clamp(min=-1e4)
    weights = logits.softmax(-1).nan_to_num()  # a row of padding has nothing to look at
    return weights.sum((2, 3)) / real.sum(1)[:, None, None].clamp(min=1) / q.shape[2]
