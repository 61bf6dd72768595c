"""`with locret(model, heads, config)`: the model reads any text within budget + chunk. §3.2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from locret._attention import attention_modules
from locret.attention import attend
from locret.budgets import shared_limits
from locret.cache import LocretCache
from locret.chunks import read
from locret.config import LocretConfig
from locret.eviction import ranked
from locret.interface import IMPLEMENTATION, Call, Rotation, exchanged, rotary_of, rotate
from locret.scorers import as_scorer
from locret.scoring import Scorer, Step, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locret.heads import RetainingHeads
    from locret.layer_store import LayerStore


@contextmanager
def locret(
    model: PreTrainedModel, heads: RetainingHeads | Scorer | str, config: LocretConfig,
    *, progress: Callable[[float], None] = lambda share: None,
) -> Iterator[None]:  # fmt: skip
    """Bound the cache of every call of `model` inside the block, and leave it as it was after.

    A prompt is read in chunks; after each, every layer and head keeps its budget's best. Forward
    calls take `past_key_values=LocretCache(config)`, so `model.generate` works with its sampling,
    stopping and streaming; batches may be padded at either side, and a row gives what it would
    give alone. `position_ids` are made here. Outputs are those of the bounded cache.

    Args:
        model: any decoder that uses transformers' attention interface, without sliding windows.
        heads: trained `RetainingHeads`; or the name or instance of a training-free scorer.
        config: sizes, for caches that calls do not bring themselves.
        progress: called after each chunk of a longer text with the share of it read.

    Raises:
        ValueError: heads of another model, or a model that cannot change its attention.
        ImportError: transformers is missing.
    """
    scorer = as_scorer(heads, model)
    engine = _Engine(model, scorer)
    inner = model.forward
    had = "forward" in model.__dict__

    @functools.wraps(inner)
    def forward(input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("inputs_embeds") is not None or input_ids is None:
            raise ValueError(
                "inside `with locret(...)` call the model with input_ids and keyword arguments"
            )
        cache = kwargs.pop("past_key_values", None)
        if cache is None:
            cache = LocretCache(config)
        if not isinstance(cache, LocretCache):
            raise ValueError(
                f"past_key_values must be a LocretCache, got {type(cache).__name__}: "
                "model.generate(..., past_key_values=LocretCache(config))"
            )
        return read(inner, input_ids, cache, kwargs, engine.settle, progress)

    with exchanged(model, engine.attend, engine.enter):
        model.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            if had:
                model.forward = inner  # type: ignore[method-assign]
            else:
                del model.forward


class _Engine:
    """One session's attention: attend, score, evict, layer by layer."""

    def __init__(self, model: PreTrainedModel, scorer: Scorer) -> None:
        self.scorer = scorer
        modules = attention_modules(model, IMPLEMENTATION)
        self.module, self.first = modules[0], modules[0].layer_idx
        self.rotary = rotary_of(model)
        self.turned: tuple[Any, Rotation] | None = None  # the last layer's, for those that follow

    def rotation(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) `[N, T, D]` of int positions `[N, T]`."""
        return self.rotary(like, positions)

    def enter(
        self, module: torch.nn.Module, hidden: Tensor, rotation: Rotation, cache: Any
    ) -> Rotation:
        """Before a layer: make room, and give the new tokens their places."""
        if not isinstance(cache, LocretCache):
            return rotation
        layer, new = cache.layer(module.layer_idx), hidden.shape[1]
        if cache.config.budgets == "layer":
            if module.layer_idx == self.first:
                self.make_room(cache, cache.layers, new)
        else:
            self.make_room(cache, [layer], new)
        if cache.config.positions == "original" or not layer.evicted:
            return rotation
        count = layer.counts()
        places = torch.arange(new, device=hidden.device)[None]
        if cache.valid is not None:
            places = (cache.valid.cumsum(1) - 1).clamp(min=0)
        if cache.valid is not None or not isinstance(count, int):
            return self.rotation(count + places, hidden)
        # A step's layers mostly hold as many, and then one rotation is for all.
        key = count, new, hidden.dtype, hidden.device
        if self.turned is None or self.turned[0] != key:
            self.turned = key, self.rotation(count + places, hidden)
        return self.turned[1]

    def make_room(self, cache: LocretCache, layers: list[LayerStore], new: int) -> None:
        """Evict from layers that share a budget where the new tokens would not fit."""
        layers = [layer for layer in layers if layer.held]
        if sum(layer.held + new for layer in layers) <= len(layers) * cache.config.capacity:
            return  # even if no column were empty
        held = torch.cat([layer.lane_counts() for layer in layers], 1)
        room = held.shape[1] * cache.config.capacity
        coming = held.new_full((len(held),), new) if cache.valid is None else cache.valid.sum(1)
        # Padding must not cut a row earlier than it would be cut alone.
        due = held.sum(1) + held.shape[1] * coming > room
        # A rectangle is rid of its padding even where no row is cut.
        if cache.config.budgets == "uniform" or bool(due.any()):
            self.evict(cache, layers, None, due)

    def evict(
        self, cache: LocretCache, layers: list[LayerStore], last: Tensor | None,
        due: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Cut layers to their budgets, which `budgets` says who shares."""
        for layer in layers:
            self.scorer.rescore(layer)
        move = self.move if cache.config.positions == "contiguous" else None
        limits: list[Tensor | None] = [None] * len(layers)
        if cache.config.budgets != "uniform":
            limits = self.limits(cache.config, layers, last)
        for layer, limit in zip(layers, limits, strict=True):
            layer.evict(last, move, due, limit)

    def limits(
        self, config: LocretConfig, layers: list[LayerStore], last: Tensor | None
    ) -> list[Tensor | None]:
        """Entries that each head keeps, int64 `[B, J]`, by layer."""
        sorted_, counts = [], []
        width = max(layer.held for layer in layers)
        for layer in layers:
            order = ranked(layer.scores, layer.positions, layer.valid, last, config)
            worth = self.scorer.comparable(layer).float().gather(2, order)
            sorted_.append(pad(worth, (0, width - layer.held)))
            counts.append(layer.lane_counts())
        if config.budgets == "head":
            return [shared_limits(w, n, config) for w, n in zip(sorted_, counts, strict=True)]
        # The r-th best of a layer is the mean of its heads' r-th best: they have as many.
        worth = torch.stack([w.mean(1) for w in sorted_], 1)
        limit = shared_limits(worth, torch.stack([n[:, 0] for n in counts], 1), config)
        return [limit[:, i, None].expand_as(n) for i, n in enumerate(counts)]

    def settle(self, cache: LocretCache) -> None:
        """After all layers read a chunk: the eviction that needs to see them all."""
        if cache.evicting and cache.config.budgets == "layer":
            self.evict(cache, cache.layers, cache.last)

    def move(self, keys: Tensor, by: Tensor) -> Tensor:
        """Turn keys `[B, J, m, D]` by so many positions `[B, J, m]`."""
        flat = keys.flatten(0, 1)[:, None]
        cos, sin = self.rotation(by.flatten(0, 1), keys)
        # Long-context variants scale cos and sin, and the keys already are.
        scale = (cos[..., :1] ** 2 + sin[..., :1] ** 2).sqrt()
        turned, _ = rotate(self.module, flat, flat, cos / scale, sin / scale)
        return turned.view_as(keys)

    def attend(self, call: Call) -> Tensor:
        """Attention over what is held; then the layer's scores, and its eviction."""
        cache = call.cache
        if not isinstance(cache, LocretCache):
            raise ValueError("inside `with locret(...)` use_cache=False is not supported")
        layer, new = cache.layer(call.layer), call.q.shape[2]
        fresh = cache.valid
        positions = cache.seen + (
            torch.arange(new, device=call.q.device)[None]
            if fresh is None
            else (fresh.cumsum(1) - 1).clamp(min=0)
        )
        positions = positions.expand(call.q.shape[0], new)
        layer.note(torch.zeros((), device=call.q.device), positions, fresh)
        mask, bias = None, _bias(layer, new)
        if fresh is not None or (bias is not None and not bool(bias.amax(2).isfinite().all())):
            mask = visible(layer.valid, slice(None), new, layer.held, call.q.device)
            bias = None if layer.masses is None else layer.masses[..., : layer.held - new].log()
        out = attend(call.q, call.k, call.v, mask, call.scaling, bias)
        step = Step(call, layer, lambda p: self.rotation(p, call.k))
        layer.tell(self.scorer.observe(step), self.scorer.foretells)
        config = cache.config
        if not cache.evicting or config.budgets == "layer":
            return out
        if layer.held > config.budget or layer.valid is not None:
            self.evict(cache, [layer], cache.last)
        return out


def _bias(layer: LayerStore, new: int) -> Tensor | None:
    """float32 `[B, J, n − T]` for the older entries; see `attention.attend`. None: all zero."""
    old = slice(0, layer.held - new)
    if layer.held == new:
        return None
    bias = None if layer.masses is None else layer.masses[..., old].log()
    if layer.valid is None or bool(layer.valid[..., old].all()):
        return bias
    bias = torch.zeros(layer.scores[..., old].shape, device=layer.device) if bias is None else bias
    return bias.masked_fill(~layer.valid[..., old], -torch.inf)
