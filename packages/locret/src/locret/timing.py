"""Time and memory of reading a prompt, bounded and dense, in turn in one process."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locret.config import LocretConfig
from locret.context import locret
from locret.generation import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locret.heads import RetainingHeads
    from locret.scoring import Scorer


@dataclass(frozen=True)
class Times:
    """Medians, seconds and bytes.

    Attributes:
        tokens: of the prompt.
        peak: the most entries that a head held.
        prefill, dense_prefill: seconds.
        ratio: median of the pairs' ratios, ours / dense.
        decode, dense_decode: seconds per token after it.
        kv_bytes, dense_kv_bytes: held after prefill.
    """

    tokens: int
    peak: int
    prefill: float
    dense_prefill: float
    ratio: float
    decode: float
    dense_decode: float
    kv_bytes: int
    dense_kv_bytes: int


@torch.no_grad()
def measure(
    model: PreTrainedModel, eye: RetainingHeads | Scorer | str, tokens: int, config: LocretConfig,
    *, repeats: int = 3, new: int = 16, seed: int = 0,
) -> Times:  # fmt: skip
    """Read random tokens and decode, ours and dense in turn, after one warm-up of each.

    Raises:
        ValueError: a count below 1.
    """
    if min(tokens, repeats, new) < 1:
        raise ValueError(f"tokens, repeats and new must be ≥ 1, got {tokens}, {repeats}, {new}")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(5, vocabulary, (1, tokens), generator=generator).to(model.device)
    ours: list[tuple[float, float]] = []
    dense: list[tuple[float, float]] = []
    peak = held = full = 0
    for turn in range(repeats + 1):
        began = _now(ids)
        cache = prefill(model, eye, ids, config)
        read = _now(ids) - began
        peak, held = cache.peak, cache.kv_bytes()
        with locret(model, eye, config):
            began = _now(ids)
            for at in range(new):
                model(input_ids=ids[:, at % tokens][:, None], past_key_values=cache)
            ours.append((read, (_now(ids) - began) / new))
        began = _now(ids)
        out = model(input_ids=ids, logits_to_keep=1, use_cache=True)
        read = _now(ids) - began
        full = sum(x.keys.nbytes + x.values.nbytes for x in out.past_key_values.layers)
        began = _now(ids)
        for at in range(new):
            model(input_ids=ids[:, at % tokens][:, None], past_key_values=out.past_key_values)
        dense.append((read, (_now(ids) - began) / new))
        del out, cache
        if not turn and repeats:
            ours.clear(), dense.clear()
    median = lambda runs, i: statistics.median(r[i] for r in runs)  # noqa: E731
    return Times(
        tokens, peak, median(ours, 0), median(dense, 0),
        statistics.median(o[0] / d[0] for o, d in zip(ours, dense, strict=True)),
        median(ours, 1), median(dense, 1), held, full,
    )  # fmt: skip


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
