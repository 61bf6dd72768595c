"""A text of any length through a model, a chunk at a time: the driver of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from locret.cache import LocretCache


def read(
    forward: Callable[..., Any], ids: Tensor, cache: LocretCache, kwargs: dict[str, Any],
    settle: Callable[[LocretCache], None], progress: Callable[[float], None],
) -> Any:  # fmt: skip
    """Feed `ids` to the model's own forward, and give its output as if it were one call.

    The rows of a padded batch are packed to the left first, so that chunks of a row begin at the
    same tokens as without padding.

    Args:
        forward: the model's.
        ids: int64 `[B, T]`.
        cache: grows and is pruned.
        kwargs: of the call. `attention_mask` `[B, T]` or `[B, past + T]`; `logits_to_keep` as in
            transformers, an integer. `position_ids` are ignored: they follow from the cache.
        settle: called with the cache after each piece.
        progress: called after each of several pieces with the share of them read.

    Returns:
        the model's output of the last piece, its logits those of the columns asked for; padding
        columns have logits 0.
    """
    B, T = ids.shape
    if T == 0:
        raise ValueError("there is no token to read: input_ids is empty")
    kwargs.pop("position_ids", None)
    kwargs.pop("cache_position", None)
    kwargs.pop("use_cache", None)
    keep = kwargs.pop("logits_to_keep", 0)
    keep = T if not isinstance(keep, int) or keep == 0 else min(keep, T)
    order, lengths = _packed(kwargs.pop("attention_mask", None), ids)
    if cache.seen is None:
        cache.seen = torch.zeros(B, 1, dtype=torch.long, device=ids.device)
    elif cache.seen.shape[0] != B:
        raise ValueError(f"the cache holds {cache.seen.shape[0]} rows, the input has {B}")

    output, logits = None, None
    pieces = _pieces(cache, lengths, T)
    for at, (start, end, last, evict) in enumerate(pieces, 1):
        columns, valid = _columns(order, start, end, ids)
        piece = ids.gather(1, columns)
        cache.evicting, cache.last = evict, last
        cache.valid = None if bool(valid.all()) else valid
        rank = (valid.cumsum(1) - 1).clamp(min=0)
        wanted = columns >= T - keep
        first = int(wanted.any(0).long().argmax()) if bool(wanted.any()) else piece.shape[1] - 1
        output = forward(
            input_ids=piece, attention_mask=None, position_ids=cache.seen + rank,
            past_key_values=cache, use_cache=True, logits_to_keep=piece.shape[1] - first, **kwargs,
        )  # fmt: skip
        if logits is None:
            logits = output.logits.new_zeros(B, keep, output.logits.shape[-1])
        rows, places = (wanted & valid)[:, first:].nonzero(as_tuple=True)
        logits[rows, columns[rows, places + first] - (T - keep)] = output.logits[rows, places]
        settle(cache)
        cache.seen = cache.seen + valid.sum(1, keepdim=True)
        if len(pieces) > 1:
            progress(at / len(pieces))
    cache.columns += T
    cache.evicting, cache.valid, cache.last = False, None, None
    output.logits = logits
    return output


def _packed(mask: Tensor | None, ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """Columns of each row's real tokens first `[B, T]` (None: all are real), and their numbers."""
    B, T = ids.shape
    whole = torch.full((B,), T, device=ids.device)
    if mask is None:
        return None, whole
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(
            f"attention_mask must be [{B}, {T}] or longer by what was read before, got "
            f"{tuple(mask.shape)}"
        )
    real = mask[:, -T:].bool()
    if bool(real.all()):
        return None, whole
    if not bool(real.any()):
        raise ValueError("attention_mask hides every token")
    return torch.sort((~real).long(), dim=1, stable=True).indices, real.sum(1)


def _pieces(
    cache: LocretCache, lengths: Tensor, T: int
) -> list[tuple[Tensor, Tensor, Tensor | None, bool]]:
    """(first, end, last, evict) of each call, by row: first and end are `[B]`, in packed order."""
    config, none = cache.config, torch.zeros_like(lengths)
    if T <= config.chunk and cache.columns:
        return [(none, lengths, None, False)]
    body = (lengths - config.tail).clamp(min=0)
    pieces: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
    for start in range(0, int(body.max()), config.chunk):
        first = torch.minimum(none + start, body)
        end = torch.minimum(none + start + config.chunk, body)
        # A row's protection of the newest ends with its prompt.
        pieces.append((first, end, end == body, True))
    if bool((lengths > body).any()):
        pieces.append((body, lengths, None, False))
    return pieces


def _columns(
    order: Tensor | None, start: Tensor, end: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Columns `[B, n]` of the tokens start … end − 1 of each row, and which of them are real."""
    width = int((end - start).max())
    rank = start[:, None] + torch.arange(width, device=ids.device)
    valid = rank < end[:, None]
    rank = rank.clamp(max=ids.shape[1] - 1)
    return (rank if order is None else order.gather(1, rank)), valid
