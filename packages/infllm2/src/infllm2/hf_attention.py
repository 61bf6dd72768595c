"""The attention and mask functions that transformers calls, and the open sessions they look up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infllm2.attention import Select, attend
from infllm2.config import InfLLMv2Config
from infllm2.eager import uncompiled
from infllm2.layer_cache import LayerCache
from infllm2.trace import Call, Trace, causal_blocks, timed

# Keyword arguments of other attention functions that would change the result; none may be set.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seqlens_q", "block_table")

# Rows of the batch done together, their first query and their end, and their blocks (None: dense).
Part = tuple[Sequence[int], int, int, Tensor | None]


@dataclass
class Session:
    """What the attention function must know about a model: found by its configuration object."""

    model_config: Any
    trace: Trace
    config: InfLLMv2Config | None = None
    backend: str = "auto"
    select: Select | None = None


# Open sessions by id of the model's configuration; a session keeps its configuration alive.
sessions: dict[int, Session] = {}


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask handed to `sparse_forward`: bool [B, positions so far], True for tokens; None if all
    are.

    A cache of fixed size holds more keys than there are positions so far; the rest is cut off
    there.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function or kv_offset:
        raise ValueError(
            "infllm2 attention is plain causal: encoders, sliding-window layers, packed sequences "
            "and custom masks are not supported; set config.sliding_window=None (Mistral, Phi-3) "
            "or pass an attention_mask"
        )
    length = int(q_offset) + q_length
    if attention_mask is None:
        if length == kv_length:
            return None
        return torch.ones(batch_size, length, dtype=torch.bool, device=kwargs.get("device"))
    mask = attention_mask[:, :length].bool()
    return None if length == kv_length and bool(mask.all()) else mask


@uncompiled
def sparse_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q [B, H, T, D], k and v [B, K, S, D] → [B, T, H, D]."""
    session = _session(module)
    config = session.config or _config_of(module)
    _check_call(module, key, attention_mask, dropout, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # As PyTorch's own attention does: rotary embedding has widened q and k, but not v.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    T, D = query.shape[2:]
    # Both steps scale by 1/√D; what a model wants beyond that goes into the queries.
    if scaling is not None and abs(scaling * D**0.5 - 1) > 1e-6:
        query = query * (scaling * D**0.5)

    def run() -> tuple[Tensor, list[Part]]:
        if attention_mask is None:
            cache = _cached(key, config)
            known = cache.compressed if cache is not None else None
            out, blocks = attend(
                query,
                key,
                value,
                config,
                keys=known,
                select=session.select,
                list_blocks=session.trace.keep_blocks,
                backend=session.backend,
            )
            parts = [(range(query.shape[0]), key.shape[2] - T, key.shape[2], blocks)]
        else:
            out, parts = _ragged(query, key, value, attention_mask, config, session)
        return out.transpose(1, 2).contiguous(), parts

    (out, parts), seconds = timed(run, query.device)
    _record(session.trace, module, key.shape[1], T, parts, seconds)
    return out, None


def _ragged(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, config: InfLLMv2Config, session: Session
) -> tuple[Tensor, list[Part]]:
    """Rows without their padding: tokens of a row stand at start … end − 1 of the keys."""
    T, S = q.shape[2], mask.shape[1]
    lengths = mask.sum(1)
    starts = torch.where(lengths > 0, mask.int().argmax(1), S)
    places = torch.arange(S, device=mask.device)
    inside = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    if not torch.equal(inside, mask):
        raise ValueError(
            "attention_mask has holes: infllm2 supports padding at the left or the right of a row"
        )
    rows: dict[tuple[int, int], list[int]] = {}
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows.setdefault((start, start + length), []).append(row)
    out = torch.zeros_like(q)
    parts = []
    cache = _cached(k, config)
    for (start, end), members in rows.items():
        first = max(start, S - T)
        if first >= end:
            continue
        at = slice(first - (S - T), end - (S - T))
        # Neighbouring rows, most often all of them, are a view; others have to be copied together.
        together = members[-1] - members[0] == len(members) - 1
        pick = slice(members[0], members[-1] + 1) if together else members
        keys = slice(start, end)
        known = None
        if cache is not None:
            whole = len(members) == k.shape[0]
            known = partial(cache.compressed, start, end, None if whole else tuple(members))
        part, blocks = attend(
            q[pick, :, at],
            k[pick, :, keys],
            v[pick, :, keys],
            config,
            keys=known,
            select=session.select,
            list_blocks=session.trace.keep_blocks,
            backend=session.backend,
        )
        out[pick, :, at] = part
        parts.append((members, first - start, end - start, blocks))
    return out, parts


def _cached(key: Tensor, config: InfLLMv2Config) -> LayerCache | None:
    """The layer's `SparseCache`, found by the tensor it returned; None if the cache is another."""
    cache: LayerCache | None = getattr(key, "infllm2_cache", None)
    if cache is None:
        return None
    cache.check_sizes(config)
    return cache


def _record(
    trace: Trace,
    module: torch.nn.Module,
    kv_heads: int,
    T: int,
    parts: list[Part],
    seconds: float,
) -> None:
    """Count the blocks and append one call."""
    visited = causal = queries = keys = 0
    layer = getattr(module, "layer_idx", 0)
    for rows, first, end, blocks in parts:
        total = causal_blocks(first, end, trace.block_size) * len(rows) * kv_heads
        causal += total
        visited += total if blocks is None else int(torch.count_nonzero(blocks >= 0))
        queries += len(rows) * (end - first)
        keys = max(keys, end)
        if blocks is not None and 0 in rows:
            trace.keep(layer, blocks[0], first)
    trace.record(Call(layer, queries, keys, seconds, visited, causal, prefill=T > 1))


@uncompiled
def dense_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own `sdpa` attention function, timed."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result, seconds = timed(
        lambda: sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs),
        query.device,
    )
    T, S = query.shape[2], key.shape[2]
    parts = [(range(query.shape[0]), S - T, S, None)]
    _record(_session(module).trace, module, key.shape[1], T, parts, seconds)
    return result


def _session(module: torch.nn.Module) -> Session:
    """The open session of the model this layer belongs to, or a passing one outside of any."""
    model_config = getattr(module, "config", None)
    session = sessions.get(id(model_config))
    if session is not None:
        return session
    config = _config_of(module)
    return Session(model_config, Trace(config.block_size), config)


def _config_of(module: torch.nn.Module) -> InfLLMv2Config:
    """Sizes from the model's `sparse_config`; the defaults without one."""
    entry = getattr(getattr(module, "config", None), "sparse_config", None)
    return InfLLMv2Config() if entry is None else InfLLMv2Config.from_pretrained_config(entry)


def _check_call(
    module: torch.nn.Module,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    """Refuse what would silently be ignored."""
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            f"infllm2 attention is causal, {type(module).__name__} is not: encoders and "
            "cross-attention are not supported"
        )
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise ValueError(
            f"the layer has a sliding window of {window} tokens and {key.shape[2]} keys: infllm2 "
            "attention does not support sliding-window layers"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"infllm2 attention does not support {name}, which the model passes")
    if dropout:
        raise ValueError(
            f"infllm2 attention has no dropout, got {dropout}: set the model's attention dropout "
            "(config.attention_dropout in most) to 0"
        )
    if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
        raise ValueError(
            f"infllm2 attention takes a padding mask [batch, length], got {mask.dtype} "
            f"{tuple(mask.shape)}: pass the 2D attention_mask, not a prepared 4D one"
        )
