"""`with locret(model, heads, config)`: the model reads any text within budget + chunk. §3.2."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from locret._attention import attention_modules
from locret.attention import attend
from locret.cache import LocretCache
from locret.chunks import read
from locret.config import LocretConfig
from locret.interface import IMPLEMENTATION, Call, Rotation, exchanged, rotary_of, rotate
from locret.scorers import as_scorer
from locret.scoring import Scorer, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locret.heads import RetainingHeads


@contextmanager
def locret(
    model: PreTrainedModel, heads: RetainingHeads | Scorer | str, config: LocretConfig
) -> Iterator[None]:
    """Bound the cache of every call of `model` inside the block, and leave it as it was after.

    A prompt is read in chunks; after each, every layer and head keeps its budget's best. Forward
    calls take `past_key_values=LocretCache(config)`, so `model.generate` works with its sampling,
    stopping and streaming; batches may be padded at either side, and a row gives what it would
    give alone. `position_ids` are made here. Outputs are those of the bounded cache.

    Args:
        model: any decoder that uses transformers' attention interface, without sliding windows.
        heads: trained `RetainingHeads`; or the name or instance of a training-free scorer.
        config: sizes, for caches that calls do not bring themselves.

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
        return read(inner, input_ids, cache, kwargs)

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
        self.module = attention_modules(model, IMPLEMENTATION)[0]
        self.rotary = rotary_of(model)

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
        move = self.move if cache.config.positions == "contiguous" else None
        if layer.held + new > cache.config.capacity:
            self.scorer.rescore(layer)
            layer.evict(None, move, self.due(layer, cache, new))
        if move is None or layer.columns == layer.held:
            return rotation  # nothing was evicted yet: places are positions
        places = torch.arange(new, device=hidden.device)[None]
        if cache.valid is not None:
            places = (cache.valid.cumsum(1) - 1).clamp(min=0)
        return self.rotation(layer.counts() + places, hidden)

    def due(self, layer: Any, cache: LocretCache, new: int) -> Tensor | None:
        """Rows that would not hold their new tokens, `[B]`: padding must not cut a row earlier than
        it would be cut alone. None: all.
        """
        if layer.valid is None:
            return None
        coming = new if cache.valid is None else cache.valid.sum(1)
        return layer.valid.sum(1) + coming > cache.config.capacity

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
        mask = _mask(layer.valid, new, layer.held, call.q)
        out = attend(call.q, call.k, call.v, mask, call.scaling)
        step = Step(call, layer, mask, lambda p: self.rotation(p, call.k))
        layer.scores[:, :, layer.held - new : layer.held] = self.scorer.observe(step)
        if cache.evicting and (layer.held > cache.config.budget or layer.valid is not None):
            self.scorer.rescore(layer)
            layer.evict(cache.last, self.move if cache.config.positions == "contiguous" else None)
        return out


def _mask(valid: Tensor | None, new: int, held: int, q: Tensor) -> Tensor | None:
    """bool `[B, 1, T, n]`, True where a query may look; None where no row has padding."""
    if valid is None:
        return None
    old = held - new
    at = torch.arange(new, device=q.device)
    seen = torch.arange(held, device=q.device)[None] <= old + at[:, None]
    # A padding query sees itself, or its softmax would be over nothing.
    own = torch.arange(held, device=q.device)[None] == old + at[:, None]
    return ((seen & valid[:, None]) | own)[:, None]
