"""Which tokens of a block deserve to travel: a score for each token and KV head.

B: batch; Hq, Hkv: query and key heads, Hq = G * Hkv; L: tokens of the block; Q: tokens of the
query; D: head dimension. The paper trains Locret's retaining heads for this; the
compressors here need no training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from apb.plan import Layer


class Compressor(Protocol):
    """What a prefill asks of a compressor; any callable of this signature will do.

    It may also have a class attribute `needs_query`, True where it cannot score without query
    vectors; and, for models, the methods `at_layer(layer, first, end) -> Compressor`, called for
    rows first .. end - 1 of each layer, and `check(model)`, which raises ValueError for one that
    does not fit.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int
    ) -> Tensor | None:
        """Score the tokens of one host's block, higher for what should be passed.

        q [B, Hq, L, D], k and v [B, Hkv, L, D]: the block. query [B, Hq, Q, D]: the query vectors
        of the anchor's query tokens, Q may be 0. host: 0-based.
        Returns scores [B, Hkv, L] without NaN, or None to pass nothing.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoPassing:
    """Pass nothing: with a full-block anchor this is Star attention (arXiv 2411.17116)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> None:
        """Return None."""
        return None


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform random scores, the paper's ablation; equal for equal seed, host and shape.

    seed: 0 to 2**40 - 1. Give each layer its own.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        valid = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not valid or not 0 <= self.seed < 2**40:
            raise ValueError(f"seed must be a whole number from 0 to 2**40 - 1, got {self.seed!r}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> Tensor:
        """Draw scores [B, Hkv, L] in [0, 1), on the CPU so that devices agree."""
        # Shifted apart: host 1 of seed 0 must not draw what host 0 of seed 1 draws.
        generator = torch.Generator().manual_seed((self.seed << 20) + host)
        return torch.rand(k.shape[:-1], generator=generator).to(k.device)

    def at_layer(self, layer: Layer, first: int, end: int) -> Random:
        """Other numbers in every layer."""
        return replace(self, seed=(self.seed * 1009 + layer.index) % 2**40)


@dataclass(frozen=True, slots=True)
class KeyNorm:
    """The negative L2 norm of the key: small keys tend to draw the most attention.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression" (arXiv 2406.11430).
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> Tensor:
        """Return -|k|, [B, Hkv, L]."""
        return -torch.linalg.vector_norm(k, dim=-1)


@dataclass(frozen=True, slots=True)
class KeyDifference:
    """How little a key is like the others of its block: -cos(k, mean of the unit keys).

    Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments" (arXiv 2504.15364).
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> Tensor:
        """Return scores [B, Hkv, L], from -1 to 1."""
        unit = normalize(k.float(), dim=-1)
        return -(unit * normalize(unit.mean(2, keepdim=True), dim=-1)).sum(-1)


@dataclass(frozen=True, slots=True)
class QueryAttention:
    """The query's mean logit on each key, Spava's training-free score (arXiv 2601.21444).

    The mean is over the query's tokens and over the query heads that share the KV head.
    """

    needs_query: ClassVar[bool] = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> Tensor:
        """Return scores [B, Hkv, L]; ValueError without query tokens."""
        if query.shape[2] == 0:
            raise ValueError(
                "QueryAttention scores keys by the query and query_length is 0; "
                "pass query_length >= 1, or use KeyNorm or Random"
            )
        # The mean of dot products is the dot product with the mean.
        mean_BHD = query.mean(2).unflatten(1, (k.shape[1], -1)).mean(2)
        return torch.einsum("bhd,bhld->bhl", mean_BHD, k) * k.shape[-1] ** -0.5


def needs_query(compressor: Compressor) -> bool:
    """Whether the compressor has to be given query vectors."""
    return bool(getattr(compressor, "needs_query", False))


def at_layer(compressor: Compressor, layer: Layer, first: int, end: int) -> Compressor:
    """The compressor for rows first .. end - 1 of one layer on one host."""
    make = getattr(compressor, "at_layer", None)
    return compressor if make is None else make(layer, first, end)
