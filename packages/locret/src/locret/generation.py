"""One long context, read once in bounded memory; then text, or many questions about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from locret.cache import LocretCache
from locret.config import LocretConfig
from locret.context import locret

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locret.heads import RetainingHeads
    from locret.scoring import Scorer


@torch.no_grad()
def prefill(
    model: PreTrainedModel, heads: RetainingHeads | Scorer | str, ids: Tensor, config: LocretConfig,
    attention_mask: Tensor | None = None, *, progress: Callable[[float], None] = lambda share: None,
) -> LocretCache:  # fmt: skip
    """Read `ids` `[B, T]`; what is left of them, for `generate` or for `cache.fork()`.

    progress: called after each chunk of a longer text with the share of it read.
    """
    cache = LocretCache(config)
    with locret(model, heads, config, progress=progress):
        model(input_ids=ids, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1)
    return cache


def query_first(
    query: Tensor, context: Tensor, config: LocretConfig
) -> tuple[Tensor, LocretConfig]:
    """Locret-Q: what is asked, before what is asked of, and never evicted.

    So every later token's activations know the question, and heads that were trained on such texts
    score by it. What is left is for this question alone, and it is asked again at the end:

        ids, config = query_first(question, context, config)
        generate(model, heads, torch.cat([ids, question], 1), config)

    Args:
        query: int64 `[B, q]`; context: int64 `[B, n]`.
        config: sizes; its budget holds the question too.

    Returns:
        int64 `[B, q + n]`, and a configuration whose sinks are the question.

    Raises:
        ValueError: a budget that question and stabilisers fill.
    """
    config = replace(config, sinks=max(config.sinks, query.shape[1]))
    return torch.cat([query, context], dim=1), config


@torch.no_grad()
def generate(
    model: PreTrainedModel, heads: RetainingHeads | Scorer | str, ids: Tensor, config: LocretConfig,
    *, attention_mask: Tensor | None = None, cache: LocretCache | None = None,
    progress: Callable[[float], None] = lambda share: None, **options: Any,
) -> Tensor:  # fmt: skip
    """Continue a prompt within budget + chunk entries per head, prompt and continuation together.

    Args:
        model: a transformers decoder.
        heads: trained heads, a scorer, or its name.
        ids: int64 `[B, T]`, the prompt; with `cache`, what comes after what the cache has read.
        config: sizes.
        attention_mask: `[B, T]`, 0 for padding (at the left, as transformers generates).
        cache: from `prefill`: it is copied first, so one context answers any number of questions.
        progress: as of `prefill`.
        options: of `model.generate`, such as `max_new_tokens`, `do_sample`, `streamer`.

    Returns:
        int64 `[B, new]`, the new tokens alone.
    """
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be [batch, tokens] with at least one token, got {ids.shape}")
    cache = LocretCache(config) if cache is None else cache.fork()
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    past = cache.columns
    if past:
        # generate counts what was read; whatever stands in its columns is not read again.
        ids = torch.cat([ids.new_zeros(ids.shape[0], past), ids], dim=1)
        mask = torch.cat([mask.new_ones(mask.shape[0], past), mask], dim=1)
    with locret(model, heads, cache.config, progress=progress):
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return out[:, ids.shape[1] :]
