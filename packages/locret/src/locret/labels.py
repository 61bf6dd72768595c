"""Labels: what answers really looked at, in memory that does not grow with the text. §3.2, Eq. 3.

The model runs as it is; while a layer attends, its label and its head's input are handed on, and
nothing else is kept. Scores are made for a block of answer rows at a time and reduced at once.

Two kinds: the paper's `scores`, before the softmax, and `attention`, the log of the largest weight
after it. Most heads look at a few keys and give every row much the same scores beside them, so the
largest score says little about who was looked at; and weights of different heads compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from locret.interface import Call, exchanged
from locret.retaining_head import qkv_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 128  # answer rows whose scores are in memory at once
KINDS = ("scores", "attention")
FLOOR = -30.0  # of the log of a weight: what nobody looks at is alike, and underflow is finite

# (layer, x [B, n, inputs], labels [B, J, n])
Receive = Callable[[int, Tensor, Tensor], None]


def blocked_importance(q: Tensor, k: Tensor, scaling: float, rows: int = ROWS) -> Tensor:
    """`reference.importance` with at most `rows` answer rows of scores in memory.

    Args:
        q: `[B, H, A, D]`, the answer's queries, after RoPE.
        k: `[B, J, n, D]`, the prompt's keys, after RoPE.
        scaling: 1 / √D, or what the model has for it.
        rows: answer rows at once.

    Returns:
        float32 `[B, J, n]`.
    """
    b, j = k.shape[:2]
    best = torch.full(k.shape[:3], -torch.inf, device=k.device)
    keys = k.transpose(2, 3)
    for part in q.unflatten(1, (j, -1)).split(rows, dim=3):
        scores = part.flatten(2, 3) @ keys
        best = torch.maximum(best, scores.amax(2).float() * scaling)
    return best


def blocked_attention(q: Tensor, k: Tensor, n: int, scaling: float, rows: int = ROWS) -> Tensor:
    """`reference.attention_importance` with at most `rows` answer rows of scores in memory.

    Args:
        q: `[B, H, A, D]`, the answer's queries, after RoPE: the last A positions of the text.
        k: `[B, J, T, D]`, the whole text's keys, after RoPE.
        n: of these, the first n are the prompt and get labels.
        scaling: 1 / √D, or what the model has for it.
        rows: answer rows at once.

    Returns:
        float32 `[B, J, n]`, in [`FLOOR`, 0].
    """
    b, j, t = k.shape[:3]
    best = torch.full((b, j, n), FLOOR, device=k.device)
    place, at = torch.arange(t, device=k.device), t - q.shape[2]
    keys = k.transpose(2, 3)
    for part in q.unflatten(1, (j, -1)).split(rows, dim=3):
        groups, count = part.shape[2:4]
        scores = (part.flatten(2, 3) @ keys).float().mul_(scaling).unflatten(2, (groups, count))
        later = place > place[at : at + count, None]
        scores.masked_fill_(later, -torch.inf)
        shares = scores[..., :n] - scores.logsumexp(-1, keepdim=True)
        best = torch.maximum(best, shares.amax((2, 3)))
        at += count
    return best


@torch.no_grad()
def collect(
    model: PreTrainedModel, ids: Tensor, answer: int, receive: Receive, *, input: str = "hidden",
    rows: int = ROWS, query: int = 0, labels: str = "scores",
) -> None:  # fmt: skip
    """Run texts and hand on each layer's head inputs and labels.

    Args:
        model: a transformers decoder; its weights need no gradient and get none.
        ids: int64 `[B, T]`, without padding.
        answer: tokens at the end whose queries make the labels; the T − answer before them are
            labelled, but for the first `query`.
        receive: called once for each layer, in order.
        input: "hidden" or "qkv", what heads read.
        rows: see `blocked_importance`.
        query: tokens at the start that say what is asked; they are read and not labelled.
        labels: "scores" (Eq. 3) or "attention", see above.

    Raises:
        ValueError: no prompt or no answer token, or another kind of label.
    """
    T = ids.shape[1]
    n = T - answer
    if labels not in KINDS:
        raise ValueError(f"labels must be one of {', '.join(KINDS)}, got {labels!r}")
    if answer < 1 or n <= query:
        raise ValueError(
            f"a text of {T} tokens with an answer of {answer} leaves {n - query} to label: both "
            "need at least one token"
        )

    def attend(call: Call) -> Tensor:
        q, k = call.q[:, :, n:], call.k
        if labels == "scores":
            found = blocked_importance(q, k[:, :, query:n], call.scaling, rows)
        else:
            found = blocked_attention(q, k, n, call.scaling, rows)[..., query:]
        if input == "hidden":
            x = call.hidden
        else:
            q, k = call.unrotated()
            x = qkv_input(q, k, call.v)
        receive(call.layer, x[:, query:n].float(), found)
        return scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, scale=call.scaling, enable_gqa=True
        )

    # The decoder alone: nobody asks what the next token is.
    decoder = getattr(model, model.base_model_prefix, model)
    with exchanged(model, attend):
        decoder(input_ids=ids, use_cache=False)


def overlap(scores: Tensor, labels: Tensor, share: float = 0.1) -> float:
    """Mean share of the truly best entries among those scored best; both `[..., n]`."""
    best = max(1, round(share * labels.shape[-1]))
    chosen = torch.zeros_like(labels, dtype=torch.bool).scatter_(
        -1, scores.topk(best, dim=-1).indices, True
    )
    return chosen.gather(-1, labels.topk(best, dim=-1).indices).float().mean().item()
