"""Locret for one layer in plain PyTorch: labels, eviction, and prefill in bounded memory. §3.

Letters: B batch, H query heads, J key-value heads, G = H / J, T tokens, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.config import LocretConfig


def importance(q_answer: Tensor, k_prompt: Tensor) -> Tensor:
    """The label: causal importance score of each prompt token. Eq. 3.

        S[k]_j = max over the group's query heads and the answer's positions p of q_p · k_k / √D

    before the softmax, so that a label does not depend on which other tokens are there.

    Args:
        q_answer: `[B, H, A, D]`, queries of the answer's tokens, RoPE applied.
        k_prompt: `[B, J, T, D]`, keys of the prompt, RoPE applied.

    Returns:
        `[B, J, T]`.

    Raises:
        ValueError: no answer token, or heads that do not divide.
    """
    groups = _groups(q_answer, k_prompt)
    if q_answer.shape[2] == 0:
        raise ValueError("importance needs at least one answer token, got none")
    b, j, t, d = k_prompt.shape
    q = q_answer.reshape(b, j, groups, -1, d)
    scores = torch.einsum("bjgad,bjtd->bjgat", q, k_prompt) / math.sqrt(d)
    return scores.amax(dim=(2, 3))


def attention_importance(q_answer: Tensor, k: Tensor) -> Tensor:
    """The other label: the largest attention weight that a prompt token gets, as a logarithm.

        S[k]_j = max over the group's query heads and the answer's positions p of
                 log softmax(q_p · K / √D)_k

    over all keys that p sees. Not the paper's; `experiments` compares the two.

    Args:
        q_answer: `[B, H, A, D]`, queries of the answer's tokens, the text's last, RoPE applied.
        k: `[B, J, T + A, D]`, keys of prompt and answer, RoPE applied.

    Returns:
        `[B, J, T]`, at most 0.

    Raises:
        ValueError: no answer token, or heads that do not divide.
    """
    groups = _groups(q_answer, k)
    b, j, t, d = k.shape
    answer = q_answer.shape[2]
    if answer == 0:
        raise ValueError("attention_importance needs at least one answer token, got none")
    q = q_answer.reshape(b, j, groups, answer, d)
    scores = torch.einsum("bjgad,bjtd->bjgat", q, k) / math.sqrt(d)
    later = torch.arange(t) > torch.arange(t - answer, t)[:, None]
    weights = scores.masked_fill(later, -torch.inf).log_softmax(-1)
    return weights[..., : t - answer].amax(dim=(2, 3))


def evict(scores: Tensor, positions: Tensor, config: LocretConfig, *, last: bool = False) -> Tensor:
    """Which entries stay: the `budget` best, in their old order.

    Args:
        scores: `[n]`, one head's entries, oldest first.
        positions: int64 `[n]`, where in the text each entry stands, ascending.
        config: sizes.
        last: whether no chunk follows: then the newest entries are no longer protected.

    Returns:
        int64 indices into the entries, ascending; at most `budget`. Of equal scores the older stay.

    Raises:
        ValueError: NaN scores, which would order at random.
    """
    if torch.isnan(scores).any():
        raise ValueError(f"score {int(torch.isnan(scores).nonzero()[0])} is NaN")
    if len(scores) <= config.budget:
        return torch.arange(len(scores))
    worth = scores.double().clone()
    if config.stabilisers and not last:
        worth[-config.stabilisers :] = torch.inf
    worth[positions < config.sinks] = torch.inf
    order = torch.sort(worth, descending=True, stable=True).indices
    return order[: config.budget].sort().values


@dataclass(frozen=True)
class Prefill:
    """What `chunked_prefill` leaves.

    Attributes:
        out: `[B, H, T, D']`, attention's output for every token, as the bounded cache gave it.
        kept: positions left in the cache, `[B][J]` of int64 tensors, ascending.
        peak: the most entries that any head held at once.
    """

    out: Tensor
    kept: list[list[Tensor]]
    peak: int


def chunked_prefill(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, config: LocretConfig
) -> Prefill:
    """Prefill a text chunk by chunk, evicting after each. Algorithm 1.

    A chunk's tokens attend to what earlier evictions left and, causally, to each other.

    Args:
        q: `[B, H, T, D]`; k: `[B, J, T, D]`; both with RoPE applied at the original positions.
        v: `[B, J, T, D']`, of any width.
        scores: `[B, J, T]`, the retaining head's.
        config: sizes.

    Returns:
        outputs, what is left, and the peak, which is at most budget + chunk.

    Raises:
        ValueError: shapes that do not fit together.
    """
    groups = _groups(q, k)
    b, j, t, d = k.shape
    if scores.shape != (b, j, t) or v.shape[:3] != (b, j, t) or q.shape[2] != t:
        raise ValueError(
            f"expected scores {(b, j, t)}, v {(b, j, t)} × any and {t} queries, got "
            f"{tuple(scores.shape)}, {tuple(v.shape)} and {q.shape[2]}"
        )
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    held = [[torch.empty(0, dtype=torch.int64) for _ in range(j)] for _ in range(b)]
    peak = 0
    for start in range(0, t, config.chunk):
        new = torch.arange(start, min(start + config.chunk, t))
        last = start + config.chunk >= t
        for row in range(b):
            for head in range(j):
                there = torch.cat([held[row][head], new])
                peak = max(peak, len(there))
                mine = slice(head * groups, (head + 1) * groups)
                out[row, mine, new] = _attend(
                    q[row, mine, new], k[row, head, there], v[row, head, there], new, there
                )
                stay = evict(scores[row, head, there], there, config, last=last)
                held[row][head] = there[stay]
    return Prefill(out, held, peak)


def _attend(q: Tensor, k: Tensor, v: Tensor, at: Tensor, there: Tensor) -> Tensor:
    """Softmax attention of `[G, n, D]` over `[m, D]`, each query seeing no later position."""
    weights = q @ k.T / math.sqrt(k.shape[-1])
    weights = weights.masked_fill(there[None, :] > at[:, None], -torch.inf)
    return weights.softmax(dim=-1) @ v


def _groups(q: Tensor, k: Tensor) -> int:
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key-value heads"
        )
    return q.shape[1] // k.shape[1]
